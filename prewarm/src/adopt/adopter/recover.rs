//! Taking up again what was there before a start, of ours or containerd's.

use std::sync::Arc;
use std::time::Duration;

use hullspeed_daemon::error::chain;
use hullspeed_proto::cri::v1::{RemovePodSandboxRequest, StopPodSandboxRequest};
use prost::Message as _;

use super::{Adopter, Shared};
use crate::adopt::journal::{AdoptRecord, Record};
use crate::adopt::recovery::{Found, Kept, Plan};
use crate::adopt::{Recovered, RecoveryError};
use crate::containerd::facts::Facts;
use crate::ledger::{Adoption, Doubts};

/// Between two looks at names in doubt.
const BOOKS_INTERVAL: Duration = Duration::from_secs(20);

/// Every so many of them all books are compared.
const ALL_BOOKS: u32 = 15;

/// Attempts on the record of a sandbox that is to lose its name, and the pause between them.
const TRIES: u32 = 20;
const BETWEEN_TRIES: Duration = Duration::from_secs(3);

/// Limit on the removal of a sandbox.
const REMOVAL_LIMIT: Duration = Duration::from_secs(60);

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
        let doubts = options.ledger.doubts();
        let found = Found::ask(&options.containerd).await?;
        let mut plan = Plan::new(&found, &journal, options.ledger.mark());
        if shared.journal.is_lost() {
            if !plan.idle.is_empty() {
                let hulls = plan.idle.len();
                tracing::warn!(hulls, "the journal was lost: no hull of before is handed out");
            }
            plan.dropped.append(&mut plan.idle);
        }
        let known = adoptions.iter().map(|adoption| &adoption.sandbox_id);
        for id in plan.gone.iter().chain(known.filter(|id| !found.has(id))) {
            options.ledger.forget(id);
            shared.forget(id);
        }
        natives
            .iter()
            .filter(|id| !found.has(id))
            .for_each(|id| options.ledger.forget(id));
        options.ledger.end_doubts(&doubts);
        // Before containerd's own names: those dropped may have had one of them.
        for hull in &plan.dropped {
            options.ledger.forget(&hull.id);
            options.ledger.retire_hull(&hull.id);
            shared.append(Record::Aborted(hull.id.clone()));
        }
        for id in plan.namesakes {
            tokio::spawn(Arc::clone(shared).take_from_pod(id));
        }
        for (name, id) in &plan.natives {
            options.ledger.add_native(name.clone(), id);
        }
        for hull in &plan.idle {
            options.ledger.add_hull(&hull.id);
        }
        let adopted = plan.kept.into_iter().map(|kept| shared.keep(kept)).collect();
        shared.journal.completed();
        *gate = facts;
        shared.known.send_replace(true);
        Ok(Recovered {
            idle: plan.idle,
            adopted,
            dropped: plan.dropped,
        })
    }

    /// Compares the books with containerd's, now and then, for as long as it is polled: who is gone leaves the ledger
    /// and the journal, though nobody told of it, and a name of which containerd shows nothing is in doubt no more.
    pub async fn keep_books(&self) {
        let mut doubts = Doubts::default();
        for round in 1_u32.. {
            tokio::time::sleep(BOOKS_INTERVAL).await;
            // What a request leaves behind may show only after some time.
            let later = self.shared.options.ledger.doubts();
            if (!doubts.is_empty() || round.is_multiple_of(ALL_BOOKS))
                && let Err(error) = self.compare(doubts).await
            {
                tracing::debug!(error = %chain(&error), "the books are not compared with containerd's");
            }
            doubts = later;
        }
    }

    /// One comparison.
    async fn compare(&self, mut doubts: Doubts) -> Result<(), RecoveryError> {
        let shared = &self.shared;
        let ledger = &shared.options.ledger;
        let (natives, adoptions) = (ledger.natives(), ledger.adoptions());
        let found = Found::ask(&shared.options.containerd).await?;
        natives
            .iter()
            .filter(|id| !found.has(id))
            .for_each(|id| ledger.forget(id));
        for adoption in adoptions.iter().filter(|adoption| !found.has(&adoption.sandbox_id)) {
            ledger.forget(&adoption.sandbox_id);
            shared.forget(&adoption.sandbox_id);
        }
        doubts.except(&found.names());
        ledger.end_doubts(&doubts);
        Ok(())
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

    /// Another sandbox has this one's name: its record is nobody's from now on, and it goes, with what is in it.
    async fn take_from_pod(self: Arc<Self>, id: String) {
        for _ in 0..TRIES {
            match self.rebrander.disown(&id).await {
                Ok(()) => return self.remove(&id).await,
                Err(error) => {
                    tracing::error!(sandbox_id = id, error = %chain(&error), "a record has the name of another sandbox's");
                }
            }
            tokio::time::sleep(BETWEEN_TRIES).await;
        }
    }

    /// What remains, the pool's sweep finds.
    async fn remove(&self, id: &str) {
        let pod_sandbox_id = id.to_owned();
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        let remove = RemovePodSandboxRequest { pod_sandbox_id };
        let mut client = self.options.containerd.runtime();
        let removal = async {
            client.stop_pod_sandbox(stop).await?;
            client.remove_pod_sandbox(remove).await
        };
        match tokio::time::timeout(REMOVAL_LIMIT, removal).await {
            Ok(Ok(_)) => tracing::info!(sandbox_id = id, "a second sandbox of a pod is removed"),
            Ok(Err(error)) => tracing::warn!(sandbox_id = id, %error, "a second sandbox of a pod is not removed yet"),
            Err(_) => tracing::warn!(sandbox_id = id, "a second sandbox of a pod is not removed in time"),
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
        }
        // One with containers in it is its pod's, whatever the journal knew; it stays so when they are gone.
        if !self.journal.is_whole(id) {
            self.append(Record::Whole(id.clone()));
        }
        // We may have died between its two copies: only the journal knows of both.
        if !self.journal.is_branded(id) {
            self.rebrander.add(id);
        }
        adoption
    }
}
