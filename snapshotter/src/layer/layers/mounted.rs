//! One mounted layer, from its directory in the cache to its mount and back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use estargz::digest::Digest;
use estargz::index::Chunk;
use prometheus_client::metrics::gauge::Gauge;

use super::{Shared, Slot, cache_error};
use crate::layer::cache::{CacheError, CachedLayer};
use crate::layer::fault;
use crate::layer::fetch::{LayerFetch, LayerNames};
use crate::layer::mounts::ways::Up;
use crate::layer::mounts::{Ended, Kind, LayerMounted};
use crate::layer::source::BlobSource;
use crate::layer::{LayerMount, LayerOrigin, LayerRequest, NotLazy};
use crate::metrics::defs::MountLabels;

/// A layer's mount and what serves it.
pub(super) struct Mounted {
    mount: Box<dyn LayerMounted>,
    /// What was mounted before, for those who use it still.
    former: Vec<Box<dyn LayerMounted>>,
    fetch: Arc<LayerFetch>,
}

impl Mounted {
    /// How it is mounted.
    pub(super) fn kind(&self) -> &'static str {
        self.mount.kind().name()
    }

    /// Takes what was mounted before and is used by nobody any more.
    pub(super) fn ended_former(&mut self) -> Vec<Box<dyn LayerMounted>> {
        self.former.extract_if(.., |former| !former.is_alive()).collect()
    }

    /// How those have it mounted who came before that.
    pub(super) fn former_kind(&self) -> Option<&'static str> {
        self.former.last().map(|former| former.kind().name())
    }
}

impl Slot {
    /// Makes the kernel forget a chunk that it may have read, if the layer is mounted. Blocks.
    pub(super) fn forget_pages(&self, chunk: &Chunk) -> io::Result<()> {
        // The lock is not held while the kernel waits for reads under way.
        let forget: Vec<_> = {
            let mounted = self.mounted.blocking_lock();
            let mounts = mounted
                .iter()
                .flat_map(|mounted| mounted.former.iter().chain([&mounted.mount]));
            mounts.map(|mount| mount.forget()).collect()
        };
        // All of them, and then the first that could not.
        let told: Vec<_> = forget.into_iter().map(|forget| forget(chunk)).collect();
        told.into_iter().collect()
    }
}

impl Shared {
    /// Mounts a layer, fetching its TOC first if it is not here.
    pub(super) async fn mount(
        self: &Arc<Self>,
        slot: &Slot,
        toc_digest: Digest,
        request: &LayerRequest,
    ) -> Result<LayerMount, NotLazy> {
        let names = LayerNames {
            image: request.image.clone(),
            layer_digest: request.layer_digest,
        };
        let mut mounted = slot.mounted.lock().await;
        if let (Some(mount), Some(mounted)) = (self.mount_of(mounted.as_ref()), mounted.as_ref()) {
            self.renew_source(&mounted.fetch, names);
            return Ok(mount);
        }
        self.discard_dead(slot, &mut mounted).await;
        let fetch = if let Some(fetch) = slot.live() {
            self.renew_source(&fetch, names);
            fetch
        } else {
            let found = {
                // What came with its TOC is being stored; nobody is to fetch that again.
                let _turn = slot.opening.lock().await;
                self.load_sound(toc_digest, request.layer_digest).await?
            };
            let layer = match found {
                Some(layer) => layer,
                None => self.open_and_load(slot, toc_digest, request).await?,
            };
            self.fetch_of(layer, names).await
        };
        self.serve(slot, &mut mounted, fetch, self.config.fetch.prefetch).await
    }

    async fn open_and_load(
        self: &Arc<Self>,
        slot: &Slot,
        toc_digest: Digest,
        request: &LayerRequest,
    ) -> Result<CachedLayer, NotLazy> {
        self.open_for(slot, toc_digest, request).await?;
        let path = self.store.path(&toc_digest);
        self.load(toc_digest, request.layer_digest)
            .await?
            .ok_or(NotLazy::NotCached { toc: toc_digest, path })
    }

    /// Mounts a layer from what is on disk.
    pub(super) async fn restore(self: &Arc<Self>, slot: &Slot, origin: &LayerOrigin) -> Result<LayerMount, NotLazy> {
        let mut mounted = slot.mounted.lock().await;
        self.restore_held(slot, &mut mounted, origin).await
    }

