//! Taking up again what was there before a start, of ours or containerd's.

use std::sync::Arc;

use hullspeed_daemon::error::chain;
use prost::Message as _;

use super::{Adopter, Shared};
use crate::adopt::journal::{AdoptRecord, Record};
use crate::adopt::recovery::{Found, Kept, Plan};
use crate::adopt::{Recovered, RecoveryError};
use crate::containerd::facts::Facts;
use crate::ledger::Adoption;

impl Adopter {
    /// Learns from containerd and the journal which sandboxes are hulls and which are pods'. For the start and after
    /// every restart of containerd. Nothing is adopted until it succeeds, and until the facts are known: without them
    /// only what there is becomes known.
    pub async fn recover(&self, facts: impl Into<Option<Arc<Facts>>>) -> Result<Recovered, RecoveryError> {
        let facts = facts.into();
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
        // Before containerd's own names: those dropped may have had one of them.
        for hull in &plan.dropped {
            options.ledger.forget(&hull.id);
            options.ledger.retire_hull(&hull.id);
            shared.append(Record::Aborted(hull.id.clone()));
        }
        for (name, id) in &plan.natives {
            options.ledger.add_native(name.clone(), id);
        }
        for hull in &plan.idle {
            options.ledger.add_hull(&hull.id);
        }
        let adopted = plan.kept.into_iter().map(|kept| shared.keep(kept)).collect();
        *gate = facts;
        shared.known.send_replace(true);
        Ok(Recovered {
            idle: plan.idle,
            adopted,
            dropped: plan.dropped,
        })
    }

    /// The facts, after a [`Self::recover`] that had none or where they changed without a restart of containerd.
    pub async fn resume(&self, facts: Arc<Facts>) {
        *self.shared.facts.write().await = Some(facts);
    }
}

impl Shared {
    fn append(&self, record: Record) {
        if let Err(error) = self.journal.append(record) {
            tracing::warn!(error = %chain(&error), "the journal does not know what was found");
        }
    }

    /// The sandbox is the pod's again.
    fn keep(&self, kept: Kept) -> Arc<Adoption> {
        let adoption = self.options.ledger.adopt(kept.adoption);
        let id = &adoption.sandbox_id;
        if !kept.journalled {
            self.append(Record::Adopt(AdoptRecord {
                id: id.clone(),
                runtime_handler: adoption.runtime_handler.clone(),
                config: adoption.config.encode_to_vec(),
                adopted_at: adoption.adopted_at,
            }));
            self.append(Record::Whole(id.clone()));
        }
        // We may have died between its two copies: only the journal knows of both.
        if !self.journal.is_branded(id) {
            self.rebrander.add(id);
        }
        adoption
    }
}
