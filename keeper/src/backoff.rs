//! When a program that ended is started again.

use std::time::Duration;

/// Pause before the first new start.
const FIRST: Duration = Duration::from_millis(20);

/// The longest pause.
const LONGEST: Duration = Duration::from_secs(5);

/// A program that said it was ready and ran this long had a good start.
const READY_RUN: Duration = Duration::from_millis(100);

/// A program that ran this long had a good start, whatever it said.
const SILENT_RUN: Duration = Duration::from_secs(10);

/// Doubles the pause with each bad start in a row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Backoff {
    failures: u32,
}

impl Backoff {
    /// With this many bad starts behind it.
    #[must_use]
    pub fn after(failures: u32) -> Self {
        Self { failures }
    }

    /// Bad starts in a row.
    #[must_use]
    pub fn failures(self) -> u32 {
        self.failures
    }

    /// The pause after a program that `ran` so long, and said that it was `ready` or did not.
    pub fn pause(&mut self, ran: Duration, ready: bool) -> Duration {
        if ran >= SILENT_RUN || ready && ran >= READY_RUN {
            self.failures = 0;
        }
        let pause = FIRST.saturating_mul(1 << self.failures.min(16)).min(LONGEST);
        self.failures = self.failures.saturating_add(1);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_begin_anew_after_a_good_start() {
        let mut backoff = Backoff::default();
        let pauses: Vec<_> = (0..40).map(|_| backoff.pause(Duration::ZERO, true)).collect();
        assert_eq!(pauses[..3], [FIRST, FIRST * 2, FIRST * 4]);
        assert!(pauses.is_sorted() && pauses[39] == LONGEST, "{pauses:?}");
        assert_eq!(backoff.pause(READY_RUN, false), LONGEST);
        assert_eq!(backoff.pause(READY_RUN, true), FIRST);
        assert_eq!(backoff.pause(Duration::ZERO, false), FIRST * 2);
        assert_eq!(backoff.pause(SILENT_RUN, false), FIRST);
        assert_eq!(Backoff::after(u32::MAX).pause(Duration::ZERO, false), LONGEST);
    }
}
