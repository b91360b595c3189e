//! How far a warm is: written by its work, read by whoever asked for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use estargz::digest::Digest;
use hullspeed_daemon::error::chain;
use tokio::sync::watch;

use crate::layer::NotLazy;
use crate::layer::cache::{NoRoom, StoreError};
use crate::layer::fetch::{Extent, FetchError, LayerFetch};
use crate::layer::image::LayerDescriptor;

/// How often it is told how much content has come.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// The reason where there is no room for what nobody waits for.
const NO_ROOM: &str = "no_room";

/// What is being done for a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerState {
    /// Nothing.
    Waiting,
    /// Its table of contents is being fetched.
    Opening,
    /// Its content is being fetched.
    Fetching,
    /// The share is resident.
    Resident,
    /// It cannot be served lazily.
    NotLazy,
    /// Something went wrong that may not last.
    Failed,
}

/// How far one layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Digest of the blob.
    pub digest: Digest,
    /// Digest of the table of contents.
    pub toc_digest: Option<Digest>,
    /// Size of the blob.
    pub blob_bytes: u64,
    /// What is being done for it.
    pub state: LayerState,
    /// How much of the share's content there is.
    pub extent: Extent,
    /// Short and stable, and for a person: what went wrong.
    pub problem: Option<(&'static str, String)>,
}

/// How far a warm is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmReport {
    /// The image's manifest.
    pub manifest: Digest,
    /// Its layers, lowest first.
    pub layers: Vec<LayerReport>,
    /// Nothing more will be done.
    pub done: bool,
}

struct Standing {
    report: LayerReport,
    /// What the extent is read from, and up to where, while content is being fetched.
    content: Option<(Arc<LayerFetch>, u64)>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Changes {
    count: u64,
    over: bool,
}

/// The state of all layers of one warm.
pub(super) struct Progress {
    manifest: Digest,
    layers: Mutex<Vec<Standing>>,
    changes: watch::Sender<Changes>,
}

/// Somebody who is told of changes.
pub(super) struct Follower {
    changes: watch::Receiver<Changes>,
    told_of_end: bool,
}

impl Progress {
    pub(super) fn new(manifest: Digest, layers: &[LayerDescriptor]) -> Self {
        let waiting = layers.iter().map(|layer| Standing {
            report: LayerReport {
                digest: layer.digest,
                toc_digest: layer.toc_digest,
                blob_bytes: layer.size,
                state: LayerState::Waiting,
                extent: Extent::default(),
                problem: None,
            },
            content: None,
        });
        Self {
            manifest,
            layers: Mutex::new(waiting.collect()),
            changes: watch::Sender::default(),
        }
    }

    pub(super) fn follow(&self) -> Follower {
        let mut changes = self.changes.subscribe();
        // The first report comes at once.
        changes.mark_changed();
        Follower {
            changes,
            told_of_end: false,
        }
    }

    pub(super) fn enter(&self, number: usize, state: LayerState) {
        self.change(number, |standing| standing.report.state = state);
    }

    pub(super) fn fetching(&self, number: usize, fetch: Arc<LayerFetch>, until: u64) {
        self.change(number, |standing| {
            standing.report.state = LayerState::Fetching;
            standing.content = Some((fetch, until));
        });
    }

    pub(super) fn not_opened(&self, number: usize, error: &NotLazy) {
        let state = if error.is_lasting() {
            LayerState::NotLazy
        } else {
            LayerState::Failed
        };
        self.change(number, |standing| {
            standing.report.state = state;
            standing.report.problem = Some((error.reason(), chain(error)));
        });
    }

    pub(super) fn no_room(&self, number: usize, no_room: &NoRoom) {
        self.change(number, |standing| {
            standing.report.state = LayerState::Failed;
            standing.report.problem = Some((NO_ROOM, no_room.to_string()));
        });
    }

    pub(super) fn not_fetched(&self, number: usize, error: &FetchError) {
        let reason = match error {
            FetchError::Store(StoreError::NoRoom { .. }) => NO_ROOM,
            error => error.reason(),
        };
        self.change(number, |standing| {
            standing.report.state = LayerState::Failed;
            standing.report.problem = Some((reason, chain(error)));
        });
    }

    /// Whether the layer's table of contents is there.
    pub(super) fn is_open(&self, number: usize) -> bool {
        let layers = self.layers();
        let problem = layers.get(number).map(|standing| standing.report.problem.is_some());
        problem == Some(false)
    }

    /// Whether nothing more is to be done for a layer.
    pub(super) fn is_over(&self, number: usize) -> bool {
        !self.is_open(number)
    }

    /// Nothing more will be done.
    pub(super) fn end(&self) {
        {
            let mut layers = self.layers();
            for standing in &mut *layers {
                standing.settle();
                // The layer may be closed now.
                standing.content = None;
                if !matches!(
                    standing.report.state,
                    LayerState::Resident | LayerState::NotLazy | LayerState::Failed
                ) {
                    standing.report.state = LayerState::Failed;
                    standing.report.problem = Some(("stopped", "the work was stopped".to_owned()));
                }
            }
        }
        self.changes.send_modify(|changes| changes.over = true);
    }

    pub(super) fn report(&self) -> WarmReport {
        // First, so that a report that says "done" has the last of everything.
        let done = self.changes.borrow().over;
        let mut layers = self.layers();
        let settle = |standing: &mut Standing| {
            standing.settle();
            standing.report.clone()
        };
        WarmReport {
            manifest: self.manifest,
            layers: layers.iter_mut().map(settle).collect(),
            done,
        }
    }

    fn change(&self, number: usize, change: impl FnOnce(&mut Standing)) {
        if let Some(standing) = self.layers().get_mut(number) {
            change(standing);
            standing.settle();
        }
        self.changes.send_modify(|changes| changes.count += 1);
    }

    fn layers(&self) -> MutexGuard<'_, Vec<Standing>> {
        // Every field is written whole.
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Standing {
    /// Looks how much content there is.
    fn settle(&mut self) {
        if let Some((fetch, until)) = &self.content {
            self.report.extent = fetch.extent(*until);
        }
        if self.report.state != LayerState::Fetching {
            self.content = None;
        }
    }
}

impl Follower {
    /// Whether there is something to tell, or time to; false once the end was told.
    pub(super) async fn changed(&mut self) -> bool {
        if self.told_of_end {
            return false;
        }
        // Too early is as good as in time, and the sender is gone only after the end.
        let _ = tokio::time::timeout(TELL_EVERY, self.changes.changed()).await;
        self.told_of_end = self.changes.borrow_and_update().over;
        true
    }
}
