//! How many workers a session has: one while nobody asks for anything, more while requests come faster than one serves them.
//!
//! Workers block in a read of the device. When the last one that waits takes a request, another is started, up to the limit; so
//! there is always somebody to read an interrupt, and a handler that blocks its thread keeps nobody else waiting. When a session has
//! been quiet for a while, those beyond the first are sent home. Nothing ends a blocked read but a request, so there is one for
//! each of them: the file system is asked for its figures, and who has answered leaves.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::lifetime::Lifetime;

/// The workers of one session.
#[derive(Debug)]
pub(crate) struct Roster {
    /// Those that wait for a request.
    waiting: AtomicUsize,
    /// Those that are to leave after their next request.
    leaving: AtomicUsize,
    /// One bit for each number that a worker has.
    numbers: AtomicU64,
    limit: usize,
    patience: Duration,
    /// Whether a request came since the last look.
    busy: AtomicBool,
    /// Whether somebody looks whether the session is quiet.
    watched: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Roster {
    /// A roster for at most `limit` workers, of which those beyond the first leave after `patience` without a request.
    pub(crate) fn new(limit: usize, patience: Duration) -> Self {
        Self {
            waiting: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            numbers: AtomicU64::new(0),
            limit: limit.clamp(1, crate::WORKERS_MAX),
            patience,
            busy: AtomicBool::new(false),
            watched: AtomicBool::new(false),
            threads: Mutex::default(),
        }
    }

    /// A worker's number, if there may be another worker.
    pub(crate) fn enlist(&self) -> Option<usize> {
        let mut free = 0;
        let take = |numbers: u64| {
            free = numbers.trailing_ones() as usize;
            (free < self.limit).then(|| numbers | 1 << free)
        };
        let taken = self.numbers.fetch_update(Ordering::AcqRel, Ordering::Acquire, take);
        taken.is_ok().then_some(free)
    }

    /// Gives a number back.
    pub(crate) fn dismiss(&self, number: usize) {
        self.numbers.fetch_and(!(1 << number), Ordering::AcqRel);
    }

    /// Keeps the thread of a worker, to be joined at the end.
    pub(crate) fn keep(&self, thread: JoinHandle<()>) {
        let mut threads = self.threads();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
    }

    /// All threads that are left.
    pub(crate) fn take_threads(&self) -> Vec<JoinHandle<()>> {
        std::mem::take(&mut *self.threads())
    }

    fn threads(&self) -> std::sync::MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A worker begins to wait.
    pub(crate) fn wait(&self) {
        self.waiting.fetch_add(1, Ordering::AcqRel);
    }

    /// A worker waits no longer; how many others do.
    pub(crate) fn wake(&self) -> usize {
        self.waiting.fetch_sub(1, Ordering::AcqRel).saturating_sub(1)
    }

    /// Whether the worker that asks, and that does not wait, is to leave: never if no other one waits.
    pub(crate) fn may_leave(&self) -> bool {
        // Nearly always, and then nothing is written.
        if self.leaving.load(Ordering::Relaxed) == 0 || self.waiting.load(Ordering::Acquire) == 0 {
            return false;
        }
        let less = |leaving: usize| leaving.checked_sub(1);
        self.leaving
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, less)
            .is_ok()
    }

    /// A request came.
    pub(crate) fn note_request(&self) {
        // Mostly set already, and then nothing is written that other threads have in their caches.
        if !self.busy.load(Ordering::Relaxed) {
            self.busy.store(true, Ordering::Relaxed);
        }
    }

    /// Whether the caller is to see to it that [`send_home`] runs.
    pub(crate) fn must_watch(&self) -> bool {
        !self.watched.swap(true, Ordering::AcqRel)
    }
}

/// Sends the workers beyond the first home when the session is quiet, and returns when they are gone or the session is over.
pub(crate) async fn send_home(roster: Arc<Roster>, lifetime: Arc<Lifetime>, target: PathBuf) {
    let mut closed = lifetime.closed();
    loop {
        let closing = tokio::time::timeout(roster.patience, closed.wait_for(Option::is_some))
            .await
            .is_ok();
        if closing || !lifetime.is_alive() {
            return;
        }
        let (running, waiting) = (lifetime.running(), roster.waiting.load(Ordering::Acquire));
        // Only where nobody is busy, so that what is asked below is answered.
        if roster.busy.swap(false, Ordering::AcqRel) || waiting < running {
            continue;
        }
        for _ in 1..running {
            roster.leaving.store(1, Ordering::Release);
            let target = target.clone();
            let asked = tokio::task::spawn_blocking(move || rustix::fs::statfs(&target));
            if let Ok(Err(errno)) = asked.await {
                tracing::debug!(%errno, "an idle worker cannot be woken");
                break;
            }
        }
        roster.leaving.store(0, Ordering::Release);
        roster.busy.store(false, Ordering::Release);
        if lifetime.running() > 1 {
            continue;
        }
        roster.watched.store(false, Ordering::Release);
        // One that was started just before this saw that somebody watches.
        if lifetime.running() <= 1 || !roster.must_watch() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_given_once_and_again_when_they_are_free() {
        let roster = Roster::new(2, Duration::ZERO);
        assert_eq!(
            (roster.enlist(), roster.enlist(), roster.enlist()),
            (Some(0), Some(1), None)
        );
        roster.dismiss(0);
        assert_eq!((roster.enlist(), roster.enlist()), (Some(0), None));
        let most = Roster::new(1000, Duration::ZERO);
        let count = std::iter::from_fn(|| most.enlist()).count();
        assert_eq!(count, crate::WORKERS_MAX);
    }
}
