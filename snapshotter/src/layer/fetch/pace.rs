//! Bytes per second: what is taken now is paid for by waiting before more is taken.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// A rate that several tasks keep together.
#[derive(Debug)]
pub(super) struct Pace {
    /// Bytes per second; 0 for no limit.
    rate: u64,
    /// When what was taken is paid for.
    free_at: Mutex<Instant>,
}

impl Pace {
    pub(super) fn new(rate: u64) -> Self {
        Self {
            rate,
            free_at: Mutex::new(Instant::now()),
        }
    }

    /// Waits until more may be taken.
    pub(super) async fn free(&self) {
        loop {
            let left = self.free_at().saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left).await;
        }
    }

    /// Notes that so many bytes are taken.
    pub(super) fn take(&self, bytes: u64) {
        if self.rate == 0 {
            return;
        }
        let seconds = bytes as f64 / self.rate as f64;
        let cost = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        let mut free_at = self.free_at.lock().unwrap_or_else(PoisonError::into_inner);
        let from = (*free_at).max(Instant::now());
        *free_at = from.checked_add(cost).unwrap_or(from);
    }

    fn free_at(&self) -> Instant {
        // One value, replaced whole.
        *self.free_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    #[tokio::test]
    async fn what_is_taken_is_waited_for_by_all() {
        let pace = Pace::new(1_000_000);
        assert!(pace.free().now_or_never().is_some());
        let began = Instant::now();
        pace.take(50_000);
        pace.take(50_000);
        assert!(pace.free().now_or_never().is_none());
        pace.free().await;
        assert!(began.elapsed() >= Duration::from_millis(99));
        let free = Pace::new(0);
        free.take(u64::MAX);
        assert!(free.free().now_or_never().is_some());
    }
}
