//! Requests whose handler could not answer at once: how many there may be, and how they are given up.
//!
//! Invariants: never more than the limit are admitted; every admitted request has an entry until its [`Permit`] is
//! dropped; an interrupt that finds its request either polled in place or admitted is never lost (see
//! [`Pending::interrupt`]). Used by [`crate::worker`].
//!
//! Why a limit of our own: the kernel's `max_background` bounds only read-ahead and other background requests.
//! Everything a process waits for itself (lookup, getattr, a single-page fault, direct reads) is bounded by the number
//! of threads on the node alone.

use std::collections::HashMap;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

use crate::abi;

/// How long a worker holds a request that found no room before it answers EIO.
///
/// A worker that holds a request does not read, and what it does not read may be the interrupt that frees a pending one.
/// With every place taken by handlers that never return, waiting for ever would make killed callers unkillable.
pub(crate) const SATURATION_PATIENCE: Duration = Duration::from_secs(30);

/// Why a pending request should look whether it is still wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Doubt {
    /// None.
    Wanted,
    /// A signal came for the caller.
    Interrupted,
    /// The kernel sent the request again, and that one is worked on.
    Repeated,
    /// The session is over.
    Ended,
}

/// What a worker is polling in place, so that interrupts find it. Zero is no request: the kernel numbers from two up.
#[derive(Debug, Default)]
pub(crate) struct Slot {
    current: AtomicU64,
    interrupted: AtomicU64,
}

impl Slot {
    pub(crate) fn begin(&self, unique: u64) {
        self.current.store(unique, Ordering::SeqCst);
    }

    pub(crate) fn end(&self) {
        self.current.store(0, Ordering::SeqCst);
    }

    /// The request that is polled in place.
    pub(crate) fn current(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.current.load(Ordering::Acquire))
    }
}

#[derive(Debug, Default)]
struct Table {
    admitted: usize,
    ended: bool,
    entries: HashMap<u64, watch::Sender<Doubt>>,
}

/// The pending requests of one session.
#[derive(Debug)]
pub(crate) struct Pending {
    limit: usize,
    patience: Duration,
    table: Mutex<Table>,
    room: Condvar,
    slots: Vec<Slot>,
}

/// The place of one pending request; dropping it makes room.
#[derive(Debug)]
pub(crate) struct Permit {
    pending: Arc<Pending>,
    unique: u64,
    doubt: watch::Receiver<Doubt>,
}

/// Why a request is not wanted any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unwanted {
    /// Its caller is being killed, or the session is over.
    ByCaller,
    /// It came again: the other one is answered.
    Repeated,
}

/// No place became free in time, or the session ended meanwhile.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Saturated;

impl Pending {
    pub(crate) fn new(limit: usize, workers: usize) -> Self {
        Self::with_patience(limit, workers, SATURATION_PATIENCE)
    }

    fn with_patience(limit: usize, workers: usize, patience: Duration) -> Self {
        let slots = (0..workers).map(|_| Slot::default()).collect();
        Self {
            limit,
            patience,
            table: Mutex::default(),
            room: Condvar::new(),
            slots,
        }
    }

    pub(crate) fn slot(&self, worker: usize) -> &Slot {
        &self.slots[worker]
    }

    /// Takes a place for the request `slot` is polling; waits for one if all are taken.
    pub(crate) fn admit(self: &Arc<Self>, slot: &Slot, unique: u64) -> Result<Permit, Saturated> {
        let deadline = Instant::now() + self.patience;
        let mut table = self.table();
        while table.admitted >= self.limit && !table.ended {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Saturated);
            }
            (table, _) = self
                .room
                .wait_timeout(table, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if table.ended {
            return Err(Saturated);
        }
        let (sender, doubt) = watch::channel(Doubt::Wanted);
        // Read under the lock, after the entry exists for all who take the lock later: the other half of `interrupt`.
        if slot.interrupted.swap(0, Ordering::SeqCst) == unique {
            sender.send_replace(Doubt::Interrupted);
        }
        table.admitted += 1;
        if let Some(earlier) = table.entries.insert(key(unique), sender) {
            earlier.send_replace(Doubt::Repeated);
        }
        drop(table);
        Ok(Permit {
            pending: Arc::clone(self),
            unique,
            doubt,
        })
    }

