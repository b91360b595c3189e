//! Manifests and indices: pulling and pushing them whole.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use http::{HeaderMap, Method};

use crate::auth::Scope;
use crate::body;
use crate::client::Client;
use crate::digest::Digest;
use crate::endpoint::Endpoint;
use crate::error::{Error, Fault};
use crate::exchange::{Ask, Payload};
use crate::limits::MAX_MANIFEST_BYTES;
use crate::reference::{Reference, Version};
use crate::turns::Need;

/// The manifest types that this project reads.
pub const MANIFEST_ACCEPT: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

const DIGEST_HEADER: &str = "docker-content-digest";

/// A manifest or index as the registry stores it.
#[derive(Debug, Clone)]
pub struct Manifest {
    /// The exact bytes; their digest has been checked.
    pub bytes: Bytes,
    /// `Content-Type` of the answer, else the document's own `mediaType`.
    pub media_type: String,
    /// Digest of the bytes.
    pub digest: Digest,
}

impl Client {
    /// Pulls the manifest that `version` names in `image`'s repository, from the first of its hosts that has it.
    pub async fn manifest(&self, image: &Reference, version: &Version, accept: &[&str]) -> Result<Manifest, Error> {
        let asked = format!("pull of manifest {version} of {}", image.repository());
        let need = match version {
            Version::Digest(_) => Need::Pull,
            Version::Tag(_) => Need::Resolve,
        };
        let mut turns = self.turns(image, need, &asked)?;
        loop {
            let mut ask = manifest_ask(Method::GET, turns.host(), image, version, Scope::pull, asked.clone())?;
            for kind in accept {
                let value = HeaderValue::from_str(kind).map_err(|_| bad_type(kind).at(image.host(), &asked))?;
                ask.headers.append(ACCEPT, value);
            }
            match self.manifest_at(turns.host(), &ask, version, turns.attempts()).await {
                Ok(manifest) => {
                    turns.succeeded();
                    return Ok(manifest);
                }
                Err(error) => turns.failed(error)?,
            }
        }
    }

    async fn manifest_at(
        &self,
        endpoint: &Endpoint,
        ask: &Ask,
        version: &Version,
        attempts: u32,
    ) -> Result<Manifest, Error> {
        let mut attempt = 0;
        loop {
            let answer = self.send(endpoint, ask, attempts).await?;
            let headers = answer.response.headers().clone();
            let fault = match body::collect(answer.response, MAX_MANIFEST_BYTES, self.idle()).await {
                Ok(bytes) => match checked(bytes, &headers, version) {
                    Ok(manifest) => return Ok(manifest),
                    Err(fault) => fault,
                },
                Err(fault) => fault,
            };
            self.pause(&mut attempt, attempts, fault)
                .await
                .map_err(|fault| fault.at(&endpoint.name, &ask.asked))?;
        }
    }

    /// Pushes a manifest under a tag or its digest. Everything it refers to must be in the repository.
    pub async fn put_manifest(
        &self,
        image: &Reference,
        version: &Version,
        bytes: Bytes,
        media_type: &str,
    ) -> Result<Digest, Error> {
        let endpoint = self.endpoint(image)?;
        let asked = format!("push of manifest {version} of {}", image.repository());
        let mut ask = manifest_ask(Method::PUT, &endpoint, image, version, Scope::push, asked)?;
        let value =
            HeaderValue::from_str(media_type).map_err(|_| bad_type(media_type).at(&endpoint.name, &ask.asked))?;
        ask.headers.insert(CONTENT_TYPE, value);
        let digest = Digest::of(&bytes);
        ask.payload = Payload::Bytes(bytes);
        let answer = self.send(&endpoint, &ask, self.retry().attempts).await?;
        if let Some(actual) = digest_header(answer.response.headers()).filter(|actual| *actual != digest) {
            return Err(Fault::Digest {
                expected: digest,
                actual,
            }
            .at(&endpoint.name, &ask.asked));
        }
        Ok(digest)
    }
}

fn manifest_ask(
    method: Method,
    endpoint: &Endpoint,
    image: &Reference,
    version: &Version,
    scope: fn(&str) -> Scope,
    asked: String,
) -> Result<Ask, Error> {
    match endpoint.url(image, &format!("manifests/{version}")) {
        Ok(url) => Ok(Ask::new(method, url, scope(&endpoint.repository(image)), asked)),
        Err(fault) => Err(fault.at(&endpoint.name, asked)),
    }
}

fn checked(bytes: Bytes, headers: &HeaderMap, version: &Version) -> Result<Manifest, Fault> {
    let expected = match version {
        Version::Digest(digest) => Some(digest.clone()),
        // A tag binds to nothing; the header at least tells damage on the way.
        Version::Tag(_) => digest_header(headers),
    };
    let digest = match expected {
        Some(expected) => {
            let mut hasher = expected.hasher();
            hasher.update(&bytes);
            let actual = hasher.finish();
            if actual != expected {
                return Err(Fault::Digest { expected, actual });
            }
            actual
        }
        None => Digest::of(&bytes),
    };
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let content_type = content_type.map(|kind| kind.split(';').next().unwrap_or(kind).trim().to_owned());
    let media_type = match content_type {
        Some(kind) if kind.contains("manifest") || kind.contains("index") => kind,
        other => own_media_type(&bytes).or(other).unwrap_or_default(),
    };
    Ok(Manifest {
        bytes,
        media_type,
        digest,
    })
}

fn own_media_type(bytes: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Typed {
        #[serde(rename = "mediaType")]
        media_type: String,
    }
    serde_json::from_slice::<Typed>(bytes)
        .ok()
        .map(|typed| typed.media_type)
}

fn digest_header(headers: &HeaderMap) -> Option<Digest> {
    headers.get(DIGEST_HEADER)?.to_str().ok()?.parse().ok()
}

fn bad_type(kind: &str) -> Fault {
    Fault::Setup(format!("{kind:?} is not a media type"))
}
