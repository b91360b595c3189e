//! Chunks that are on the node already: found by digest in any layer of the cache, copied, and verified like everything else.
//!
//! Where a chunk is found is a hint and no more: the layer may be gone, the chunk given up, the disk wrong. What counts is the digest
//! of what arrives.

pub(super) mod digests;

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use estargz::digest::Digest;
use estargz::index::Chunk;

use super::layer::{CachedLayer, OpenLayer, StoreError};
use super::shelf::Shelf;
use super::store;

/// Layers that are not open and are opened to look into them, for one [`fill`].
const MAX_DONORS: usize = 8;
/// `statfs` types of filesystems where a copy can share its blocks with what it is a copy of.
const CLONING: [u64; 3] = [0x5846_5342, 0x9123_683e, 0xca45_1a4e];

/// Where on the node a chunk is.
#[derive(Debug, Clone)]
pub struct Found {
    layer: CachedLayer,
    chunk: u32,
}

/// What [`fill`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Filled {
    /// Chunks that became resident.
    pub chunks: u32,
    /// Their bytes.
    pub bytes: u64,
}

/// Makes resident what of `chunks` can be had from other layers of the node, or from elsewhere in the layer itself. Blocks: reads,
/// hashes and writes.
///
/// Ends early where there is no room for what nobody waits for.
pub fn fill(layer: &CachedLayer, chunks: Range<u32>) -> Result<Filled, StoreError> {
    let mut search = Search::new(&layer.shelf);
    let mut filled = Filled::default();
    for id in chunks {
        if layer.residency().contains(id) {
            continue;
        }
        let Some(chunk) = layer.chunk(id) else { break };
        let Some(found) = search.find(&chunk.digest, chunk.size) else {
            continue;
        };
        if layer.adopt_chunk(id, &found)? {
            filled.chunks += 1;
            filled.bytes += u64::from(chunk.size);
        }
    }
    Ok(filled)
}

/// A search for several chunks.
pub(super) struct Search<'a> {
    shelf: &'a Arc<Shelf>,
    /// Layers that were opened for it; none where one cannot be.
    donors: HashMap<Digest, Option<CachedLayer>>,
}

impl<'a> Search<'a> {
    pub(super) fn new(shelf: &'a Arc<Shelf>) -> Self {
        Self {
            shelf,
            donors: HashMap::new(),
        }
    }

    /// Where a chunk of this digest is resident.
    pub(super) fn find(&mut self, digest: &Digest, size: u32) -> Option<Found> {
        let places = self.shelf.digests.find(digest);
        places.into_iter().find_map(|(layer, chunk)| {
            let layer = self.donor(&layer)?;
            let entry = layer.chunk(chunk)?;
            let right = entry.digest == *digest && entry.size == size && layer.residency().contains(chunk);
            right.then_some(Found { layer, chunk })
        })
    }

    fn donor(&mut self, layer: &Digest) -> Option<CachedLayer> {
        if let Some(open) = self.shelf.open_one(layer) {
            return Some(open);
        }
        if self.donors.len() >= MAX_DONORS && !self.donors.contains_key(layer) {
            return None;
        }
        let shelf = self.shelf;
        let open = || store::load(shelf, layer).ok().flatten();
        self.donors.entry(*layer).or_insert_with(open).clone()
    }
}

impl OpenLayer {
    /// Takes a chunk over from where it was found; false if it is not there any more, or not right.
    pub fn adopt_chunk(&self, chunk: u32, found: &Found) -> Result<bool, StoreError> {
        let (Some(entry), Some(theirs)) = (self.chunk(chunk), found.layer.chunk(found.chunk)) else {
            return Ok(false);
        };
        if theirs.size != entry.size || theirs.digest != entry.digest {
            return Ok(false);
        }
        // It is not given up there while it is copied.
        let _held = found.layer.hold_for_copy(found.chunk);
        if !found.layer.residency().contains(found.chunk) {
            return Ok(false);
        }
        let cloned = if self.shelf.clones() {
            self.clone_chunk(chunk, &entry, &found.layer, &theirs)?
        } else {
            None
        };
        let adopted = if let Some(cloned) = cloned {
            cloned
        } else {
            let place = theirs.data_offset..theirs.data_offset + u64::from(theirs.size);
            // A disk that cannot be read there does not keep us from fetching the chunk.
            let Ok(bytes) = found.layer.read(place) else {
                return Ok(false);
            };
            match self.store(chunk, &bytes) {
                Err(StoreError::Digest { .. }) => false,
                stored => stored?,
            }
        };
        if adopted {
            self.shelf.metrics.cache_reused_bytes.inc_by(u64::from(entry.size));
        }
        Ok(adopted)
    }

    /// Copies within the filesystem, which may share the blocks, and compares the digest of what is then here. `None` where the kernel
    /// may read what is here: nothing must be there, at any moment, that is not verified.
    fn clone_chunk(&self, id: u32, ours: &Chunk, donor: &Self, theirs: &Chunk) -> Result<Option<bool>, StoreError> {
        let is_left = Cell::new(self.is_read_by_kernel());
        if is_left.get() {
            return Ok(None);
        }
        let cloned = self.with_room_alone(id, ours.size, || {
            // Nobody leaves it to the kernel from here on; somebody may have, while room was made or the turn was waited for.
            is_left.set(self.is_read_by_kernel());
            if is_left.get() {
                return Ok(false);
            }
            let copied = self.copy_from(ours, donor, theirs);
            let place = ours.data_offset..ours.data_offset + u64::from(ours.size);
            let is_right = copied && self.read(place).is_ok_and(|bytes| Digest::of(&bytes) == ours.digest);
            if !is_right {
                self.clear(ours)?;
            }
            Ok(is_right)
        })?;
        Ok((!is_left.get()).then_some(cloned))
    }

    /// Copies a chunk, with the padding behind it where both end their file: only whole blocks can be shared.
    fn copy_from(&self, ours: &Chunk, donor: &Self, theirs: &Chunk) -> bool {
        let padded = |layer: &Self, chunk: &Chunk| layer.padded_size(chunk);
        let mut left = match (padded(self, ours), padded(donor, theirs)) {
            (Some(a), Some(b)) if a == b => a,
            _ => u64::from(ours.size),
        };
        let (mut from, mut to) = (theirs.data_offset, ours.data_offset);
        while left > 0 {
            let want = usize::try_from(left).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(&donor.data, Some(&mut from), &self.data, Some(&mut to), want) {
                Ok(0) => return false,
                Ok(copied) => left = left.saturating_sub(copied as u64),
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
        true
    }
}

impl Shelf {
    /// Whether a copy on this filesystem can share its blocks.
    fn clones(&self) -> bool {
        self.cloning
    }

    pub(super) fn can_clone(root: &std::path::Path) -> bool {
        let kind = rustix::fs::statfs(root).map_err(io::Error::from);
        kind.is_ok_and(|stat| u64::try_from(stat.f_type).is_ok_and(|kind| CLONING.contains(&(kind & 0xffff_ffff))))
    }
}

#[cfg(test)]
mod tests;
