//! A host that is asked: the root of its API, and how it is connected to.

use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::header::{AUTHORIZATION, HeaderMap};
use reqwest::RequestBuilder;
use url::Url;

use crate::auth::Authorization;
use crate::error::Fault;
use crate::hosts::Capabilities;
use crate::reference::Reference;
use crate::tls::Trust;

/// A registry or a mirror of it.
#[derive(Debug)]
pub(crate) struct Endpoint {
    /// The host as the image or `hosts.toml` names it; logins are filed under it.
    pub(crate) name: String,
    /// Scheme, host and port.
    pub(crate) origin: Url,
    /// The API's root, ending in a slash.
    api: Url,
    /// The registry that is meant, for a host that is not this registry.
    namespace: Option<String>,
    pub(crate) capabilities: Capabilities,
    /// Sent to the origin with each request.
    headers: HeaderMap,
    /// What connects, or why nothing can.
    pools: Result<Arc<Pools>, String>,
    /// Tells endpoints apart whose tokens and addresses must not be mixed up.
    key: String,
}

/// What makes an [`Endpoint`].
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) api: Url,
    pub(crate) namespace: Option<String>,
    pub(crate) capabilities: Capabilities,
    pub(crate) headers: HeaderMap,
    pub(crate) pools: Result<Arc<Pools>, String>,
}

impl Endpoint {
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts {
            name,
            api,
            namespace,
            capabilities,
            headers,
            pools,
        } = parts;
        let mut origin = api.clone();
        origin.set_path("/");
        let key = format!("{api} {}", namespace.as_deref().unwrap_or_default());
        Self {
            name,
            origin,
            api,
            namespace,
            capabilities,
            headers,
            pools,
            key,
        }
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// Why the host cannot be asked at all.
    pub(crate) fn problem(&self) -> Option<&str> {
        self.pools.as_ref().err().map(String::as_str)
    }

    /// The repository of an image as this host knows it: below a root such as `/v2/mirror/` it has that in front.
    pub(crate) fn repository(&self, image: &Reference) -> String {
        let inside = self.api.path().strip_prefix("/v2/").unwrap_or_default();
        format!("{inside}{}", image.repository())
    }

    /// The address of something in the repository of an image.
    pub(crate) fn url(&self, image: &Reference, rest: &str) -> Result<Url, Fault> {
        let path = format!("{}/{rest}", image.repository());
        let url = self.api.join(&path).map_err(|error| Fault::Setup(error.to_string()));
        url.map(|mut url| {
            if let Some(namespace) = &self.namespace {
                url.query_pairs_mut().append_pair("ns", namespace);
            }
            url
        })
    }

    /// Adds what goes to this host and to no other.
    pub(crate) fn identify(&self, url: &Url, request: RequestBuilder, auth: Option<&Authorization>) -> RequestBuilder {
        let request = self.with_headers(url, request, auth.is_some());
        match auth.filter(|_| self.is_own(url)) {
            Some(auth) => auth.apply(request),
            None => request,
        }
    }

    /// Adds the headers that go to this host and to no other; none that would be a login in the place of one that is there.
    pub(crate) fn with_headers(&self, url: &Url, request: RequestBuilder, has_login: bool) -> RequestBuilder {
        if !self.is_own(url) {
            return request;
        }
        let mut headers = self.headers.clone();
        if has_login {
            headers.remove(AUTHORIZATION);
        }
        request.headers(headers)
    }

    /// Whether an address is at this host's origin.
    pub(crate) fn is_own(&self, url: &Url) -> bool {
        same_origin(url, &self.origin)
    }

    /// The connection pool for an address that this host is at or has named.
    pub(crate) fn http(&self, url: &Url) -> Result<reqwest::Client, Fault> {
        let pools = self.pools.as_ref().map_err(|problem| Fault::Setup(problem.clone()))?;
        let loopback = url.host_str().is_some_and(is_loopback);
        // Its token server and its store are trusted as it is, but nobody else gets to see our certificate.
        let way = match (loopback, url.scheme()) {
            (false, _) => Way::Out,
            (true, "https") => Way::LoopbackTls,
            (true, _) => Way::LoopbackPlain,
        };
        pools.client(way, self.is_own(url))
    }
}

/// Where connections go, as far as they differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// To other machines.
    Out,
    /// To this machine, with TLS.
    LoopbackTls,
    /// To this machine.
    LoopbackPlain,
}

/// Connection pools of one way to trust, each made when it is needed.
#[derive(Debug)]
pub(crate) struct Pools {
    trust: Trust,
    connect_timeout: Duration,
    /// By where they go, and whether they show a client certificate.
    made: [[OnceLock<Result<reqwest::Client, String>>; 2]; 3],
}

impl Pools {
    pub(crate) fn new(trust: Trust, connect_timeout: Duration) -> Self {
        Self {
            trust,
            connect_timeout,
            made: Default::default(),
        }
    }

    fn client(&self, way: Way, own: bool) -> Result<reqwest::Client, Fault> {
        let identified = own && self.trust.has_identities();
        let place = &self.made[way as usize][usize::from(identified)];
        let made = place.get_or_init(|| self.make(way, identified));
        made.clone().map_err(Fault::Setup)
    }

    /// Loopback needs no proxy, and without TLS none of the system's certificates, which a minimal machine lacks; with TLS it can do
    /// without them.
    fn make(&self, way: Way, identified: bool) -> Result<reqwest::Client, String> {
        let config = match (self.trust.config(way != Way::LoopbackPlain, identified), way) {
            (Err(_), Way::LoopbackTls) => self.trust.config(false, identified),
            (config, _) => config,
        };
        let config = config.map_err(|error| format!("{error}; is ca-certificates installed?"))?;
        let builder = reqwest::Client::builder()
            .user_agent(concat!("hullspeed/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .connect_timeout(self.connect_timeout)
            .tcp_nodelay(true)
            .tls_backend_preconfigured(config);
        let builder = if way == Way::Out { builder } else { builder.no_proxy() };
        builder.build().map_err(|error| chain(&error))
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

pub(crate) fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme() && a.host() == b.host() && a.port_or_known_default() == b.port_or_known_default()
}

/// Host and, if it is not the scheme's own, port.
pub(crate) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port()
        .map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// The host of `host[:port]`.
pub(crate) fn host_name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

/// Whether a host, without its port, is this machine.
pub(crate) fn is_loopback(name: &str) -> bool {
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}
