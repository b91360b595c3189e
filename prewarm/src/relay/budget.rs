//! Memory for gathered messages: bytes that are taken before they are filled, and given back when they are gone.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Bytes that may be in use at once.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    bytes: Arc<Semaphore>,
    most: u32,
}

/// Bytes in use, given back when dropped.
#[derive(Debug)]
pub(super) struct Bite(OwnedSemaphorePermit);

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
    ///
    /// Who holds a bite must not wait for another one of the same budget.
    pub(super) async fn take(&self, bytes: usize) -> Bite {
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.most);
        match Arc::clone(&self.bytes).acquire_many_owned(bytes).await {
            Ok(permit) => Bite(permit),
            // The semaphore is never closed.
            Err(_) => std::future::pending().await,
        }
    }
}

impl Bite {
    /// Gives back what is more than `bytes`.
    pub(super) fn shrink(&mut self, bytes: usize) {
        if let Some(surplus) = self.0.num_permits().checked_sub(bytes) {
            drop(self.0.split(surplus));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[tokio::test]
    async fn bytes_come_back() {
        let budget = Budget::new(100);
        let mut first = budget.take(80).await;
        assert!(budget.take(30).now_or_never().is_none());
        first.shrink(70);
        let second = budget.take(30).await;
        assert!(budget.take(1).now_or_never().is_none());
        drop((first, second));
        assert!(budget.take(1 << 40).now_or_never().is_some());
    }
}