    /// Tells a request that its caller got a signal. `false` when no such request is being worked on: it is answered
    /// already, or another worker has read it and not begun.
    ///
    /// A request moves from a slot into the table between two looks at them, so the table is looked at twice: if the
    /// second look misses the entry, it is made later and [`Pending::admit`] sees the mark in the slot.
    pub(crate) fn interrupt(&self, unique: u64) -> bool {
        if self.doubt(unique) {
            return true;
        }
        let Some(slot) = self
            .slots
            .iter()
            .find(|slot| slot.current.load(Ordering::SeqCst) == unique)
        else {
            // It may have been admitted between the two looks.
            return self.doubt(unique);
        };
        slot.interrupted.store(unique, Ordering::SeqCst);
        self.doubt(unique);
        true
    }

    fn doubt(&self, unique: u64) -> bool {
        let table = self.table();
        table
            .entries
            .get(&key(unique))
            .map(|entry| {
                // What is known already is more than a doubt, and stays.
                entry.send_if_modified(|doubt| {
                    let is_new = *doubt == Doubt::Wanted;
                    if is_new {
                        *doubt = Doubt::Interrupted;
                    }
                    is_new
                })
            })
            .is_some()
    }

    /// The session is over: nobody waits for any pending request.
    pub(crate) fn end(&self) {
        let mut table = self.table();
        table.ended = true;
        for entry in table.entries.values() {
            entry.send_replace(Doubt::Ended);
        }
        drop(table);
        self.room.notify_all();
    }

    /// How many requests are pending now.
    pub(crate) fn count(&self) -> usize {
        self.table().admitted
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// Returns when the request is no longer wanted: the session ended, or the thread `pid` is being killed.
    ///
    /// A signal alone is no reason to give up. The kernel reports every signal once, also those a handler will take
    /// (Go's runtime preempts by signal), and a page fault that fails with EINTR is a SIGBUS for an innocent program. So an
    /// interrupt only starts a look, every [`LOOK_INTERVAL`], at whether the caller is being killed.
    pub(crate) async fn unwanted(&mut self, pid: u32) -> Unwanted {
        loop {
            let doubt = *self.doubt.borrow_and_update();
            match doubt {
                Doubt::Ended => return Unwanted::ByCaller,
                Doubt::Repeated => return Unwanted::Repeated,
                Doubt::Interrupted if is_dying(pid) => return Unwanted::ByCaller,
                Doubt::Interrupted => {
                    let _ = tokio::time::timeout(LOOK_INTERVAL, self.doubt.changed()).await;
                }
                Doubt::Wanted => {
                    if self.doubt.changed().await.is_err() {
                        // The entry goes without a word only together with this permit.
                        return Unwanted::ByCaller;
                    }
                }
            }
        }
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut table = self.pending.table();
        table.admitted = table.admitted.saturating_sub(1);
        let ours = table
            .entries
            .get(&key(self.unique))
            .is_some_and(|entry| entry.subscribe().same_channel(&self.doubt));
        if ours {
            table.entries.remove(&key(self.unique));
        }
        drop(table);
        self.pending.room.notify_one();
    }
}

/// What a request is known by: the same one sent again has only its top bit changed.
fn key(unique: u64) -> u64 {
    unique & !abi::RESENT
}

/// Time between two looks at an interrupted caller.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// Whether the thread has SIGKILL pending (every fatal signal becomes one) or is gone. Zero is a thread of a pid
/// namespace that cannot be seen from here, of which nothing is known.
fn is_dying(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    match std::fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => has_sigkill(&status),
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
    }
}

