//! What the cache tells of its layers without opening them, and what operators have done to it.

use std::fs;
use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use estargz::digest::Digest;

use super::evict::Dropped;
use super::layer::RESIDENT;
use super::room::NoRoom;
use super::{LayerStore, OpenLayer, Residency, files};

/// Longest file with a bitmap that is read for a report: that of a layer of 64 million chunks.
const MAX_RESIDENT_BYTES: u64 = 8 << 20;

/// The limits of the cache in bytes; 0 for none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheLimits {
    /// What all layers together may take.
    pub quota: u64,
    /// What is left free on the filesystem.
    pub min_free: u64,
}

impl LayerStore {
    /// The layers that are here, in no order.
    pub fn layers(&self) -> Vec<Digest> {
        let Ok(entries) = fs::read_dir(&self.shelf.root) else {
            return Vec::new();
        };
        let digest = |name: &str| format!("sha256:{name}").parse().ok();
        entries
            .filter_map(|entry| digest(entry.ok()?.file_name().to_str()?))
            .collect()
    }

    /// When a layer was used last: read, if it is open, else closed.
    pub fn last_used(&self, toc_digest: &Digest) -> Option<SystemTime> {
        if let Some(open) = self.shelf.open_one(toc_digest) {
            let ago = self.shelf.now().saturating_sub(open.last_use.load(Ordering::Relaxed));
            return SystemTime::now().checked_sub(Duration::from_secs(u64::try_from(ago).unwrap_or(0)));
        }
        let origin = fs::symlink_metadata(self.path(toc_digest).join("origin"));
        origin.and_then(|metadata| metadata.modified()).ok()
    }

    /// The number of a layer's chunks, and how many of them are resident, as its last checkpoint has them.
    pub fn peek(&self, toc_digest: &Digest) -> Option<(u32, u32)> {
        let bytes = files::read_bounded(&self.path(toc_digest).join(RESIDENT), MAX_RESIDENT_BYTES);
        Residency::peek(&bytes.ok()??)
    }

    /// What limits the cache now.
    pub fn limits(&self) -> CacheLimits {
        let room = self.shelf.room();
        CacheLimits {
            quota: if room.quota == u64::MAX { 0 } else { room.quota },
            min_free: room.min_free,
        }
    }

    /// Why what nobody waits for may not be stored; none where it may.
    pub fn no_room(&self) -> Option<NoRoom> {
        self.shelf.room().lack()
    }

    /// Removes layers that nobody uses and no snapshot refers to: all of them, or as many as the limits ask for. Blocks.
    pub fn prune(&self, all: bool) -> Dropped {
        self.shelf.prune(all)
    }
}

impl OpenLayer {
    /// Gives up a chunk whose bytes are found to be wrong; false if somebody waits for it just now.
    pub fn disown(&self, chunk: u32) -> io::Result<bool> {
        if self.is_read_by_kernel() {
            self.lose(chunk)?;
        } else {
            self.give_up(&[chunk])?;
        }
        Ok(!self.residency().contains(chunk))
    }
}
