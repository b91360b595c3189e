//! How many workers a session has: one while nobody asks for anything, more while requests come faster than one serves them.
//!
//! Workers block in a read of the device. The kernel wakes the one that has waited longest, so more of them than can run at once
//! only cost switches between threads: where there are requests without end, one that is still awake takes the next at no cost. So
//! there are as many as half the cores (readers have the others), and more only while handlers sleep: every 25 ms in which
//! there are requests it is looked whether a worker sleeps in a handler, and another one takes its place, up to the limit. A handler
//! that blocks its thread keeps nobody else waiting for much longer, and an interrupt is read as soon. When no handler has slept for a
//! while, those beyond half the cores leave; when the session has been quiet for a while, those beyond the first are sent home.
//! Nothing ends a blocked read but a message, so there is one for each of them: the kernel is asked for nothing of a file, and who
//! has read its answer leaves.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::channel::Channel;
use crate::lifetime::Lifetime;

/// How long those who are sent home may take to leave.
const LEAVE_PATIENCE: Duration = Duration::from_millis(100);

/// How often it is looked whether a worker sleeps in a handler, while there are requests.
///
/// Not oftener: the thread that looks runs on some processor and makes the kernel move those who read, and with a look every
/// millisecond four readers had a fifth less.
pub(crate) const LOOK: Duration = Duration::from_millis(25);

/// How late a look may be, in milliseconds, before workers see themselves to it that somebody reads.
const LATE_LOOK_MILLIS: u64 = 100;

/// How long no other worker is tried after one could not be started.
pub(crate) const FAILED_START_PAUSE: Duration = Duration::from_secs(1);

/// Looks without a request after which nobody looks any more.
pub(crate) const QUIET_LOOKS: u32 = 8;

