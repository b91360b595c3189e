//! How often and after what wait a failed request is tried again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use crate::limits::MAX_RETRY_AFTER;

/// Bounded exponential back-off with full jitter.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Attempts altogether, at least one is made.
    pub attempts: u32,
    /// Upper bound of the first wait; it doubles with each attempt.
    pub first: Duration,
    /// Upper bound of any wait.
    pub longest: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            attempts: 5,
            first: Duration::from_millis(200),
            longest: Duration::from_secs(10),
        }
    }
}

impl RetryPolicy {
    /// The wait after failed attempt number `attempt` (from 0); a server's `Retry-After` is a lower bound for it.
    pub(crate) fn wait(&self, attempt: u32, retry_after: Option<Duration>) -> Duration {
        let ceiling = self
            .first
            .saturating_mul(1_u32.checked_shl(attempt).unwrap_or(u32::MAX))
            .min(self.longest);
        jittered(ceiling).max(retry_after.unwrap_or_default().min(MAX_RETRY_AFTER))
    }
}

/// Half of a wait and a random part of the other: clients that failed together do not come back together.
pub(crate) fn jittered(ceiling: Duration) -> Duration {
    let random = RandomState::new().hash_one(ceiling) % 1024;
    ceiling / 2 + (ceiling / 2).mul_f64(random as f64 / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_within_their_bounds() {
        let policy = RetryPolicy::default();
        for attempt in 0..70 {
            let wait = policy.wait(attempt, None);
            let ceiling = Duration::from_millis(200)
                .saturating_mul(1 << attempt.min(20))
                .min(policy.longest);
            assert!(wait >= ceiling / 2 && wait <= ceiling, "{attempt}: {wait:?}");
        }
        assert_eq!(policy.wait(0, Some(Duration::from_secs(7))), Duration::from_secs(7));
        assert_eq!(policy.wait(0, Some(Duration::from_secs(7000))), MAX_RETRY_AFTER);
    }
}
