//! Who may use the network: bounded requests, demand before prefetch.
//!
//! Prefetch may hold only a part of the slots, and warming only a part of those, so a reader never queues behind it; and it stops taking bytes from its connections
//! while a reader's request is under way, so the reader has the bandwidth. The demand of one layer may hold a part too, so a
//! registry that does not answer keeps nobody else waiting. No pause is longer than [`LONGEST_PAUSE`]:
//! nothing starves.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::flight::Urgency;

/// Longest time that a prefetch stands aside for readers between two pieces of its body.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(super) struct Gate {
    slots: Arc<Semaphore>,
    prefetch_slots: Arc<Semaphore>,
    warm_slots: Arc<Semaphore>,
    /// Demand requests that wait for a slot or have one.
    demand: Arc<watch::Sender<usize>>,
    /// Demand slots of one layer.
    share: usize,
}

/// The demand slots that one layer may have, so that one whose registry does not answer leaves the others theirs.
#[derive(Debug)]
pub(super) struct Share(Arc<Semaphore>);

/// The right to one request.
#[derive(Debug, Default)]
pub(super) struct Slot {
    _slot: Option<OwnedSemaphorePermit>,
    _prefetch_slot: Option<OwnedSemaphorePermit>,
    _warm_slot: Option<OwnedSemaphorePermit>,
    _share: Option<OwnedSemaphorePermit>,
    _demand: Option<Counted>,
}

/// One demand request, counted as long as it lives.
#[derive(Debug)]
struct Counted(Arc<watch::Sender<usize>>);

impl Counted {
    fn new(demand: &Arc<watch::Sender<usize>>) -> Self {
        demand.send_modify(|count| *count += 1);
        Self(demand.clone())
    }
}

impl Gate {
    /// `slots` requests at once; prefetch has a quarter of them, warming half of that, the demand of one layer half of all.
    pub(super) fn new(slots: usize) -> Self {
        let slots = slots.max(2);
        Self {
            slots: Arc::new(Semaphore::new(slots)),
            prefetch_slots: Arc::new(Semaphore::new((slots / 4).max(1))),
            warm_slots: Arc::new(Semaphore::new((slots / 8).max(1))),
            demand: Arc::new(watch::Sender::new(0)),
            share: slots / 2,
        }
    }

    /// The share of one more layer.
    pub(super) fn share(&self) -> Share {
        Share(Arc::new(Semaphore::new(self.share)))
    }

    /// Waits for the right to make a request that a reader waits for.
    pub(super) async fn enter_demand(&self, share: &Share) -> Slot {
        // Counted first, and for as long as it waits or has a slot.
        let counted = Counted::new(&self.demand);
        Slot {
            _share: share.0.clone().acquire_owned().await.ok(),
            _slot: self.slots.clone().acquire_owned().await.ok(),
            _demand: Some(counted),
            ..Slot::default()
        }
    }

    /// Waits for the right to make a request that nobody waits for.
    pub(super) async fn enter_prefetch(&self) -> Slot {
        let prefetch_slot = self.prefetch_slots.clone().acquire_owned().await.ok();
        self.stand_aside(&Urgency::default()).await;
        Slot {
            _prefetch_slot: prefetch_slot,
            _slot: self.slots.clone().acquire_owned().await.ok(),
            ..Slot::default()
        }
    }

    /// Waits for the right to make a request that nobody will miss for now.
    pub(super) async fn enter_warm(&self) -> Slot {
        let warm_slot = self.warm_slots.clone().acquire_owned().await.ok();
        Slot {
            _warm_slot: warm_slot,
            ..self.enter_prefetch().await
        }
    }

    /// Waits while readers' requests are under way, though not for long, and not once a reader waits for this very fetch.
    pub(super) async fn stand_aside(&self, urgency: &Urgency) {
        if *self.demand.borrow() > 0 {
            let mut demand = self.demand.subscribe();
            // Whichever comes first, it is our turn again.
            tokio::select! {
                _ = demand.wait_for(|count| *count == 0) => {}
                () = urgency.raised() => {}
                () = tokio::time::sleep(LONGEST_PAUSE) => {}
            }
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    const SOON: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn demand_finds_a_slot_whatever_prefetch_holds_and_prefetch_stands_aside() {
        let gate = Gate::new(4);
        let share = gate.share();
        let prefetch = gate.enter_prefetch().await;
        assert!(tokio::time::timeout(SOON, gate.enter_prefetch()).await.is_err());
        let demand = gate.enter_demand(&share).await;
        let before = Instant::now();
        let urgency = Urgency::default();
        gate.stand_aside(&urgency).await;
        assert!(before.elapsed() >= LONGEST_PAUSE);
        urgency.raise();
        assert!(
            tokio::time::timeout(LONGEST_PAUSE, gate.stand_aside(&urgency))
                .await
                .is_ok()
        );
        drop(demand);
        assert!(
            tokio::time::timeout(LONGEST_PAUSE, gate.stand_aside(&Urgency::default()))
                .await
                .is_ok()
        );
        drop(prefetch);
    }

    #[tokio::test]
    async fn warming_leaves_prefetch_its_slots() {
        let gate = Gate::new(16);
        let _warm = [gate.enter_warm().await, gate.enter_warm().await];
        assert!(tokio::time::timeout(SOON, gate.enter_warm()).await.is_err());
        let _prefetch = [gate.enter_prefetch().await, gate.enter_prefetch().await];
        assert!(tokio::time::timeout(SOON, gate.enter_prefetch()).await.is_err());
    }

    #[tokio::test]
    async fn a_cancelled_demand_leaves_no_trace() {
        let gate = Gate::new(4);
        let share = gate.share();
        let held = [gate.enter_demand(&share).await, gate.enter_demand(&share).await];
        assert!(tokio::time::timeout(SOON, gate.enter_demand(&share)).await.is_err());
        // Another layer finds the other half.
        drop(gate.enter_demand(&gate.share()).await);
        assert_eq!(*gate.demand.borrow(), 2);
        drop(held);
        assert_eq!(*gate.demand.borrow(), 0);
    }
}
