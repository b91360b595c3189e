//! Layers that are not in the cache yet: their TOCs, fetched for the whole image at once.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use estargz::digest::Digest;
use futures_util::{StreamExt, stream};
use hullspeed_registry::Reference;

use super::{MAX_OPENING, Shared, Slot, Used};
use crate::layer::cache::Origin;
use crate::layer::image::LayerDescriptor;
use crate::layer::open::{self, Expected};
use crate::layer::report::Failure;
use crate::layer::source::SourceError;
use crate::layer::source::registry::{host_of, reference_error};
use crate::layer::{LayerRequest, NotLazy, fetch};

/// How long an image's layers are not opened ahead again; each `Prepare` of the image asks for it.
const NOT_AGAIN: Duration = Duration::from_secs(60);
/// Images remembered for that.
const MAX_REMEMBERED: u64 = 1024;
/// Layers of which it is remembered what went wrong when they were opened.
const MAX_FAILURES: usize = 256;

/// What went wrong when layers were opened, though they were in the end: the last failure of each, the newest layers.
#[derive(Default)]
pub(super) struct OpeningFailures(Mutex<VecDeque<(Digest, Failure)>>);

impl OpeningFailures {
    fn note(&self, toc_digest: Digest, failure: Failure) {
        // Every change is one removal or push.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(layer, _)| *layer != toc_digest);
        if kept.len() == MAX_FAILURES {
            kept.pop_front();
        }
        kept.push_back((toc_digest, failure));
    }

    /// What went wrong when the layer was opened.
    pub(super) fn of(&self, toc_digest: &Digest) -> Option<Failure> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of_layer = kept.iter().find(|(layer, _)| layer == toc_digest);
        of_layer.map(|(_, failure)| failure.clone())
    }
}

/// The memory of images whose layers were opened ahead.
pub(super) fn recently_opened() -> moka::future::Cache<Digest, ()> {
    moka::future::Cache::builder()
        .max_capacity(MAX_REMEMBERED)
        .time_to_live(NOT_AGAIN)
        .build()
}

/// What is to be opened.
#[derive(Clone, Copy)]
struct Wanted<'a> {
    image: &'a str,
    expected: Expected,
    size: Option<u64>,
}

impl Shared {
    /// Brings the requested layer into the cache, and behind it the image's other layers.
    pub(super) async fn open_for(
        self: &Arc<Self>,
        slot: &Slot,
        toc_digest: Digest,
        request: &LayerRequest,
    ) -> Result<(), NotLazy> {
        let layers = self.describe(request).await;
        let described = layers.iter().find(|layer| layer.digest == request.layer_digest);
        if let Some(manifest) = &request.manifest_digest {
            self.open_ahead(manifest, layers.clone(), request).await;
        }
        let expected = Expected {
            layer: request.layer_digest,
            toc: toc_digest,
            position: described.and_then(|layer| layer.position),
            toc_offset: described.and_then(|layer| layer.toc_offset),
        };
        let wanted = Wanted {
            image: &request.image,
            expected,
            size: described.map(|layer| layer.size),
        };
        self.open(slot, wanted).await
    }

    /// The image's layers by its manifest; none where it is not known or does not come, which costs parallelism only.
    async fn describe(&self, request: &LayerRequest) -> Arc<[LayerDescriptor]> {
        let Some(digest) = &request.manifest_digest else {
            return Arc::default();
        };
        let layers = async {
            let image = Reference::parse(&request.image).map_err(reference_error)?;
            let client = self.registries.client()?;
            self.manifests.layers(&client, &image, digest).await
        };
        let layers = self
            .stop
            .run_until_cancelled(layers)
            .await
            .unwrap_or(Ok(Arc::default()));
        layers.unwrap_or_else(|error: Arc<SourceError>| {
            let host = host_of(&error);
            tracing::warn!(image = request.image, manifest = %digest, host, error = &*error as &dyn std::error::Error, "cannot read the image's manifest; its layers are opened one by one");
            Arc::default()
        })
    }

    /// Opens the image's other layers in the background, once per image.
    async fn open_ahead(self: &Arc<Self>, manifest: &Digest, layers: Arc<[LayerDescriptor]>, request: &LayerRequest) {
        if layers.is_empty() || !self.opened_ahead.entry(*manifest).or_insert(()).await.is_fresh() {
            return;
        }
        let (shared, image, own) = (self.clone(), request.image.clone(), request.layer_digest);
        let ahead = async move {
            let others: Vec<LayerDescriptor> = layers.iter().filter(|layer| layer.digest != own).copied().collect();
            let open = |layer| shared.clone().open_other(image.clone(), layer);
            stream::iter(others).for_each_concurrent(MAX_OPENING, open).await;
        };
        let stop = self.stop.clone();
        let ahead = async move { stop.run_until_cancelled(ahead).await };
        self.tasks.spawn_on(ahead, &self.runtime);
    }

    async fn open_other(self: Arc<Self>, image: String, layer: LayerDescriptor) {
        if let Err(error) = self.open_described(&image, &layer).await {
            // Its own Prepare reports it.
            tracing::debug!(layer = %layer.digest, error = &error as &dyn std::error::Error, "cannot open a layer ahead");
        }
    }

    /// Brings a layer of a manifest into the cache if it is not there. May be dropped.
    pub(super) async fn open_described(self: &Arc<Self>, image: &str, layer: &LayerDescriptor) -> Result<(), NotLazy> {
        let Some(toc) = layer.toc_digest else {
            return Err(NotLazy::NoTocDigest { layer: layer.digest });
        };
        let used = Used::new(self, toc);
        let expected = Expected {
            layer: layer.digest,
            toc,
            position: layer.position,
            toc_offset: layer.toc_offset,
        };
        let wanted = Wanted {
            image,
            expected,
            size: Some(layer.size),
        };
        self.open(&used.slot, wanted).await
    }

    /// Brings one layer into the cache if it is not there.
    async fn open(self: &Arc<Self>, slot: &Slot, wanted: Wanted<'_>) -> Result<(), NotLazy> {
        let Expected { layer, toc, .. } = wanted.expected;
        let _turn = slot.opening.lock().await;
        if self.store.contains(&toc) {
            return Ok(());
        }
        let Ok(_memory) = self.opening.acquire().await else {
            return Err(NotLazy::Refused {
                why: "the daemon is stopping",
            });
        };
        let sources = self.sources(wanted.image, &layer, wanted.size);
        let opening = open::open(&self.engine, sources, wanted.image, wanted.expected, self.as_ref());
        let stopped = NotLazy::Refused {
            why: "the daemon is stopping",
        };
        let mut opened = self.stop.run_until_cancelled(opening).await.unwrap_or(Err(stopped))?;
        if let Some(failure) = opened.failure.take() {
            self.opening_failures.note(toc, failure);
        }
        let origin = Origin {
            image: wanted.image.to_owned(),
            layer_digest: layer,
            blob_size: opened.blob_size,
            toc_offset: opened.toc_offset,
            compression: opened.compression,
        };
        let create = move |shared: &Self| {
            let cached = shared.store.create(&toc, &opened.toc, &origin)?;
            let (start, bytes) = opened.leftover;
            fetch::ingest(&cached, &shared.metrics, start, &bytes);
            if let Err(error) = cached.checkpoint() {
                tracing::warn!(dir = %cached.dir().display(), %error, "what came with the TOC is fetched again");
            }
            Ok(())
        };
        self.with_store(layer, toc, create).await
    }
}
