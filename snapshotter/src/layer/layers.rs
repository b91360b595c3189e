//! The mounts of layers: one per layer, shared by all snapshots and images that use it.
//!
//! [`Layers`] implements [`LayerMounts`]. A layer has a [`Slot`] while somebody wants it; what happens to one layer happens one
//! after the other under the slot's locks, and different layers do not wait for each other. Work runs in tasks of its own, so a
//! caller that gives up leaves a layer mounted or not, and never half.

mod hosts;
mod inherited;
pub mod inspector;
mod manifest;
#[cfg(test)]
mod memory;
mod mounted;
mod opening;
#[cfg(test)]
mod tests;
pub mod warming;
mod ways;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use async_trait::async_trait;
use estargz::digest::Digest;
use estargz::index::IndexError;
use futures_util::{StreamExt, stream};
use hullspeed_registry::{ClientOptions, Credentials, HandedOver, Providers, RetryPolicy};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::inherited::Inheritance;
use self::inspector::Inspector;
use self::mounted::Mounted;
use self::opening::OpeningFailures;
use self::warming::{Turns, Warmer};
use super::cache::limits::Limits;
use super::cache::{CacheError, LayerStore};
use super::fault;
use super::fetch::{Engine, FetchOptions};
use super::image::Manifests;
use super::mounts::kept::Descriptors;
use super::mounts::ways::Ways;
use super::open::elsewhere::{KnownTocImages, known_toc_images};
use super::source::registry::Registries;
use super::{Cause, LayerMount, LayerMounts, LayerOrigin, LayerRequest, NotLazy, Usage};
use crate::config::{Config, RegistryConfig};
use crate::metrics::Metrics;

/// Layers opened (TOC fetched, parsed and indexed) at once; bounds the memory for TOCs.
const MAX_OPENING: usize = 16;
/// Layers unmounted or checkpointed at once.
const PARALLEL: usize = 16;
/// Attempts that the registry client makes by itself; more than one for the sake of manifests.
const REGISTRY_ATTEMPTS: u32 = 2;

