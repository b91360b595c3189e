//! Reads that waited in vain lately.
//!
//! The kernel asks for a page several times before it gives a program an error: ahead of the read, for the page alone, and for a fault
//! once more. Each of them would wait for the whole deadline again. So who asks for what was given up a moment ago waits only a little.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long it is remembered that a read was given up. The kernel asks again at once; a program that tries again is to be served.
const MEMORY: Duration = Duration::from_millis(50);
/// How long those who ask again wait: enough for a source that is well.
const PATIENCE: Duration = Duration::from_millis(500);
/// Reads that are remembered.
const MOST: usize = 64;

/// What of a layer was given up lately.
#[derive(Debug, Default)]
pub(super) struct Lately {
    given_up: Mutex<VecDeque<(Instant, Range<u32>)>>,
}

impl Lately {
    /// A read of these chunks was given up.
    pub(super) fn gave_up(&self, chunks: Range<u32>, now: Instant) {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        given_up.retain(|(at, range)| now.duration_since(*at) < MEMORY && *range != chunks);
        given_up.truncate(MOST - 1);
        given_up.push_front((now, chunks));
    }

    /// How long a read of these chunks is to wait, if it may wait for `deadline`.
    pub(super) fn patience(&self, chunks: &Range<u32>, deadline: Duration, now: Instant) -> Duration {
        let given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        let is_one = |(at, range): &(Instant, Range<u32>)| {
            now.duration_since(*at) < MEMORY && range.start < chunks.end && chunks.start < range.end
        };
        if given_up.iter().any(is_one) {
            deadline.min(PATIENCE)
        } else {
            deadline
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_again_for_what_was_given_up_waits_a_little() {
        let (lately, now, deadline) = (Lately::default(), Instant::now(), Duration::from_secs(60));
        assert_eq!(lately.patience(&(3..5), deadline, now), deadline);
        lately.gave_up(3..5, now);
        assert_eq!(lately.patience(&(4..9), deadline, now), PATIENCE);
        assert_eq!(
            lately.patience(&(3..5), Duration::from_millis(1), now),
            Duration::from_millis(1)
        );
        assert_eq!(lately.patience(&(5..9), deadline, now), deadline);
        assert_eq!(lately.patience(&(4..9), deadline, now + MEMORY), deadline);
        for chunk in 0..1000 {
            lately.gave_up(chunk..chunk + 1, now);
        }
        assert_eq!(lately.given_up.lock().unwrap().len(), MOST);
        lately.gave_up(7..8, now + MEMORY);
        assert_eq!(lately.given_up.lock().unwrap().len(), 1);
    }
}
