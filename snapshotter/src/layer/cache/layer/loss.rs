//! Bytes that leave `data` again: chunks that are given up, and what an unclean stop left of chunks that nobody knows of.

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use estargz::index::Chunk;
use rustix::fs::FallocateFlags;

use super::{OpenLayer, RESIDENT};
use crate::layer::cache::files;
use crate::layer::cache::residency::{Residency, Snapshot};

/// Extents in `data` begin at multiples of this.
const EXTENT_ALIGN: u64 = 4096;
/// Unit of `st_blocks`.
const BLOCK: u64 = 512;
/// What a filesystem may count for a file besides its content: a share of it, and this.
const BOOKKEEPING: u64 = 256 << 10;

impl OpenLayer {
    /// Gives up chunks that nobody holds: clears their bits, on disk first, and punches holes where they were. How many bytes the
    /// disk got back.
    pub(in crate::layer::cache) fn give_up(&self, chunks: &[u32]) -> io::Result<u64> {
        self.give_up_after(chunks, || ())
    }

    /// Like [`Self::give_up`]; `forgotten` is called when the disk has forgotten the chunks and memory has not.
    pub(in crate::layer::cache) fn give_up_after(&self, chunks: &[u32], forgotten: impl FnOnce()) -> io::Result<u64> {
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let _alone = self.writing.write().unwrap_or_else(PoisonError::into_inner);
        if self.is_read_by_kernel() {
            return Ok(0);
        }
        self.forget_on_disk(&mut synced, chunks)?;
        forgotten();
        let gone = self.forget(chunks);
        if gone.is_empty() {
            return Ok(0);
        }
        let before = self.data.metadata()?.blocks();
        self.punch(&gone)?;
        Ok(before.saturating_sub(self.data.metadata()?.blocks()) * BLOCK)
    }

    /// Takes a chunk for missing whose bytes are wrong, and leaves them where they are: they are written over when it is fetched.
    pub(in crate::layer::cache) fn lose(&self, chunk: u32) -> io::Result<()> {
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let _alone = self.writing.write().unwrap_or_else(PoisonError::into_inner);
        self.forget_on_disk(&mut synced, &[chunk])?;
        self.forget(&[chunk]);
        Ok(())
    }

    /// Clears bits on disk.
    fn forget_on_disk(&self, synced: &mut Snapshot, chunks: &[u32]) -> io::Result<()> {
        if !chunks.iter().any(|&chunk| synced.contains(chunk)) {
            return Ok(());
        }
        let mut left = synced.clone();
        chunks.iter().for_each(|&chunk| left.remove(chunk));
        let bitmap = self.residency.encode(&left, &self.binding);
        if files::replace(&self.dir, RESIDENT, &bitmap).is_err() {
            // A full disk has no room for another bitmap. Without one nothing is resident after an unclean stop, until the
            // next checkpoint.
            files::remove(&self.dir, RESIDENT)?;
            left = Residency::empty(self.index().chunk_count()).snapshot();
        }
        *synced = left;
        Ok(())
    }

    /// Clears bits in memory; those of them that were set and that nobody holds.
    fn forget(&self, chunks: &[u32]) -> Vec<u32> {
        let held = self.holds.fix();
        let gone = chunks
            .iter()
            .copied()
            .filter(|&chunk| !held.contains(chunk) && self.residency.remove(chunk))
            .collect();
        // Not before: who sees the new count must see no bit of what is about to go.
        self.given_up.fetch_add(1, Ordering::SeqCst);
        self.changes.fetch_add(1, Ordering::AcqRel);
        gone
    }

    /// Where a chunk lies in `data`, with the padding behind it if it is its file's last.
    fn extent(&self, chunk: u32) -> Option<Range<u64>> {
        let chunk = self.index().chunk(chunk)?;
        let size = self.padded_size(&chunk).unwrap_or(u64::from(chunk.size));
        Some(chunk.data_offset..chunk.data_offset + size)
    }

    /// A chunk's size with the padding behind it, if it is its file's last.
    pub(in crate::layer::cache) fn padded_size(&self, chunk: &Chunk) -> Option<u64> {
        let file = self.index().inode(chunk.ino)?;
        if file.size != chunk.file_offset + u64::from(chunk.size) {
            return None;
        }
        let end = chunk.data_offset + u64::from(chunk.size);
        Some(
            end.checked_next_multiple_of(EXTENT_ALIGN)?
                .min(self.index().data_size())
                - chunk.data_offset,
        )
    }

    /// Zeros where a chunk would lie that is not resident.
    pub(in crate::layer::cache) fn clear(&self, chunk: &Chunk) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.data, flags, chunk.data_offset, u64::from(chunk.size)).map_err(io::Error::from)
    }

    /// Gives back what is allocated for chunks that are not resident, if it is much: an unclean stop leaves it.
    pub(in crate::layer::cache) fn trim(&self) -> io::Result<()> {
        let padded = |id: u32| {
            self.extent(id)
                .map_or(0, |extent| (extent.end - extent.start).next_multiple_of(EXTENT_ALIGN))
        };
        let (mut known, mut missing) = (0, Vec::new());
        for id in 0..self.residency.chunks() {
            if self.residency.contains(id) {
                known += padded(id) + EXTENT_ALIGN;
            } else {
                missing.push(id);
            }
        }
        let allocated = self.data.metadata()?.blocks() * BLOCK;
        if missing.is_empty() || allocated <= known + known / 64 + BOOKKEEPING {
            return Ok(());
        }
        tracing::info!(dir = %self.dir.display(), allocated, known, "giving back what an unclean stop left");
        self.punch(&missing)
    }

    fn punch(&self, chunks: &[u32]) -> io::Result<()> {
        for hole in holes(chunks.iter().filter_map(|&chunk| self.extent(chunk))) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.data, flags, hole.start, hole.end - hole.start)?;
        }
        self.grown.store(true, Ordering::Relaxed);
        Ok(())
    }
}

/// Extents, in order, as few holes.
fn holes(extents: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut holes: Vec<Range<u64>> = Vec::new();
    for extent in extents {
        match holes.last_mut() {
            Some(last) if last.end == extent.start => last.end = extent.end,
            _ => holes.push(extent),
        }
    }
    holes
}
