//! Taking up again what was there before a start, of ours or containerd's.

use std::sync::Arc;

use hullspeed_daemon::error::chain;
use prost::Message as _;

use super::{Adopter, Shared};
use crate::adopt::hull::Hull;
use crate::adopt::journal::{AdoptRecord, Record};
use crate::adopt::patch::Identity;
use crate::adopt::recovery::{Found, Kept, Plan, pause_process};
use crate::adopt::{Recovered, RecoveryError};
use crate::containerd::facts::Facts;
use crate::ledger::Adoption;

impl Adopter {
    /// Learns from containerd and the journal which sandboxes are hulls and which are pods'. For the start and after
    /// every restart of containerd; until it succeeds nothing is adopted.
    pub async fn recover(&self, facts: Arc<Facts>) -> Result<Recovered, RecoveryError> {
        let shared = &self.shared;
        let options = &shared.options;
        // No adoption is under way while this is held.
        let mut gate = shared.facts.write().await;
        *gate = None;
        // Both were there before containerd is asked: what it does not know of them then is gone.
        let journal = shared.journal.contents();
        let (natives, adoptions) = (options.ledger.natives(), options.ledger.adoptions());
        let found = Found::ask(&options.containerd).await?;
        let plan = Plan::new(&found, &journal, options.ledger.mark());
        let known = adoptions.iter().map(|adoption| &adoption.sandbox_id);
        for id in plan.gone.iter().chain(known.filter(|id| !found.has(id))) {
            options.ledger.forget(id);
            shared.forget(id);
        }
        natives
            .iter()
            .filter(|id| !found.has(id))
            .for_each(|id| options.ledger.forget(id));
        options.ledger.end_doubts();
        for (name, id) in &plan.natives {
            options.ledger.add_native(name.clone(), id);
        }
        for hull in &plan.idle {
            options.ledger.add_hull(&hull.id);
        }
        for hull in &plan.dropped {
            options.ledger.forget(&hull.id);
            options.ledger.retire_hull(&hull.id);
            shared.append(Record::Aborted(hull.id.clone()));
        }
        let mut adopted = Vec::with_capacity(plan.kept.len());
        for kept in plan.kept {
            adopted.push(shared.keep(kept, &facts).await);
        }
        *gate = Some(facts);
        Ok(Recovered {
            idle: plan.idle,
            adopted,
            dropped: plan.dropped,
        })
    }
}

impl Shared {
    fn append(&self, record: Record) {
        if let Err(error) = self.journal.append(record) {
            tracing::warn!(error = %chain(&error), "the journal does not know what was found");
        }
    }

    /// The sandbox is the pod's again, as far as it was and then completely.
    async fn keep(&self, kept: Kept, facts: &Facts) -> Arc<Adoption> {
        let Kept {
            adoption,
            branded,
            journalled,
            ready,
        } = kept;
        let adoption = self.options.ledger.adopt(adoption);
        let id = &adoption.sandbox_id;
        if !journalled {
            self.append(Record::Adopt(AdoptRecord {
                id: id.clone(),
                runtime_handler: adoption.runtime_handler.clone(),
                config: adoption.config.encode_to_vec(),
                adopted_at: adoption.adopted_at,
            }));
        }
        if branded {
            if !self.journal.is_branded(id) {
                self.append(Record::Branded(id.clone()));
            }
            return adoption;
        }
        if ready {
            self.patch_again(&adoption, facts).await;
        }
        self.rebrander.add(id);
        adoption
    }

    /// We may have died between the journal and the answer. What is written again is the same.
    async fn patch_again(&self, adoption: &Adoption, facts: &Facts) {
        let id = adoption.sandbox_id.as_str();
        let pid = match pause_process(&self.options.containerd, id).await {
            Ok(Some(pid)) => pid,
            Ok(None) => return,
            Err(error) => {
                tracing::warn!(sandbox_id = id, error = %chain(&error), "an adopted sandbox cannot be looked at");
                return;
            }
        };
        let hull = match Hull::open(id, &adoption.runtime_handler, pid, facts) {
            Ok(hull) => hull,
            Err(error) => {
                tracing::warn!(sandbox_id = id, error = %chain(&error), "an adopted sandbox cannot be opened");
                return;
            }
        };
        let (_, done) = self.patcher.patch(hull, Identity::of(&adoption.config, facts)).await;
        if let Err(error) = done {
            tracing::warn!(sandbox_id = id, error = %chain(&error), "an adopted sandbox is not completely its pod's");
        }
    }
}
