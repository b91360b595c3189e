//! How the hosts are: who is to be left alone for a while, and how many requests each of them bears.
//!
//! One [`Host`] per name, shared by all layers, so what one layer finds out the others need not. A host that fails is put back,
//! for longer each time; a request that finds another source goes there meanwhile. The number of requests at once grows by one
//! per round of successes and is halved by a host that says it has too much to do, or shows it by its latency.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::layer::source::SourceError;

/// Hosts remembered; beyond it those that nobody uses are forgotten.
const MAX_HOSTS: usize = 256;
/// Time for which a host is put back by its first failure; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest time for which failures put a host back.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Longest time for which a host is left alone because it says so.
const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);
/// Least time between two reductions: requests that fail together say one thing and not many.
const REDUCE_EVERY: Duration = Duration::from_millis(500);
/// An answer that takes this many times as long as the quickest one, and [`SLOW_BY`] longer, shows a queue.
const SLOW_FACTOR: u32 = 4;
/// See [`SLOW_FACTOR`].
const SLOW_BY: Duration = Duration::from_millis(500);
/// What is left of the limit when answers become slow.
const SLOW_SHARE: f64 = 0.75;

/// All hosts.
#[derive(Debug)]
pub(in crate::layer) struct Hosts {
    known: Mutex<HashMap<String, Arc<Host>>>,
    most: usize,
}

impl Hosts {
    /// Hosts with at most `most` requests at once each.
    pub(super) fn new(most: usize) -> Self {
        Self {
            known: Mutex::default(),
            most: most.max(1),
        }
    }

    /// All that are known.
    pub(super) fn all(&self) -> Vec<Arc<Host>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.values().cloned().collect()
    }

    /// The host called `name`.
    pub(super) fn of(&self, name: &str) -> Arc<Host> {
        // Every change is one insert or a removal of whole entries.
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = known.get(name) {
            return host.clone();
        }
        if known.len() >= MAX_HOSTS {
            known.retain(|_, host| Arc::strong_count(host) > 1);
        }
        let host = Arc::new(Host::new(name, self.most));
        if known.len() < MAX_HOSTS {
            known.insert(name.to_owned(), host.clone());
        }
        host
    }
}

/// One host.
#[derive(Debug)]
pub(in crate::layer) struct Host {
    name: String,
    most: usize,
    state: Mutex<State>,
    /// Told when a request ends or the limit grows.
    freed: Notify,
}

#[derive(Debug)]
struct State {
    /// Failures since the last success.
    failures: u32,
    /// When it may be asked again after failures.
    until: Option<Instant>,
    /// When it may be asked again because it said so; no success of a request made before changes that.
    asked_until: Option<Instant>,
    /// Readers who wait until it bears one more request.
    readers: usize,
    /// Requests at once that it seems to bear.
    limit: f64,
    under_way: usize,
    reduced: Option<Instant>,
    /// The quickest answer of late.
    quickest: Option<Duration>,
}

/// The right to one request to a host.
#[derive(Debug)]
pub(super) struct Permit(Arc<Host>);

impl Permit {
    pub(super) fn is_for(&self, host: &Arc<Host>) -> bool {
        Arc::ptr_eq(&self.0, host)
    }

    /// Whether a reader waits for it.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.state().readers > 0
    }
}

/// A reader who waits for a host, counted as long as it lives.
struct Reader<'a>(&'a Host);

impl<'a> Reader<'a> {
    fn new(host: &'a Host) -> Self {
        host.state().readers += 1;
        Self(host)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        {
            let mut state = self.0.state();
            state.readers = state.readers.saturating_sub(1);
        }
        // Those whom it kept away look again.
        self.0.freed.notify_waiters();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        {
            let mut state = self.0.state();
            state.under_way = state.under_way.saturating_sub(1);
        }
        self.0.freed.notify_waiters();
    }
}

impl Host {
    fn new(name: &str, most: usize) -> Self {
        let state = State {
            failures: 0,
            until: None,
            asked_until: None,
            readers: 0,
            limit: bound(most),
            under_way: 0,
            reduced: None,
            quickest: None,
        };
        Self {
            name: name.to_owned(),
            most,
            state: Mutex::new(state),
            freed: Notify::new(),
        }
    }