    /// Like [`Self::restore`], for who has the slot.
    pub(super) async fn restore_held(
        self: &Arc<Self>,
        slot: &Slot,
        mounted: &mut Option<Mounted>,
        origin: &LayerOrigin,
    ) -> Result<LayerMount, NotLazy> {
        if let (Some(mount), Some(mounted)) = (self.mount_of(mounted.as_ref()), mounted.as_ref()) {
            self.offer_source(&mounted.fetch, &origin.image, origin.layer_digest);
            return Ok(mount);
        }
        self.discard_dead(slot, mounted).await;
        let fetch = if let Some(fetch) = slot.live() {
            self.offer_source(&fetch, &origin.image, origin.layer_digest);
            fetch
        } else {
            let path = self.store.path(&origin.toc_digest);
            let layer = self.load(origin.toc_digest, origin.layer_digest).await?;
            let layer = layer.ok_or(NotLazy::NotCached {
                toc: origin.toc_digest,
                path,
            })?;
            let names = LayerNames {
                image: origin.image.clone(),
                layer_digest: origin.layer_digest,
            };
            self.fetch_of(layer, names).await
        };
        self.serve(slot, mounted, fetch, false).await
    }

    /// Opens a layer that is on disk for a warm, or joins those who have it open; [`Self::let_go`] must follow.
    pub(super) async fn hold(
        self: &Arc<Self>,
        slot: &Slot,
        toc_digest: Digest,
        names: LayerNames,
    ) -> Result<Arc<LayerFetch>, NotLazy> {
        let _mounted = slot.mounted.lock().await;
        let fetch = if let Some(fetch) = slot.live() {
            self.offer_source(&fetch, &names.image, names.layer_digest);
            fetch
        } else {
            let path = self.store.path(&toc_digest);
            let layer = self.load_sound(toc_digest, names.layer_digest).await?;
            let layer = layer.ok_or(NotLazy::NotCached { toc: toc_digest, path })?;
            let fetch = self.fetch_of(layer, names).await;
            slot.set_live(Some(fetch.clone()));
            fetch
        };
        slot.warms.fetch_add(1, Ordering::Relaxed);
        Ok(fetch)
    }

    /// Ends what [`Self::hold`] began.
    pub(super) async fn let_go(&self, slot: &Slot, fetch: Arc<LayerFetch>) {
        let mounted = slot.mounted.lock().await;
        slot.warms.fetch_sub(1, Ordering::Relaxed);
        close_unused(slot, &fetch, mounted.is_some()).await;
    }

    fn mount_of(&self, mounted: Option<&Mounted>) -> Option<LayerMount> {
        let mounted = mounted.filter(|mounted| mounted.mount.is_alive())?;
        let layer = mounted.fetch.layer();
        Some(LayerMount {
            toc_digest: layer.toc_digest(),
            path: layer.mount_point(),
        })
    }

    /// The image that was pulled last is the one whose registry and credentials most likely work; the others stay behind it.
    fn renew_source(&self, fetch: &LayerFetch, names: LayerNames) {
        let size = fetch.layer().index().blob_size();
        fetch.prefer_sources(self.sources(&names.image, &names.layer_digest, Some(size)), names);
    }

    /// Another image of the layer, to be asked where the others fail.
    fn offer_source(&self, fetch: &LayerFetch, image: &str, layer_digest: Digest) {
        let size = fetch.layer().index().blob_size();
        let names = LayerNames {
            image: image.to_owned(),
            layer_digest,
        };
        fetch.offer_sources(self.sources(image, &layer_digest, Some(size)), names);
    }

    pub(super) fn sources(&self, image: &str, layer_digest: &Digest, size: Option<u64>) -> Vec<Arc<dyn BlobSource>> {
        self.registries.sources(image, layer_digest, size)
    }

    async fn load(self: &Arc<Self>, toc_digest: Digest, layer_digest: Digest) -> Result<Option<CachedLayer>, NotLazy> {
        self.with_store(layer_digest, toc_digest, move |shared| shared.store.load(&toc_digest))
            .await
    }