/// Why layers cannot be mounted at all.
#[derive(Debug, thiserror::Error)]
pub enum LayersError {
    /// The layer cache cannot be used.
    #[error("the layer cache cannot be used")]
    Cache(#[source] CacheError),
    /// Layers are to be mounted natively and cannot be.
    #[error("layers cannot be mounted as layers.mount = \"erofs\" wants it")]
    Native(#[source] Cause),
}

/// All layers of this daemon.
pub struct Layers {
    shared: Arc<Shared>,
}

/// What the tasks of all layers share.
struct Shared {
    config: Config,
    store: LayerStore,
    ways: Ways,
    engine: Arc<Engine>,
    registries: Arc<Registries>,
    manifests: Manifests,
    /// Manifests whose layers were opened ahead lately.
    opened_ahead: moka::future::Cache<Digest, ()>,
    /// Manifests that did not come lately.
    missing: manifest::Missing,
    toc_images: KnownTocImages,
    opening: Semaphore,
    opening_failures: OpeningFailures,
    slots: Mutex<HashMap<Digest, Arc<Slot>>>,
    inheritance: Inheritance,
    warms: Turns,
    handed_over: HandedOver,
    metrics: Metrics,
    runtime: Handle,
    tasks: TaskTracker,
    stop: CancellationToken,
}

/// A layer that somebody wants.
#[derive(Default)]
struct Slot {
    /// Held while the layer's TOC is fetched, so that it is fetched once.
    opening: tokio::sync::Mutex<()>,
    /// Held while the layer is mounted or unmounted.
    mounted: tokio::sync::Mutex<Option<Mounted>>,
    /// The part in the cache of a layer that is mounted or being warmed, for those who must not wait. Set and cleared with
    /// `mounted` held, so that there is never more than one.
    live: Mutex<Option<Arc<super::fetch::LayerFetch>>>,
    /// Warms that use it; changed with `mounted` held.
    warms: AtomicUsize,
}

/// The directory as the mount table has it: without links.
fn real(root: &Path) -> PathBuf {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    match (root.canonicalize(), root.parent(), root.file_name()) {
        (Ok(real), ..) => real,
        // It is made soon.
        (Err(_), Some(parent), Some(name)) => real(parent).join(name),
        (Err(_), ..) => root,
    }
}

impl Layers {
    /// Layers under `config.root`, fetched and served on `runtime`. Whether there is FUSE, the daemon has found out before.
    /// `descriptors` has what an earlier process left.
    pub fn new(
        config: &Config,
        metrics: Metrics,
        descriptors: Descriptors,
        runtime: Handle,
    ) -> Result<Self, LayersError> {
        let root = real(&config.root);
        let limits = Limits {
            quota: config.cache.quota,
            min_free: config.cache.min_free,
        };
        let store = LayerStore::inheriting(&root, limits, metrics.clone(), |layer| descriptors.inherited(layer))
            .map_err(LayersError::Cache)?;
        let ways = ways::of(config, &root, &metrics, descriptors, &runtime).map_err(LayersError::Native)?;
        let inheritance = Inheritance::new(&store, ways.descriptors());
        let handed_over = HandedOver::default();
        let engine = Engine::new(FetchOptions::new(config), metrics.clone(), runtime.clone());
        let shared = Arc::new(Shared {
            config: config.clone(),
            store,
            ways,
            engine,
            registries: Arc::new(Registries::new(
                client_options(config, handed_over.clone()),
                metrics.clone(),
            )),
            manifests: Manifests::new(),
            opened_ahead: opening::recently_opened(),
            missing: manifest::missing(),
            toc_images: known_toc_images(),
            opening: Semaphore::new(MAX_OPENING),
            opening_failures: OpeningFailures::default(),
            slots: Mutex::new(HashMap::new()),
            inheritance,
            warms: Turns::new(),
            handed_over,
            metrics,
            runtime: runtime.clone(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        });
        let layers = Self { shared };
        layers.spawn_checkpoints(&runtime);
        layers.spawn_host_watch(&runtime);
        Ok(layers)
    }

    /// Makes residency durable and keeps the cache within its limits every now and then.
    fn spawn_checkpoints(&self, runtime: &Handle) {
        let (shared, stop) = (self.shared.clone(), self.shared.stop.clone());
        let mut ticks = {
            let _guard = runtime.enter();
            tokio::time::interval(shared.config.cache.checkpoint_interval)
        };
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let checkpoints = async move {
            loop {
                ticks.tick().await;
                shared.checkpoint_all().await;
                shared.drop_former().await;
                let tidying = shared.clone();
                // A panic there has been reported, and concerns no reader.
                let _ = tokio::task::spawn_blocking(move || {
                    tidying.ways.tidy();
                    tidying.store.tidy();
                })
                .await;
            }
        };
        self.shared
            .tasks
            .spawn_on(async move { stop.run_until_cancelled(checkpoints).await }, runtime);
    }

    /// Runs `work` to its end, whether or not the caller waits for it.
    async fn detached<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, NotLazy>> + Send + 'static,
    ) -> Result<T, NotLazy> {
        if self.shared.stop.is_cancelled() {
            return Err(NotLazy::Refused {
                why: "the daemon is stopping",
            });
        }
        let task = self.shared.tasks.spawn_on(work, &self.shared.runtime);
        task.await.unwrap_or(Err(NotLazy::Refused {
            why: "the mount was interrupted",
        }))
    }
}

impl Shared {
    /// The layer's slot, made if nobody wanted the layer until now.
    fn slot(&self, toc_digest: &Digest) -> Arc<Slot> {
        self.slots().entry(*toc_digest).or_default().clone()
    }

    fn slots(&self) -> std::sync::MutexGuard<'_, HashMap<Digest, Arc<Slot>>> {
        // Every change is one insert or remove.
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets a slot that nobody uses; the caller's reference does not count.
    fn forget(&self, toc_digest: &Digest, slot: Arc<Slot>) {
        let mut slots = self.slots();
        let unmounted = slot.mounted.try_lock().is_ok_and(|mounted| mounted.is_none());
        // References are taken only under the lock of the table, so nobody else can take one now.
        if unmounted && Arc::strong_count(&slot) == 2 {
            slots.remove(toc_digest);
        }
    }

    async fn checkpoint_all(&self) {
        let live: Vec<_> = self
            .slots()
            .values()
            .filter_map(|slot| slot.live())
            .filter(|fetch| fetch.layer().is_dirty())
            .collect();
        stream::iter(live)
            .for_each_concurrent(PARALLEL, |fetch| async move { fetch.checkpoint().await })
            .await;
    }

    /// Gives back what was kept of mounts that nobody uses any more since another took their place.
    async fn drop_former(&self) {
        for (_, slot) in self.all_slots() {
            let ended = match slot.mounted.try_lock() {
                Ok(mut mounted) => mounted.as_mut().map(Mounted::ended_former).unwrap_or_default(),
                // Next time.
                Err(_) => continue,
            };
            if !ended.is_empty() {
                let unmount = move || ended.into_iter().for_each(|mount| drop(mount.unmount()));
                // A panic there has been reported.
                let _ = tokio::task::spawn_blocking(unmount).await;
            }
        }
    }

    fn all_slots(&self) -> Vec<(Digest, Arc<Slot>)> {
        let slots = self.slots();
        slots
            .iter()
            .map(|(toc_digest, slot)| (*toc_digest, slot.clone()))
            .collect()
    }

    async fn unmount_all(self: &Arc<Self>) {
        let unmount = |(toc_digest, slot)| {
            let shared = self.clone();
            async move { shared.unmount_and_forget(toc_digest, slot).await }
        };
        stream::iter(self.all_slots())
            .for_each_concurrent(PARALLEL, unmount)
            .await;
    }

    /// Leaves all mounts to the next process, if something keeps them; unmounts them otherwise.
    async fn leave_all(self: &Arc<Self>) {
        if !self.ways.descriptors().has_store() {
            return self.unmount_all().await;
        }
        let ways = self.clone();
        // A panic there has been reported.
        let _ = tokio::task::spawn_blocking(move || ways.ways.leave()).await;
        let leave = |(toc_digest, slot): (Digest, Arc<Slot>)| {
            let shared = self.clone();
            async move {
                shared.leave(&slot).await;
                shared.forget(&toc_digest, slot);
            }
        };
        stream::iter(self.all_slots())
            .for_each_concurrent(PARALLEL, leave)
            .await;
    }

    async fn unmount_and_forget(self: &Arc<Self>, toc_digest: Digest, slot: Arc<Slot>) {
        self.unmount(&toc_digest, &slot).await;
        self.forget(&toc_digest, slot);
    }
}

/// A slot, in use until this is dropped.
struct Used {
    shared: Arc<Shared>,
    toc_digest: Digest,
    slot: Arc<Slot>,
}

impl Used {
    fn new(shared: &Arc<Shared>, toc_digest: Digest) -> Self {
        Self {
            shared: shared.clone(),
            toc_digest,
            slot: shared.slot(&toc_digest),
        }
    }
}

impl Drop for Used {
    fn drop(&mut self) {
        let slot = std::mem::take(&mut self.slot);
        self.shared.forget(&self.toc_digest, slot);
    }
}

impl Slot {
    fn live(&self) -> Option<Arc<super::fetch::LayerFetch>> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_live(&self, fetch: Option<Arc<super::fetch::LayerFetch>>) {
        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = fetch;
    }
}

/// The registry client that the configuration asks for; taken apart completely, so that no key is forgotten.
fn client_options(config: &Config, handed_over: HandedOver) -> ClientOptions {
    let RegistryConfig {
        hosts_directory,
        plain_http,
        ca_file,
        credentials_file,
        docker_config,
        credential_provider_config,
        credential_provider_bin_dir,
        connect_timeout,
        stall_timeout,
    } = config.registry.clone();
    let mut credentials = match docker_config {
        Some(path) => Credentials::anonymous().with_file(path),
        None => Credentials::from_environment(),
    };
    if let Some(path) = credentials_file {
        credentials = credentials.with_logins(path);
    }
    if let (Some(config), Some(programs)) = (credential_provider_config, credential_provider_bin_dir) {
        credentials = credentials.with_providers(Providers::new(config, programs));
    }
    ClientOptions {
        plain_http,
        hosts_directory,
        credentials: credentials.with_handed_over(handed_over),
        ca_file,
        connect_timeout,
        idle_timeout: stall_timeout,
        // The fetch engine asks again itself; it knows what is still needed.
        retry: RetryPolicy {
            attempts: REGISTRY_ATTEMPTS,
            ..RetryPolicy::default()
        },
    }
}

/// A cache error as a reason to leave the layer to containerd.
fn cache_error(layer: Digest, root: PathBuf, error: CacheError) -> NotLazy {
    match error {
        CacheError::Io { ref path, .. } => NotLazy::CacheIo {
            path: path.clone(),
            cause: Box::new(error),
        },
        CacheError::Toc(cause) if cause.downcast_ref().is_some_and(IndexError::is_limit) => {
            NotLazy::TooLarge { layer, cause }
        }
        CacheError::Toc(cause) => NotLazy::TocInvalid { layer, cause },
        CacheError::TocDigest { expected, found } => {
            let cause: Cause = format!("the TOC on disk has digest {found} instead of {expected}").into();
            NotLazy::CacheIo { path: root, cause }
        }
    }
}

#[async_trait]
impl LayerMounts for Layers {
    async fn mount(&self, request: LayerRequest) -> Result<LayerMount, NotLazy> {
        if !self.shared.config.layers.lazy {
            return Err(NotLazy::Disabled);
        }
        let (shared, began) = (self.shared.clone(), Instant::now());
        self.detached(async move {
            let toc_digest = shared.identity(&request).await?;
            let _pin = shared.store.pin(&toc_digest);
            let slot = shared.slot(&toc_digest);
            let result = shared.mount(&slot, toc_digest, &request).await;
            if result.is_ok() {
                // Until it is released.
                shared.store.keep(&toc_digest);
            }
            shared.forget(&toc_digest, slot);
            shared.metrics.layer_mount.observe(began.elapsed().as_secs_f64());
            result
        })
        .await
    }

    async fn restore(&self, origin: LayerOrigin) -> Result<LayerMount, NotLazy> {
        let shared = self.shared.clone();
        self.detached(async move {
            // Also if it cannot be mounted now: a snapshot refers to it.
            shared.store.keep(&origin.toc_digest);
            let slot = shared.slot(&origin.toc_digest);
            let result = shared.restore(&slot, &origin).await;
            shared.forget(&origin.toc_digest, slot);
            result
        })
        .await
    }

    async fn release(&self, toc_digest: &Digest) {
        let (shared, toc_digest) = (self.shared.clone(), *toc_digest);
        // A task of its own for the same reason as mounting: it must not stop in the middle.
        let released = self.detached(async move {
            fault::point("layer-released");
            let slot = shared.slot(&toc_digest);
            shared.unmount_and_forget(toc_digest, slot).await;
            shared.store.let_go(&toc_digest);
            Ok(())
        });
        // Refused only while stopping, which unmounts everything.
        let _ = released.await;
    }

    fn in_use(&self, layers: &[Digest]) {
        layers.iter().for_each(|layer| self.shared.store.keep(layer));
        self.shared.store.settle();
        self.shared.inherit(layers.to_vec());
    }

    async fn restored(&self) {
        self.shared.inherited().await;
    }

    fn usage(&self, toc_digest: &Digest) -> Usage {
        self.shared.store.usage(toc_digest)
    }

    fn warmer(&self) -> Option<Warmer> {
        Some(Warmer::new(self.shared.clone()))
    }

    fn inspector(&self) -> Option<Inspector> {
        Some(Inspector::new(self.shared.clone()))
    }

    async fn shutdown(&self) {
        let shared = &self.shared;
        // From here on nothing is mounted, and what waits for a registry gives up.
        shared.stop.cancel();
        shared.leave_all().await;
        shared.engine.stop();
        shared.tasks.close();
        shared.tasks.wait().await;
        // What was being mounted when the stop came.
        shared.leave_all().await;
    }
}
