//! The room that the cache takes and may take.

use super::Inspector;

/// Limits of the cache, and the filesystem that it is on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes that layers may take; 0 for no limit.
    pub quota: u64,
    /// Bytes that are to stay free; 0 for no limit.
    pub min_free: u64,
    /// The filesystem's type.
    pub filesystem: &'static str,
    /// Its size.
    pub size: u64,
    /// What is free of it for us.
    pub free: u64,
}

/// What a pruning came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pruned {
    /// Layers removed.
    pub layers: usize,
    /// What they had on disk.
    pub bytes: u64,
    /// Layers that could not be removed.
    pub failed: usize,
}

impl Inspector {
    /// Limits of the cache.
    pub fn limits(&self) -> (u64, u64) {
        (0, 0)
    }

    /// Removes layers that no snapshot refers to and nobody has open: all of them, or as many as the limits ask for.
    pub async fn prune(&self, all_unused: bool) -> Pruned {
        let _ = all_unused;
        Pruned::default()
    }
}
