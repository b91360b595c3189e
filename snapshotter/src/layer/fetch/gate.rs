//! Who may use the network: bounded requests, demand before what is fetched ahead of it.
//!
//! What no reader waits for may hold only a part of the slots (prefetch a quarter, warming and background completion a part of those),
//! so a reader never queues behind it; and it stops taking bytes from its connections while a reader's request is under way, so the
//! reader has the bandwidth. Background completion makes no request before nobody else has made one for [`CALM`]: a program that
//! starts computes between its reads, and what is begun then is in the way of the next one. What is read ahead of a sequence gives way to other readers and not to its own. The demand of one layer
//! may hold a part too, and a request without progress gives its slot up when a reader waits for one ([`Slot::lend`]), so a
//! registry that does not answer keeps nobody else waiting. No pause within a body is longer than [`LONGEST_PAUSE`].

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::flight::Urgency;
use super::sequence::Sequence;
use crate::layer::source::Priority;

/// Longest time that a request stands aside for readers between two pieces of its body.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(250);
/// Time without a request for anything else, and without a mount, before the rest of a layer is asked for.
pub(super) const CALM: Duration = Duration::from_millis(500);
/// Layers completed at once.
const MAX_BACKGROUND: usize = 2;

/// What a request is made for, and so to whom it gives way.
#[derive(Debug, Clone)]
pub(super) enum Lane {
    /// A reader waits.
    Demand(Sequence),
    /// The reader of this sequence will need it next.
    Ahead(Sequence),
    /// What the image's maker put first.
    Prefetch,
    /// What is to be warm.
    Warm,
    /// The rest of a layer.
    Background {
        /// Until when it waits for others, however long; then no longer.
        patient_until: Instant,
    },
}

impl Lane {
    /// How it is counted.
    pub(super) fn priority(&self) -> Priority {
        match self {
            Self::Demand(_) | Self::Ahead(_) => Priority::Demand,
            Self::Prefetch => Priority::Prefetch,
            Self::Warm => Priority::Warm,
            Self::Background { .. } => Priority::Background,
        }
    }

    /// The sequence of reads that it is for.
    pub(super) fn sequence(&self) -> Option<&Sequence> {
        match self {
            Self::Demand(sequence) | Self::Ahead(sequence) => Some(sequence),
            Self::Prefetch | Self::Warm | Self::Background { .. } => None,
        }
    }

    /// Whether a reader waits.
    pub(super) fn is_demand(&self) -> bool {
        matches!(self, Self::Demand(_))
    }
}

#[derive(Debug)]
pub(super) struct Gate {
    slots: Arc<Semaphore>,
    ahead_slots: Arc<Semaphore>,
    warm_slots: Arc<Semaphore>,
    background_slots: Arc<Semaphore>,
    /// Demand requests that wait for a slot or have one.
    demand: Arc<watch::Sender<usize>>,
    /// Demand requests that wait for a slot.
    starving: AtomicUsize,
    /// What completion waits for.
    activity: Arc<Activity>,
    /// Demand slots of one layer.
    share: usize,
}

/// The demand slots that one layer may have, so that one whose registry does not answer leaves the others theirs.
#[derive(Debug)]
pub(super) struct Share(Arc<Semaphore>);

/// The right to one request.
#[derive(Debug, Default)]
pub(super) struct Slot {
    is_lent: bool,
    _slot: Option<OwnedSemaphorePermit>,
    _ahead_slot: Option<OwnedSemaphorePermit>,
    _lane_slot: Option<OwnedSemaphorePermit>,
    _share: Option<OwnedSemaphorePermit>,
    _demand: Option<Counted>,
    _active: Option<Active>,
}

impl Slot {
    /// Gives the slot up while the request goes on: what does not move uses nothing that others could. The next request needs another.
    pub(super) fn lend(&mut self) {
        self.is_lent = true;
        self._slot = None;
        self._share = None;
    }

