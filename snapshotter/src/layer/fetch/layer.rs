//! The fetch engine's view of one layer.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use estargz::digest::Digest;
use hullspeed_daemon::error::chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ahead::Pipes;
use super::engine::Engine;
use super::error::FetchError;
use super::flight::{Flights, Urgency};
use super::gate::{Lane, Share, Slot};
use super::lately::Lately;
use super::readahead::Readahead;
use super::remotes::{Remote, Remotes};
use super::sequence::Sequence;
use super::tally::{Counts, Tally};
use crate::layer::cache::CachedLayer;
use crate::layer::readers::Readers;
use crate::layer::source::BlobSource;
use crate::metrics::defs::SourceLabels;

/// What log lines call a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerNames {
    /// Reference of the image that the layer is fetched for.
    pub image: String,
    /// Digest of the compressed blob.
    pub layer_digest: Digest,
}

/// Makes chunks of one layer resident.
pub struct LayerFetch {
    engine: Arc<Engine>,
    layer: Arc<CachedLayer>,
    remotes: Remotes,
    flights: Flights,
    readahead: Mutex<Readahead>,
    pipes: Pipes,
    /// What readers gave up lately.
    pub(super) lately: Lately,
    counts: Counts,
    readers: Readers,
    /// Whether it is being completed.
    completing: AtomicBool,
    /// Whether residency could not be made durable last time.
    checkpoint_failed: AtomicBool,
    /// Whether all of the layer is resident, and durably so.
    complete: watch::Sender<bool>,
    /// Whether all of it was looked for on the node, or nobody has asked for that.
    pub(super) looked_around: AtomicBool,
    tasks: TaskTracker,
    stop: CancellationToken,
    share: Share,
}

impl LayerFetch {
    /// A layer that is fetched from `sources`, in this order, as far as it is not resident.
    pub fn new(
        engine: Arc<Engine>,
        layer: Arc<CachedLayer>,
        sources: Vec<Arc<dyn BlobSource>>,
        names: LayerNames,
    ) -> Arc<Self> {
        let (options, size) = (&engine.options, layer.index().blob_size());
        let readahead = Mutex::new(Readahead::new(options.read_around, options.max_range, size));
        let stop = engine.stop_signal();
        let share = engine.gate.share();
        let counts = Counts::default();
        if let Some((requests, bytes)) = engine.take_opened(&layer.toc_digest()) {
            counts.toc(requests, bytes);
        }
        let readers = Readers::new(engine.runtime().clone());
        let complete = watch::Sender::new(layer.residency().is_complete() && !layer.is_dirty());
        let fetch = Arc::new(Self {
            engine,
            layer,
            remotes: Remotes::default(),
            flights: Flights::default(),
            readahead,
            pipes: Pipes::default(),
            lately: Lately::default(),
            counts,
            readers,
            completing: AtomicBool::new(false),
            checkpoint_failed: AtomicBool::new(false),
            complete,
            looked_around: AtomicBool::new(true),
            tasks: TaskTracker::new(),
            stop,
            share,
        });
        fetch.prefer_sources(sources, names);
        fetch
    }

    /// Asks these sources first from now on, in this order; what fails there is asked of those that were known before.
    pub fn prefer_sources(&self, sources: Vec<Arc<dyn BlobSource>>, names: LayerNames) {
        self.remotes.prefer(self.remotes_of(sources, &names));
    }

    /// Asks these sources where all others fail.
    pub fn offer_sources(&self, sources: Vec<Arc<dyn BlobSource>>, names: LayerNames) {
        self.remotes.offer(self.remotes_of(sources, &names));
    }

    fn remotes_of(&self, sources: Vec<Arc<dyn BlobSource>>, names: &LayerNames) -> Vec<Arc<Remote>> {
        let remote = |source| Remote::new(source, names.clone(), &self.engine.hosts);
        sources.into_iter().map(remote).collect()
    }

    /// What the layer has cost since it was opened.
    pub fn tally(&self) -> Tally {
        self.counts.read()
    }

    /// Who has waited for bytes of the layer since it was opened.
    pub fn readers(&self) -> &Readers {
        &self.readers
    }

    pub(super) fn counts(&self) -> &Counts {
        &self.counts
    }

    pub(super) fn pipes(&self) -> &Pipes {
        &self.pipes
    }

    /// Whether nobody completes the layer yet; the caller does from now on.
    pub(super) fn claim_background(&self) -> bool {
        !self.completing.swap(true, Ordering::AcqRel)
    }

    pub(super) fn end_background(&self) {
        self.completing.store(false, Ordering::Release);
    }

    pub(super) fn remotes(&self) -> &Remotes {
        &self.remotes
    }

    pub(super) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    pub(super) fn flights(&self) -> &Flights {
        &self.flights
    }