fn has_sigkill(status: &str) -> bool {
    status
        .lines()
        .filter_map(|line| line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:")))
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & (1 << (libc::SIGKILL - 1)) != 0)
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn pending(limit: usize) -> Arc<Pending> {
        Arc::new(Pending::with_patience(limit, 2, Duration::from_millis(50)))
    }

    #[test]
    fn no_more_than_the_limit_and_places_come_back() {
        let pending = pending(2);
        let first = pending.admit(pending.slot(0), 2).unwrap();
        let _second = pending.admit(pending.slot(0), 4).unwrap();
        assert_eq!(pending.admit(pending.slot(0), 6).unwrap_err(), Saturated);
        drop(first);
        let _third = pending.admit(pending.slot(0), 6).unwrap();
        assert_eq!(pending.count(), 2);
    }

    #[test]
    fn an_interrupt_is_found_in_place_and_admitted_but_not_elsewhere() {
        let pending = pending(2);
        assert!(!pending.interrupt(8));
        pending.slot(1).begin(8);
        assert!(pending.interrupt(8));
        let permit = pending.admit(pending.slot(1), 8).unwrap();
        assert_eq!(*permit.doubt.borrow(), Doubt::Interrupted);
        pending.slot(1).end();
        assert!(pending.interrupt(8));
        drop(permit);
        assert!(!pending.interrupt(8));
        // The mark of one request is not taken for the next.
        pending.slot(1).begin(10);
        assert!(pending.interrupt(10));
        pending.slot(1).begin(12);
        assert_eq!(
            *pending.admit(pending.slot(1), 12).unwrap().doubt.borrow(),
            Doubt::Wanted
        );
    }

    #[test]
    fn the_end_frees_those_who_wait() {
        let pending = Arc::new(Pending::with_patience(1, 1, Duration::from_secs(60)));
        let mut held = pending.admit(pending.slot(0), 2).unwrap();
        let waiting = Arc::clone(&pending);
        let waiter = std::thread::spawn(move || waiting.admit(waiting.slot(0), 4).map(drop));
        std::thread::sleep(Duration::from_millis(50));
        pending.end();
        assert_eq!(waiter.join().unwrap(), Err(Saturated));
        assert!(held.unwanted(0).now_or_never().is_some());
    }

    #[test]
    fn an_interrupt_does_not_undo_the_end() {
        let pending = pending(2);
        let mut held = pending.admit(pending.slot(0), 2).unwrap();
        pending.end();
        assert!(pending.interrupt(2));
        // The caller lives, and yet nobody is to wait for this handler.
        let given_up = held.unwanted(std::process::id()).now_or_never();
        assert_eq!(given_up, Some(Unwanted::ByCaller));
    }

    #[test]
    fn a_request_that_came_again_replaces_the_earlier_one() {
        let pending = pending(4);
        let mut earlier = pending.admit(pending.slot(0), 2).unwrap();
        assert!(earlier.unwanted(0).now_or_never().is_none());
        let mut later = pending.admit(pending.slot(1), 1 << 63 | 2).unwrap();
        assert_eq!(earlier.unwanted(0).now_or_never(), Some(Unwanted::Repeated));
        drop(earlier);
        assert!(pending.interrupt(1 << 63 | 2), "the later one is still known");
        assert_eq!(*later.doubt.borrow(), Doubt::Interrupted);
        pending.end();
        assert_eq!(later.unwanted(0).now_or_never(), Some(Unwanted::ByCaller));
    }

    #[test]
    fn a_signal_alone_does_not_make_a_living_caller_unwanted() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let pending = pending(1);
        let mut permit = pending.admit(pending.slot(0), 2).unwrap();
        assert!(pending.interrupt(2));
        runtime.block_on(async {
            let waited = tokio::time::timeout(LOOK_INTERVAL * 2, permit.unwanted(std::process::id())).await;
            assert!(waited.is_err(), "this process is alive");
            // No thread can have this id: the kernel's limit is 2^22.
            let gone = tokio::time::timeout(LOOK_INTERVAL * 2, permit.unwanted(u32::MAX)).await;
            assert!(gone.is_ok());
        });
    }

    #[test]
    fn a_pending_kill_is_read_from_either_mask() {
        assert!(has_sigkill(
            "Name:\tcat\nSigPnd:\t0000000000000100\nShdPnd:\t0000000000000000\n"
        ));
        assert!(has_sigkill("SigPnd:\t0000000000000000\nShdPnd:\t0000000000000100\n"));
        assert!(!has_sigkill(
            "SigPnd:\t0000000000400000\nShdPnd:\t0000000000000002\nSigIgn:\t0000000000000100\n"
        ));
        assert!(!has_sigkill("SigPnd:\tgarbage\n"));
    }
}
