//! The operations of the snapshots service.
//!
//! An operation that changes something runs in a task of its own to its end, so a client that hangs up leaves nothing
//! half done. Blocking work goes through [`Service::blocking`], which bounds how much of it there is at once.

use hullspeed_daemon::error::chain as error_chain;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use estargz::digest::Digest;
use futures_util::{StreamExt, TryStreamExt, stream};
use tokio::sync::{Mutex, MutexGuard, Semaphore};
use tokio_util::task::TaskTracker;

use super::decisions::{Decisions, Fallback};
use super::directories::Directories;
use super::filter::Filters;
use super::labels::{self, check_name};
use super::mounts::{Mount, OverlayFeatures, mounts};
use super::store::{Chain, LabelChange, Listing, Store};
use super::usage::disk_usage;
use super::{Error, Info, Kind, Labels};
use crate::layer::{LayerMounts, LayerOrigin, Usage};
use crate::metrics::Metrics;

/// Calls to the store and to directories under way at once; further ones wait.
const BLOCKING_CALLS: usize = 16;

/// Locks that layers share. A lock is held for local work only, so a collision costs milliseconds.
const LAYER_LOCKS: usize = 64;

/// Layers of one chain that are mounted again at once.
const CHAIN_PARALLELISM: usize = 8;

/// Snapshots in one batch of a listing.
pub const LIST_BATCH: usize = 100;

/// What a [`Service`] is made of.
pub struct ServiceOptions {
    /// Directory of all that is kept; it exists.
    pub root: PathBuf,
    /// The lazy layers.
    pub layers: Arc<dyn LayerMounts>,
    /// Where events are counted.
    pub metrics: Metrics,
    /// Longest wait for a layer to be mounted.
    pub mount_timeout: Duration,
    /// Layers mounted again at once after a start.
    pub restore_parallelism: usize,
}

/// The snapshots service. Cheap to clone; clones are the same service.
#[derive(Clone)]
pub struct Service {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    store: Store,
    directories: Directories,
    features: OverlayFeatures,
    pub(super) layers: Arc<dyn LayerMounts>,
    pub(super) metrics: Metrics,
    pub(super) decisions: Decisions,
    pub(super) mount_timeout: Duration,
    pub(super) restore_parallelism: usize,
    permits: Semaphore,
    /// Held while a layer is released, or while a snapshot is made that needs it mounted.
    layer_locks: Vec<Mutex<()>>,
    /// Removal of directories, one at a time: it must not starve containers of the disk.
    removal: Mutex<()>,
    tasks: TaskTracker,
}

