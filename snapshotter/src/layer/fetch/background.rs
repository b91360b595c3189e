//! Background completion: the rest of a mounted layer, when nobody else wants the network.
//!
//! One task for each layer that is not complete; the gate admits two requests of all of them together, in turn, so no layer waits
//! for another to be complete. It goes through the blob in order, in requests of a megabyte and more, and waits before each of
//! them while a reader's request is under way. What it fetched stays, so a task that ends early (a restart, an unmount) is gone on with.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::error::{Failure, FetchError};
use super::flight::{Claim, Progress, Urgency};
use super::gate::Lane;
use super::group::{self, Group};
use super::layer::LayerFetch;
use super::plan;
use super::tally::BackgroundState;
use crate::config::FetchConfig;
use crate::metrics::Metrics;

/// Longest request: what a reader may have to wait for if it wants the last of it.
const MOST: u64 = 4 << 20;
/// Shortest request, where the bandwidth is capped.
const LEAST: u64 = 1 << 20;
/// Pause before what was on its way for others is looked at again.
const OTHERS: Duration = Duration::from_millis(200);
/// Pause before it is looked again whether there is room.
const NO_ROOM: Duration = Duration::from_secs(5);
/// Pause after the first failure; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause after failures.
const LONGEST_PAUSE: Duration = Duration::from_secs(120);
/// Passes that brought nothing and left nothing on its way: what is missing then cannot be had.
const MAX_FRUITLESS_PASSES: u32 = 4;

/// How the rest of mounted layers is fetched.
#[derive(Debug, Clone, Copy)]
pub struct Completion {
    /// Whether it is.
    pub enabled: bool,
    /// Bytes per second, all layers together; 0 for no cap.
    pub bandwidth: u64,
    /// How long after the mount it begins.
    pub delay: Duration,
    /// How long it waits for readers.
    pub deadline: Duration,
}

impl Completion {
    /// What the configuration says.
    pub(super) fn new(config: &FetchConfig) -> Self {
        Self {
            enabled: config.background,
            bandwidth: config.background_bandwidth.bytes(),
            delay: config.background_delay,
            deadline: config.background_deadline,
        }
    }

    /// Length of one request: a second's worth, where there is a cap.
    fn range(&self) -> u64 {
        match self.bandwidth {
            0 => MOST,
            rate => rate.clamp(LEAST, MOST),
        }
    }
}

/// A layer that is being completed, in the gauge as long as it lives.
struct Counted(Metrics);

impl Counted {
    fn new(metrics: &Metrics) -> Self {
        metrics.background_layers.inc();
        Self(metrics.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.background_layers.dec();
    }
}

/// What one request came to.
enum Outcome {
    /// It was made; where the next one begins.
    Went(u32),
    /// Nothing from there on is free.
    Nothing,
}

impl LayerFetch {
    /// Begins to complete the layer in the background, if that is wanted and not under way.
    pub fn start_background(self: &Arc<Self>) {
        if self.layer().residency().is_complete() {
            self.counts().background(BackgroundState::Complete);
            return;
        }
        if !self.engine().options.completion.enabled || !self.claim_background() {
            return;
        }
        let fetch = self.clone();
        self.counts().background(BackgroundState::Waiting);
        let counted = Counted::new(&self.engine().metrics);
        self.spawn(async move {
            let counted = counted;
            tokio::time::sleep(fetch.engine().options.completion.delay).await;
            let state = fetch.complete().await;
            drop(counted);
            fetch.end_background();
            fetch.counts().background(state);
            if state == BackgroundState::Complete {
                fetch.checkpoint().await;
            }
        });
    }

    /// Fetches until all is there that can be had.
    async fn complete(self: &Arc<Self>) -> BackgroundState {
        let completion = self.engine().options.completion;
        let patient_until = Instant::now() + completion.deadline;
        let (mut next, mut failures, mut fruitless) = (0, 0u32, 0);
        let mut left = self.missing().count();
        loop {
            self.engine().pace.free().await;
            while !self.layer().has_room() {
                self.counts().background(BackgroundState::Paused);
                tokio::time::sleep(NO_ROOM).await;
            }
            match self.fetch_hole(next, patient_until).await {
                Ok(Outcome::Went(end)) => {
                    next = end;
                    failures = 0;
                }
                Ok(Outcome::Nothing) => {
                    let now = self.missing().count();
                    if now == 0 {
                        return BackgroundState::Complete;
                    }
                    let flies = self.missing().any(|member| self.flights().hold().contains(member));
                    fruitless = if now < left || flies { 0 } else { fruitless + 1 };
                    if fruitless >= MAX_FRUITLESS_PASSES {
                        return BackgroundState::GaveUp;
                    }
                    left = now;
                    next = 0;
                    tokio::time::sleep(OTHERS).await;
                }
                Err(failure) => {
                    failures += 1;
                    self.counts().background(BackgroundState::Paused);
                    tracing::debug!(dir = %self.layer().dir().display(), error = &*failure as &dyn std::error::Error, failures, "background completion pauses");
                    let doubled = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
                    tokio::time::sleep(doubled.min(LONGEST_PAUSE)).await;
                }
            }
            self.counts().background(BackgroundState::Waiting);
        }
    }

    /// One request for what is missing from member `next` on; an error if the next one would fail in the same way.
    async fn fetch_hole(self: &Arc<Self>, next: u32, patient_until: Instant) -> Result<Outcome, Failure> {
        // The slot comes first: claims that wait for one would keep readers waiting.
        let lane = Lane::Background { patient_until };
        let slot = self.enter(&lane, &Urgency::default()).await;
        let Some((group, end)) = self.claim_hole(next, lane) else {
            return Ok(Outcome::Nothing);
        };
        self.counts().background(BackgroundState::Running);
        let progress: Vec<_> = group.claims.iter().map(Claim::progress).collect();
        group::run(self.clone(), group, slot).await;
        let lasting = progress.iter().find_map(|progress| match &*progress.borrow() {
            Progress::Settled(Err(failure)) if !matches!(**failure, FetchError::Corrupt { .. }) => {
                Some(failure.clone())
            }
            Progress::Settled(_) | Progress::Pending | Progress::Partial => None,
        });
        lasting.map_or(Ok(Outcome::Went(end)), Err)
    }

    fn claim_hole(&self, from: u32, lane: Lane) -> Option<(Group, u32)> {
        let mut flights = self.flights().hold();
        let free = |member: u32| !flights.contains(member) && self.is_missing(member);
        let most = if self.remotes().ignore_ranges() {
            u64::MAX
        } else {
            self.engine().options.completion.range()
        };
        let members = plan::holes(self.layer().index(), from, free, most)?;
        let (first, end) = (*members.first()?, members.last()? + 1);
        let bytes = plan::blob_range(self.layer().index(), &(first..end));
        self.engine().pace.take(bytes.end - bytes.start);
        let urgency = Urgency::default();
        let claims = members.into_iter().filter_map(|member| flights.claim(member, &urgency));
        let claims = claims.collect();
        Some((Group::new(self, claims, lane, urgency), end))
    }

    fn missing(&self) -> impl Iterator<Item = u32> {
        (0..self.layer().index().member_count()).filter(|&member| self.is_missing(member))
    }
}
