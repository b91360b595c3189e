//! Streams what nobody waits for, behind the readers' backs: what the image's maker put first, and what is to be warm.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::{JoinError, JoinSet};

use super::error::{Failure, FetchError};
use super::flight::{Claim, Progress, Urgency};
use super::gate::Lane;
use super::group::{self, Group};
use super::layer::LayerFetch;
use super::plan;

/// Requests under way at once: the second is asked for while the first arrives, so no round trip is waited for.
const PIPELINE: usize = 2;
/// Pause before what was on its way for others is looked at again.
const OTHERS: Duration = Duration::from_millis(100);
/// Pause before it is looked again whether there is room for what nobody waits for.
const NO_ROOM: Duration = Duration::from_secs(5);
/// Passes that brought nothing and left nothing on its way; more would hide a fault.
const MAX_FRUITLESS_PASSES: u32 = 4;

/// How much of a stretch of the layer is resident, in bytes of file content.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Extent {
    /// All of it.
    pub wanted: u64,
    /// What is resident.
    pub resident: u64,
}

impl LayerFetch {
    /// Starts to fetch the layer's prioritized files, if it has any and they are not resident; in order, in the background.
    pub fn start_prefetch(self: &Arc<Self>) {
        if let Some(until) = self.layer().index().prefetch_end() {
            let fetch = self.clone();
            self.spawn(async move {
                // What fails was logged, and is asked for again by whoever reads it.
                let _ = fetch.stream(until, &Lane::Prefetch).await;
            });
        }
    }

    /// Makes resident all that begins before `until` in the blob, in order, when nobody else wants the network. What came stays if
    /// the future is dropped.
    pub async fn warm(self: &Arc<Self>, until: u64) -> Result<(), Failure> {
        let work = async {
            let mut fruitless = 0;
            loop {
                let before = self.missing_before(until).count();
                self.clone().stream(until, &Lane::Warm).await?;
                let (mut left, mut under_way) = (0, false);
                for member in self.missing_before(until) {
                    left += 1;
                    under_way |= self.flights().hold().contains(member);
                }
                if left == 0 {
                    return Ok(());
                }
                fruitless = if left < before || under_way { 0 } else { fruitless + 1 };
                if fruitless == MAX_FRUITLESS_PASSES {
                    return Err(Arc::new(FetchError::Abandoned));
                }
                tokio::time::sleep(OTHERS).await;
            }
        };
        let closed = Err(Arc::new(FetchError::Abandoned));
        self.while_open(work).await.unwrap_or(closed)
    }

    /// How much of what begins before `until` in the blob is resident.
    pub fn extent(&self, until: u64) -> Extent {
        let index = self.layer().index();
        let mut extent = Extent::default();
        let members = (0..index.member_count()).map_while(|member| index.member(member));
        for chunk in members
            .take_while(|member| member.start < until)
            .flat_map(|member| member.chunks)
        {
            let size = index.chunk(chunk).map_or(0, |chunk| u64::from(chunk.size));
            extent.wanted += size;
            if self.layer().residency().contains(chunk) {
                extent.resident += size;
            }
        }
        extent
    }

    fn missing_before(&self, until: u64) -> impl Iterator<Item = u32> {
        let index = self.layer().index();
        let before_end = move |member: &u32| index.member(*member).is_some_and(|member| member.start < until);
        (0..index.member_count())
            .take_while(before_end)
            .filter(|member| self.is_missing(*member))
    }

    /// One pass over what is free before `until`; ends early where going on is of no use.
    async fn stream(self: Arc<Self>, until: u64, lane: &Lane) -> Result<(), Failure> {
        let mut requests = JoinSet::new();
        let mut failed = None;
        let mut next = 0;
        loop {
            if requests.len() >= PIPELINE {
                note(&mut failed, requests.join_next().await);
            }
            if failed.as_deref().is_some_and(is_lasting) {
                break;
            }
            while matches!(lane, Lane::Prefetch) && !self.layer().has_room() {
                tokio::time::sleep(NO_ROOM).await;
            }
            // The slot comes first: claims that wait for one would keep readers waiting.
            let fetch = self.clone();
            let lane = lane.clone();
            let (send, started) = tokio::sync::oneshot::channel();
            requests.spawn(async move {
                let slot = fetch.enter(&lane, &Urgency::default()).await;
                let claimed = fetch.claim_run(next, until, lane);
                // The receiver is gone only when the whole stream is.
                let _ = send.send(claimed.as_ref().map(|(_, members)| members.end));
                let Some((group, _)) = claimed else { return Ok(()) };
                let progress: Vec<_> = group.claims.iter().map(Claim::progress).collect();
                group::run(fetch, group, slot).await;
                progress.iter().try_for_each(|progress| match &*progress.borrow() {
                    Progress::Settled(result) => result.clone(),
                    Progress::Pending | Progress::Partial => Ok(()),
                })
            });
            match started.await {
                Ok(Some(end)) => next = end,
                Ok(None) | Err(_) => break,
            }
        }
        while let Some(ended) = requests.join_next().await {
            note(&mut failed, Some(ended));
        }
        failed.map_or(Ok(()), Err)
    }

    /// Claims the next stretch of members before `until`.
    fn claim_run(&self, from: u32, until: u64, lane: Lane) -> Option<(Group, Range<u32>)> {
        let mut flights = self.flights().hold();
        let free = |member: u32| !flights.contains(member) && self.is_missing(member);
        // A server that sends all that lies before a range is asked once for all of it.
        let most = if self.remotes().ignore_ranges() {
            u64::MAX
        } else {
            self.engine().options.prefetch_range
        };
        let members = plan::run(self.layer().index(), from, until, free, most)?;
        let urgency = Urgency::default();
        let claims = members
            .clone()
            .filter_map(|member| flights.claim(member, &urgency))
            .collect();
        Some((Group::new(self, claims, lane, urgency), members))
    }
}

/// Whether the next stretch would fail in the same way; a wrong chunk says nothing of its neighbours.
fn is_lasting(failure: &FetchError) -> bool {
    match failure {
        FetchError::Source { .. } | FetchError::Store(_) | FetchError::Deadline { .. } | FetchError::Abandoned => true,
        FetchError::Corrupt { .. } => false,
    }
}

/// Keeps the first failure, or the first that lasts.
fn note(failed: &mut Option<Failure>, ended: Option<Result<Result<(), Failure>, JoinError>>) {
    if let Some(Ok(Err(failure))) = ended
        && (failed.is_none() || is_lasting(&failure))
    {
        *failed = Some(failure);
    }
}
