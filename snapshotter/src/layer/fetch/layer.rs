//! The fetch engine's view of one layer.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use estargz::digest::Digest;
use hullspeed_daemon::error::chain;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::ahead::Pipes;
use super::engine::Engine;
use super::error::{Failure, FetchError};
use super::flight::{Flights, Progress, Urgency};
use super::gate::{Lane, Sequence, Share, Slot};
use super::group::{self, Group};
use super::plan::{self, Reach};
use super::readahead::Readahead;
use super::remotes::{Remote, Remotes};
use super::tally::{Counts, Tally};
use crate::layer::cache::{CachedLayer, StoreError};
use crate::layer::source::BlobSource;
use crate::metrics::defs::SourceLabels;

/// How often a reader looks again after fetches that died and brought nothing; more would hide a fault.
const MAX_FRUITLESS_ROUNDS: u32 = 4;
/// Groups that one read has on the way at once: a read of scattered chunks must not fill the gate's queue.
pub(super) const MAX_GROUPS: usize = 8;

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
    counts: Counts,
    /// Whether it is being completed.
    completing: AtomicBool,
    tasks: TaskTracker,
    stop: CancellationToken,
    share: Share,
}

/// What is fetched for the misses of one read.
struct Planned {
    groups: Vec<Range<u32>>,
    sequence: Sequence,
    /// Whether the reader goes on where the last fetch ended.
    is_contiguous: bool,
    window: u64,
}

