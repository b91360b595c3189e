//! When a hull may be made: not while pods start, not at once after a failure.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Starts that are followed at once; more are as good as this many.
const MAX_STARTS: usize = 1024;

/// The first wait after a failed creation, and the longest.
const BACKOFF_FIRST: Duration = Duration::from_millis(500);
const BACKOFF_LONGEST: Duration = Duration::from_secs(120);

/// A hull that dies younger is a failure: somebody, or the lack of something, kills them.
const PROVEN_AGE: Duration = Duration::from_secs(30);

/// Pods that are starting, whoever makes their sandboxes.
#[derive(Debug)]
pub(super) struct Starts {
    limit: Duration,
    under_way: HashMap<String, Instant>,
    last_ended: Option<Instant>,
}

impl Starts {
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            under_way: HashMap::new(),
            last_ended: None,
        }
    }

    pub(super) fn begin(&mut self, sandbox: &str, now: Instant) {
        self.expire(now);
        if self.under_way.len() < MAX_STARTS {
            self.under_way.insert(sandbox.to_owned(), now);
        }
    }

    pub(super) fn end(&mut self, sandbox: &str, now: Instant) {
        self.under_way.remove(sandbox);
        self.last_ended = Some(now);
    }

    /// It is no start after all.
    pub(super) fn forget(&mut self, sandbox: &str) {
        self.under_way.remove(sandbox);
    }

    /// Pods start that have no name here: no hull was there for one.
    pub(super) fn stir(&mut self, now: Instant) {
        self.last_ended = Some(now);
    }

    fn expire(&mut self, now: Instant) {
        let limit = self.limit;
        self.under_way
            .retain(|_, began| now.saturating_duration_since(*began) < limit);
    }

    /// When it will be quiet, as far as is known: `now` or earlier if it is.
    pub(super) fn quiet_at(&mut self, now: Instant, quiet: Duration) -> Instant {
        self.expire(now);
        let ends = self.under_way.values().map(|began| *began + self.limit).max();
        let after = self.last_ended.map(|ended| ended + quiet);
        ends.max(after).unwrap_or(now)
    }
}

/// Failures in a row: hulls that were not made, or that did not live. One that was made proves nothing yet; one that was
/// adopted or has lived for [`PROVEN_AGE`] does.
#[derive(Debug, Default)]
pub(super) struct Backoff {
    failures: u32,
    reason: Option<String>,
    /// The last failure was a hull's death.
    died: bool,
    failed_at: Option<Instant>,
    until: Option<Instant>,
}

impl Backoff {
    /// A hull has proven that they live.
    pub(super) fn succeeded(&mut self) {
        *self = Self::default();
    }

    /// A hull was made. That ends a failure to make one, as far as people are told.
    pub(super) fn made(&mut self) {
        if !self.died {
            self.reason = None;
        }
    }

    /// A hull that was born then is gone though nobody wanted it to be. Dead young, it is a failure.
    pub(super) fn died(&mut self, born: Instant, jitter: u8, now: Instant) {
        let age = now.saturating_duration_since(born);
        if age < PROVEN_AGE {
            self.failed(format!("a hull lived for {:.1} s only", age.as_secs_f64()), jitter, now);
            self.died = true;
        }
    }

    /// There is a hull that was born then and lives.
    pub(super) fn lives(&mut self, born: Instant, now: Instant) {
        let is_old = now.saturating_duration_since(born) >= PROVEN_AGE;
        if is_old && self.failed_at.is_some_and(|failed| born > failed) {
            self.succeeded();
        }
    }

    /// When the last of the failures was.
    pub(super) fn failed_at(&self) -> Option<Instant> {
        self.failed_at
    }

    /// `jitter` is from 0 to 255; it takes up to half of the wait away, so that nodes that fail together do not retry
    /// together.
    pub(super) fn failed(&mut self, reason: String, jitter: u8, now: Instant) {
        let wait = BACKOFF_FIRST
            .saturating_mul(1u32.checked_shl(self.failures.min(16)).unwrap_or(u32::MAX))
            .min(BACKOFF_LONGEST);
        self.failures = self.failures.saturating_add(1);
        self.until = Some(now + wait - wait.mul_f64(f64::from(jitter) / 512.0));
        self.reason = Some(reason);
        self.died = false;
        self.failed_at = Some(now);
    }

    /// Until when nothing is tried.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// Reason of the last failure, and how many there were.
    pub(super) fn failure(&self) -> Option<(&str, u32)> {
        self.reason.as_deref().map(|reason| (reason, self.failures))
    }
}

