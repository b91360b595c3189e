//! The one task that keeps the pool: looks, decides, begins, waits.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hullspeed_daemon::error::chain;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::metrics::defs::{HandlerLabels, HullLabels, HullState, ReasonLabels};

use super::cni;
use super::memory;
use super::state::{Idle, Shared, State};
use super::survey::survey;

/// Between looks at what changes without telling: files, processes, addresses.
const TICK: Duration = Duration::from_secs(1);

/// Between questions to containerd about its configuration and its pause image.
const SURVEY_INTERVAL: Duration = Duration::from_secs(10);

/// Between measurements of hulls' memory.
const MEASURE_INTERVAL: Duration = Duration::from_secs(60);

/// How long creations and removals under way are waited for at the end. What they leave, the next run finds.
const STOP_LIMIT: Duration = Duration::from_secs(10);

/// When things were last looked at.
#[derive(Debug, Default)]
struct Keeper {
    surveyed: Option<Instant>,
    watched: Option<Instant>,
    measured: Option<Instant>,
    /// Reasons that stand in the metric.
    reasons: Vec<&'static str>,
}

fn is_due(last: Option<Instant>, interval: Duration, now: Instant) -> bool {
    last.is_none_or(|last| now.saturating_duration_since(last) >= interval)
}

/// Until `stopping`.
pub(super) async fn run(shared: Arc<Shared>, stopping: CancellationToken) {
    let mut tasks = JoinSet::new();
    let mut keeper = Keeper::default();
    loop {
        let step = keeper.step(&shared, &mut tasks);
        let Some(next) = stopping.run_until_cancelled(step).await else {
            break;
        };
        let next = next.unwrap_or(TICK).min(TICK);
        tokio::select! {
            () = stopping.cancelled() => break,
            () = shared.wake.notified() => {}
            () = tokio::time::sleep(next) => {}
            Some(ended) = tasks.join_next() => {
                if let Err(error) = ended {
                    tracing::error!("a task of the pool failed: {error}");
                }
            }
        }
    }
    let ended = tokio::time::timeout(STOP_LIMIT, async { while tasks.join_next().await.is_some() {} }).await;
    if ended.is_err() {
        tracing::warn!("hulls were still being made or removed at the end; the next run finds them");
    }
}

impl Keeper {
    /// Everything that is due; how long there is nothing more to do.
    async fn step(&mut self, shared: &Arc<Shared>, tasks: &mut JoinSet<()>) -> Option<Duration> {
        self.look(shared).await;
        let now = Instant::now();
        if is_due(self.watched, TICK, now) {
            self.watched = Some(now);
            shared.watch(now).await;
        }
        if is_due(self.measured, MEASURE_INTERVAL, now) && shared.measure().await {
            self.measured = Some(now);
        }
        shared.retarget(now);
        let refill = shared.refill(tasks, now);
        let clear = shared.clear(tasks, now);
        self.publish(shared);
        // Who waits for the end of a drain looks again.
        shared.removed.notify_waiters();
        let next = refill.into_iter().chain(clear).min();
        next.map(|at| at.saturating_duration_since(Instant::now()))
    }

    async fn look(&mut self, shared: &Arc<Shared>) {
        let now = Instant::now();
        let (wanting, unsettled) = {
            let state = shared.state();
            let stale = state.current.as_ref().is_none_or(|current| !current.is_current());
            let loading = state
                .shelves
                .iter()
                .any(|shelf| shelf.off.as_ref().is_some_and(|off| off.reason == "cni_loading"));
            // The first hull brings the pause image with it.
            let has_hulls = state.shelves.iter().any(|shelf| !shelf.idle.is_empty());
            let imageless = state
                .current
                .as_ref()
                .is_some_and(|current| current.facts.pause_images.is_empty());
            (stale || (has_hulls && imageless), loading || state.away.is_some())
        };
        // What has just been found wanting is not asked for again at every wake.
        let interval = if unsettled { TICK } else { SURVEY_INTERVAL };
        if (wanting && is_due(self.surveyed, TICK / 10, now)) || is_due(self.surveyed, interval, now) {
            self.surveyed = Some(now);
            if let Err(error) = survey(shared).await {
                tracing::debug!("containerd: {}", chain(&error));
            }
        }
        let sweep = {
            let state = shared.state();
            let due = state.unchecked || state.sweep_at.is_none_or(|at| at <= now);
            state
                .current
                .clone()
                .filter(|_| due && state.away.is_none() && state.candidates.is_some())
        };
        if let Some(current) = sweep {
            let again = match shared.sweep(&current).await {
                Ok(()) => shared.options.sweep_interval,
                Err(status) => {
                    tracing::warn!("hulls could not be compared with containerd's sandboxes: {status}");
                    TICK
                }
            };
            let mut state = shared.state();
            // A failed creation may have asked for an earlier one meanwhile.
            let asked = state.sweep_at.filter(|at| *at > now);
            let at = Instant::now() + again;
            state.sweep_at = Some(asked.map_or(at, |asked| asked.min(at)));
        }
    }

