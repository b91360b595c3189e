//! Chunks that somebody is about to read and that must stay until then.

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The chunks of one layer that are held; there are as many as there are reads that wait for the network.
#[derive(Debug, Default)]
pub(super) struct Holds(Mutex<Vec<Range<u32>>>);

/// Keeps chunks from being given up as long as it lives.
#[derive(Debug)]
pub struct Held<'a> {
    holds: &'a Holds,
    chunks: Range<u32>,
}

/// The held chunks, while nobody can hold any more.
pub(super) struct Fixed<'a>(MutexGuard<'a, Vec<Range<u32>>>);

impl Holds {
    pub(super) fn hold(&self, chunks: Range<u32>) -> Held<'_> {
        self.ranges().push(chunks.clone());
        Held { holds: self, chunks }
    }

    pub(super) fn fix(&self) -> Fixed<'_> {
        Fixed(self.ranges())
    }

    fn ranges(&self) -> MutexGuard<'_, Vec<Range<u32>>> {
        // Every change is one push or remove.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Fixed<'_> {
    pub(super) fn contains(&self, chunk: u32) -> bool {
        self.0.iter().any(|held| held.contains(&chunk))
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        let mut ranges = self.holds.ranges();
        if let Some(at) = ranges.iter().position(|held| *held == self.chunks) {
            ranges.swap_remove(at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_held_as_often_as_they_are_wanted() {
        let holds = Holds::default();
        let (first, second) = (holds.hold(3..5), holds.hold(3..5));
        drop(first);
        assert!(holds.fix().contains(4) && !holds.fix().contains(5));
        drop(second);
        assert!(!holds.fix().contains(4));
    }
}