    /// Whether it was given up.
    pub(super) fn is_lent(&self) -> bool {
        self.is_lent
    }
}

/// One demand request, counted as long as it lives.
#[derive(Debug)]
struct Counted(Arc<watch::Sender<usize>>, Sequence);

impl Counted {
    fn new(demand: &Arc<watch::Sender<usize>>, sequence: &Sequence) -> Self {
        // In this order, and the other way round at the end: its own read-ahead never takes it for another's.
        sequence.demand_begins();
        demand.send_modify(|count| *count += 1);
        Self(demand.clone(), sequence.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
        self.1.demand_ends();
    }
}

/// Requests that completion gives way to, and when the last of them ended.
#[derive(Debug)]
struct Activity {
    requests: watch::Sender<usize>,
    last: Mutex<Instant>,
}

impl Activity {
    fn note(&self) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// How much of the calm is still to come.
    fn calm_in(&self) -> Duration {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        CALM.saturating_sub(last.elapsed())
    }
}

/// One of those requests, from when it is wanted on, as long as it lives.
#[derive(Debug)]
struct Active(Arc<Activity>);

impl Active {
    fn new(activity: &Arc<Activity>) -> Self {
        activity.requests.send_modify(|count| *count += 1);
        Self(activity.clone())
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        // In this order: whoever sees that it is over sees when, too.
        self.0.note();
        self.0.requests.send_modify(|count| *count = count.saturating_sub(1));
    }
}

/// One who waits, counted as long as it lives.
struct Starving<'a>(&'a AtomicUsize);

impl<'a> Starving<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(count)
    }
}

impl Drop for Starving<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Gate {
    /// `slots` requests at once; what no reader waits for has a quarter of them, warming half of that, the demand of one layer half
    /// of all.
    pub(super) fn new(slots: usize) -> Self {
        let slots = slots.max(2);
        let semaphore = |permits: usize| Arc::new(Semaphore::new(permits.max(1)));
        Self {
            slots: semaphore(slots),
            ahead_slots: semaphore(slots / 4),
            warm_slots: semaphore(slots / 8),
            background_slots: semaphore((slots / 8).min(MAX_BACKGROUND)),
            demand: Arc::new(watch::Sender::new(0)),
            starving: AtomicUsize::new(0),
            activity: Arc::new(Activity {
                requests: watch::Sender::new(0),
                last: Mutex::new(Instant::now()),
            }),
            share: slots / 2,
        }
    }

    /// Tells that something begins which will want the network.
    pub(super) fn note_activity(&self) {
        self.activity.note();
    }

    /// The share of one more layer.
    pub(super) fn share(&self) -> Share {
        Share(Arc::new(Semaphore::new(self.share)))
    }

    /// Whether a reader waits for a slot.
    pub(super) fn is_starved(&self) -> bool {
        self.starving.load(Ordering::Acquire) > 0
    }

    /// Waits for the right to make a request that a reader waits for.
    pub(super) async fn enter_demand(&self, share: &Share, sequence: &Sequence) -> Slot {
        // Counted first, and for as long as it waits or has a slot.
        let counted = Counted::new(&self.demand, sequence);
        let active = Active::new(&self.activity);
        let _starving = Starving::new(&self.starving);
        Slot {
            _share: share.0.clone().acquire_owned().await.ok(),
            _slot: self.slots.clone().acquire_owned().await.ok(),
            _demand: Some(counted),
            _active: Some(active),
            ..Slot::default()
        }
    }

    /// Waits for the right to make a request that no reader waits for.
    pub(super) async fn enter_ahead(&self, lane: &Lane) -> Slot {
        let is_background = matches!(lane, Lane::Background { .. });
        let active = (!is_background).then(|| Active::new(&self.activity));
        let lane_slot = match lane {
            Lane::Demand(_) | Lane::Ahead(_) | Lane::Prefetch => None,
            Lane::Warm => self.warm_slots.clone().acquire_owned().await.ok(),
            Lane::Background { patient_until } => self.calm_slot(*patient_until).await,
        };
        let ahead_slot = self.ahead_slots.clone().acquire_owned().await.ok();
        self.stand_aside(lane, &Urgency::default()).await;
        Slot {
            _lane_slot: lane_slot,
            _ahead_slot: ahead_slot,
            _active: active,
            _slot: self.slots.clone().acquire_owned().await.ok(),
            ..Slot::default()
        }
    }