/// What stands between a shortage and the next creation.
#[derive(Debug, Clone, Copy)]
pub(super) struct Obstacles {
    /// Since when hulls have been missing, or when the last one was made if that is later.
    pub(super) short_since: Instant,
    /// The shortage does not wait for quiet longer than this.
    pub(super) patience: Duration,
    pub(super) quiet_at: Instant,
    /// The last creation began, and how far apart creations are.
    pub(super) last: Option<Instant>,
    pub(super) interval: Duration,
    /// After failures.
    pub(super) backoff: Option<Instant>,
    /// Kept from making any.
    pub(super) held: Option<Instant>,
}

impl Obstacles {
    /// When a hull may be made. Under load that does not end, quiet never comes: then it is when patience ends.
    pub(super) fn due(&self) -> Instant {
        let quiet = self.quiet_at.min(self.short_since + self.patience);
        let paced = self.last.map(|last| last + self.interval);
        [paced, self.backoff, self.held]
            .into_iter()
            .flatten()
            .fold(quiet, Instant::max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn starts_are_waited_for_within_their_limit() {
        let now = Instant::now();
        let quiet = Duration::from_secs(1);
        let mut starts = Starts::new(Duration::from_secs(10));
        assert_eq!(starts.quiet_at(now, quiet), now);
        starts.begin("a", now);
        assert_eq!(starts.quiet_at(now, quiet), now + Duration::from_secs(10));
        assert!(starts.quiet_at(now + Duration::from_secs(10), quiet) <= now + Duration::from_secs(10));
        starts.begin("b", now);
        starts.end("b", now + quiet);
        assert_eq!(starts.quiet_at(now + quiet, quiet), now + 2 * quiet);
    }

    #[test]
    fn patience_ends_the_wait_for_quiet_but_no_other() {
        let now = Instant::now();
        let second = Duration::from_secs(1);
        let obstacles = Obstacles {
            short_since: now,
            patience: second,
            quiet_at: now + 10 * second,
            last: None,
            interval: second,
            backoff: None,
            held: None,
        };
        assert_eq!(obstacles.due(), now + second);
        let quiet = Obstacles {
            quiet_at: now,
            ..obstacles
        };
        assert_eq!(quiet.due(), now);
        let paced = Obstacles {
            last: Some(now),
            ..quiet
        };
        assert_eq!(paced.due(), now + second);
        let failed = Obstacles {
            backoff: Some(now + 20 * second),
            ..obstacles
        };
        assert_eq!(failed.due(), now + 20 * second);
        let held = Obstacles {
            held: Some(now + 30 * second),
            ..failed
        };
        assert_eq!(held.due(), now + 30 * second);
    }

    #[test]
    fn waits_double_up_to_their_limit_and_end_with_success() {
        let now = Instant::now();
        let mut backoff = Backoff::default();
        let mut last = Duration::ZERO;
        for attempt in 0..40 {
            backoff.failed("no".into(), 0, now);
            let wait = backoff.until().unwrap() - now;
            assert!(wait >= last && wait <= BACKOFF_LONGEST, "{attempt}: {wait:?}");
            last = wait;
        }
        assert_eq!(last, BACKOFF_LONGEST);
        backoff.failed("no".into(), 255, now);
        assert!(backoff.until().unwrap() - now > BACKOFF_LONGEST / 2 - Duration::from_secs(1));
        assert_eq!(backoff.failure(), Some(("no", 41)));
        backoff.succeeded();
        assert_eq!((backoff.until(), backoff.failure()), (None, None));
    }

    #[test]
    fn hulls_that_die_young_are_failures_though_each_was_made() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        for deaths in 1..=12 {
            let born = now;
            backoff.made();
            now += Duration::from_secs(2);
            backoff.died(born, 0, now);
            assert_eq!(backoff.failure(), Some(("a hull lived for 2.0 s only", deaths)));
            now = backoff.until().unwrap();
        }
        let last = backoff.failed_at().unwrap();
        assert_eq!(now, last + BACKOFF_LONGEST);
        // One from before the last failure proves nothing.
        backoff.lives(last, now);
        assert!(backoff.failure().is_some());
        backoff.lives(now, now + PROVEN_AGE - Duration::from_secs(1));
        assert!(backoff.failure().is_some());
        backoff.lives(now, now + PROVEN_AGE);
        assert_eq!((backoff.until(), backoff.failure()), (None, None));
        // An old one may die.
        backoff.died(now, 0, now + PROVEN_AGE);
        assert_eq!(backoff.until(), None);
        // The next that is made ends a failure to make one, but waits go on doubling.
        backoff.failed("no".into(), 0, now);
        backoff.made();
        assert_eq!(backoff.failure(), None);
        backoff.failed("no".into(), 0, now);
        assert_eq!(backoff.until(), Some(now + 2 * BACKOFF_FIRST));
    }
}