    /// Like [`Self::load`]; but a layer that is damaged is cleared away, so that it can be opened anew.
    async fn load_sound(
        self: &Arc<Self>,
        toc_digest: Digest,
        layer_digest: Digest,
    ) -> Result<Option<CachedLayer>, NotLazy> {
        self.with_store(layer_digest, toc_digest, move |shared| {
            let error = match shared.store.load(&toc_digest) {
                Err(error) if error.is_damage() => error,
                loaded => return loaded,
            };
            tracing::warn!(toc = %toc_digest, error = &error as &dyn std::error::Error,
                "the cached layer is damaged; fetching its TOC again");
            shared.store.discard(&toc_digest).map(|()| None)
        })
        .await
    }

    /// Runs blocking work on the cache.
    pub(super) async fn with_store<T: Send + 'static>(
        self: &Arc<Self>,
        layer_digest: Digest,
        toc_digest: Digest,
        work: impl FnOnce(&Self) -> Result<T, CacheError> + Send + 'static,
    ) -> Result<T, NotLazy> {
        let shared = self.clone();
        let result = tokio::task::spawn_blocking(move || work(&shared)).await;
        let path = self.store.path(&toc_digest);
        match result {
            Ok(result) => result.map_err(|error| cache_error(layer_digest, path, error)),
            Err(panic) => Err(NotLazy::CacheIo {
                path,
                cause: Box::new(panic),
            }),
        }
    }

    /// The fetch engine's view of a layer that has just been opened.
    async fn fetch_of(self: &Arc<Self>, layer: CachedLayer, names: LayerNames) -> Arc<LayerFetch> {
        let sources = self.sources(&names.image, &names.layer_digest, Some(layer.index().blob_size()));
        let (layer_digest, toc_digest) = (names.layer_digest, layer.toc_digest());
        let fetch = LayerFetch::new(self.engine.clone(), Arc::new(layer), sources, names);
        // The image that the TOC came with; without it there is one source less.
        let first = self.with_store(layer_digest, toc_digest, move |shared| shared.store.origin(&toc_digest));
        if let Ok(origin) = first.await {
            self.offer_source(&fetch, &origin.image, origin.layer_digest);
        }
        fetch
    }

    /// Puts a layer on its mount point, or goes on with what an earlier process put there.
    async fn serve(
        self: &Arc<Self>,
        slot: &Slot,
        mounted: &mut Option<Mounted>,
        fetch: Arc<LayerFetch>,
        prefetch: bool,
    ) -> Result<LayerMount, NotLazy> {
        let answer = LayerMount {
            toc_digest: fetch.layer().toc_digest(),
            path: fetch.layer().mount_point(),
        };
        let (shared, served) = (self.clone(), fetch.clone());
        let up = tokio::task::spawn_blocking(move || shared.ways.bring_up(&served, &shared.store)).await;
        let up = up.map_err(Into::into).and_then(|up| up);
        let Up { mount, former } = up.map_err(|cause| NotLazy::Mount {
            path: answer.path.clone(),
            cause,
        })?;
        fault::point("layer-mounted");
        self.mounted_by(&*mount).inc();
        if mount.kind() == Kind::Fuse {
            self.take_over_when_complete(&fetch);
        }
        fetch.layer().touch();
        slot.set_live(Some(fetch.clone()));
        fetch.start_filling(prefetch);
        *mounted = Some(Mounted { mount, former, fetch });
        Ok(answer)
    }

    /// Mounts the layer natively for those who come later, once it is complete.
    fn take_over_when_complete(self: &Arc<Self>, fetch: &Arc<LayerFetch>) {
        let (shared, weak) = (self.clone(), Arc::downgrade(fetch));
        let (completed, toc_digest) = (fetch.completed(), fetch.layer().toc_digest());
        let take_over = async move {
            let complete = shared.stop.run_until_cancelled(completed).await == Some(true);
            let slot = shared.slots().get(&toc_digest).cloned();
            let (Some(fetch), Some(slot), true) = (weak.upgrade(), slot, complete) else {
                return;
            };
            shared.take_over(&slot, fetch).await;
            // Who unmounted it meanwhile could not.
            shared.forget(&toc_digest, slot);
        };
        self.tasks.spawn_on(take_over, &self.runtime);
    }

    async fn take_over(self: &Arc<Self>, slot: &Slot, fetch: Arc<LayerFetch>) {
        let mut mounted = slot.mounted.lock().await;
        let Some(mounted) = mounted.as_mut().filter(|mounted| Arc::ptr_eq(&mounted.fetch, &fetch)) else {
            return;
        };
        let ways = self.clone();
        let native = tokio::task::spawn_blocking(move || ways.ways.take_over(&fetch, &ways.store)).await;
        // A panic there has been reported, and leaves the layer as it was.
        if let Ok(Some(native)) = native {
            self.mounted_by(&*mounted.mount).dec();
            self.mounted_by(&*native).inc();
            let former = std::mem::replace(&mut mounted.mount, native);
            mounted.former.push(former);
        }
    }

    fn mounted_by(&self, mount: &dyn LayerMounted) -> Gauge {
        let labels = MountLabels {
            mount: mount.kind().name(),
        };
        self.metrics.layers_mounted.get_or_create_owned(&labels)
    }

    /// Unmounts a layer if it is mounted, and makes its residency durable.
    pub(super) async fn unmount(self: &Arc<Self>, toc_digest: &Digest, slot: &Slot) {
        self.unmount_held(toc_digest, slot, &mut *slot.mounted.lock().await)
            .await;
    }

    /// Like [`Self::unmount`], for who has the slot.
    pub(super) async fn unmount_held(
        self: &Arc<Self>,
        toc_digest: &Digest,
        slot: &Slot,
        mounted: &mut Option<Mounted>,
    ) {
        if let Some(mounted) = mounted.take() {
            tracing::debug!(toc = %toc_digest, "unmounting the layer");
            self.take_down(slot, mounted).await;
        }
        let (shared, toc_digest) = (self.clone(), *toc_digest);
        let end = move || shared.ways.end(&toc_digest, &shared.store.mount_point(&toc_digest));
        // A panic there has been reported.
        let _ = tokio::task::spawn_blocking(end).await;
    }

    /// Clears away a mount that died under us (somebody unmounted it, or its connection was aborted).
    async fn discard_dead(&self, slot: &Slot, mounted: &mut Option<Mounted>) {
        if let Some(dead) = mounted.take() {
            tracing::warn!(path = %dead.mount.target().display(), "the layer's mount had ended; mounting it again");
            self.take_down(slot, dead).await;
        }
    }

    async fn take_down(&self, slot: &Slot, mounted: Mounted) {
        let Mounted { mount, former, fetch } = mounted;
        let gauge = self.mounted_by(&*mount);
        let unmount = |mount: Box<dyn LayerMounted>| tokio::task::spawn_blocking(move || mount.unmount());
        let mut in_use = false;
        for mount in std::iter::once(mount).chain(former) {
            match unmount(mount).await {
                Ok(Ok(ended)) => in_use |= ended == Ended::InUse,
                Ok(Err(error)) => tracing::warn!(
                    error = &*error as &dyn std::error::Error,
                    "the layer's mount did not end cleanly"
                ),
                // It has been reported.
                Err(_) => {}
            }
        }
        fault::point("layer-unmounted");
        if in_use {
            // Who uses it still is served by this one.
            slot.set_live(None);
            fetch.checkpoint().await;
        } else {
            close_unused(slot, &fetch, false).await;
        }
        gauge.dec();
    }

    /// Leaves a layer's mount to the next process, and makes its residency durable.
    pub(super) async fn leave(&self, slot: &Slot) {
        let Some(Mounted { mount, former, fetch }) = slot.mounted.lock().await.take() else {
            return;
        };
        // First of all: what fails from here on because this process ends must be told nobody.
        let left =
            tokio::task::spawn_blocking(move || std::iter::once(mount).chain(former).for_each(|mount| mount.leave()))
                .await;
        if let Err(error) = left {
            tracing::error!(%error, "a layer's mount was not left as it should be");
        }
        close_unused(slot, &fetch, false).await;
    }
}

/// Makes a layer's residency durable, and closes it if neither a mount nor a warm uses it any more.
async fn close_unused(slot: &Slot, fetch: &LayerFetch, is_mounted: bool) {
    if !is_mounted && slot.warms.load(Ordering::Relaxed) == 0 {
        slot.set_live(None);
        fetch.close().await;
    }
    fetch.checkpoint().await;
}
