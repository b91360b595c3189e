//! Reading ahead of a sequence: the ranges behind the last miss are fetched before the reader comes to them.
//!
//! A sequence that is recognised gets a task of its own. It asks for the next range when so little of the last ones is still to come
//! that the link would stand still for a round trip otherwise; not earlier, since what comes at once comes late: the reader waits for
//! the first of it. It stays a bounded distance ahead of the reader: short at first, longer the further the reader came. It ends with
//! the file, or when the reader stops. What it fetches it claims like everybody else, so a reader who catches up waits for that very
//! request.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;

use super::flight::Urgency;
use super::gate::Lane;
use super::group::Group;
use super::layer::LayerFetch;
use super::plan;
use super::sequence::Sequence;

/// Requests of one sequence on their way at once.
const PIPELINE: usize = 4;
/// Length of one of them: chunks of 2 MiB together, and what they have more where they do not compress.
const RANGE: u64 = (2 << 20) + (64 << 10);
/// How far ahead of its reader a sequence is fetched at first.
const LEAST_REACH: u64 = 4 << 20;
/// How far at most; claims and cache beyond it would be a guess.
const MOST_REACH: u64 = 16 << 20;
/// With so many bytes still to come the next ones are asked for: what a link of 1 Gbit/s carries in a round trip of 20 ms, and a
/// little more. Doubled as often as the link stood still.
const LEAST_COMING: u64 = 3 << 20;
/// Sequences of one layer that are read ahead at once.
const MAX_PIPES: usize = 4;
/// Time without a step of the reader after which it has stopped.
const IDLE: Duration = Duration::from_secs(2);

/// The sequences of one layer that are read ahead.
#[derive(Default)]
pub(super) struct Pipes {
    /// Looked at by every read, so that those of a layer without sequences cost nothing.
    count: AtomicUsize,
    list: Mutex<Vec<Arc<Pipe>>>,
}

/// One sequence that is read ahead.
struct Pipe {
    sequence: Sequence,
    began: u64,
    /// Where in the blob the member ends that the reader is in.
    reader: watch::Sender<u64>,
    /// Up to where it was asked for.
    end: AtomicU64,
}

/// Takes a pipe out of the list, however its task ends.
struct Listed {
    fetch: Arc<LayerFetch>,
    pipe: Arc<Pipe>,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let end = self.pipe.end.load(Ordering::Acquire);
        self.fetch.went_on(&self.pipe.sequence, end);
        self.fetch
            .pipes()
            .change(|list| list.retain(|pipe| !Arc::ptr_eq(pipe, &self.pipe)));
    }
}

impl Pipes {
    /// Tells that a reader is at `position` of the blob.
    pub(super) fn advance(&self, position: impl FnOnce() -> Option<u64>) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let Some(position) = position() else { return };
        let list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        for pipe in list.iter() {
            if (pipe.began..=pipe.end.load(Ordering::Acquire)).contains(&position) {
                pipe.reader.send_if_modified(|reader| {
                    let moved = position > *reader;
                    *reader = position.max(*reader);
                    moved
                });
            }
        }
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Pipe>>)) {
        // Every change is one push or removal.
        let mut list = self.list.lock().unwrap_or_else(PoisonError::into_inner);
        change(&mut list);
        self.count.store(list.len(), Ordering::Release);
    }

    /// Lists a pipe, unless its sequence has one or there are enough.
    fn add(&self, pipe: &Arc<Pipe>) -> bool {
        let mut added = false;
        self.change(|list| {
            let known = list.iter().any(|other| other.sequence.is(&pipe.sequence));
            if !known && list.len() < MAX_PIPES {
                list.push(pipe.clone());
                added = true;
            }
        });
        added
    }
}

impl LayerFetch {
    /// Reads ahead of a sequence whose last miss is fetched up to member `from`, at most up to `until` in the blob.
    pub(super) fn read_ahead(self: &Arc<Self>, sequence: Sequence, position: u64, from: u32, until: u64) {
        let pipe = Arc::new(Pipe {
            sequence,
            began: position,
            reader: watch::Sender::new(position),
            end: AtomicU64::new(plan::member_range(self.layer().index(), from).start.max(position)),
        });
        if self.pipes().add(&pipe) {
            let (fetch, listed) = (
                self.clone(),
                Listed {
                    fetch: self.clone(),
                    pipe: pipe.clone(),
                },
            );
            self.spawn(async move {
                let _listed = listed;
                fetch.pipe(&pipe, from, until).await;
            });
        }
    }

    async fn pipe(self: &Arc<Self>, pipe: &Pipe, mut next: u32, until: u64) {
        let (mut reader, mut coming) = (pipe.reader.subscribe(), pipe.sequence.coming());
        let mut requests = JoinSet::new();
        let mut enough = LEAST_COMING;
        // The first request of all comes alone.
        let mut made = 0;
        loop {
            let position = *reader.borrow_and_update();
            let reach = (2 * (position - pipe.began)).clamp(LEAST_REACH, MOST_REACH);
            let is_far = pipe.end.load(Ordering::Acquire) >= position.saturating_add(reach);
            if pipe.sequence.was_idle() && made > 1 {
                enough = (2 * enough).min(MOST_REACH);
            }
            let is_full = requests.len() >= PIPELINE;
            let is_coming = *coming.borrow_and_update() > enough;
            if is_far || is_full || is_coming {
                tokio::select! {
                    moved = tokio::time::timeout(IDLE, reader.changed()) => match moved {
                        Ok(Ok(())) => {}
                        // A reader who waits for what is on its way does not move either.
                        Err(_) if !requests.is_empty() || *coming.borrow() > 0 => {}
                        Ok(Err(_)) | Err(_) => break,
                    },
                    Ok(()) = async { coming.wait_for(|coming| *coming <= enough).await.map(drop) }, if is_coming && !is_full && !is_far => {}
                    Some(_) = requests.join_next() => {}
                }
                continue;
            }
            made += 1;
            let Some((group, end)) = self.claim_ahead(&pipe.sequence, next, until) else {
                break;
            };
            next = end;
            let reached = plan::blob_range(self.layer().index(), &(0..end)).end;
            pipe.end.store(reached, Ordering::Release);
            let fetch = self.clone();
            requests.spawn(group.fetch(fetch));
        }
        while requests.join_next().await.is_some() {}
    }

    /// Claims the next range of a sequence; and the member behind it.
    fn claim_ahead(&self, sequence: &Sequence, from: u32, until: u64) -> Option<(Group, u32)> {
        let mut flights = self.flights().hold();
        let free = |member: u32| !flights.contains(member) && self.is_missing(member);
        let most = RANGE.min(self.engine().options.max_range);
        let members = plan::run(self.layer().index(), from, until, free, most)?;
        let urgency = Urgency::default();
        let claims = members
            .clone()
            .filter_map(|member| flights.claim(member, &urgency))
            .collect();
        let lane = Lane::Ahead(sequence.clone());
        Some((Group::new(self, claims, lane, urgency), members.end))
    }
}
