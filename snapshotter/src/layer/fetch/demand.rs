//! What a reader waits for: which ranges its misses cost, and what comes with them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use super::error::{Failure, FetchError};
use super::flight::{Progress, Urgency};
use super::gate::Lane;
use super::group::Group;
use super::layer::LayerFetch;
use super::plan::{self, Reach};
use super::sequence::Sequence;
use crate::layer::cache::StoreError;

/// How often a reader looks again after fetches that died and brought nothing; more would hide a fault.
const MAX_FRUITLESS_ROUNDS: u32 = 4;
/// Groups that one read has on the way at once: a read of scattered chunks must not fill the gate's queue.
pub(super) const MAX_GROUPS: usize = 8;

/// What a read tells of those that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reading {
    /// Nothing.
    Part,
    /// A file from its beginning in large pieces: it goes on.
    Front,
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
    /// Returns when all of `chunks` are resident, or when the read's deadline is over. Needs no runtime to be polled on.
    pub async fn ensure(self: &Arc<Self>, chunks: Range<u32>, reading: Reading) -> Result<(), Failure> {
        if self.layer().residency().contains_all(chunks.clone()) {
            return Ok(());
        }
        let began = Instant::now();
        let deadline = self
            .lately
            .patience(&chunks, self.engine().options.read_deadline, began);
        // The timer is made on the runtime: this may be polled outside of it.
        let over = AbortOnDrop(
            self.engine()
                .runtime()
                .spawn(async move { tokio::time::sleep(deadline).await }),
        );
        let result = {
            let mut over = over;
            tokio::select! {
                biased;
                result = self.wait_for(&chunks, reading, began) => result,
                _ = &mut over.0 => Err(Arc::new(FetchError::Deadline { waited: deadline })),
            }
        };
        if let Err(failure) = &result
            && let FetchError::Deadline { .. } = **failure
        {
            self.lately.gave_up(chunks.clone(), Instant::now());
            let (names, failed) = (self.remotes().images(), self.counts().read().last_failure);
            tracing::error!(
                image = names.first().map(|names| &*names.image),
                layer = names.first().map(|names| names.layer_digest.to_string()),
                host = failed.map(|failed| failed.host),
                chunk = chunks.start,
                error = &**failure as &dyn std::error::Error,
                "a read gets an error"
            );
        }
        self.counts().stalled(began.elapsed());
        self.engine().metrics.read_stall.observe(began.elapsed().as_secs_f64());
        result
    }

    /// Tells that a reader is at `chunks`, resident or not.
    pub fn note_read(&self, chunks: &Range<u32>) {
        self.pipes().advance(|| self.end_of(chunks.end.checked_sub(1)?));
    }

    /// Where in the blob the member that holds a chunk ends.
    fn end_of(&self, chunk: u32) -> Option<u64> {
        let member = self.layer().index().chunk(chunk)?.member;
        Some(plan::member_range(self.layer().index(), member).end)
    }

    async fn wait_for(self: &Arc<Self>, chunks: &Range<u32>, reading: Reading, began: Instant) -> Result<(), Failure> {
        self.reuse_near(chunks).await;
        let mut missing = self.count_missing(chunks);
        let mut fruitless = 0;
        while fruitless < MAX_FRUITLESS_ROUNDS {
            if self.is_closed() {
                break;
            }
            let waits = self.start(chunks, reading);
            if waits.is_empty() {
                return Ok(());
            }
            for wait in waits {
                let Wait { chunks, progress } = wait;
                match follow(progress, || self.layer().residency().contains_all(chunks.clone())).await {
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
                source.is_transient() && began.elapsed() < self.engine().options.read_deadline
            }
            FetchError::Corrupt { .. } | FetchError::Store(_) | FetchError::Deadline { .. } | FetchError::Abandoned => {
                false
            }
        }
    }

    /// Starts to fetch what of `chunks` is neither resident nor under way, the first [`MAX_GROUPS`] ranges of it.
    fn start(self: &Arc<Self>, chunks: &Range<u32>, reading: Reading) -> Vec<Wait> {
        let missing = self.missing_members(chunks);
        let mut waits = Vec::with_capacity(missing.len());
        let mut groups = Vec::new();
        let mut planned = None;
        {
            let mut flights = self.flights().hold();
            let mut wanted = Vec::new();
            for (&member, needed) in &missing {
                if let Some(progress) = flights.join(member) {
                    waits.push(Wait {
                        chunks: needed.clone(),
                        progress,
                    });
                } else if !self.layer().residency().contains_all(needed.clone()) {
                    wanted.push(member);
                }
            }
            let free = |member: u32| !flights.contains(member) && self.is_missing(member);
            if let Some(plan) = self.plan(&wanted, free) {
                for members in &plan.groups {
                    let urgency = Urgency::default();
                    let claims = members.clone().filter_map(|member| flights.claim(member, &urgency));
                    let lane = Lane::Demand(plan.sequence.clone());
                    groups.push(Group::new(self, claims.collect(), lane, urgency));
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
            self.spawn(group.fetch(fetch));
        }
        if let Some(planned) = planned {
            self.go_on(chunks, reading, planned);
        }
        waits
    }

    fn plan(&self, wanted: &[u32], free: impl Fn(u32) -> bool) -> Option<Planned> {
        let first = *wanted.first()?;
        let index = self.layer().index();
        let mut readahead = self.readahead();
        let window = readahead.window(plan::member_range(index, first).start);
        // A server that sends all that lies before a range is asked once for all that is missing.
        let (around, max) = if self.remotes().ignore_ranges() {
            (u64::MAX, u64::MAX)
        } else if !self.layer().has_room() {
            // It would not be kept, and fetched again when it is read.
            (0, self.engine().options.max_range)
        } else {
            (window.length, self.engine().options.max_range)
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
    fn go_on(self: &Arc<Self>, chunks: &Range<u32>, reading: Reading, planned: Planned) {
        let index = self.layer().index();
        let goes_on = planned.is_contiguous || reading == Reading::Front;
        let goes_on = goes_on && !self.remotes().ignore_ranges() && self.layer().has_room();
        let Some(last) = planned.groups.last().filter(|_| goes_on) else {
            return;
        };
        let file = chunks.end.checked_sub(1).and_then(|chunk| index.chunk(chunk));
        let file = file.and_then(|chunk| index.inode(chunk.ino));
        let file_end = file.and_then(|file| self.end_of(file.chunks.end.checked_sub(1)?));
        let reached = plan::blob_range(index, last).end;
        let until = match file_end {
            Some(end) if end > reached => end,
            _ if planned.window >= self.engine().options.max_range / 2 => u64::MAX,
            Some(_) | None => return,
        };
        if let Some(position) = chunks.end.checked_sub(1).and_then(|chunk| self.end_of(chunk)) {
            self.read_ahead(planned.sequence, position, last.end, until);
        }
    }

    fn count_missing(&self, chunks: &Range<u32>) -> usize {
        let residency = self.layer().residency();
        chunks.clone().filter(|&chunk| !residency.contains(chunk)).count()
    }

    /// The members of those of `chunks` that are not resident, each with the chunks needed of it.
    fn missing_members(&self, chunks: &Range<u32>) -> BTreeMap<u32, Range<u32>> {
        let mut missing: BTreeMap<u32, Range<u32>> = BTreeMap::new();
        for chunk in chunks
            .clone()
            .filter(|&chunk| !self.layer().residency().contains(chunk))
        {
            if let Some(entry) = self.layer().index().chunk(chunk) {
                missing.entry(entry.member).or_insert(chunk..chunk + 1).end = chunk + 1;
            }
        }
        missing
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

    use super::super::flight::Flights;
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