    /// The right to complete a layer, when nothing else has been asked for during [`CALM`] or it has been waited for long enough. Who
    /// waits keeps it from nobody.
    async fn calm_slot(&self, patient_until: Instant) -> Option<OwnedSemaphorePermit> {
        loop {
            tokio::select! {
                () = self.calm() => {}
                () = tokio::time::sleep_until(patient_until.into()) => {}
            }
            let slot = self.background_slots.clone().acquire_owned().await.ok()?;
            if Instant::now() >= patient_until || self.is_calm() {
                return Some(slot);
            }
        }
    }

    fn is_calm(&self) -> bool {
        *self.activity.requests.borrow() == 0 && self.activity.calm_in().is_zero()
    }

    /// Waits until nothing else has been asked for during [`CALM`].
    async fn calm(&self) {
        let mut requests = self.activity.requests.subscribe();
        loop {
            // The sender is ours, so waiting cannot fail.
            let _ = requests.wait_for(|count| *count == 0).await;
            match self.activity.calm_in() {
                Duration::ZERO => return,
                left => tokio::time::sleep(left).await,
            }
        }
    }

    /// Waits while other readers' requests are under way, though not for long, and not once a reader waits for this very fetch.
    pub(super) async fn stand_aside(&self, lane: &Lane, urgency: &Urgency) {
        if matches!(lane, Lane::Background { patient_until } if Instant::now() >= *patient_until) {
            return;
        }
        let own = || match lane {
            Lane::Demand(_) => usize::MAX,
            Lane::Ahead(sequence) => sequence.demand(),
            Lane::Prefetch | Lane::Warm | Lane::Background { .. } => 0,
        };
        if *self.demand.borrow() > own() {
            let mut demand = self.demand.subscribe();
            // Whichever comes first, it is our turn again.
            tokio::select! {
                _ = demand.wait_for(|count| *count <= own()) => {}
                () = urgency.raised() => {}
                () = tokio::time::sleep(LONGEST_PAUSE) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn background(patience: Duration) -> Lane {
        Lane::Background {
            patient_until: Instant::now() + patience,
        }
    }

    fn sequence() -> Sequence {
        Sequence::default()
    }

    #[tokio::test]
    async fn demand_finds_a_slot_whatever_prefetch_holds_and_prefetch_stands_aside() {
        let gate = Gate::new(4);
        let share = gate.share();
        let prefetch = gate.enter_ahead(&Lane::Prefetch).await;
        assert!(gate.enter_ahead(&Lane::Prefetch).now_or_never().is_none());
        let demand = gate.enter_demand(&share, &sequence()).await;
        let before = Instant::now();
        let urgency = Urgency::default();
        gate.stand_aside(&Lane::Prefetch, &urgency).await;
        assert!(before.elapsed() >= LONGEST_PAUSE);
        urgency.raise();
        assert!(gate.stand_aside(&Lane::Prefetch, &urgency).now_or_never().is_some());
        drop(demand);
        let calm = Urgency::default();
        assert!(gate.stand_aside(&Lane::Prefetch, &calm).now_or_never().is_some());
        drop(prefetch);
    }

    #[tokio::test]
    async fn read_ahead_gives_way_to_other_readers_and_not_to_its_own() {
        let gate = Gate::new(16);
        let (share, own, calm) = (gate.share(), sequence(), Urgency::default());
        let ahead = Lane::Ahead(own.clone());
        let _own = gate.enter_demand(&share, &own).await;
        assert!(gate.stand_aside(&ahead, &calm).now_or_never().is_some());
        assert!(gate.enter_ahead(&ahead).now_or_never().is_some());
        let other = gate.enter_demand(&share, &sequence()).await;
        assert!(gate.stand_aside(&ahead, &calm).now_or_never().is_none());
        drop(other);
        assert!(gate.stand_aside(&ahead, &calm).now_or_never().is_some());
    }

    #[tokio::test]
    async fn warming_and_completion_leave_prefetch_its_slots_and_completion_waits_for_calm() {
        let gate = Gate::new(16);
        let hurried = background(Duration::ZERO);
        let _warm = [gate.enter_ahead(&Lane::Warm).await, gate.enter_ahead(&Lane::Warm).await];
        assert!(gate.enter_ahead(&Lane::Warm).now_or_never().is_none());
        let completion = [gate.enter_ahead(&hurried).await, gate.enter_ahead(&hurried).await];
        assert!(gate.enter_ahead(&hurried).now_or_never().is_none());
        drop(completion);
        let _prefetch = [
            gate.enter_ahead(&Lane::Prefetch).await,
            gate.enter_ahead(&Lane::Prefetch).await,
        ];
        assert!(gate.enter_ahead(&Lane::Prefetch).now_or_never().is_none());

        for others in [Lane::Demand(sequence()), Lane::Prefetch, Lane::Warm] {
            let gate = Gate::new(16);
            let share = gate.share();
            let slot = match &others {
                Lane::Demand(sequence) => gate.enter_demand(&share, sequence).await,
                ahead => gate.enter_ahead(ahead).await,
            };
            let patient = background(Duration::from_secs(3600));
            let mut waiting = Box::pin(gate.enter_ahead(&patient));
            tokio::time::timeout(2 * CALM, &mut waiting).await.unwrap_err();
            drop(slot);
            let over = Instant::now();
            drop(waiting.await);
            assert!(over.elapsed() >= CALM, "{others:?}");
            // A mount is followed by reads.
            gate.note_activity();
            assert!(gate.enter_ahead(&patient).now_or_never().is_none());
        }
    }

    #[tokio::test]
    async fn completion_whose_deadline_is_over_waits_for_nobody_and_not_for_those_who_do() {
        let gate = Gate::new(16);
        let share = gate.share();
        let _demand = gate.enter_demand(&share, &sequence()).await;
        let patient = background(Duration::from_secs(3600));
        let mut waiting = [(); 2 * MAX_BACKGROUND].map(|()| Box::pin(gate.enter_ahead(&patient)));
        for waiting in &mut waiting {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        let (soon, calm) = (background(CALM / 4), Urgency::default());
        gate.enter_ahead(&soon).await;
        assert!(gate.stand_aside(&soon, &calm).now_or_never().is_some());
        assert!(gate.stand_aside(&patient, &calm).now_or_never().is_none());
    }

    #[tokio::test]
    async fn a_cancelled_demand_leaves_no_trace_and_a_lent_slot_serves_another() {
        let gate = Gate::new(4);
        let (share, own) = (gate.share(), sequence());
        let mut held = [
            gate.enter_demand(&share, &own).await,
            gate.enter_demand(&share, &own).await,
        ];
        assert!(!gate.is_starved());
        let mut waiting = Box::pin(gate.enter_demand(&share, &own));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(gate.is_starved());
        held[0].lend();
        assert!(held[0].is_lent() && !held[1].is_lent());
        assert_eq!(*gate.demand.borrow(), 3, "its reader still waits");
        assert!(waiting.as_mut().now_or_never().is_some());
        drop(waiting);
        assert!(!gate.is_starved());
        // Another layer finds the other half.
        drop(gate.enter_demand(&gate.share(), &own).await);
        assert_eq!(*gate.demand.borrow(), 2);
        drop(held);
        assert_eq!((*gate.demand.borrow(), own.demand()), (0, 0));
    }
}