    pub(in crate::layer) fn name(&self) -> &str {
        &self.name
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Plain numbers, each right by itself.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Failures since the last success.
    pub(super) fn failures(&self) -> u32 {
        self.state().failures
    }

    /// How long it is still to be left alone; nothing if it may be asked now.
    pub(in crate::layer) fn pause(&self) -> Option<Duration> {
        let until = {
            let state = self.state();
            state.until.max(state.asked_until)?
        };
        let left = until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }

    /// The right to one more request, if the host bears it now. What no reader waits for has half of what it bears.
    pub(super) fn try_enter(self: &Arc<Self>, is_demand: bool) -> Option<Permit> {
        let mut state = self.state();
        if !state.has_room(is_demand) {
            return None;
        }
        state.under_way += 1;
        Some(Permit(self.clone()))
    }

    /// Waits until it bears one more request; somebody else may be quicker then.
    pub(super) async fn room(&self, is_demand: bool) {
        let _reader = is_demand.then(|| Reader::new(self));
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            // From here on no end of a request is missed.
            freed.as_mut().enable();
            if self.state().has_room(is_demand) {
                return;
            }
            freed.await;
        }
    }

    /// An answer began after `wait`.
    pub(in crate::layer) fn answered(&self, wait: Duration) {
        let mut state = self.state();
        let quickest = state.quickest.map_or(wait, |quickest| quickest.min(wait));
        // Drifts upwards, so that one lucky answer is not the measure for ever.
        state.quickest = Some(quickest + wait.saturating_sub(quickest) / 64);
        if wait > quickest * SLOW_FACTOR && wait > quickest + SLOW_BY {
            state.reduce(SLOW_SHARE);
        }
    }

    /// A request was answered to its end.
    pub(in crate::layer) fn delivered(&self) {
        {
            let mut state = self.state();
            state.failures = 0;
            state.until = None;
            state.limit = (state.limit + 1.0 / state.limit).min(bound(self.most));
        }
        self.freed.notify_waiters();
    }

    /// A request failed in a way that may pass; whether it is the first one since a success.
    pub(in crate::layer) fn failed(&self, error: &SourceError) -> bool {
        let mut state = self.state();
        state.failures = state.failures.saturating_add(1);
        let now = Instant::now();
        let until = now + jittered(state.failures);
        state.reduce(0.5);
        if let Some(asked) = error.overload().and_then(|overload| overload.retry_after) {
            state.asked_until = state.asked_until.max(Some(now + asked.min(LONGEST_RETRY_AFTER)));
        }
        state.until = state.until.max(Some(until));
        state.failures == 1
    }

    /// A body broke that had brought something: asked again soon, and not counted as a failure.
    pub(super) fn broke_off(&self) {
        let mut state = self.state();
        state.until = state.until.max(Some(Instant::now() + jittered(1)));
    }

    #[cfg(test)]
    pub(super) fn limit(&self) -> f64 {
        self.state().limit
    }
}

impl State {
    fn has_room(&self, is_demand: bool) -> bool {
        let limit = match (is_demand, self.readers) {
            (true, _) => self.limit,
            (false, 0) => (self.limit / 2.0).max(1.0),
            // What is free is for those who wait.
            (false, _) => 0.0,
        };
        bound(self.under_way) + 1.0 <= limit
    }

    fn reduce(&mut self, share: f64) {
        let now = Instant::now();
        if self
            .reduced
            .is_none_or(|before| now.saturating_duration_since(before) >= REDUCE_EVERY)
        {
            self.reduced = Some(now);
            self.limit = (self.limit * share).max(1.0);
        }
    }
}

fn bound(requests: usize) -> f64 {
    f64::from(u32::try_from(requests).unwrap_or(u32::MAX))
}

