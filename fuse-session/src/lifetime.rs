//! Whether a session lives: how many workers are left, why the first one ended, and waiting for the last.
//!
//! Written by the workers, read by [`crate::Session`] from threads and tasks alike.

use std::time::Duration;

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;
use tokio::sync::watch;

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum End {
    /// The last mount of the file system is gone, or the connection was aborted.
    Unmounted,
    /// This process left the connection to a successor: [`crate::Session::leave`].
    Left,
    /// The device could not be read; the errno of the last attempt.
    Failed(i32),
}

#[derive(Debug)]
struct State {
    running: usize,
    end: Option<End>,
}

/// Shared state of one session's workers.
#[derive(Debug)]
pub(crate) struct Lifetime {
    state: Mutex<State>,
    left: Condvar,
    /// Set when the last worker has left.
    closed: watch::Sender<Option<End>>,
}

impl Lifetime {
    pub(crate) fn new(workers: usize) -> Self {
        let state = Mutex::new(State {
            running: workers,
            end: None,
        });
        Self {
            state,
            left: Condvar::new(),
            closed: watch::Sender::new(None),
        }
    }

    /// One more worker; `false` when the session is over.
    pub(crate) fn join(&self) -> bool {
        let mut state = self.state();
        let is_open = state.end.is_none();
        state.running += usize::from(is_open);
        is_open
    }

    /// One that [`Lifetime::join`] counted was never started. Why the session ended, if all others have left meanwhile.
    pub(crate) fn miss(&self) -> Option<End> {
        let mut state = self.state();
        state.running = state.running.saturating_sub(1);
        let end = state.end.filter(|_| state.running == 0);
        drop(state);
        if end.is_some() {
            self.closed.send_replace(end);
        }
        self.left.notify_all();
        end
    }

    /// A worker that is not needed leaves; `false` if it is the only one, or if the session is over and it has to say so.
    pub(crate) fn retire(&self) -> bool {
        let mut state = self.state();
        let may = state.end.is_none() && state.running > 1;
        state.running -= usize::from(may);
        may
    }

    /// How many workers there are.
    pub(crate) fn running(&self) -> usize {
        self.state().running
    }

    /// The session is over for this process, whatever its workers still wait for.
    pub(crate) fn abandon(&self) {
        let end = *self.state().end.get_or_insert(End::Left);
        self.closed.send_replace(Some(end));
        self.left.notify_all();
    }

    /// A worker leaves because the session is over; `true` for the last one.
    pub(crate) fn leave(&self, end: End) -> bool {
        let mut state = self.state();
        state.running = state.running.saturating_sub(1);
        let end = *state.end.get_or_insert(end);
        let last = state.running == 0;
        drop(state);
        if last {
            self.closed.send_replace(Some(end));
        }
        self.left.notify_all();
        last
    }

    /// Whether workers serve and none has found the session to be over.
    pub(crate) fn is_alive(&self) -> bool {
        let state = self.state();
        state.end.is_none() && state.running > 0
    }

    /// Waits until no worker is left; the number of those still there after `patience`.
    pub(crate) fn wait(&self, patience: Duration) -> usize {
        let deadline = Instant::now() + patience;
        let mut state = self.state();
        while state.running > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (state, _) = self
                .left
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.running
    }

    /// Notified when the last worker has left.
    pub(crate) fn closed(&self) -> watch::Receiver<Option<End>> {
        self.closed.subscribe()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_was_never_started_is_not_waited_for_whatever_came_meanwhile() {
        let lifetime = Lifetime::new(1);
        assert!(lifetime.join());
        lifetime.miss();
        assert_eq!(lifetime.running(), 1);
        assert!(lifetime.join());
        // Between the count and the attempt.
        lifetime.abandon();
        lifetime.miss();
        assert_eq!(lifetime.running(), 1);
        assert!(lifetime.leave(End::Left), "the one that is there is the last one");
        assert_eq!(lifetime.wait(Duration::ZERO), 0);
    }
}