/// What a reader waits for: chunks, and the fetch of the member that holds them.
struct Wait {
    chunks: Range<u32>,
    progress: watch::Receiver<Progress>,
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
        let fetch = Arc::new(Self {
            engine,
            layer,
            remotes: Remotes::default(),
            flights: Flights::default(),
            readahead,
            pipes: Pipes::default(),
            counts,
            completing: AtomicBool::new(false),
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

    /// Returns when all of `chunks` are resident, or when the read's deadline is over. Needs no runtime to be polled on.
    pub async fn ensure(self: &Arc<Self>, chunks: Range<u32>) -> Result<(), Failure> {
        if self.layer.residency().contains_all(chunks.clone()) {
            return Ok(());
        }
        let began = Instant::now();
        let deadline = self.engine.options.read_deadline;
        let over = AbortOnDrop(self.engine.runtime().spawn(tokio::time::sleep(deadline)));
        let result = {
            let mut over = over;
            tokio::select! {
                biased;
                result = self.wait_for(&chunks, began) => result,
                _ = &mut over.0 => Err(Arc::new(FetchError::Deadline { waited: deadline })),
            }
        };
        if let Err(failure) = &result
            && let FetchError::Deadline { .. } = **failure
        {
            let dir = self.layer.dir().display();
            tracing::error!(%dir, chunk = chunks.start, error = &**failure as &dyn std::error::Error, "a read gets an error");
        }
        self.counts.stalled(began.elapsed());
        self.engine.metrics.read_stall.observe(began.elapsed().as_secs_f64());
        result
    }

    /// Tells that a reader is at `chunks`, resident or not.
    pub fn note_read(&self, chunks: &Range<u32>) {
        self.pipes.advance(|| self.position_of(chunks.end.checked_sub(1)?));
    }

    /// Where in the blob a chunk begins.
    fn position_of(&self, chunk: u32) -> Option<u64> {
        let member = self.layer.index().chunk(chunk)?.member;
        Some(self.layer.index().member(member)?.start)
    }

    async fn wait_for(self: &Arc<Self>, chunks: &Range<u32>, began: Instant) -> Result<(), Failure> {
        let mut missing = self.count_missing(chunks);
        let mut fruitless = 0;
        while fruitless < MAX_FRUITLESS_ROUNDS {
            if self.stop.is_cancelled() {
                break;
            }
            let waits = self.start(chunks);
            if waits.is_empty() {
                return Ok(());
            }
            for wait in waits {
                let Wait { chunks, progress } = wait;
                match follow(progress, || self.layer.residency().contains_all(chunks.clone())).await {
                    Ok(()) => {}
                    // Nobody waited for it when it was stored; now somebody does.
                    Err(failure) if matches!(*failure, FetchError::Store(StoreError::NoRoom { .. })) => {}
                    // Who fetched it gave up; but this read still has time.
                    Err(failure) if self.may_pass(&failure, began) => fruitless = 0,
                    Err(failure) => return Err(failure),
                }
            }
            // A round may end with more to start; chunks that have come never go, so this ends.
            let left = self.count_missing(chunks);
            fruitless = if left < missing { 0 } else { fruitless + 1 };
            missing = left;
        }
        Err(Arc::new(FetchError::Abandoned))
    }

    /// Whether a fetch that failed for others is to be tried again for a read that began when it was under way.
    fn may_pass(&self, failure: &FetchError, began: Instant) -> bool {
        match failure {
            // It is over when all have refused for good, or after as long a time as a read has; so this cannot spin.
            FetchError::Source { source, .. } => {
                source.is_transient() && began.elapsed() < self.engine.options.read_deadline
            }
            FetchError::Corrupt { .. } | FetchError::Store(_) | FetchError::Deadline { .. } | FetchError::Abandoned => {
                false
            }
        }
    }

    /// Starts to fetch what of `chunks` is neither resident nor under way, the first [`MAX_GROUPS`] ranges of it.
    fn start(self: &Arc<Self>, chunks: &Range<u32>) -> Vec<Wait> {
        let missing = self.missing_members(chunks);
        let mut waits = Vec::with_capacity(missing.len());
        let mut groups = Vec::new();
        let mut planned = None;
        {
            let mut flights = self.flights.hold();
            let mut wanted = Vec::new();
            for (&member, needed) in &missing {
                if let Some(progress) = flights.join(member) {
                    waits.push(Wait {
                        chunks: needed.clone(),
                        progress,
                    });
                } else if !self.layer.residency().contains_all(needed.clone()) {
                    wanted.push(member);
                }
            }
            let free = |member: u32| !flights.contains(member) && self.is_missing(member);
            if let Some(plan) = self.plan(&wanted, free) {
                for members in &plan.groups {
                    let urgency = Urgency::default();
                    let claims = members.clone().filter_map(|member| flights.claim(member, &urgency));
                    groups.push(Group {
                        claims: claims.collect(),
                        lane: Lane::Demand(plan.sequence.clone()),
                        urgency,
                    });
                }
                planned = Some(plan);
            }
            for member in wanted {
                if let (Some(progress), Some(needed)) = (flights.join(member), missing.get(&member)) {
                    waits.push(Wait {
                        chunks: needed.clone(),
                        progress,
                    });
                }
            }
        }
        for group in groups {
            let fetch = self.clone();
            self.spawn(async move {
                let slot = fetch.enter(&group.lane, &group.urgency).await;
                group::run(fetch, group, slot).await;
            });
        }
        if let Some(planned) = planned {
            self.go_on(chunks, planned);
        }
        waits
    }

    fn plan(&self, wanted: &[u32], free: impl Fn(u32) -> bool) -> Option<Planned> {
        let first = *wanted.first()?;
        let index = self.layer.index();
        let mut readahead = self.readahead.lock().unwrap_or_else(PoisonError::into_inner);
        let window = readahead.window(plan::member_range(index, first).start);
        // A server that sends all that lies before a range is asked once for all that is missing.
        let (around, max) = if self.remotes.ignore_ranges() {
            (u64::MAX, u64::MAX)
        } else {
            (window.length, self.engine.options.max_range)
        };
        let reach = Reach { window: around, max };
        let mut groups = plan::groups(index, wanted, free, reach);
        groups.truncate(MAX_GROUPS);
        if let Some(last) = groups.last() {
            readahead.reached(plan::blob_range(index, last).end);
        }
        Some(Planned {
            groups,
            sequence: window.sequence,
            is_contiguous: window.is_contiguous,
            window: window.length,
        })
    }

    /// Reads ahead of a sequence: of a large file up to its end, of small files once there were many.
    fn go_on(self: &Arc<Self>, chunks: &Range<u32>, planned: Planned) {
        let index = self.layer.index();
        let Some(last) = planned.groups.last().filter(|_| planned.is_contiguous) else {
            return;
        };
        let position = |chunk: u32| self.position_of(chunk);
        let file = chunks.end.checked_sub(1).and_then(|chunk| index.chunk(chunk));
        let file = file.and_then(|chunk| index.inode(chunk.ino));
        let file_end = file.and_then(|file| position(file.chunks.end.checked_sub(1)?));
        let reached = plan::blob_range(index, last).end;
        let until = match file_end {
            Some(end) if end > reached => end + 1,
            _ if planned.window >= self.engine.options.max_range / 2 => u64::MAX,
            Some(_) | None => return,
        };
        if let Some(begin) = position(chunks.start) {
            self.read_ahead(planned.sequence, begin, last.end, until);
        }
    }

    /// Tells that what follows a sequence was fetched ahead.
    pub(super) fn went_on(&self, sequence: &Sequence, end: u64) {
        let mut readahead = self.readahead.lock().unwrap_or_else(PoisonError::into_inner);
        readahead.went_on(sequence, end);
    }

    fn count_missing(&self, chunks: &Range<u32>) -> usize {
        let residency = self.layer.residency();
        chunks.clone().filter(|&chunk| !residency.contains(chunk)).count()
    }

    /// The members of those of `chunks` that are not resident, each with the chunks needed of it.
    fn missing_members(&self, chunks: &Range<u32>) -> BTreeMap<u32, Range<u32>> {
        let mut missing: BTreeMap<u32, Range<u32>> = BTreeMap::new();
        for chunk in chunks.clone().filter(|&chunk| !self.layer.residency().contains(chunk)) {
            if let Some(entry) = self.layer.index().chunk(chunk) {
                missing.entry(entry.member).or_insert(chunk..chunk + 1).end = chunk + 1;
            }
        }
        missing
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

    /// Makes residency durable; failing costs fetches after an unclean stop, no more.
    pub async fn checkpoint(&self) {
        let layer = self.layer.clone();
        let result = tokio::task::spawn_blocking(move || layer.checkpoint()).await;
        if let Ok(Err(error)) = result {
            let dir = self.layer.dir().display();
            tracing::error!(%dir, %error, "cannot make durable which chunks are in the cache");
        }
    }

    /// Notes wrong bytes, with image, layer, file and chunk.
    pub(super) fn note_corruption(&self, from: &Remote, error: &FetchError, what: &'static str) {
        let (image, layer) = (from.names.image.as_str(), from.names.layer_digest);
        self.counts.failed(from.host.name(), chain(error), error.reason());
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

/// A task that ends with whoever waits for it.
struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits until `is_resident` holds or the fetch is over, whichever is first.
///
/// Chunks become resident before their fetch says so. What it has said is therefore marked as seen first and residency looked at
/// afterwards: whatever comes in between still counts as a change.
async fn follow(mut progress: watch::Receiver<Progress>, mut is_resident: impl FnMut() -> bool) -> Result<(), Failure> {
    loop {
        let said = progress.borrow_and_update().clone();
        if is_resident() {
            return Ok(());
        }
        match said {
            Progress::Settled(result) => return result,
            // A fetch that died says nothing more; the caller looks again.
            Progress::Pending | Progress::Partial if progress.changed().await.is_err() => return Ok(()),
            Progress::Pending | Progress::Partial => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[test]
    fn what_becomes_resident_while_its_reader_looks_is_not_slept_through() {
        let flights = Flights::default();
        let claim = flights.hold().claim(7, &Urgency::default()).unwrap();
        let progress = flights.hold().join(7).unwrap();
        let mut looks = 0;
        let following = follow(progress, || {
            looks += 1;
            if looks == 1 {
                // The bit is set and announced right after the reader has seen that it is not.
                claim.announce_partial();
            }
            looks > 1
        });
        assert!(matches!(following.now_or_never(), Some(Ok(()))));
        assert_eq!(looks, 2);
    }
}