impl Service {
    /// Opens metadata and directories. Blocks.
    pub fn open(options: ServiceOptions) -> Result<Self, Error> {
        let ServiceOptions {
            root,
            layers,
            metrics,
            mount_timeout,
            restore_parallelism,
        } = options;
        let directories = Directories::open(&root)?;
        let store = Store::open(&root.join("meta.redb"), directories.floor()?)?;
        let inner = Inner {
            store,
            directories,
            features: OverlayFeatures::detect(),
            layers,
            metrics,
            decisions: Decisions::default(),
            mount_timeout,
            restore_parallelism,
            permits: Semaphore::new(BLOCKING_CALLS),
            layer_locks: std::iter::repeat_with(Mutex::default).take(LAYER_LOCKS).collect(),
            removal: Mutex::default(),
            tasks: TaskTracker::new(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Makes an active snapshot and gives its mounts. Where the labels offer a layer for lazy use and it can be had,
    /// its committed snapshot is made instead, and the answer is [`Error::TargetExists`].
    pub async fn prepare(&self, key: String, parent: Option<String>, labels: Labels) -> Result<Vec<Mount>, Error> {
        check_new("key", &key, parent.as_deref(), &labels)?;
        self.to_end(async move |service| {
            let mut fallback = None;
            if let Some(target) = labels.get(labels::TARGET) {
                check_name("target", target)?;
                fallback = Some(service.offer(&key, target, parent.as_deref(), &labels).await?);
            }
            service.create(Kind::Active, key, parent, labels, fallback).await
        })
        .await
    }

    /// Makes a read-only snapshot and gives its mounts.
    pub async fn view(&self, key: String, parent: Option<String>, labels: Labels) -> Result<Vec<Mount>, Error> {
        check_new("key", &key, parent.as_deref(), &labels)?;
        self.to_end(async move |service| service.create(Kind::View, key, parent, labels, None).await)
            .await
    }

    async fn create(
        &self,
        kind: Kind,
        key: String,
        parent: Option<String>,
        labels: Labels,
        fallback: Option<Fallback>,
    ) -> Result<Vec<Mount>, Error> {
        let (parents, layers) = {
            let parent = parent.clone();
            self.blocking(move |inner| inner.store.ground(parent.as_deref()))
                .await?
        };
        self.ensure_mounted(&key, layers).await?;
        self.blocking(move |inner| {
            let owner = parents.first().map(|id| inner.directories.owner(*id)).transpose()?;
            let mut made = None;
            let make = |id| {
                inner.directories.make(id, kind, owner)?;
                made = Some(id);
                Ok(())
            };
            let created = inner
                .store
                .create(kind, &key, parent.as_deref(), &labels, fallback, make);
            inner.undo(made, created.is_err());
            Ok(inner.mounts(&created?))
        })
        .await
    }

    /// Mounts of an active or view snapshot.
    pub async fn mounts(&self, key: String) -> Result<Vec<Mount>, Error> {
        check_name("key", &key)?;
        let chain = {
            let key = key.clone();
            self.blocking(move |inner| inner.store.chain(&key)).await?
        };
        self.ensure_mounted(&key, chain.layers.clone()).await?;
        Ok(self.inner.mounts(&chain))
    }

    /// Makes an active snapshot a committed one called `name`.
    pub async fn commit(&self, name: String, key: String, parent: Option<String>, labels: Labels) -> Result<(), Error> {
        check_new("name", &name, parent.as_deref(), &labels)?;
        check_name("key", &key)?;
        self.to_end(async move |service| {
            service
                .blocking(move |inner| {
                    let found = inner.store.find(&key)?;
                    // Measured outside the transaction, since it takes as long as the layer is large.
                    let usage = match found.info.kind {
                        Kind::Active => disk_usage(&inner.directories.upper(found.id))?,
                        Kind::View | Kind::Committed => Usage::default(),
                    };
                    inner
                        .store
                        .commit(found.id, &key, &name, parent.as_deref(), &labels, usage)
                })
                .await
        })
        .await
    }

    /// Removes a snapshot without children; its directory goes in the background.
    pub async fn remove(&self, key: String) -> Result<(), Error> {
        check_name("key", &key)?;
        self.to_end(async move |service| {
            let removed = service.blocking(move |inner| inner.store.remove(&key)).await?;
            let background = service.clone();
            service.inner.tasks.spawn(async move {
                background
                    .remove_paths(vec![background.inner.directories.snapshot(removed.id)])
                    .await;
                if let Some(toc) = removed.unused_layer {
                    background.release_unused(&toc).await;
                }
            });
            Ok(())
        })
        .await
    }

    /// A snapshot of any kind.
    pub async fn stat(&self, key: String) -> Result<Info, Error> {
        check_name("key", &key)?;
        self.blocking(move |inner| Ok(inner.store.find(&key)?.info)).await
    }

    /// Changes labels: all of them without `fields`, else those that `fields` names as `labels` or `labels.KEY`.
    pub async fn update(&self, key: String, labels: Labels, fields: Vec<String>) -> Result<Info, Error> {
        check_name("key", &key)?;
        labels::check(&labels)?;
        let changes = match fields.as_slice() {
            [] => vec![LabelChange::All],
            fields => fields
                .iter()
                .map(|field| label_change(&key, field))
                .collect::<Result<_, _>>()?,
        };
        self.to_end(async move |service| {
            service
                .blocking(move |inner| inner.store.update(&key, &labels, &changes))
                .await
        })
        .await
    }

    /// Starts a listing of the snapshots that one of `filters` matches.
    pub async fn list(&self, filters: &[String]) -> Result<List, Error> {
        let filters = Filters::parse(filters.iter().map(String::as_str)).map_err(|(filter, source)| Error::Filter {
            filter: filter.chars().take(200).collect(),
            source,
        })?;
        let listing = self.blocking(|inner| inner.store.listing()).await?;
        Ok(List {
            service: self.clone(),
            listing: Some(listing),
            filters,
        })
    }

    /// Disk usage of the snapshot alone, without its parents; what several share is counted with the oldest of them.
    pub async fn usage(&self, key: String) -> Result<Usage, Error> {
        check_name("key", &key)?;
        self.blocking(move |inner| {
            let found = inner.store.find(&key)?;
            match (found.info.kind, found.layer) {
                (Kind::Active, _) => disk_usage(&inner.directories.upper(found.id)),
                (_, Some(origin)) if inner.store.first_user(&origin.toc_digest)? == Some(found.id) => {
                    Ok(inner.layers.usage(&origin.toc_digest))
                }
                (_, Some(_)) => Ok(Usage::default()),
                (_, None) => Ok(found.usage),
            }
        })
        .await
    }

    /// Removes what removed snapshots left on disk. What cannot be removed is logged and stays for the next time.
    pub async fn cleanup(&self) -> Result<(), Error> {
        self.to_end(async move |service| {
            let orphans = service
                .blocking(|inner| inner.store.with_ids(|ids| inner.directories.orphans(ids))?)
                .await?;
            service.remove_paths(orphans).await;
            Ok(())
        })
        .await
    }

    /// Refuses new work and waits for what is under way, then stops the layers. Directories that are still there
    /// after `drain` are swept after the next start.
    pub async fn shutdown(&self, drain: Duration) {
        self.inner.tasks.close();
        if tokio::time::timeout(drain, self.inner.tasks.wait()).await.is_err() {
            tracing::warn!(
                unfinished = self.inner.tasks.len(),
                "operations did not end in time and are abandoned"
            );
        }
        self.inner.layers.shutdown().await;
    }

    /// Mounts the layers that a chain needs, where they are not mounted already.
    async fn ensure_mounted(&self, key: &str, layers: Vec<LayerOrigin>) -> Result<(), Error> {
        stream::iter(layers)
            .map(|origin| async move {
                let toc = origin.toc_digest;
                self.restore_layer(origin)
                    .await?
                    .map_err(|source| Error::LayerUnavailable {
                        key: key.to_owned(),
                        toc,
                        source: Box::new(source),
                    })?;
                Ok(())
            })
            .buffer_unordered(CHAIN_PARALLELISM)
            .try_collect()
            .await
    }

    /// Excludes the release of a layer.
    pub(super) async fn lock_layer(&self, toc: &Digest) -> MutexGuard<'_, ()> {
        let shard = usize::from(toc.as_bytes()[0]) % self.inner.layer_locks.len();
        self.inner.layer_locks[shard].lock().await
    }

    /// Releases a layer that no snapshot refers to.
    pub(super) async fn release_unused(&self, toc: &Digest) {
        let _lock = self.lock_layer(toc).await;
        let toc = *toc;
        match self.blocking(move |inner| inner.store.first_user(&toc)).await {
            Ok(None) => self.inner.layers.release(&toc).await,
            Ok(Some(_)) => {}
            Err(error) => tracing::error!(error = %error_chain(&error), %toc, "cannot tell whether a layer is in use"),
        }
    }

    pub(super) async fn remove_paths(&self, paths: Vec<PathBuf>) {
        for path in paths {
            let _one = self.inner.removal.lock().await;
            let removed = self.blocking(move |inner| inner.directories.remove_path(&path)).await;
            if let Err(error) = removed {
                self.inner.metrics.snapshot_cleanup_errors.inc();
                tracing::warn!(error = %error_chain(&error), "a removed snapshot's directory stays until the next cleanup");
            }
        }
    }

    /// Runs `work` to its end even if the caller goes away.
    async fn to_end<T, W, F>(&self, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: FnOnce(Self) -> F,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        if self.inner.tasks.is_closed() {
            return Err(Error::Stopping);
        }
        self.inner
            .tasks
            .spawn(work(self.clone()))
            .await
            .map_err(Error::Interrupted)?
    }

    /// Runs blocking work on the pool.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let inner = Arc::clone(&self.inner);
        let _permit = self.inner.permits.acquire().await.map_err(|_| Error::Stopping)?;
        tokio::task::spawn_blocking(move || work(&inner))
            .await
            .map_err(Error::Interrupted)?
    }
}

impl Inner {
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    pub(super) fn directories(&self) -> &Directories {
        &self.directories
    }

