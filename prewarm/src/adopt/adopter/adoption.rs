//! One adoption, from the hull in hand to the answer.

use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hullspeed_daemon::error::chain;
use hullspeed_proto::cri::v1::{PodSandboxConfig, RunPodSandboxResponse};
use prost::Message as _;
use tokio::sync::oneshot;

use super::{Gate, Setbacks, Shared};
use crate::adopt::hull::Hull;
use crate::adopt::journal::{AdoptRecord, JournalError, Record};
use crate::adopt::patch::{Identity, PatchError};
use crate::adopt::{Outcome, fault};
use crate::ledger::{Adoption, Reservation};
use crate::relay::{Answer, Reply};

/// How long a test's kill waits for the answer to leave.
const ANSWER_LEAVES: Duration = Duration::from_millis(50);

/// What an adoption begins with.
pub(super) struct Attempt {
    pub(super) gate: Gate,
    pub(super) hull: Hull,
    pub(super) config: PodSandboxConfig,
    pub(super) handler: String,
    pub(super) begun: Instant,
}

/// What the caller gets: the answer, or the name back and why there is none.
type Finished = Result<Reply, (Reservation, &'static str)>;

/// Why a hull did not become the pod's.
#[derive(Debug, thiserror::Error)]
enum AdoptionError {
    #[error("the adoption cannot be written down")]
    Journal(#[source] JournalError),
    #[error("the hull cannot be made the pod's")]
    Patch(#[source] PatchError),
    #[error("the hull has died")]
    Died,
}

impl AdoptionError {
    fn reason(&self) -> &'static str {
        match self {
            Self::Journal(_) => "journal",
            Self::Patch(PatchError::Sysctl { .. } | PatchError::Unsafe { .. }) => "patch_sysctl",
            Self::Patch(PatchError::Sysfs(_)) => "patch_sysfs",
            Self::Patch(_) => "patch",
            Self::Died => "died",
        }
    }

    /// Whether the next hull would fare no better.
    fn is_ours(&self) -> bool {
        !matches!(self.reason(), "patch_sysctl" | "patch_sysfs" | "died")
    }
}

/// What becomes of a hull that did not become the pod's.
enum Leftover {
    /// It is as it was.
    Untouched(Hull),
    /// Nobody can have it any more.
    Spoilt(Option<Hull>),
}

impl Shared {
    /// Runs to its end once it has begun. The gate is held until then.
    pub(super) async fn adopt(&self, attempt: Attempt, name: Reservation, answer: oneshot::Sender<Finished>) {
        let Attempt {
            gate,
            hull,
            config,
            handler,
            begun,
        } = attempt;
        fault::point("taken");
        let Some(facts) = gate.as_ref() else {
            self.options.hulls.give_back(hull);
            let _ = answer.send(Err((name, "recovering")));
            return;
        };
        let identity = Identity::of(&config, facts);
        let age = hull.age();
        let adoption = Adoption {
            sandbox_id: hull.id.clone(),
            config,
            runtime_handler: handler,
            adopted_at: now(),
        };
        match self.make(hull, &adoption, identity).await {
            Ok(hull) => {
                let reply = self.publish(adoption, begun, age);
                let _ = answer.send(Ok(reply));
                drop((name, hull));
                if fault::is_set("answered") {
                    tokio::time::sleep(ANSWER_LEAVES).await;
                    fault::point("answered");
                }
            }
            Err((hull, error)) => {
                self.abort(&adoption, hull, &error);
                let _ = answer.send(Err((name, error.reason())));
            }
        }
    }

    /// Makes the hull the pod's, though nobody knows yet.
    async fn make(
        &self,
        hull: Hull,
        adoption: &Adoption,
        identity: Identity,
    ) -> Result<Hull, (Leftover, AdoptionError)> {
        let record = Record::Adopt(AdoptRecord {
            id: adoption.sandbox_id.clone(),
            runtime_handler: adoption.runtime_handler.clone(),
            config: adoption.config.encode_to_vec(),
            adopted_at: adoption.adopted_at,
        });
        if let Err(error) = self.journal.append(record) {
            return Err((Leftover::Untouched(hull), AdoptionError::Journal(error)));
        }
        fault::point("journalled");
        let hull = match self.patcher.patch(hull, identity).await {
            (Some(hull), Ok(())) if hull.is_alive() => hull,
            (hull, Ok(())) => return Err((Leftover::Spoilt(hull), AdoptionError::Died)),
            (Some(hull), Err(error)) if error.is_refusal() => {
                return Err((Leftover::Untouched(hull), AdoptionError::Patch(error)));
            }
            (hull, Err(error)) => return Err((Leftover::Spoilt(hull), AdoptionError::Patch(error))),
        };
        match self.journal.append(Record::Whole(hull.id.clone())) {
            Ok(()) => Ok(hull),
            Err(error) => Err((Leftover::Spoilt(Some(hull)), AdoptionError::Journal(error))),
        }
    }

    pub(super) fn setbacks(&self) -> MutexGuard<'_, Setbacks> {
        self.setbacks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From here on the sandbox is the pod's for everybody who asks the relay.
    fn publish(&self, adoption: Adoption, begun: Instant, age: Duration) -> Reply {
        let adoption = self.options.ledger.adopt(adoption);
        let id = adoption.sandbox_id.as_str();
        self.options.hulls.start_begins(id);
        self.options.events.adopted(&adoption);
        fault::point("published");
        self.rebrander.add_later(id);
        self.setbacks().succeeded();
        self.options.observer.request(Outcome::Hit, "");
        self.options.observer.adopted(begun.elapsed(), age);
        let response = RunPodSandboxResponse {
            pod_sandbox_id: id.to_owned(),
        };
        Reply::One(Answer::ours(response.encode_to_vec()))
    }

    /// The hull is not the pod's, and a hull still only if nothing was done to it and the journal says so.
    fn abort(&self, adoption: &Adoption, hull: Leftover, error: &AdoptionError) {
        let id = &adoption.sandbox_id;
        tracing::warn!(sandbox_id = id, error = %chain(error), "an adoption is given up; containerd makes the sandbox");
        let now = Instant::now();
        if let AdoptionError::Patch(PatchError::Sysctl { name, .. }) = error {
            let sysctls = adoption.config.linux.as_ref().map(|linux| &linux.sysctls);
            if let Some(value) = sysctls.and_then(|sysctls| sysctls.get(name)) {
                self.setbacks().refused(name, value, now);
            }
        }
        if error.is_ours() {
            self.setbacks().failed(now);
        }
        match hull {
            Leftover::Untouched(hull) if self.journal.append(Record::Forgotten(id.clone())).is_ok() => {
                self.options.hulls.give_back(hull);
            }
            Leftover::Untouched(hull) => self.spoil(id, Some(hull), error),
            Leftover::Spoilt(hull) => self.spoil(id, hull, error),
        }
        self.compact();
    }

    /// The hull is neither a hull any more nor the pod's.
    fn spoil(&self, id: &str, hull: Option<Hull>, why: &AdoptionError) {
        if let Err(error) = self.journal.append(Record::Aborted(id.to_owned())) {
            tracing::warn!(sandbox_id = id, error = %chain(&error), "the journal does not know of an adoption given up");
        }
        // Hidden until it is gone, whoever destroys it.
        self.options.ledger.retire_hull(id);
        if let Some(hull) = hull {
            self.options.hulls.discard(hull, why.reason());
        }
    }

    /// The journal may let go of this sandbox.
    pub(super) fn forget(&self, id: &str) {
        if let Err(error) = self.journal.append(Record::Forgotten(id.to_owned())) {
            // Harmless: the next recovery finds that the sandbox is gone.
            tracing::warn!(sandbox_id = id, error = %chain(&error), "the journal does not know of a removed sandbox");
        }
        self.compact();
    }

    /// In the background: it may take as long as writing all that stands.
    fn compact(&self) {
        let journal = Arc::clone(&self.journal);
        tokio::task::spawn_blocking(move || {
            if let Err(error) = journal.compact() {
                tracing::warn!(error = %chain(&error), "the journal cannot be rewritten");
            }
        });
    }
}

/// Nanoseconds since the epoch.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
