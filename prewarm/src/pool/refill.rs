//! Making hulls where some are missing, giving up those that are too many.

use std::sync::Arc;
use std::time::{Duration, Instant};

use hullspeed_daemon::error::chain;
use tokio::task::JoinSet;

use crate::adopt::hull::Hull;
use crate::metrics::defs::ResultLabels;

use super::creation::{self, CreationError, Order};
use super::fingerprint::Current;
use super::pace::Obstacles;
use super::policy::{Limits, share};
use super::state::{Idle, Shared, State};

/// So many addresses beyond the headroom have to be free before a further hull takes one; without it, pods that come and
/// go at the limit would have hulls made and removed in turns.
const ADDRESS_MARGIN: u64 = 2;

/// How soon the remains of a failed creation are looked for.
const REMAINS: Duration = Duration::from_secs(2);

/// What a creation has come to.
struct Made {
    shelf: usize,
    name: String,
    began: Instant,
    generation: u64,
    current: Arc<Current>,
    outcome: Result<(Hull, i32), (Option<String>, CreationError)>,
}

impl Shared {
    /// Sets each shelf's target, and removes hulls beyond it.
    pub(super) fn retarget(&self, now: Instant) {
        let options = &self.options;
        let mut state = self.state();
        if state.may_hold() && !state.is_usable() {
            // Until containerd has answered, everything stays as it is.
            return;
        }
        let usable = state.is_usable();
        let refill = state.creation_time + options.max_deferral;
        let limits = limits(&state, self);
        let mut targets: Vec<usize> = state
            .shelves
            .iter_mut()
            .map(|shelf| {
                if !usable || shelf.off.is_some() {
                    return 0;
                }
                let config = &shelf.config;
                let wanted = shelf.demand.wanted(refill, config.min, config.max, now);
                shelf.steady.update(wanted, options.release_interval, now)
            })
            .collect();
        share(&mut targets, limits.total());
        let reason = if limits.is_by_addresses() {
            "addresses"
        } else {
            "surplus"
        };
        let mut gone = Vec::new();
        for (shelf, target) in state.shelves.iter_mut().zip(targets) {
            shelf.target = target;
            let surplus = shelf.idle.len().saturating_sub(target);
            gone.extend(shelf.idle.drain(..surplus).map(|idle| idle.hull.id));
            let is_short = shelf.idle.len() + shelf.creating < target;
            shelf.short_since = is_short.then(|| shelf.short_since.unwrap_or(now));
        }
        for id in gone {
            self.condemn(&mut state, &id, reason, now);
        }
    }

    /// Begins the creations that are due; says when the next one will be.
    pub(super) fn refill(self: &Arc<Self>, tasks: &mut JoinSet<()>, now: Instant) -> Option<Instant> {
        loop {
            let mut state = self.state();
            let (shelf, due) = self.next_creation(&mut state, now)?;
            if due > now {
                return Some(due);
            }
            // The keeper looks again, soon.
            let current = state.current.clone().filter(|current| current.is_current())?;
            let order = match self.order(&state, shelf, &current) {
                Ok(order) => order,
                Err(error) => {
                    state.backoff.failed(chain(&error), 0, now);
                    return state.backoff.until();
                }
            };
            let generation = state.generation;
            state.expected.insert(order.name.clone());
            state.last_creation = Some(now);
            if let Some(shelf) = state.shelves.get_mut(shelf) {
                shelf.creating += 1;
                // Patience begins anew, so that under load that does not end creations are that far apart.
                shelf.short_since = Some(now);
            }
            drop(state);
            let shared = Arc::clone(self);
            tasks.spawn(async move {
                let outcome = shared.make(&order, &current).await;
                shared.made(Made {
                    shelf,
                    name: order.name,
                    began: now,
                    generation,
                    current,
                    outcome,
                });
            });
        }
    }

    /// The shelf that lacks most, and when something can be done about it.
    fn next_creation(&self, state: &mut State, now: Instant) -> Option<(usize, Instant)> {
        let options = &self.options;
        let short = state.shelves.iter().enumerate().filter_map(|(at, shelf)| {
            let have = shelf.idle.len() + shelf.creating;
            let missing = shelf.target.checked_sub(have).filter(|missing| *missing > 0)?;
            Some((have == 0, missing, at, shelf.short_since.unwrap_or(now)))
        });
        let (is_empty, _, at, short_since) = short.max_by_key(|(empty, missing, ..)| (*empty, *missing))?;
        let creating: usize = state.shelves.iter().map(|shelf| shelf.creating).sum();
        let narrow = state
            .free_addresses
            .is_some_and(|free| free < options.address_headroom + ADDRESS_MARGIN);
        if !state.is_usable() || state.paused || narrow || creating >= options.parallel_creations.max(1) {
            return None;
        }
        let obstacles = Obstacles {
            short_since,
            patience: if is_empty {
                options.quiet.min(options.max_deferral)
            } else {
                options.max_deferral
            },
            quiet_at: state.starts.quiet_at(now, options.quiet),
            last: state.last_creation,
            interval: options.creation_interval,
            backoff: state.backoff.until(),
            held: state.held_until,
        };
        Some((at, obstacles.due()))
    }

