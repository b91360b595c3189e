//! Comparing our books with containerd's: hulls of an earlier run are taken back, those that it has lost are dropped,
//! and marked sandboxes that nobody answers for are removed. Never one with containers in it, nor one whose record has
//! been rewritten for a pod.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use hullspeed_daemon::error::chain;
use hullspeed_proto::containerd::services::containers::v1::GetContainerRequest;
use hullspeed_proto::cri::v1::{ContainerFilter, ListContainersRequest};
use tonic::{Code, Status};

use super::creation::{self, CreationError, MADE_WITH};
use super::fingerprint::Current;
use super::state::{Idle, Shared, Shelf};

/// Limit on each call.
const CALL_LIMIT: Duration = Duration::from_secs(10);

impl Shared {
    /// One comparison.
    pub(super) async fn sweep(&self, current: &Current) -> Result<(), Status> {
        let candidates = self.state().candidates.as_mut().map(std::mem::take);
        // Before recovery, a marked sandbox may be a pod's.
        let Some(candidates) = candidates else { return Ok(()) };
        let outcome = self.compare(current, &candidates).await;
        let mut state = self.state();
        if outcome.is_err() {
            state.candidates.get_or_insert_default().extend(candidates);
            return outcome;
        }
        state.settle_lent(&self.ledger, Instant::now());
        state.audit.sweeps += 1;
        state.unchecked = false;
        outcome
    }

    async fn compare(&self, current: &Current, candidates: &HashSet<String>) -> Result<(), Status> {
        let asked_at = Instant::now();
        let listed = creation::marked(&self.containerd, self.ledger.mark()).await?;
        self.drop_missing(&listed, asked_at);
        for (id, name, is_ready) in &listed {
            let is_ours = self.ledger.adoption(id).is_some() || self.state().knows(id, name);
            if is_ours {
                continue;
            }
            let is_candidate = candidates.contains(id);
            if is_candidate && *is_ready {
                match self.take_back(id, current).await {
                    Ok(()) => {
                        tracing::info!(sandbox = id, "a hull of an earlier run is taken back");
                        continue;
                    }
                    Err(why) => tracing::info!(sandbox = id, "a hull of an earlier run is not taken back: {why}"),
                }
            }
            self.judge(id, is_candidate).await?;
        }
        Ok(())
    }

    /// Hulls on shelves that containerd does not list as ready are not handed out.
    fn drop_missing(&self, listed: &[(String, String, bool)], asked_at: Instant) {
        let now = Instant::now();
        let mut state = self.state();
        let is_ready = |id: &str| listed.iter().any(|(listed, _, ready)| listed == id && *ready);
        let mut gone = Vec::new();
        for shelf in &mut state.shelves {
            // The list may be older than the youngest.
            let is_there = |idle: &Idle| idle.born >= asked_at || is_ready(&idle.hull.id);
            let (kept, missing): (Vec<_>, Vec<_>) = shelf.idle.drain(..).partition(is_there);
            shelf.idle.extend(kept);
            gone.extend(missing.into_iter().map(|idle| idle.hull.id));
        }
        for id in gone {
            self.condemn(&mut state, &id, "lost", now);
        }
    }

    /// A hull of an earlier run goes on its shelf, if it is as one made now would be; else: why not.
    async fn take_back(&self, id: &str, current: &Current) -> Result<(), String> {
        let described = |error: CreationError| chain(&error);
        let ready = creation::inspect(&self.containerd, id).await.map_err(described)?;
        let handler = &ready.status.runtime_handler;
        let made_with = ready.status.annotations.get(MADE_WITH);
        if !made_with.is_some_and(|text| current.fingerprint.is(text)) {
            return Err("it was made with another configuration, network or pause image".into());
        }
        if !matches!(self.is_pods(id).await, Ok(false)) {
            return Err("it is not known to be idle".into());
        }
        let hull = creation::open(id, handler, ready.pid, &current.facts).map_err(described)?;
        let mut state = self.state();
        let may_hold = state.may_hold();
        let shelf = state
            .shelves
            .iter_mut()
            .find(|shelf| shelf.config.runtime_handler == *handler);
        let has_room = |shelf: &&mut Shelf| may_hold && shelf.off.is_none() && shelf.idle.len() < shelf.config.max;
        let shelf = shelf.filter(has_room).ok_or("no pool has a place for it")?;
        self.ledger.add_hull(id);
        shelf.idle.push_back(Idle {
            hull,
            pid: ready.pid,
            born: Instant::now(),
        });
        Ok(())
    }

    /// A marked sandbox that nobody answers for.
    async fn judge(&self, id: &str, is_candidate: bool) -> Result<(), Status> {
        let is_pods = self.is_pods(id).await?;
        if let Err(CreationError::Status { source, .. }) = creation::inspect(&self.containerd, id).await
            && source.code() == Code::NotFound
        {
            // A pod's, removed since the list was made.
            return Ok(());
        }
        let mut state = self.state();
        // It may have been adopted while we asked.
        if is_pods || self.ledger.adoption(id).is_some() {
            state.audit.spared += 1;
            tracing::warn!(
                sandbox = id,
                "a marked sandbox that is in no book belongs to a pod; it is left alone"
            );
            return Ok(());
        }
        if !is_candidate {
            state.audit.lost += 1;
        }
        let reason = if is_candidate { "not_taken_back" } else { "lost" };
        tracing::info!(sandbox = id, reason, "a hull that is in no book is removed");
        self.condemn(&mut state, id, reason, Instant::now());
        Ok(())
    }

    /// Whether the sandbox has become a pod's: it has containers, or its record does not bear our mark.
    async fn is_pods(&self, id: &str) -> Result<bool, Status> {
        let late = || Status::deadline_exceeded("containerd does not answer");
        let filter = ContainerFilter {
            pod_sandbox_id: id.to_owned(),
            ..Default::default()
        };
        let request = ListContainersRequest { filter: Some(filter) };
        let mut runtime = self.containerd.runtime();
        let list = tokio::time::timeout(CALL_LIMIT, runtime.list_containers(request)).await;
        if !list.map_err(|_| late())??.into_inner().containers.is_empty() {
            return Ok(true);
        }
        let request = GetContainerRequest { id: id.to_owned() };
        let mut containers = self.containerd.containers();
        match tokio::time::timeout(CALL_LIMIT, containers.get(request))
            .await
            .map_err(|_| late())?
        {
            Ok(record) => {
                let labels = record.into_inner().container.unwrap_or_default().labels;
                Ok(!self.ledger.mark().is_on(&labels))
            }
            // Without a record nothing was rewritten.
            Err(status) if status.code() == Code::NotFound => Ok(false),
            Err(status) => Err(status),
        }
    }
}
