//! How many hulls to keep.

use std::time::{Duration, Instant};

/// Demand for hulls of one handler.
#[derive(Debug)]
pub(super) struct Demand {
    #[allow(dead_code)]
    window: Duration,
}

impl Demand {
    pub(super) fn new(window: Duration) -> Self {
        Self { window }
    }

    pub(super) fn record(&mut self, _now: Instant) {}
}
