//! The pool: hulls made ahead, one shelf for each runtime handler, handed out at once or not at all.
//!
//! [`Pool::run`] is the only thing that makes hulls. It learns what containerd is configured to do, lets only networks
//! that do not depend on a pod's identity through ([`cni`]), keeps as many hulls as demand asks for ([`policy`]), makes
//! them while nothing else starts, and removes those that are dead, of an older configuration, surplus or unknown.
//! Handing out ([`HullSource::take`]) is synchronous: a lock, a few stats ([`fingerprint`]), a look at two processes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::adopt::hull::Hull;
use crate::adopt::{HullSource, Miss};
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::ledger::Ledger;
use crate::metrics::Metrics;
use crate::warm::Quiet;

mod cgroup;
mod cni;
mod creation;
mod fingerprint;
mod gauges;
mod keeper;
mod memory;
mod nri;
mod options;
mod pace;
mod policy;
mod presence;
mod refill;
mod removal;
mod snapshot;
mod state;
mod survey;
mod sweep;
#[cfg(test)]
mod tests;

pub use options::{CniPermissions, HandlerPool, PoolOptions};
pub use snapshot::{Audit, CreationFailure, HandlerSnapshot, Off, PoolSnapshot};
pub use survey::{Preview, preview};

use state::Shared;

/// The pool. Cheap to clone; clones share their state.
#[derive(Debug, Clone)]
pub struct Pool {
    shared: Arc<Shared>,
}

impl Pool {
    /// A pool of hulls of this containerd. Nothing is made before [`Self::run`].
    #[must_use]
    pub fn new(options: PoolOptions, containerd: Containerd, ledger: Ledger, metrics: Metrics) -> Self {
        Self {
            shared: Arc::new(Shared::new(options, containerd, ledger, metrics)),
        }
    }

    /// The ledger knows every adopted sandbox now, and these are hulls of an earlier run, as recovery found them: they are
    /// taken back if they are alive and of the present configuration. Before the first call (which may name none) no
    /// sandbox can be told from a lost hull, so nothing is handed out, made or removed; after it every hull that is in no
    /// book goes.
    pub fn take_back(&self, ids: Vec<String>) {
        let mut state = self.shared.state();
        state.candidates.get_or_insert_default().extend(ids);
        state.sweep_at = None;
        drop(state);
        self.shared.wake.notify_one();
    }

    /// Keeps the pool until `stopping`. Hulls that are being made then are waited for; all stay for the next run.
    pub async fn run(&self, stopping: CancellationToken) {
        tokio::select! {
            () = keeper::run(Arc::clone(&self.shared), stopping) => {}
            () = presence::follow(Arc::clone(&self.shared)) => {}
        }
    }

    /// What containerd is configured to do; changes when it is restarted. `None` while it does not answer.
    #[must_use]
    pub fn facts(&self) -> tokio::sync::watch::Receiver<Option<Arc<Facts>>> {
        self.shared.facts.subscribe()
    }

    /// Removes every idle hull and makes new ones: what they were made with has changed.
    pub fn flush(&self, reason: &'static str) {
        self.shared.condemn_idle(reason);
    }

    /// Removes every idle hull and makes none for a while: what they hold is needed, such as addresses.
    pub fn release_all(&self, reason: &'static str) {
        self.shared.release_all(reason);
    }

    /// Makes no hulls until [`Self::resume`]. Those that are there are handed out.
    pub fn pause(&self) {
        self.shared.state().paused = true;
        self.shared.wake.notify_one();
    }

    /// Ends [`Self::pause`] and [`Self::drain`].
    pub fn resume(&self) {
        self.shared.resume();
    }

    /// Hands out and makes no hulls until [`Self::resume`], and removes all. Returns when none is left; how many are,
    /// [`Self::snapshot`] tells meanwhile. Dropping the future does not stop it.
    pub async fn drain(&self) {
        self.shared.drain().await;
    }

    /// How things stand.
    #[must_use]
    pub fn snapshot(&self) -> PoolSnapshot {
        self.shared.snapshot(Instant::now())
    }
}

impl Quiet for Pool {
    fn quiet_in(&self) -> Duration {
        let now = Instant::now();
        self.shared
            .quiet_at(&mut self.shared.state(), now)
            .saturating_duration_since(now)
    }
}

impl HullSource for Pool {
    fn take(&self, runtime_handler: &str) -> Result<Hull, Miss> {
        self.shared.take(runtime_handler, Instant::now())
    }

    fn discard(&self, hull: Hull, why: &'static str) {
        self.shared.discard(hull, why);
    }

    fn give_back(&self, hull: Hull) {
        self.shared.give_back(hull);
    }

    fn start_begins(&self, sandbox_id: &str) {
        self.shared.start_begins(sandbox_id, Instant::now());
    }

    fn start_ended(&self, sandbox_id: &str) {
        self.shared.start_ended(sandbox_id, Instant::now());
    }

    fn release_all(&self, why: &'static str) {
        Self::release_all(self, why);
    }
}
