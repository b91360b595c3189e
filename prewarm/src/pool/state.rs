//! What the pool's parts share: shelves, what is being removed, and what stands in the way. Every step under the lock is
//! short, and nothing waits while holding it.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, watch};

use crate::adopt::Miss;
use crate::adopt::hull::Hull;
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::ledger::Ledger;
use crate::metrics::Metrics;

use super::creation;
use super::fingerprint::Current;
use super::options::{HandlerPool, PoolOptions};
use super::pace::{Backoff, Starts};
use super::policy::{Demand, Steady};
use super::snapshot::{Audit, Off};

/// How long [`Shared::release_all`] keeps the pool from making hulls.
const HOLD: Duration = Duration::from_secs(30);

/// How soon whoever gives way to the making of a hull looks again.
const CREATION_LOOK: Duration = Duration::from_millis(200);

/// How long a hull that was handed out may be in nobody's books before the sweep takes it for lost.
const LENT_LIMIT: Duration = Duration::from_secs(300);

/// A hull that was handed out: where it came from.
#[derive(Debug)]
pub(super) struct Lent {
    at: Instant,
    pid: i32,
    born: Instant,
    shelf: usize,
    generation: u64,
}

/// A hull on its shelf.
#[derive(Debug)]
pub(super) struct Idle {
    pub(super) hull: Hull,
    /// The pause process.
    pub(super) pid: i32,
    pub(super) born: Instant,
}

/// The hulls of one handler.
#[derive(Debug)]
pub(super) struct Shelf {
    pub(super) config: HandlerPool,
    /// Oldest first; that one is handed out first, so that none grows old.
    pub(super) idle: VecDeque<Idle>,
    pub(super) creating: usize,
    pub(super) demand: Demand,
    /// What demand asks for, within bounds.
    pub(super) steady: Steady,
    /// The same within limits on all.
    pub(super) target: usize,
    pub(super) off: Option<Off>,
    /// Since when hulls have been missing.
    pub(super) short_since: Option<Instant>,
}

/// A sandbox that has to go.
#[derive(Debug)]
pub(super) struct Condemned {
    pub(super) reason: &'static str,
    pub(super) attempts: u32,
    pub(super) not_before: Instant,
    pub(super) under_way: bool,
    /// It has given its addresses back.
    pub(super) stopped: bool,
}

/// Everything that changes.
#[derive(Debug)]
pub(super) struct State {
    pub(super) shelves: Vec<Shelf>,
    /// By configuration, or because of who watches.
    pub(super) off: Option<Off>,
    /// containerd does not answer; the hulls may well be fine.
    pub(super) away: Option<Off>,
    /// containerd is another than the one that the hulls were made by, and has not confirmed them yet.
    pub(super) unchecked: bool,
    pub(super) paused: bool,
    pub(super) drained: bool,
    /// All that containerd had was looked at after the drain began, so that what is in no book has been found, too.
    pub(super) drain_swept: bool,
    pub(super) held_until: Option<Instant>,
    pub(super) current: Option<Arc<Current>>,
    /// Hulls of an earlier run that are to be taken back; `None` before recovery has said which.
    pub(super) candidates: Option<HashSet<String>>,
    /// Rises with every flush: hulls that were begun before it are not kept.
    pub(super) generation: u64,
    /// Names of hulls that containerd is making.
    pub(super) expected: HashSet<String>,
    /// Hulls that were handed out, until the ledger or we know what became of them.
    pub(super) lent: HashMap<String, Lent>,
    pub(super) condemned: HashMap<String, Condemned>,
    pub(super) starts: Starts,
    pub(super) backoff: Backoff,
    pub(super) last_creation: Option<Instant>,
    /// Of late, on average.
    pub(super) creation_time: Duration,
    pub(super) free_addresses: Option<u64>,
    /// These, and those of hulls at the time of the count: hulls that go or come since do not change the sum.
    pub(super) addresses: Option<u64>,
    pub(super) bytes_per_hull: Option<u64>,
    pub(super) audit: Audit,
    /// The next comparison of our books with containerd's; `None` is now.
    pub(super) sweep_at: Option<Instant>,
}

