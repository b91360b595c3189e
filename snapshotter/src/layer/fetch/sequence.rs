//! One sequence of reads: what it has under way, for itself and ahead of itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::watch;

/// Reads that follow one another in the blob; clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct Sequence(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// Demand requests that wait for a slot or have one.
    demand: AtomicUsize,
    /// Bytes asked for that have not come yet.
    coming: watch::Sender<u64>,
    /// Whether its link stood still although more could have been asked for.
    was_idle: AtomicBool,
}

impl Sequence {
    /// Whether both are the same one.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Demand requests that wait for a slot or have one.
    pub(super) fn demand(&self) -> usize {
        self.0.demand.load(Ordering::Acquire)
    }

    pub(super) fn demand_begins(&self) {
        self.0.demand.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn demand_ends(&self) {
        self.0.demand.fetch_sub(1, Ordering::AcqRel);
    }

    /// Notes that `bytes` are asked for.
    pub(super) fn expect(&self, bytes: u64) -> Expected {
        self.0.coming.send_modify(|coming| *coming += bytes);
        Expected {
            sequence: self.clone(),
            left: bytes,
            has_begun: false,
        }
    }

    /// Bytes asked for that have not come yet.
    pub(super) fn coming(&self) -> watch::Receiver<u64> {
        self.0.coming.subscribe()
    }

    /// Whether its link stood still since this was asked last.
    pub(super) fn was_idle(&self) -> bool {
        self.0.was_idle.swap(false, Ordering::AcqRel)
    }
}

/// Bytes that one request is to bring, as long as it lives.
#[derive(Debug)]
pub(super) struct Expected {
    sequence: Sequence,
    left: u64,
    has_begun: bool,
}

impl Expected {
    /// Notes that `bytes` of them came.
    pub(super) fn came(&mut self, bytes: u64) {
        let bytes = bytes.min(self.left);
        let is_first = !std::mem::replace(&mut self.has_begun, true);
        if is_first && *self.sequence.0.coming.borrow() == self.left {
            self.sequence.0.was_idle.store(true, Ordering::Release);
        }
        self.left -= bytes;
        self.sequence
            .0
            .coming
            .send_modify(|coming| *coming = coming.saturating_sub(bytes));
    }
}

impl Drop for Expected {
    fn drop(&mut self) {
        let left = self.left;
        self.sequence
            .0
            .coming
            .send_modify(|coming| *coming = coming.saturating_sub(left));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_is_counted_to_the_end_of_its_request() {
        let sequence = Sequence::default();
        let coming = sequence.coming();
        let mut first = sequence.expect(100);
        first.came(10);
        assert!(
            sequence.was_idle() && !sequence.was_idle(),
            "the first of all came alone"
        );
        let mut second = sequence.expect(50);
        assert_eq!(*coming.borrow(), 140);
        second.came(20);
        assert!(!sequence.was_idle(), "the first request was still coming");
        first.came(1000);
        drop(second);
        assert_eq!(*coming.borrow(), 0);
        let mut third = sequence.expect(7);
        third.came(7);
        assert!(sequence.was_idle(), "nothing was coming any more");
        assert_eq!(*coming.borrow(), 0);
    }
}