    fn publish(&mut self, shared: &Shared) {
        let metrics = &shared.metrics;
        let state = shared.state();
        for (at, shelf) in state.shelves.iter().enumerate() {
            let handler = state.label(shelf);
            let set = |state, count: usize| {
                let handler = handler.clone();
                let gauge = metrics.pool_hulls.get_or_create_owned(&HullLabels { handler, state });
                gauge.set(i64::try_from(count).unwrap_or(i64::MAX));
            };
            state.show_ready(metrics, at);
            set(HullState::creating, shelf.creating);
            let labels = HandlerLabels {
                handler: handler.clone(),
            };
            let oldest = shelf.idle.front().map_or(0, |idle| idle.born.elapsed().as_secs());
            let gauge = metrics.pool_oldest.get_or_create_owned(&labels);
            gauge.set(i64::try_from(oldest).unwrap_or(i64::MAX));
            let target = metrics.pool_target.get_or_create_owned(&labels);
            target.set(i64::try_from(shelf.target).unwrap_or(i64::MAX));
        }
        // Which handler's they were does not matter any more.
        let all = HullLabels {
            handler: String::new(),
            state: HullState::destroying,
        };
        let destroying = metrics.pool_hulls.get_or_create_owned(&all);
        destroying.set(i64::try_from(state.condemned.len()).unwrap_or(i64::MAX));
        let shown = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        metrics.hull_memory.set(state.bytes_per_hull.map_or(0, shown));
        metrics.free_addresses.set(state.free_addresses.map_or(-1, shown));
        let reasons: Vec<&'static str> = state.off_reasons().collect();
        drop(state);
        for reason in self.reasons.iter().filter(|reason| !reasons.contains(reason)) {
            metrics.pool_off.get_or_create(&ReasonLabels { reason }).set(0);
        }
        for reason in &reasons {
            metrics.pool_off.get_or_create(&ReasonLabels { reason }).set(1);
        }
        self.reasons = reasons;
    }
}

impl Shared {
    /// Drops hulls that have died, and counts addresses.
    async fn watch(&self, now: Instant) {
        let (networks, before) = {
            let state = self.state();
            (state.current.clone(), state.holders())
        };
        // Reads a directory of up to a million entries, so neither under the lock nor on a thread of the runtime.
        let count = move || networks.and_then(|current| cni::free(current.networks.iter()));
        let free = tokio::task::spawn_blocking(count).await.unwrap_or_default();
        let mut state = self.state();
        let held = state.holders();
        state.free_addresses = free;
        // A sum of two counts that do not belong together would have hulls made and removed in turns.
        if free.is_none() || state.addresses.is_none() || held == before {
            state.addresses = free.map(|free| free.saturating_add(held));
        }
        let mut dead = Vec::new();
        for shelf in &mut state.shelves {
            let (alive, gone): (Vec<Idle>, Vec<Idle>) = shelf.idle.drain(..).partition(|idle| idle.hull.is_alive());
            shelf.idle.extend(alive);
            dead.extend(gone);
        }
        for idle in &dead {
            tracing::warn!(sandbox = idle.hull.id, "a hull has died");
        }
        self.bury(&mut state, dead, "dead", now);
        let State { shelves, backoff, .. } = &mut *state;
        for idle in shelves.iter().flat_map(|shelf| &shelf.idle) {
            backoff.lives(idle.born, now);
        }
        state.settle_lent(&self.ledger, now);
    }

    /// Measures memory; whether there was something to measure.
    async fn measure(&self) -> bool {
        let pids: Vec<i32> = {
            let state = self.state();
            let idle = state.shelves.iter().flat_map(|shelf| &shelf.idle);
            idle.take(memory::SAMPLES).map(|idle| idle.pid).collect()
        };
        if pids.is_empty() {
            return false;
        }
        // Walks page tables, which takes milliseconds for many.
        let measured = tokio::task::spawn_blocking(move || memory::per_hull(&pids)).await;
        let Ok(Some(bytes)) = measured else { return false };
        self.state().bytes_per_hull = Some(bytes);
        true
    }
}