    /// Waits for the right to make a request; as one that nobody waits for only until a reader does.
    pub(super) async fn enter(&self, lane: &Lane, urgency: &Urgency) -> Slot {
        let gate = &self.engine.gate;
        let sequence = match lane {
            Lane::Demand(sequence) => return gate.enter_demand(&self.share, sequence).await,
            Lane::Ahead(sequence) => sequence.clone(),
            Lane::Prefetch | Lane::Warm | Lane::Background { .. } => Sequence::default(),
        };
        let ahead = tokio::select! {
            biased;
            () = urgency.raised() => None,
            slot = gate.enter_ahead(lane) => Some(slot),
        };
        match ahead {
            Some(slot) => slot,
            None => gate.enter_demand(&self.share, &sequence).await,
        }
    }

    /// Runs a task of this layer until it ends or the layer is closed.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        let task = async move {
            // A task that is dropped frees its claims and slots.
            stop.run_until_cancelled(task).await;
        };
        self.tasks.spawn_on(task, self.engine.runtime());
    }

    /// Runs work of this layer until it ends or the layer is closed.
    pub(super) async fn while_open<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.stop.run_until_cancelled(work).await
    }

    /// Ends all fetches of this layer and waits for them; readers that still wait get an error.
    pub async fn close(&self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Counts bytes given to a reader.
    pub fn count_read(&self, resident: bool, bytes: usize) {
        let source = if resident { "cache" } else { "registry" };
        self.engine
            .metrics
            .read_bytes
            .get_or_create(&SourceLabels { source })
            .inc_by(bytes as u64);
    }

    /// The layer in the cache.
    pub fn layer(&self) -> &Arc<CachedLayer> {
        &self.layer
    }

    pub(super) fn readahead(&self) -> MutexGuard<'_, Readahead> {
        // It only guesses; whatever it holds is of use.
        self.readahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells that what follows a sequence was fetched ahead.
    pub(super) fn went_on(&self, sequence: &Sequence, end: u64) {
        self.readahead().went_on(sequence, end);
    }

    /// Whether the layer is closed or being closed.
    pub(super) fn is_closed(&self) -> bool {
        self.stop.is_cancelled()
    }

    /// Whether any chunk of the member is not resident.
    pub(super) fn is_missing(&self, member: u32) -> bool {
        self.layer
            .index()
            .member(member)
            .is_some_and(|member| !self.layer.residency().contains_all(member.chunks))
    }

    /// Makes a layer that has just become complete durable as such.
    pub(super) fn group_done(self: &Arc<Self>) {
        if self.layer.residency().is_complete() && self.layer.is_dirty() {
            let fetch = self.clone();
            self.spawn(async move { fetch.checkpoint().await });
        }
    }

    /// Whether all of the layer is resident, and will be after an unclean stop.
    pub fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    /// Resolves to true when [`Self::is_complete`], to false when nobody has the layer any more.
    pub fn completed(&self) -> impl Future<Output = bool> + Send + 'static {
        let mut complete = self.complete.subscribe();
        async move { complete.wait_for(|complete| *complete).await.is_ok() }
    }

    /// Makes residency durable; failing costs fetches after an unclean stop, no more.
    pub async fn checkpoint(&self) {
        let layer = self.layer.clone();
        let result = tokio::task::spawn_blocking(move || layer.checkpoint()).await;
        if matches!(result, Ok(Ok(()))) && self.layer.residency().is_complete() && !self.layer.is_dirty() {
            self.complete
                .send_if_modified(|complete| !std::mem::replace(complete, true));
        }
        // It is tried again at every interval; a disk that is full is said once.
        let dir = self.layer.dir().display();
        match result {
            Ok(Err(error)) if !self.checkpoint_failed.swap(true, Ordering::Relaxed) => {
                tracing::error!(%dir, %error, "cannot make durable which chunks are in the cache");
            }
            Ok(Ok(_)) if self.checkpoint_failed.swap(false, Ordering::Relaxed) => {
                tracing::info!(%dir, "it is durable again which chunks are in the cache");
            }
            Ok(_) | Err(_) => {}
        }
    }

    /// Notes wrong bytes, with image, layer, file and chunk.
    pub(super) fn note_corruption(&self, from: &Remote, error: &FetchError, what: &'static str) {
        let (image, layer) = (from.names.image.as_str(), from.names.layer_digest);
        self.counts.failed(from.host.name(), chain(error), error.reason());
        from.source.distrust();
        let FetchError::Corrupt { chunk, .. } = error else {
            tracing::error!(image, %layer, error = error as &dyn std::error::Error, "{what}");
            return;
        };
        let entry = self.layer.index().chunk(*chunk);
        let file = entry
            .as_ref()
            .map(|entry| self.layer.index().path_of(entry.ino))
            .unwrap_or_default();
        let offset = entry.as_ref().map_or(0, |entry| entry.file_offset);
        let file = String::from_utf8_lossy(&file);
        self.counts.verify_failed(1);
        tracing::error!(image, %layer, host = from.host.name(), %file, chunk, offset, error = error as &dyn std::error::Error, "{what}");
    }
}
