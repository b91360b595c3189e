//! The pool's state as status and metrics show it.

use std::time::{Duration, Instant};

use super::state::Shelf;

/// Why no hulls are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Off {
    /// A short, stable name: the label of a metric.
    pub reason: &'static str,
    /// The same in a sentence.
    pub detail: String,
}

impl Off {
    pub(super) fn new(reason: &'static str, detail: impl Into<String>) -> Self {
        Self {
            reason,
            detail: detail.into(),
        }
    }
}

/// One handler's pool.
#[derive(Debug, Clone, PartialEq)]
pub struct HandlerSnapshot {
    /// The handler, as configured.
    pub runtime_handler: String,
    /// Configured bounds.
    pub min: usize,
    /// Configured bounds.
    pub max: usize,
    /// How many there should be now.
    pub target: usize,
    /// Hulls that can be taken.
    pub idle: usize,
    /// Hulls being made.
    pub creating: usize,
    /// Age of the oldest idle hull.
    pub oldest: Option<Duration>,
    /// Why this handler has no pool, though the others may.
    pub off: Option<Off>,
}

/// The last creation that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CreationFailure {
    /// What containerd, or we, said.
    pub reason: String,
    /// Failures since the last success.
    pub in_a_row: u32,
    /// Until the next attempt.
    pub retry_in: Duration,
}

/// What the searches for lost sandboxes have found since the start.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Audit {
    /// Searches done.
    pub sweeps: u64,
    /// Marked sandboxes that nobody knew, removed.
    pub lost: u64,
    /// Marked sandboxes that nobody knew, left alone: they have containers or a pod's identity.
    pub spared: u64,
}

/// The pool, at one moment.
#[derive(Debug, Clone, PartialEq)]
pub struct PoolSnapshot {
    /// Why the whole pool is off.
    pub off: Option<Off>,
    /// Paused by the operator: what is there is handed out, nothing is made.
    pub paused: bool,
    /// Drained by the operator, or about to be.
    pub drained: bool,
    /// The drain is not over: containerd has not shown yet that no hull is there that is in no book.
    pub sweeping: bool,
    /// Pools by handler.
    pub handlers: Vec<HandlerSnapshot>,
    /// Hulls that are being removed.
    pub removing: usize,
    /// The CNI networks that hulls are attached to.
    pub networks: Vec<String>,
    /// Free addresses of the pod network, where they can be counted.
    pub free_addresses: Option<u64>,
    /// Measured memory of one hull.
    pub bytes_per_hull: Option<u64>,
    /// The last creation, if it failed.
    pub failure: Option<CreationFailure>,
    /// Lost sandboxes.
    pub audit: Audit,
}

impl super::state::Shared {
    pub(super) fn snapshot(&self, now: Instant) -> PoolSnapshot {
        let state = self.state();
        let detail = if state.is_sweeping() {
            "drained by the operator; containerd has not shown yet that no other hull is there"
        } else {
            "drained by the operator"
        };
        let drained = Off::new("drained", detail);
        let failure = state.backoff.failure().map(|(reason, in_a_row)| CreationFailure {
            reason: reason.to_owned(),
            in_a_row,
            retry_in: state
                .backoff
                .until()
                .map_or(Duration::ZERO, |at| at.saturating_duration_since(now)),
        });
        PoolSnapshot {
            off: state
                .off
                .clone()
                .or_else(|| state.away.clone())
                .or_else(|| state.drained.then_some(drained)),
            paused: state.paused,
            drained: state.drained,
            sweeping: state.is_sweeping(),
            handlers: state.shelves.iter().map(|shelf| handler(shelf, now)).collect(),
            removing: state.condemned.len(),
            networks: state.current.as_ref().map_or_else(Vec::new, |current| {
                current.networks.iter().map(|network| network.name.clone()).collect()
            }),
            free_addresses: state.free_addresses,
            bytes_per_hull: state.bytes_per_hull,
            failure,
            audit: state.audit,
        }
    }
}

fn handler(shelf: &Shelf, now: Instant) -> HandlerSnapshot {
    HandlerSnapshot {
        runtime_handler: shelf.config.runtime_handler.clone(),
        min: shelf.config.min,
        max: shelf.config.max,
        target: shelf.target,
        idle: shelf.idle.len(),
        creating: shelf.creating,
        oldest: shelf.idle.front().map(|idle| now.saturating_duration_since(idle.born)),
        off: shelf.off.clone(),
    }
}
