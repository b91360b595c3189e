//! Memory for gathered messages: bytes that are taken before they are filled, and given back when they are gone.
//!
//! What a client makes wait is itself. Small messages take of their connection's own bytes, so they never wait for what
//! other clients do. Large ones take of the bytes that all connections share, and a connection holds one of those at a
//! time, each way.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Limits;

/// Bytes that may be in use at once.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    bytes: Arc<Semaphore>,
    most: u32,
}

/// What one connection may take, in one direction.
#[derive(Debug, Clone)]
pub(super) struct Allowance {
    /// Up to this size a message is small.
    small: usize,
    own: Budget,
    shared: Budget,
    /// Whose turn it is to have a large message.
    turn: Arc<Semaphore>,
}

/// Bytes in use, given back when dropped.
#[derive(Debug)]
pub(super) struct Bite {
    bytes: OwnedSemaphorePermit,
    /// Of a large message.
    turn: Option<OwnedSemaphorePermit>,
    small: usize,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Self {
        let most = u32::try_from(bytes).unwrap_or(u32::MAX);
        let most = most.min(u32::try_from(Semaphore::MAX_PERMITS).unwrap_or(u32::MAX));
        Self {
            bytes: Arc::new(Semaphore::new(most as usize)),
            most,
        }
    }

    /// Takes `bytes`; waits until they are there, in turn. More than the whole budget counts as the whole.
    async fn take(&self, bytes: usize) -> OwnedSemaphorePermit {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.most);
        acquired(&self.bytes, bytes).await
    }
}

impl Allowance {
    /// A new connection's part in what all `shared`.
    pub(super) fn new(limits: &Limits, shared: &Budget) -> Self {
        Self {
            small: limits.small,
            own: Budget::new(limits.own),
            shared: shared.clone(),
            turn: Arc::new(Semaphore::new(1)),
        }
    }

    /// Takes memory for a message; waits until it is there.
    ///
    /// Who holds a bite must not wait for another one of the same direction.
    pub(super) async fn take(&self, bytes: usize) -> Bite {
        let small = self.small;
        if bytes <= small {
            let bytes = self.own.take(bytes).await;
            return Bite {
                bytes,
                turn: None,
                small,
            };
        }
        // The turn first: who waits for it holds nothing that others want.
        let turn = Some(acquired(&self.turn, 1).await);
        let bytes = self.shared.take(bytes).await;
        Bite { bytes, turn, small }
    }
}

impl Bite {
    /// Gives back what is more than `bytes`, and the turn if that is small.
    pub(super) fn shrink(&mut self, bytes: usize) {
        if let Some(surplus) = self.bytes.num_permits().checked_sub(bytes) {
            drop(self.bytes.split(surplus));
        }
        if bytes <= self.small {
            self.turn = None;
        }
    }
}

async fn acquired(semaphore: &Arc<Semaphore>, permits: u32) -> OwnedSemaphorePermit {
    match Arc::clone(semaphore).acquire_many_owned(permits).await {
        Ok(permit) => permit,
        // None of them is ever closed.
        Err(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    fn allowance(shared: &Budget) -> Allowance {
        let limits = Limits {
            small: 10,
            own: 20,
            ..Limits::default()
        };
        Allowance::new(&limits, shared)
    }

    #[tokio::test]
    async fn bytes_come_back() {
        let shared = Budget::new(100);
        let (one, two) = (allowance(&shared), allowance(&shared));
        let mut first = one.take(80).await;
        assert!(two.take(30).now_or_never().is_none());
        first.shrink(70);
        let second = two.take(30).await;
        let three = allowance(&shared);
        assert!(three.take(11).now_or_never().is_none());
        drop((first, second));
        assert!(three.take(1 << 40).now_or_never().is_some());
    }

    #[tokio::test]
    async fn a_connection_makes_only_itself_wait() {
        let shared = Budget::new(100);
        let (one, two) = (allowance(&shared), allowance(&shared));
        // One large message of a connection at a time, although there are bytes for two.
        let mut large = one.take(30).await;
        assert!(one.take(30).now_or_never().is_none());
        let other = two.take(70).await;
        // All that is shared is taken. Small messages do not need it, until their own connection has too many.
        let small = [one.take(10).await, one.take(10).await];
        assert!(one.take(1).now_or_never().is_none());
        assert!(two.take(10).now_or_never().is_some());
        drop((other, small));
        assert!(one.take(1).now_or_never().is_some());
        // What turned out to be small is no longer in the way of a large one.
        large.shrink(10);
        assert!(one.take(90).now_or_never().is_some());
    }
}
