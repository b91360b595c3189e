//! Removing sandboxes: one at a time and while nothing starts, unless somebody waits for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::{RemovePodSandboxRequest, StopPodSandboxRequest};
use tokio::task::JoinSet;
use tonic::{Code, Status};

use crate::metrics::defs::ReasonLabels;

use super::state::Shared;

/// Limit on each of the two calls.
const CALL_LIMIT: Duration = Duration::from_secs(30);

/// Removals at once while somebody waits for the pool to be drained or for what hulls hold; otherwise one.
const PARALLEL_URGENT: usize = 4;

/// The first wait after a failed removal, and the longest.
const RETRY_FIRST: Duration = Duration::from_millis(500);
const RETRY_LONGEST: Duration = Duration::from_secs(15);

/// A removal under way. However it ends, the books learn of it.
struct Removal {
    shared: Arc<Shared>,
    id: String,
    outcome: Result<(), Status>,
}

impl Removal {
    async fn run(mut self) {
        self.outcome = self.shared.remove(&self.id).await;
    }
}

impl Drop for Removal {
    fn drop(&mut self) {
        self.shared.removed(&self.id, &self.outcome);
    }
}

impl Shared {
    /// Begins the removals that are due; says when the next one will be.
    pub(super) fn clear(self: &Arc<Self>, tasks: &mut JoinSet<()>, now: Instant) -> Option<Instant> {
        let mut state = self.state();
        let is_urgent = state.is_urgent(now);
        let parallel = if is_urgent { PARALLEL_URGENT } else { 1 };
        let quiet_at = if is_urgent {
            now
        } else {
            state.starts.quiet_at(now, self.options.quiet)
        };
        let mut under_way = state.condemned.values().filter(|one| one.under_way).count();
        let mut next: Option<Instant> = None;
        for (id, one) in &mut state.condemned {
            if one.under_way {
                continue;
            }
            let due = one
                .not_before
                .max(quiet_at.min(one.not_before + self.options.max_deferral));
            if due > now {
                next = Some(next.map_or(due, |next| next.min(due)));
                continue;
            }
            if under_way >= parallel {
                // The end of one of them wakes the keeper.
                continue;
            }
            under_way += 1;
            one.under_way = true;
            let removal = Removal {
                shared: Arc::clone(self),
                id: id.clone(),
                outcome: Err(Status::internal("the removal was broken off")),
            };
            tasks.spawn(removal.run());
        }
        next
    }

    async fn remove(&self, id: &str) -> Result<(), Status> {
        if self.ledger.adoption(id).is_some() {
            // Whoever condemned it was wrong: it is a pod's.
            tracing::error!(
                sandbox = id,
                "a pod's sandbox was about to be removed as a hull; it is left alone"
            );
            return Ok(());
        }
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        let mut runtime = self.containerd.runtime();
        gone(tokio::time::timeout(CALL_LIMIT, runtime.stop_pod_sandbox(stop)).await)?;
        if let Some(one) = self.state().condemned.get_mut(id) {
            one.stopped = true;
        }
        let remove = RemovePodSandboxRequest {
            pod_sandbox_id: id.to_owned(),
        };
        gone(tokio::time::timeout(CALL_LIMIT, runtime.remove_pod_sandbox(remove)).await)
    }

    pub(super) fn removed(&self, id: &str, outcome: &Result<(), Status>) {
        let mut state = self.state();
        match outcome {
            Ok(()) => {
                if let Some(one) = state.condemned.remove(id) {
                    let label = ReasonLabels { reason: one.reason };
                    self.metrics.hulls_destroyed.get_or_create(&label).inc();
                }
            }
            Err(status) => {
                if let Some(one) = state.condemned.get_mut(id) {
                    let wait = RETRY_FIRST.saturating_mul(1 << one.attempts.min(10)).min(RETRY_LONGEST);
                    one.attempts = one.attempts.saturating_add(1);
                    one.not_before = Instant::now() + wait;
                    one.under_way = false;
                    tracing::warn!(
                        sandbox = id,
                        "a hull could not be removed: {status}; next attempt in {wait:?}"
                    );
                }
            }
        }
        drop(state);
        self.removed.notify_waiters();
        self.wake.notify_one();
    }
}

/// What is not there need not be removed.
fn gone<T>(answer: Result<Result<tonic::Response<T>, Status>, tokio::time::error::Elapsed>) -> Result<(), Status> {
    match answer {
        Err(_) => Err(Status::deadline_exceeded("containerd does not answer")),
        Ok(Err(status)) if status.code() != Code::NotFound => Err(status),
        Ok(_) => Ok(()),
    }
}