/// Half of the doubled pause, plus up to as much again by chance, so that clients of a failing server drift apart.
fn jittered(failures: u32) -> Duration {
    let doubled = FIRST_PAUSE
        .saturating_mul(1 << failures.saturating_sub(1).min(10))
        .min(LONGEST_PAUSE);
    // A fresh `RandomState` is keyed by the process's random source; no more is asked of it here.
    let chance = RandomState::new().build_hasher().finish() % 1024;
    doubled / 2 + doubled.mul_f64(f64::from(u32::try_from(chance).unwrap_or(0)) / 2048.0)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;
    use crate::layer::source::Overload;

    fn busy(seconds: u64) -> SourceError {
        SourceError::Transient {
            what: "429".to_owned(),
            load: Some(Overload {
                retry_after: Some(Duration::from_secs(seconds)),
            }),
            cause: None,
        }
    }

    #[test]
    fn pauses_grow_to_their_limit_and_vary() {
        for (failures, most) in [(0, 50), (1, 50), (2, 100), (5, 800), (7, 2000), (u32::MAX, 2000)] {
            let most = Duration::from_millis(most);
            let pauses: Vec<Duration> = (0..32).map(|_| jittered(failures)).collect();
            assert!(
                pauses.iter().all(|pause| (most / 2..=most).contains(pause)),
                "{failures}: {pauses:?}"
            );
            assert!(pauses.iter().any(|pause| pause != &pauses[0]));
        }
    }

    #[test]
    fn a_host_is_left_alone_as_long_as_it_says_and_its_health_is_one_for_all() {
        let hosts = Hosts::new(16);
        let (one, same) = (hosts.of("a.test"), hosts.of("a.test"));
        assert!(one.pause().is_none());
        one.failed(&busy(30));
        let pause = same.pause().unwrap();
        assert!(Duration::from_secs(29) < pause && pause <= Duration::from_secs(30));
        // A shorter pause takes nothing from a longer one.
        one.failed(&SourceError::transient("cut"));
        assert!(one.pause().unwrap() > Duration::from_secs(29));
        one.failed(&busy(100_000));
        assert!(one.pause().unwrap() <= LONGEST_RETRY_AFTER);
        // Nor does a success of a request that was made before it said so.
        one.delivered();
        assert!(same.pause().is_some());
        let other = hosts.of("b.test");
        assert!(other.pause().is_none());
        other.failed(&SourceError::transient("cut"));
        assert!(other.pause().is_some());
        other.delivered();
        assert!(other.pause().is_none());
    }

    #[test]
    fn requests_at_once_are_halved_and_grow_again() {
        let host = Hosts::new(16).of("a.test");
        host.failed(&busy(0));
        host.failed(&busy(0));
        assert!((host.limit() - 8.0).abs() < 0.01, "failures together count once");
        for _ in 0..9 {
            host.delivered();
        }
        assert!((8.9..10.0).contains(&host.limit()), "{}", host.limit());
        for _ in 0..1000 {
            host.delivered();
        }
        assert!((host.limit() - 16.0).abs() < 0.01);
        host.state().reduced = None;
        host.answered(Duration::from_millis(20));
        host.answered(Duration::from_millis(900));
        assert!(host.limit() < 12.1);
    }

    #[test]
    fn a_full_host_admits_the_next_when_one_ends_and_readers_have_half_of_it_for_themselves() {
        let host = Hosts::new(4).of("a.test");
        let ahead: Vec<_> = (0..2).map(|_| host.try_enter(false).unwrap()).collect();
        assert!(host.try_enter(false).is_none());
        let demand: Vec<_> = (0..2).map(|_| host.try_enter(true).unwrap()).collect();
        assert!(host.try_enter(true).is_none());
        let mut waiting = Box::pin(host.room(true));
        assert!(waiting.as_mut().now_or_never().is_none());
        let first = ahead.into_iter().next().unwrap();
        assert!(first.is_wanted());
        drop(first);
        assert!(host.try_enter(false).is_none(), "what is free is the reader's");
        drop(demand);
        assert!(waiting.as_mut().now_or_never().is_some());
        drop(waiting);
        assert!(
            host.try_enter(true)
                .is_some_and(|permit| permit.is_for(&host) && !permit.is_wanted())
        );
    }

    #[test]
    fn names_without_users_are_forgotten() {
        let hosts = Hosts::new(1);
        let kept = hosts.of("kept.test");
        for number in 0..3 * MAX_HOSTS {
            hosts.of(&format!("host{number}.test"));
        }
        assert!(hosts.known.lock().unwrap().len() <= MAX_HOSTS);
        assert!(Arc::ptr_eq(&kept, &hosts.of("kept.test")));
    }
}