/// How long no handler has slept when workers that took the place of one leave.
pub(crate) const AWAKE_PATIENCE: Duration = Duration::from_secs(2);

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
    /// Workers that can be of use while none sleeps in a handler.
    base: usize,
    /// The kernel's numbers of the workers' threads, by the workers' own numbers.
    tasks: [AtomicI32; crate::WORKERS_MAX],
    /// Whether a request came since the last look at the handlers.
    fresh: AtomicBool,
    /// Whether somebody looks whether handlers sleep.
    looking: AtomicBool,
    began: Instant,
    /// When somebody last looked, in milliseconds since it began.
    looked: AtomicU64,
    patience: Duration,
    /// Whether a request came since the last look.
    busy: AtomicBool,
    /// A regular file the kernel has opened, or zero: what workers are woken with.
    file: AtomicU64,
    /// Whether somebody looks whether the session is quiet.
    watched: AtomicBool,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Roster {
    /// A roster for at most `limit` workers, of which those beyond the first leave after `patience` without a request.
    pub(crate) fn new(limit: usize, patience: Duration) -> Self {
        let limit = limit.clamp(1, crate::WORKERS_MAX);
        let cores = std::thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self {
            waiting: AtomicUsize::new(0),
            leaving: AtomicUsize::new(0),
            numbers: AtomicU64::new(0),
            limit,
            base: (cores / 2).clamp(1, limit),
            tasks: std::array::from_fn(|_| AtomicI32::new(0)),
            fresh: AtomicBool::new(false),
            looking: AtomicBool::new(false),
            began: Instant::now(),
            looked: AtomicU64::new(0),
            patience,
            busy: AtomicBool::new(false),
            file: AtomicU64::new(0),
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
        // In one order with `wake` and `stand_down`.
        let taken = self.numbers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take);
        taken.is_ok().then_some(free)
    }

    /// Gives a number back.
    pub(crate) fn dismiss(&self, number: usize) {
        self.numbers.fetch_and(!(1 << number), Ordering::SeqCst);
    }

    /// A worker that is about to leave gives its number back. It gets one again, and has to stay, if nobody waits any more: who took
    /// a request meanwhile may have found no number for another worker.
    pub(crate) fn stand_down(&self, number: usize) -> Option<usize> {
        self.dismiss(number);
        if self.waiting.load(Ordering::SeqCst) > 0 {
            return None;
        }
        self.enlist()
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
        self.waiting.fetch_add(1, Ordering::SeqCst);
    }

    /// A worker waits no longer; how many others do.
    pub(crate) fn wake(&self) -> usize {
        self.waiting.fetch_sub(1, Ordering::SeqCst).saturating_sub(1)
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

    /// The worker of this number runs on the calling thread.
    pub(crate) fn introduce(&self, number: usize) {
        if let Some(task) = self.tasks.get(number) {
            task.store(rustix::thread::gettid().as_raw_nonzero().get(), Ordering::Release);
        }
    }

    /// Numbers of all workers.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = usize> {
        let numbers = self.numbers.load(Ordering::Acquire);
        (0..crate::WORKERS_MAX).filter(move |number| numbers & (1 << number) != 0)
    }

    /// Whether the thread of a worker sleeps. One that cannot be looked at does, so that nobody has to wait for it.
    pub(crate) fn sleeps(&self, number: usize) -> bool {
        let task = self.tasks.get(number).map_or(0, |task| task.load(Ordering::Acquire));
        let stat = std::fs::read(format!("/proc/self/task/{task}/stat")).unwrap_or_default();
        // After the name, which is in parentheses and may have any character.
        let state = stat
            .iter()
            .rposition(|&byte| byte == b')')
            .and_then(|end| stat.get(end + 2));
        state != Some(&b'R')
    }

    /// Whether there are fewer workers than can be of use.
    pub(crate) fn is_below_base(&self) -> bool {
        (self.numbers.load(Ordering::Relaxed).count_ones() as usize) < self.base
    }

    /// How many workers can be of use while none sleeps.
    pub(crate) fn base(&self) -> usize {
        self.base
    }

    /// Has `count` workers leave after their next request.
    pub(crate) fn dismiss_some(&self, count: usize) {
        self.leaving.store(count, Ordering::Release);
    }

    /// Whether the caller is to see to it that somebody looks whether handlers sleep.
    pub(crate) fn must_look(&self) -> bool {
        // Mostly somebody does, and then nothing is written that other threads have in their caches.
        if self.fresh.load(Ordering::Relaxed) {
            return false;
        }
        self.fresh.store(true, Ordering::SeqCst);
        let must = !self.looking.load(Ordering::SeqCst) && !self.looking.swap(true, Ordering::SeqCst);
        if must {
            self.note_look();
        }
        must
    }

    /// Whether there was a request since this was last asked.
    pub(crate) fn take_fresh(&self) -> bool {
        self.fresh.swap(false, Ordering::SeqCst)
    }

    /// Nobody looks any more; `false` if a request came meanwhile whose worker saw that somebody does, or if one of the `running` workers
    /// does not wait: its handler may sleep yet.
    pub(crate) fn stop_looking(&self, running: usize) -> bool {
        self.looking.store(false, Ordering::SeqCst);
        let is_quiet = !self.fresh.load(Ordering::SeqCst) && self.waiting.load(Ordering::SeqCst) >= running;
        is_quiet || self.looking.swap(true, Ordering::SeqCst)
    }

    /// Somebody looks now.
    pub(crate) fn note_look(&self) {
        self.looked.store(self.elapsed(), Ordering::Relaxed);
    }

    /// Whether somebody has looked just now. The runtime's threads may all be busy, and then nobody does.
    pub(crate) fn is_looked_after(&self) -> bool {
        self.elapsed().saturating_sub(self.looked.load(Ordering::Relaxed)) <= LATE_LOOK_MILLIS
    }

    fn elapsed(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A request came.
    pub(crate) fn note_request(&self) {
        // Mostly set already, and then nothing is written that other threads have in their caches.
        if !self.busy.load(Ordering::Relaxed) {
            self.busy.store(true, Ordering::Relaxed);
        }
    }

    /// The kernel opens a regular file.
    pub(crate) fn note_file(&self, node: u64) {
        if self.file.load(Ordering::Relaxed) != node {
            self.file.store(node, Ordering::Relaxed);
        }
    }

    /// Wakes up to `count` workers that wait for a request. The kernel may know no file any more; then they stay.
    pub(crate) fn wake_up(&self, channel: &Channel, count: usize) {
        let file = self.file.load(Ordering::Relaxed);
        if file == 0 {
            return;
        }
        for _ in 0..count {
            if let Err(errno) = channel.wake_reader(file) {
                tracing::debug!(%errno, file, "an idle worker cannot be woken");
                return;
            }
        }
    }

    /// Whether the caller is to see to it that [`send_home`] runs.
    pub(crate) fn must_watch(&self) -> bool {
        !self.watched.swap(true, Ordering::AcqRel)
    }
}

/// Sends the workers beyond the first home when the session is quiet, and returns when they are gone or the session is over.
pub(crate) async fn send_home(roster: Arc<Roster>, lifetime: Arc<Lifetime>, channel: Arc<Channel>) {
    let mut closed = lifetime.closed();
    loop {
        let closing = tokio::time::timeout(roster.patience, closed.wait_for(Option::is_some))
            .await
            .is_ok();
        if closing || !lifetime.is_alive() {
            return;
        }
        let (running, waiting) = (lifetime.running(), roster.waiting.load(Ordering::Acquire));
        // Only where nobody is busy: a message that waits in the queue wakes nobody.
        if roster.busy.swap(false, Ordering::AcqRel) || waiting < running {
            continue;
        }
        if running > 1 {
            roster.leaving.store(running - 1, Ordering::Release);
            roster.wake_up(&channel, running - 1);
            tokio::time::sleep(LEAVE_PATIENCE).await;
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

    #[test]
    fn who_leaves_while_the_last_one_takes_a_request_stays() {
        let roster = Roster::new(2, Duration::ZERO);
        let (reader, leaver) = (roster.enlist().unwrap(), roster.enlist().unwrap());
        roster.wait();
        roster.leaving.store(1, Ordering::Release);
        assert!(roster.may_leave());
        // The other one takes a request now, and nobody can be started beside it.
        assert_eq!((roster.wake(), roster.enlist()), (0, None));
        let number = roster.stand_down(leaver);
        assert!(number.is_some_and(|number| number != reader));
        // With somebody who waits it goes, and its number is free at once.
        roster.wait();
        assert_eq!(roster.stand_down(leaver), None);
        assert_eq!(roster.enlist(), Some(leaver));
    }
}
