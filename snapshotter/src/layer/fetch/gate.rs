//! Who may use the network: bounded requests, demand before prefetch.
//!
//! Prefetch may hold only a part of the slots, so a reader never queues behind it; and it stops taking bytes from its connections
//! while a reader's request is under way, so the reader has the bandwidth. No pause is longer than [`LONGEST_PAUSE`]:
//! nothing starves.

use std::time::Duration;

use tokio::sync::{Semaphore, SemaphorePermit, watch};

use super::flight::Urgency;
use crate::layer::source::Priority;

/// Longest time that a prefetch stands aside for readers between two pieces of its body.
pub(super) const LONGEST_PAUSE: Duration = Duration::from_millis(250);

#[derive(Debug)]
pub(super) struct Gate {
    slots: Semaphore,
    prefetch_slots: Semaphore,
    /// Demand requests that wait for a slot or have one.
    demand: watch::Sender<usize>,
}

/// The right to one request.
pub(super) struct Slot<'a> {
    _slot: Option<SemaphorePermit<'a>>,
    _prefetch_slot: Option<SemaphorePermit<'a>>,
    demand: Option<&'a watch::Sender<usize>>,
}

impl Gate {
    /// `slots` requests at once; prefetch has a quarter of them.
    pub(super) fn new(slots: usize) -> Self {
        let slots = slots.max(2);
        Self {
            slots: Semaphore::new(slots),
            prefetch_slots: Semaphore::new((slots / 4).max(1)),
            demand: watch::Sender::new(0),
        }
    }

    /// Waits for the right to make a request.
    pub(super) async fn enter(&self, priority: Priority) -> Slot<'_> {
        match priority {
            Priority::Demand => {
                self.demand.send_modify(|count| *count += 1);
                // Made first, so that the count falls again if the wait is cancelled.
                let mut slot = Slot {
                    _slot: None,
                    _prefetch_slot: None,
                    demand: Some(&self.demand),
                };
                slot._slot = self.slots.acquire().await.ok();
                slot
            }
            Priority::Prefetch => {
                let prefetch_slot = self.prefetch_slots.acquire().await.ok();
                self.stand_aside(&Urgency::default()).await;
                Slot {
                    _prefetch_slot: prefetch_slot,
                    _slot: self.slots.acquire().await.ok(),
                    demand: None,
                }
            }
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

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        if let Some(demand) = self.demand {
            demand.send_modify(|count| *count = count.saturating_sub(1));
        }
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
        let prefetch = gate.enter(Priority::Prefetch).await;
        assert!(
            tokio::time::timeout(SOON, gate.enter(Priority::Prefetch))
                .await
                .is_err()
        );
        let demand = gate.enter(Priority::Demand).await;
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
    async fn a_cancelled_demand_leaves_no_trace() {
        let gate = Gate::new(2);
        let held = [gate.enter(Priority::Demand).await, gate.enter(Priority::Demand).await];
        assert!(tokio::time::timeout(SOON, gate.enter(Priority::Demand)).await.is_err());
        assert_eq!(*gate.demand.borrow(), 2);
        drop(held);
        assert_eq!(*gate.demand.borrow(), 0);
    }
}