    fn mounts(&self, chain: &Chain) -> Vec<Mount> {
        mounts(chain, &self.directories, self.features)
    }

    /// Removes a directory whose snapshot did not come to be. A commit that failed may be on disk all the same; so what is there is
    /// looked up, and where that cannot be told the directory stays.
    pub(super) fn undo(&self, made: Option<u64>, failed: bool) {
        let Some(id) = made.filter(|_| failed) else { return };
        let undone = self.store.with_ids(|ids| ids.contains(&id)).and_then(|is_there| {
            if is_there {
                tracing::warn!(id, "a snapshot is there although its commit failed");
                return Ok(());
            }
            self.directories.remove_path(&self.directories.snapshot(id))
        });
        if let Err(error) = undone {
            tracing::warn!(error = %error_chain(&error), "a failed snapshot's directory stays until the next cleanup");
        }
    }
}

/// A listing in progress: a view of the moment when it was started.
pub struct List {
    service: Service,
    listing: Option<Listing>,
    filters: Filters,
}

impl List {
    /// The next matching snapshots, at most [`LIST_BATCH`], or none at the end.
    pub async fn batch(&mut self) -> Result<Option<Vec<Info>>, Error> {
        while let Some(mut listing) = self.listing.take() {
            let (page, listing) = self
                .service
                .blocking(move |_| Ok((listing.page(LIST_BATCH)?, listing)))
                .await?;
            let Some(page) = page else { return Ok(None) };
            self.listing = Some(listing);
            let infos: Vec<_> = page
                .into_iter()
                .map(|found| found.info)
                .filter(|info| self.filters.matches(info))
                .collect();
            if !infos.is_empty() {
                return Ok(Some(infos));
            }
        }
        Ok(None)
    }
}

fn check_new(what: &'static str, name: &str, parent: Option<&str>, labels: &Labels) -> Result<(), Error> {
    check_name(what, name)?;
    if let Some(parent) = parent {
        check_name("parent", parent)?;
    }
    labels::check(labels)
}

fn label_change(key: &str, field: &str) -> Result<LabelChange, Error> {
    match field.strip_prefix("labels") {
        Some("") => Ok(LabelChange::All),
        Some(rest) if rest.starts_with('.') => Ok(LabelChange::One(rest[1..].to_owned())),
        _ => Err(Error::ImmutableField {
            key: key.to_owned(),
            field: field.to_owned(),
        }),
    }
}

/// Whether `path` can hold snapshots at all: overlayfs separates directories by colons and options by commas.
pub fn usable_root(path: &Path) -> bool {
    path.is_absolute()
        && path
            .to_str()
            .is_some_and(|text| !text.contains([':', ',', '\\', '"', '\n']))
}