/// State and what it works on.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: PoolOptions,
    pub(super) containerd: Containerd,
    pub(super) ledger: Ledger,
    pub(super) metrics: Metrics,
    pub(super) facts: watch::Sender<Option<Arc<Facts>>>,
    /// The keeper has something to do.
    pub(super) wake: Notify,
    /// A removal has ended.
    pub(super) removed: Notify,
    state: Mutex<State>,
}

impl Shared {
    pub(super) fn new(options: PoolOptions, containerd: Containerd, ledger: Ledger, metrics: Metrics) -> Self {
        let shelves = options.handlers.iter().cloned().map(|config| Shelf {
            demand: Demand::new(options.demand_window),
            config,
            idle: VecDeque::new(),
            creating: 0,
            steady: Steady::default(),
            target: 0,
            off: None,
            short_since: None,
        });
        let state = State {
            shelves: shelves.collect(),
            off: None,
            away: Some(Off::new("containerd_away", "containerd has not answered yet")),
            unchecked: true,
            paused: false,
            drained: false,
            drain_swept: false,
            held_until: None,
            current: None,
            candidates: None,
            generation: 0,
            expected: HashSet::new(),
            lent: HashMap::new(),
            condemned: HashMap::new(),
            starts: Starts::new(options.start_limit),
            backoff: Backoff::default(),
            last_creation: None,
            creation_time: Duration::ZERO,
            free_addresses: None,
            addresses: None,
            bytes_per_hull: None,
            audit: Audit::default(),
            sweep_at: None,
        };
        Self {
            options,
            containerd,
            ledger,
            metrics,
            facts: watch::Sender::new(None),
            wake: Notify::new(),
            removed: Notify::new(),
            state: Mutex::new(state),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A panic under the lock may at worst have lost a hull from the books; the sweep finds it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn take(&self, handler: &str, now: Instant) -> Result<Hull, Miss> {
        let taken = self.take_inner(handler, now);
        if matches!(taken, Err(Miss::Stale)) {
            // Something to look into. Room on a shelf can wait: nothing is made while the pod starts, and the keeper need
            // not wake beside it.
            self.wake.notify_one();
        }
        taken
    }

    fn take_inner(&self, handler: &str, now: Instant) -> Result<Hull, Miss> {
        let mut state = self.state();
        if !state.may_hold() || state.away.is_some() {
            return Err(Miss::Off);
        }
        let unchecked = state.unchecked;
        let Some(current) = state.current.clone() else {
            return Err(Miss::Off);
        };
        let at = state.position(handler, &current.facts).ok_or(Miss::Handler)?;
        let shelf = state.shelves.get_mut(at).ok_or(Miss::Handler)?;
        if let Some(off) = &shelf.off {
            let of_handler = off.reason.starts_with("handler");
            return Err(if of_handler { Miss::Handler } else { Miss::Off });
        }
        shelf.demand.record(now);
        if unchecked || !current.is_current() {
            return Err(Miss::Stale);
        }
        let mut dead = Vec::new();
        let found = loop {
            match shelf.idle.pop_front() {
                None => break Err(Miss::Empty),
                Some(idle) if idle.hull.is_alive() => break Ok(idle),
                Some(idle) => dead.push(idle),
            }
        };
        self.bury(&mut state, dead, "dead", now);
        match found {
            Ok(idle) => {
                state.starts.begin(&idle.hull.id, now);
                let lent = Lent {
                    at: now,
                    pid: idle.pid,
                    born: idle.born,
                    shelf: at,
                    generation: state.generation,
                };
                state.lent.insert(idle.hull.id.clone(), lent);
                // The keeper, who publishes the rest, sleeps.
                state.show_ready(&self.metrics, at);
                Ok(idle.hull)
            }
            Err(miss) => {
                state.starts.stir(now);
                Err(miss)
            }
        }
    }

    pub(super) fn discard(&self, hull: Hull, why: &'static str) {
        let now = Instant::now();
        let mut state = self.state();
        state.starts.forget(&hull.id);
        if let Some(lent) = state.lent.remove(&hull.id)
            && !hull.is_alive()
        {
            state.backoff.died(lent.born, creation::jitter(), now);
        }
        self.condemn(&mut state, &hull.id, why, now);
        drop(state);
        self.wake.notify_one();
    }

    /// A hull that was taken and not touched is as it was.
    pub(super) fn give_back(&self, hull: Hull) {
        let now = Instant::now();
        let mut state = self.state();
        state.starts.forget(&hull.id);
        let lent = state.lent.remove(&hull.id);
        let may_hold = state.may_hold();
        // Flushed meanwhile, or not from here: it goes.
        let lent = lent.filter(|lent| may_hold && lent.generation == state.generation);
        let shelf = lent.as_ref().and_then(|lent| state.shelves.get_mut(lent.shelf));
        if let (Some(Lent { pid, born, .. }), Some(shelf)) = (lent, shelf.filter(|shelf| shelf.off.is_none())) {
            // It was the oldest.
            shelf.idle.push_front(Idle { hull, pid, born });
        } else {
            self.condemn(&mut state, &hull.id, "given_back", now);
        }
        drop(state);
        self.wake.notify_one();
    }

    /// When neither pods start nor a hull is made, as far as is known: both are background work to each other, and have
    /// one budget.
    pub(super) fn quiet_at(&self, state: &mut State, now: Instant) -> Instant {
        let starts = state.starts.quiet_at(now, self.options.quiet);
        if state.shelves.iter().any(|shelf| shelf.creating > 0) {
            starts.max(now + CREATION_LOOK)
        } else {
            starts
        }
    }

    /// Hulls that have ended by themselves.
    pub(super) fn bury(&self, state: &mut State, gone: Vec<Idle>, reason: &'static str, now: Instant) {
        // What kills many at once is one failure.
        if let Some(youngest) = gone.iter().map(|idle| idle.born).max() {
            state.backoff.died(youngest, creation::jitter(), now);
        }
        for idle in gone {
            self.condemn(state, &idle.hull.id, reason, now);
        }
    }

    pub(super) fn start_begins(&self, sandbox: &str, now: Instant) {
        let mut state = self.state();
        state.starts.begin(sandbox, now);
        // It may be a hull that has just been adopted. Its pod may be gone before the next look, and then nothing would tell.
        state.settle_lent(&self.ledger, now);
        drop(state);
        self.removed.notify_waiters();
    }

    pub(super) fn start_ended(&self, sandbox: &str, now: Instant) {
        self.state().starts.end(sandbox, now);
        self.wake.notify_one();
    }

    /// The sandbox is removed, soon. It stays hidden.
    pub(super) fn condemn(&self, state: &mut State, id: &str, reason: &'static str, now: Instant) {
        self.ledger.retire_hull(id);
        state.condemned.entry(id.to_owned()).or_insert(Condemned {
            reason,
            attempts: 0,
            not_before: now,
            under_way: false,
            stopped: false,
        });
    }

    /// Every idle hull is removed, and those being made once they are there.
    pub(super) fn condemn_idle(&self, reason: &'static str) {
        let now = Instant::now();
        let mut state = self.state();
        state.generation += 1;
        let idle: Vec<Idle> = state
            .shelves
            .iter_mut()
            .flat_map(|shelf| shelf.idle.drain(..))
            .collect();
        for idle in idle {
            self.condemn(&mut state, &idle.hull.id, reason, now);
        }
        drop(state);
        self.wake.notify_one();
    }

    pub(super) fn release_all(&self, reason: &'static str) {
        self.state().held_until = Some(Instant::now() + HOLD);
        self.condemn_idle(reason);
    }

    pub(super) fn resume(&self) {
        let mut state = self.state();
        state.paused = false;
        state.drained = false;
        state.held_until = None;
        drop(state);
        self.wake.notify_one();
    }

    pub(super) async fn drain(&self) {
        {
            let mut state = self.state();
            state.drained = true;
            state.drain_swept = false;
            state.sweep_at = None;
        }
        self.condemn_idle("drained");
        loop {
            let removed = self.removed.notified();
            tokio::pin!(removed);
            // Registered before the look, so that nothing that happens between the two is missed.
            removed.as_mut().enable();
            if self.state().is_drained() {
                return;
            }
            removed.await;
        }
    }
}

impl State {
    /// Hulls may lie on shelves.
    pub(super) fn may_hold(&self) -> bool {
        self.off.is_none() && !self.drained && self.current.is_some()
    }

    /// Hulls may be made.
    pub(super) fn is_usable(&self) -> bool {
        self.may_hold() && self.away.is_none() && !self.unchecked
    }

    /// Somebody waits for hulls to go.
    pub(super) fn is_urgent(&self, now: Instant) -> bool {
        self.drained || self.held_until.is_some_and(|until| now < until)
    }

    /// Hulls that hold addresses, or are about to.
    pub(super) fn holders(&self) -> u64 {
        let shelved: usize = self.shelves.iter().map(|shelf| shelf.idle.len() + shelf.creating).sum();
        let condemned = self.condemned.values().filter(|one| !one.stopped).count();
        (shelved + condemned) as u64
    }

    /// Labels of all that keeps hulls from being there.
    pub(super) fn off_reasons(&self) -> impl Iterator<Item = &'static str> {
        let whole = [&self.off, &self.away].into_iter().flatten();
        let all = whole.chain(self.shelves.iter().filter_map(|shelf| shelf.off.as_ref()));
        let drained = self.drained.then_some("drained");
        all.map(|off| off.reason)
            .chain(drained)
            .chain(self.paused.then_some("paused"))
    }

    /// Which shelf is for pods of this handler: its own, or that of the default handler under its other name.
    fn position(&self, handler: &str, facts: &Facts) -> Option<usize> {
        let other_name = if handler.is_empty() {
            Some(facts.default_handler.as_str())
        } else if handler == facts.default_handler {
            Some("")
        } else {
            None
        };
        let position = |name: &str| {
            self.shelves
                .iter()
                .position(|shelf| shelf.config.runtime_handler == name)
        };
        position(handler).or_else(|| other_name.and_then(position))
    }

    /// Nothing is left, as far as can be known: no hull in whatever stage, and containerd, which is there, has shown that
    /// there is none that we do not know of.
    pub(super) fn is_drained(&self) -> bool {
        self.drain_swept
            && self.is_sure()
            && self.lent.is_empty()
            && self.condemned.is_empty()
            && self.expected.is_empty()
            && self
                .shelves
                .iter()
                .all(|shelf| shelf.idle.is_empty() && shelf.creating == 0)
    }

    /// containerd is there and our books are right.
    fn is_sure(&self) -> bool {
        let settled = self.candidates.as_ref().is_some_and(HashSet::is_empty);
        settled && !self.unchecked && self.away.is_none()
    }

    /// The drain is not over although no hull may be known: one may be yet to be found.
    pub(super) fn is_sweeping(&self) -> bool {
        self.drained && !(self.drain_swept && self.is_sure())
    }

    /// Whether somebody here answers for this sandbox.
    pub(super) fn knows(&self, id: &str, name: &str) -> bool {
        self.condemned.contains_key(id)
            || self.lent.contains_key(id)
            || self.expected.contains(name)
            || self
                .shelves
                .iter()
                .any(|shelf| shelf.idle.iter().any(|idle| idle.hull.id == id))
    }

    /// Forgets hulls handed out whose adoption the ledger knows, and those that nobody has spoken of for too long, which
    /// a sweep is to find.
    pub(super) fn settle_lent(&mut self, ledger: &Ledger, now: Instant) {
        let mut lost = false;
        let mut proven = false;
        let failed_at = self.backoff.failed_at();
        self.lent.retain(|id, lent| {
            if ledger.adoption(id).is_some() {
                proven |= failed_at.is_none_or(|failed| lent.born > failed);
                return false;
            }
            let keep = now.saturating_duration_since(lent.at) < LENT_LIMIT;
            lost |= !keep;
            keep
        });
        if proven {
            self.backoff.succeeded();
        }
        if lost {
            self.drain_swept = false;
            self.sweep_at = None;
        }
    }
}
