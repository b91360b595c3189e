//! The room that the cache takes and may take.

use super::Inspector;
use crate::layer::cache::{CacheLimits, Dropped, NoRoom};

/// Limits of the cache, and the filesystem that it is on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// What limits the cache.
    pub limits: CacheLimits,
    /// The filesystem's type.
    pub filesystem: &'static str,
    /// Its size.
    pub size: u64,
    /// What is free of it for us.
    pub free: u64,
    /// Why nothing is fetched but for readers.
    pub no_room: Option<NoRoom>,
}

impl Inspector {
    /// Limits of the cache.
    pub fn limits(&self) -> CacheLimits {
        self.shared.store.limits()
    }

    /// Why nothing is fetched but for readers; none where there is room to spare.
    pub fn no_room(&self) -> Option<NoRoom> {
        self.shared.store.no_room()
    }

    /// Removes layers that no snapshot refers to and nobody has open: all of them, or as many as the limits ask for.
    pub async fn prune(&self, all_unused: bool) -> Dropped {
        let shared = self.shared.clone();
        let pruned = tokio::task::spawn_blocking(move || shared.store.prune(all_unused));
        // A panic is a defect; what it was about is in the log.
        pruned.await.unwrap_or_default()
    }
}