    fn order(&self, state: &State, shelf: usize, current: &Current) -> Result<Order, CreationError> {
        let handler = state
            .shelves
            .get(shelf)
            .map(|shelf| shelf.config.runtime_handler.clone());
        let handler = handler.unwrap_or_default();
        let systemd = current
            .facts
            .handler(&handler)
            .is_some_and(|handler| handler.systemd_cgroup);
        Ok(Order {
            name: creation::name()?,
            handler,
            mark: self.ledger.mark().clone(),
            made_with: current.fingerprint.text(),
            cgroup: self.options.cgroup.clone(),
            systemd,
            limit: self.options.creation_limit,
        })
    }

    /// Makes a hull. With an error comes the id of what there is to remove.
    async fn make(&self, order: &Order, current: &Current) -> Result<(Hull, i32), (Option<String>, CreationError)> {
        let id = creation::run(&self.containerd, order)
            .await
            .map_err(|error| (None, error))?;
        self.ledger.add_hull(&id);
        let ready = match creation::inspect(&self.containerd, &id).await {
            Ok(ready) => ready,
            Err(error) => return Err((Some(id), error)),
        };
        match creation::open(&id, &order.handler, ready.pid, &current.facts) {
            Ok(hull) => Ok((hull, ready.pid)),
            Err(error) => Err((Some(id), error)),
        }
    }

    fn made(&self, made: Made) {
        let now = Instant::now();
        let took = now.saturating_duration_since(made.began);
        let label = made.outcome.as_ref().map_or_else(|(_, error)| error.label(), |_| "ok");
        self.metrics
            .hull_creations
            .get_or_create(&ResultLabels { result: label })
            .inc();
        // What a failure costs, a refill costs, too.
        self.metrics
            .hull_creation_duration
            .get_or_create(&ResultLabels { result: label })
            .observe(took.as_secs_f64());
        let mut state = self.state();
        state.expected.remove(&made.name);
        if let Some(shelf) = state.shelves.get_mut(made.shelf) {
            shelf.creating = shelf.creating.saturating_sub(1);
        }
        match made.outcome {
            Ok((hull, pid)) => {
                state.backoff.succeeded();
                state.creation_time = if state.creation_time.is_zero() {
                    took
                } else {
                    (3 * state.creation_time + took) / 4
                };
                let idle = Idle { hull, pid, born: now };
                if made.generation == state.generation {
                    self.shelve(&mut state, made.shelf, idle, &made.current, now);
                } else {
                    self.condemn(&mut state, &idle.hull.id, "stale", now);
                }
            }
            Err((id, error)) => {
                let reason = chain(&error);
                tracing::warn!(hull = made.name, "no hull was made: {reason}");
                // Without random numbers all nodes retry alike, which is harmless.
                let jitter = creation::random().map_or(0, |random| random.to_le_bytes()[0]);
                state.backoff.failed(reason, jitter, now);
                match id {
                    Some(id) => self.condemn(&mut state, &id, "unfit", now),
                    // There may be one whose id we have not been told.
                    None => state.sweep_at = Some(now + REMAINS),
                }
            }
        }
        drop(state);
        self.wake.notify_one();
        self.removed.notify_waiters();
    }

    /// Puts a new hull on its shelf, unless times have changed while it was made.
    fn shelve(&self, state: &mut State, shelf: usize, idle: Idle, made_with: &Current, now: Instant) {
        let is_same = |current: &Arc<Current>| {
            current.fingerprint.change_since(&made_with.fingerprint).is_none() && made_with.is_current()
        };
        let is_current = state.current.as_ref().is_some_and(is_same);
        let has_place = state.may_hold();
        match state.shelves.get_mut(shelf) {
            Some(shelf) if is_current && has_place && shelf.off.is_none() => shelf.idle.push_back(idle),
            _ => self.condemn(state, &idle.hull.id, if has_place { "stale" } else { "off" }, now),
        }
    }
}

fn limits(state: &State, shared: &Shared) -> Limits {
    Limits {
        max_memory_bytes: shared.options.max_memory_bytes,
        bytes_per_hull: state.bytes_per_hull,
        address_headroom: shared.options.address_headroom,
        addresses: state.addresses,
    }
}
