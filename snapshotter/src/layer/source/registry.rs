//! A registry as a [`BlobSource`].

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use estargz::digest::Digest;
use futures_util::TryStreamExt;
use hullspeed_registry::{
    Client, ClientOptions, Error, ErrorClass, Fault, HostHandle, InUse, Place, RangeResponse, RangeSpec, Reference,
    ReferenceError,
};

use super::{BlobSource, ByteStream, Overload, Priority, SourceError, Tail};
use crate::metrics::Metrics;

/// The way to registries, set up when it is first needed: a daemon whose layers are all resident needs none.
#[derive(Debug)]
pub struct Registries {
    options: ClientOptions,
    client: Mutex<Option<Client>>,
    metrics: Metrics,
}

impl Registries {
    /// Registries reached as `options` say.
    pub fn new(options: ClientOptions, metrics: Metrics) -> Self {
        Self {
            options,
            client: Mutex::new(None),
            metrics,
        }
    }

    /// One source per host that may serve the blob `digest` of `image`, in the order in which they are to be asked; never empty, the
    /// registry itself last. `size` where a manifest told it. They keep the logins for the repository as long as they live.
    pub fn sources(self: &Arc<Self>, image: &str, digest: &Digest, size: Option<u64>) -> Vec<Arc<dyn BlobSource>> {
        let any = RegistryBlob {
            _in_use: self.in_use(image).map(Arc::new),
            ..RegistryBlob::new(self.clone(), image, digest, size)
        };
        // What is wrong with the image's name or with the set-up is an error of each read, as it is without mirrors.
        let hosts = match (&any.image, self.client()) {
            (Ok(image), Ok(client)) => client.hosts(image).unwrap_or_default(),
            _ => Vec::new(),
        };
        if hosts.is_empty() {
            return vec![Arc::new(any)];
        }
        let of = |host| -> Arc<dyn BlobSource> {
            Arc::new(RegistryBlob {
                host: Some(host),
                ignores_ranges: Arc::default(),
                ..any.clone()
            })
        };
        hosts.into_iter().map(of).collect()
    }

    /// A number that is another one whenever [`Self::sources`] of some image may have become others. Looks at files; blocks.
    pub fn version(&self) -> u64 {
        let client = self.client.lock().unwrap_or_else(PoisonError::into_inner).clone();
        client.map_or(0, |client| client.hosts_version())
    }

    fn in_use(&self, image: &str) -> Option<InUse> {
        let place = Place::of(&Reference::parse(image).ok()?);
        self.options.credentials.in_use(place)
    }

    /// The client that all layers share.
    pub fn client(&self) -> Result<Client, SourceError> {
        // What the lock guards is whole or absent.
        let mut client = self.client.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let new = Client::new(self.options.clone()).map_err(source_error)?;
        Ok(client.insert(new).clone())
    }
}

/// A blob in a registry's repository.
#[derive(Debug, Clone)]
pub struct RegistryBlob {
    registries: Arc<Registries>,
    image: Result<Reference, ReferenceError>,
    digest: hullspeed_registry::Digest,
    size: Option<u64>,
    /// The host that is asked; without one, all hosts of the image in turn.
    host: Option<HostHandle>,
    /// Keeps the logins for the repository.
    _in_use: Option<Arc<InUse>>,
    /// Whether the host was seen to ignore ranges.
    ignores_ranges: Arc<AtomicBool>,
}

/// The registry client's form of a digest.
pub(crate) fn registry_digest(digest: &Digest) -> hullspeed_registry::Digest {
    hullspeed_registry::Digest::sha256(digest.as_bytes())
}

/// Tells failures that may pass from those that stay.
pub(crate) fn source_error(error: Error) -> SourceError {
    let what = error.to_string();
    let class = match error.class() {
        ErrorClass::Transient => {
            return SourceError::Transient {
                what,
                load: overload(error.fault()),
                cause: Some(Box::new(error)),
            };
        }
        ErrorClass::Auth => "auth",
        ErrorClass::NotFound => "not_found",
        ErrorClass::Protocol => "protocol",
        ErrorClass::Local => "local",
    };
    SourceError::Permanent {
        what,
        class,
        cause: Some(Box::new(error)),
    }
}

/// The host that failed, as far as the registry client tells.
pub(crate) fn host_of(error: &SourceError) -> Option<&str> {
    std::iter::successors(Some(error as &(dyn std::error::Error + 'static)), |error| {
        error.source()
    })
    .find_map(|error| error.downcast_ref::<Error>())
    .map(Error::host)
}

/// What a host that answers, and has too much to do, says of it.
fn overload(fault: &Fault) -> Option<Overload> {
    match fault {
        Fault::RateLimited { retry_after, .. } | Fault::Server { retry_after, .. } => Some(Overload {
            retry_after: *retry_after,
        }),
        _ => None,
    }
}

/// Image references come from labels, so one that is none is an error of each read and not of the mount.
pub(crate) fn reference_error(error: ReferenceError) -> SourceError {
    SourceError::Permanent {
        what: error.to_string(),
        class: "reference",
        cause: None,
    }
}

impl RegistryBlob {
    /// The blob `digest` in the repository of `image`; `size` where a manifest told it.
    pub fn new(registries: Arc<Registries>, image: &str, digest: &Digest, size: Option<u64>) -> Self {
        Self {
            registries,
            image: Reference::parse(image),
            digest: registry_digest(digest),
            size,
            host: None,
            _in_use: None,
            ignores_ranges: Arc::default(),
        }
    }

    async fn ask(&self, range: RangeSpec) -> Result<RangeResponse, SourceError> {
        let image = self.image.as_ref().map_err(|error| reference_error(error.clone()))?;
        let answer = match &self.host {
            Some(host) => host.blob_range(&self.digest, range).await,
            None => self.registries.client()?.blob_range(image, &self.digest, range).await,
        };
        let response = answer.map_err(source_error)?;
        if response.ranges_ignored && !self.ignores_ranges.swap(true, Ordering::Relaxed) {
            self.registries.metrics.fetch_ranges_ignored.inc();
            tracing::warn!(
                %image,
                layer = %self.digest,
                host = self.host(),
                "the server ignores ranges; the whole layer is read from it in few requests"
            );
        }
        Ok(response)
    }
}

fn body(response: RangeResponse) -> ByteStream {
    Box::pin(response.into_stream().map_err(source_error))
}

#[async_trait]
impl BlobSource for RegistryBlob {
    fn host(&self) -> &str {
        let registry = || self.image.as_ref().map_or("", Reference::host);
        self.host.as_ref().map_or_else(registry, HostHandle::host)
    }

    fn identity(&self) -> &str {
        self.host.as_ref().map_or_else(|| self.host(), HostHandle::key)
    }

    fn distrust(&self) {
        if let Some(host) = &self.host {
            host.forget_address(&self.digest);
        }
    }

    fn size(&self) -> Option<u64> {
        self.size
    }

    fn ignores_ranges(&self) -> bool {
        self.ignores_ranges.load(Ordering::Relaxed)
    }

    async fn read(&self, range: Range<u64>, _priority: Priority) -> Result<ByteStream, SourceError> {
        Ok(body(self.ask(RangeSpec::From(range)).await?))
    }

    async fn read_tail(&self, length: u64) -> Result<Tail, SourceError> {
        let response = self.ask(RangeSpec::Suffix(length)).await?;
        // The client has checked that what it calls the end is the blob's end.
        let (start, blob_size) = (response.start, response.end);
        Ok(Tail {
            start,
            blob_size,
            body: body(response),
        })
    }
}
