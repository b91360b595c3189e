//! Blobs behind redirects: the registry sends clients on, over several hops, to addresses at another host that work for
//! a while and without credentials.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::response::{IntoResponse as _, Response};
use http::{HeaderMap, HeaderValue, Method, StatusCode, Uri, header};
use sha2::{Digest as _, Sha256};

/// First part of the path while there are hops to go; the number of them follows.
const HOP: &str = "/hop/";

/// Signs addresses at the registry, and checks them at the store.
pub struct Signer {
    began: Instant,
    lifetime: Duration,
    /// Part of what is signed; a new one makes all addresses worthless.
    generation: AtomicU64,
}

impl Signer {
    /// One whose addresses work for `lifetime`.
    #[must_use]
    pub fn new(lifetime: Duration) -> Arc<Self> {
        Arc::new(Self {
            began: Instant::now(),
            lifetime,
            generation: AtomicU64::new(0),
        })
    }

    /// No address that was given out works any more.
    pub fn expire_all(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
    }

    fn now(&self) -> u128 {
        self.began.elapsed().as_millis()
    }

    fn signature(&self, path: &str, expires: u128) -> String {
        let generation = self.generation.load(Ordering::Relaxed);
        let text = format!("{:p} {generation} {path} {expires}", self);
        hex::encode(&Sha256::digest(text)[..16])
    }

    fn query(&self, path: &str) -> String {
        let expires = self.now() + self.lifetime.as_millis();
        format!("expires={expires}&signature={}", self.signature(path, expires))
    }

    fn accepts(&self, path: &str, query: &str) -> bool {
        let field = |name: &str| {
            query
                .split('&')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
        };
        let Some(expires) = field("expires").and_then(|text| text.parse().ok()) else {
            return false;
        };
        self.now() < expires && field("signature") == Some(&self.signature(path, expires))
    }
}

/// Where a registry sends those who ask for a blob.
#[derive(Clone)]
pub struct Redirects {
    /// The store: another proxy, which checks signatures.
    pub to: SocketAddr,
    /// Redirects until the blob's address is reached; at least 1.
    pub hops: u32,
    /// Signs the addresses.
    pub signer: Arc<Signer>,
}

impl Redirects {
    /// The answer to a request for a blob; `None` for all else.
    pub(super) fn answer(&self, method: &Method, path: &str) -> Option<Response> {
        let read = matches!(*method, Method::GET | Method::HEAD);
        (read && path.contains("/blobs/")).then(|| {
            let query = self.signer.query(path);
            redirect(self.to, self.hops.max(1) - 1, path, &query)
        })
    }
}

fn redirect(to: SocketAddr, hops: u32, path: &str, query: &str) -> Response {
    let path = if hops == 0 {
        path.into()
    } else {
        format!("{HOP}{hops}{path}")
    };
    let mut response = StatusCode::TEMPORARY_REDIRECT.into_response();
    if let Ok(value) = HeaderValue::from_str(&format!("http://{to}{path}?{query}")) {
        response.headers_mut().insert(header::LOCATION, value);
    }
    response
}

/// The store's answer unless it is the blob: the next hop, or why not.
pub(super) fn refuse(signer: &Signer, uri: &Uri, headers: &HeaderMap, own: SocketAddr) -> Option<Response> {
    let refused = |status: StatusCode, why: &'static str| Some((status, why).into_response());
    if headers.contains_key(header::AUTHORIZATION) {
        // As object stores answer; and the log tells that a login went to another host.
        return refused(StatusCode::BAD_REQUEST, "two ways of authorization\n");
    }
    let hop = uri.path().strip_prefix(HOP).and_then(|rest| {
        let (hops, _) = rest.split_once('/')?;
        Some((hops.parse::<u32>().ok()?, &rest[hops.len()..]))
    });
    let path = hop.map_or(uri.path(), |(_, path)| path);
    let query = uri.query().unwrap_or_default();
    if !signer.accepts(path, query) {
        return refused(StatusCode::FORBIDDEN, "the address has expired\n");
    }
    hop.map(|(hops, path)| redirect(own, hops.saturating_sub(1), path, query))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn location(response: &Response) -> Uri {
        response.headers()[header::LOCATION].to_str().unwrap().parse().unwrap()
    }

    #[test]
    fn hops_lead_to_the_blob_until_the_address_expires() {
        let own = SocketAddr::from(([127, 0, 0, 1], 99));
        let signer = Signer::new(Duration::from_secs(60));
        let redirects = Redirects {
            to: own,
            hops: 3,
            signer: signer.clone(),
        };
        assert!(redirects.answer(&Method::GET, "/v2/a/manifests/x").is_none());
        let mut uri = location(&redirects.answer(&Method::GET, "/v2/a/blobs/x").unwrap());
        let none = HeaderMap::new();
        for left in [2, 1] {
            assert_eq!(uri.path(), format!("/hop/{left}/v2/a/blobs/x"));
            uri = location(&refuse(&signer, &uri, &none, own).unwrap());
        }
        assert_eq!(uri.path(), "/v2/a/blobs/x");
        assert!(refuse(&signer, &uri, &none, own).is_none());
        let login = HeaderMap::from_iter([(header::AUTHORIZATION, HeaderValue::from_static("Bearer x"))]);
        let status = |uri: &Uri, headers: &HeaderMap| refuse(&signer, uri, headers, own).unwrap().status();
        assert_eq!(status(&uri, &login), 400);
        assert_eq!(status(&"/v2/a/blobs/x".parse().unwrap(), &none), 403);
        let other = uri.to_string().replace("/x?", "/y?").parse().unwrap();
        assert_eq!(status(&other, &none), 403);
        signer.expire_all();
        assert_eq!(status(&uri, &none), 403);
    }
}
