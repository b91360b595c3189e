//! What is being fetched: one entry per member under way, so that no member is fetched twice at a time.
//!
//! A [`Claim`] is the right and the duty to fetch one member. It leaves the table when it is settled or dropped, and always after
//! the resident bits were set; so whoever finds a member neither resident nor in the table, while holding the table, must fetch it.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::error::Failure;

/// How far the fetch of a member is.
#[derive(Debug, Clone)]
pub(super) enum Progress {
    /// On its way.
    Pending,
    /// What could be stored is stored; a wrong chunk is being asked for again.
    Partial,
    /// Over.
    Settled(Result<(), Failure>),
}

/// A fetch that others may wait for.
#[derive(Debug, Clone)]
struct Flight {
    progress: watch::Receiver<Progress>,
    urgent: Urgency,
}

/// Whether a reader waits for a group of members, so that it must not pause for other readers.
#[derive(Debug, Clone)]
pub(super) struct Urgency(Arc<watch::Sender<bool>>);

impl Default for Urgency {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(false)))
    }
}

impl Urgency {
    pub(super) fn raise(&self) {
        self.0.send_if_modified(|raised| !std::mem::replace(raised, true));
    }

    pub(super) fn is_raised(&self) -> bool {
        *self.0.borrow()
    }

    /// Returns when a reader waits.
    pub(super) async fn raised(&self) {
        // The sender is ours, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|raised| *raised).await;
    }
}

/// Members for which a table at rest keeps room.
const IDLE_CAPACITY: usize = 64;

type Table = HashMap<u32, Flight>;

/// The members of one layer that are under way.
#[derive(Debug, Clone, Default)]
pub(super) struct Flights {
    table: Arc<Mutex<Table>>,
}

/// The table, held: nothing settles and nothing is claimed meanwhile.
pub(super) struct HeldFlights<'a> {
    flights: &'a Flights,
    table: MutexGuard<'a, Table>,
}

impl Flights {
    pub(super) fn hold(&self) -> HeldFlights<'_> {
        // Every change of the table is one insert or remove, so a panic elsewhere cannot leave it half changed.
        HeldFlights {
            flights: self,
            table: self.table.lock().unwrap_or_else(PoisonError::into_inner),
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.hold().table.len()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.hold().table.is_empty()
    }
}

impl HeldFlights<'_> {
    pub(super) fn contains(&self, member: u32) -> bool {
        self.table.contains_key(&member)
    }

    /// Waits for a member under way, as a reader.
    pub(super) fn join(&self, member: u32) -> Option<watch::Receiver<Progress>> {
        self.table.get(&member).map(|flight| {
            flight.urgent.raise();
            flight.progress.clone()
        })
    }

    /// Claims a member that is not under way.
    pub(super) fn claim(&mut self, member: u32, urgent: &Urgency) -> Option<Claim> {
        let Entry::Vacant(entry) = self.table.entry(member) else {
            return None;
        };
        let (sender, progress) = watch::channel(Progress::Pending);
        entry.insert(Flight {
            progress,
            urgent: urgent.clone(),
        });
        Some(Claim {
            member,
            sender,
            flights: self.flights.clone(),
        })
    }
}

/// The right and the duty to fetch one member.
///
/// Dropped without being settled, it tells its waiters by closing the channel; they look again.
#[derive(Debug)]
pub(super) struct Claim {
    member: u32,
    sender: watch::Sender<Progress>,
    flights: Flights,
}

impl Claim {
    pub(super) fn member(&self) -> u32 {
        self.member
    }

    /// What is said of it, for those who do not wait as readers do.
    pub(super) fn progress(&self) -> watch::Receiver<Progress> {
        self.sender.subscribe()
    }

    /// Lets waiters look whether their chunks are there already.
    pub(super) fn announce_partial(&self) {
        self.sender.send_replace(Progress::Partial);
    }

    pub(super) fn settle(self, result: Result<(), Failure>) {
        self.leave();
        self.sender.send_replace(Progress::Settled(result));
    }

    fn leave(&self) {
        let mut held = self.flights.hold();
        held.table.remove(&self.member);
        // A table never becomes smaller by itself, and there is one for each mounted layer; most are idle most of the time.
        if held.table.is_empty() && held.table.capacity() > IDLE_CAPACITY {
            *held.table = Table::default();
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // After `settle` somebody else may have claimed the member anew; that flight is not ours to remove.
        if !matches!(*self.sender.borrow(), Progress::Settled(_)) {
            self.leave();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_member_has_one_claim_and_a_dropped_claim_frees_it() {
        let flights = Flights::default();
        let urgent = Urgency::default();
        let claim = flights.hold().claim(7, &urgent).unwrap();
        assert!(flights.hold().claim(7, &urgent).is_none());
        assert!(!urgent.is_raised());
        let mut waiter = flights.hold().join(7).unwrap();
        assert!(urgent.is_raised());
        drop(claim);
        assert!(waiter.changed().await.is_err());
        let claim = flights.hold().claim(7, &urgent).unwrap();
        let waiter = flights.hold().join(7).unwrap();
        claim.settle(Ok(()));
        assert!(flights.is_empty());
        assert!(matches!(*waiter.borrow(), Progress::Settled(Ok(()))));
    }

    #[test]
    fn a_layer_at_rest_keeps_no_room_for_members_under_way() {
        let flights = Flights::default();
        let claim = |member| flights.hold().claim(member, &Urgency::default()).unwrap();
        let claims: Vec<_> = (0..4096).map(claim).collect();
        assert!(flights.hold().table.capacity() >= 4096);
        drop(claims);
        assert!(flights.hold().table.capacity() <= IDLE_CAPACITY);
    }
}
