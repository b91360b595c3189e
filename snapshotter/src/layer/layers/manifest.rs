//! What is asked of manifests beside the sizes of layers: the name of a TOC that no label tells, and TOCs in images of their own.
//!
//! containerd hands on only annotations below `containerd.io/snapshot/`, and those of containers/storage's zstd:chunked are not.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use estargz::digest::Digest;
use hullspeed_registry::Reference;

use super::Shared;
use crate::layer::open::elsewhere::{TocImages, toc_image, toc_of};
use crate::layer::platform::Platform;
use crate::layer::source::registry::{host_of, reference_error};
use crate::layer::source::{BlobSource, SourceError};
use crate::layer::{LayerRequest, NotLazy};

/// How long a manifest that did not come is not asked for again: each layer of an image that is not lazy would wait for it.
const NOT_AGAIN: Duration = Duration::from_secs(60);
/// Manifests remembered for that.
const MAX_REMEMBERED: u64 = 1024;

/// Manifests that did not come, and why.
pub(super) type Missing = moka::future::Cache<Digest, Arc<SourceError>>;

/// The memory of manifests that did not come.
pub(super) fn missing() -> Missing {
    moka::future::Cache::builder()
        .max_capacity(MAX_REMEMBERED)
        .time_to_live(NOT_AGAIN)
        .build()
}

impl Shared {
    /// The identity of a layer: from its labels, or from its manifest.
    pub(super) async fn identity(&self, request: &LayerRequest) -> Result<Digest, NotLazy> {
        let unknown = NotLazy::NoTocDigest {
            layer: request.layer_digest,
        };
        if let Some(toc_digest) = request.toc_digest {
            return Ok(toc_digest);
        }
        // Without the manifest's digest nothing would tell whether a manifest is the one that was pulled.
        let Some(manifest) = &request.manifest_digest else {
            return Err(unknown);
        };
        let failed = |cause: Arc<SourceError>| NotLazy::Registry {
            image: request.image.clone(),
            layer: request.layer_digest,
            host: host_of(&cause).unwrap_or_default().to_owned(),
            cause: Box::new(cause),
        };
        if let Some(cause) = self.missing.get(manifest).await {
            return Err(failed(cause));
        }
        let layers = async {
            let image = Reference::parse(&request.image).map_err(reference_error)?;
            let client = self.registries.client()?;
            self.manifests.layers(&client, &image, manifest).await
        };
        let stopped = NotLazy::Refused {
            why: "the daemon is stopping",
        };
        let layers: Result<_, Arc<SourceError>> = self.stop.run_until_cancelled(layers).await.ok_or(stopped)?;
        if let Err(cause) = &layers {
            self.missing.insert(*manifest, cause.clone()).await;
        }
        let layers = layers.map_err(failed)?;
        let described = layers.iter().find(|layer| layer.digest == request.layer_digest);
        described.and_then(|layer| layer.toc_digest).ok_or(unknown)
    }
}

#[async_trait]
impl TocImages for Shared {
    async fn find(&self, image: &str, layer: &Digest) -> Result<Vec<Arc<dyn BlobSource>>, SourceError> {
        let image = Reference::parse(image).map_err(reference_error)?;
        let toc_image = toc_image(&image)?;
        let name = toc_image.to_string();
        let resolve = async {
            let client = self.registries.client()?;
            let found = self.manifests.resolve(&client, &toc_image, &Platform::own()).await;
            found.map(|(_, layers)| layers)
        };
        let layers = self.toc_images.try_get_with(name.clone(), resolve).await;
        let layers = layers.map_err(|error: Arc<Arc<SourceError>>| missing_image(&toc_image, Arc::clone(&error)))?;
        let toc = match toc_of(&layers, layer, &toc_image) {
            Ok(toc) => toc,
            Err(error) => {
                // The tag may point to another manifest when it is looked at again.
                self.toc_images.invalidate(&name).await;
                return Err(error);
            }
        };
        Ok(self.sources(&name, &toc.digest, Some(toc.size)))
    }
}

/// Names the image whose manifest did not come.
fn missing_image(image: &Reference, error: Arc<SourceError>) -> SourceError {
    let what = format!("the manifest of {image} did not come");
    let cause: Option<crate::layer::source::BoxError> = Some(Box::new(Arc::clone(&error)));
    let class = error.class();
    match &*error {
        SourceError::Transient { load, .. } => SourceError::Transient {
            what,
            load: *load,
            cause,
        },
        SourceError::Permanent { .. } => SourceError::Permanent { what, class, cause },
    }
}
