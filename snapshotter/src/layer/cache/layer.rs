//! One layer of the cache: its index, its data, and which of it is resident.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use estargz::digest::Digest;
use estargz::index::LayerIndex;
use memmap2::Mmap;
use rustix::buffer::spare_capacity;

use super::files;
use super::residency::{Binding, Residency, Snapshot};

/// File with the checkpointed bitmap.
pub(super) const RESIDENT: &str = "resident";

/// Why a chunk was not stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Not the bytes that the TOC promises; nothing was written.
    #[error("chunk {chunk} has digest {found} instead of {expected}")]
    Digest {
        /// Number of the chunk in its layer.
        chunk: u32,
        /// Digest in the TOC.
        expected: Digest,
        /// Digest of the bytes.
        found: Digest,
    },
    /// The layer has no such chunk.
    #[error("there is no chunk {chunk}")]
    NoChunk {
        /// Number asked for.
        chunk: u32,
    },
    /// The bytes are right and could not be written.
    #[error("cannot write chunk {chunk} to {}", path.display())]
    Write {
        /// Number of the chunk in its layer.
        chunk: u32,
        /// The file.
        path: PathBuf,
        /// The failure; `ENOSPC` on a full disk.
        #[source]
        source: io::Error,
    },
}

/// A layer in the cache, open.
pub struct CachedLayer {
    pub(super) dir: PathBuf,
    binding: Binding,
    index: LayerIndex<Mmap>,
    data: File,
    residency: Residency,
    /// Resident chunks at the last checkpoint.
    checkpointed: AtomicU32,
    /// What was resident at the last sync of `data` that succeeded. Kept locked while a checkpoint is written, so that
    /// an older bitmap never replaces a newer one.
    synced: Mutex<Snapshot>,
    /// Set by the first failed write, so that a full disk is logged once and not once per chunk.
    write_failed: AtomicBool,
}

impl std::fmt::Debug for CachedLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedLayer")
            .field("dir", &self.dir)
            .field("resident", &self.residency.count())
            .finish_non_exhaustive()
    }
}

impl CachedLayer {
    pub(super) fn new(
        dir: PathBuf,
        binding: Binding,
        index: LayerIndex<Mmap>,
        data: File,
        residency: Residency,
    ) -> Self {
        let checkpointed = AtomicU32::new(residency.count());
        let synced = Mutex::new(residency.snapshot());
        Self {
            dir,
            binding,
            index,
            data,
            residency,
            checkpointed,
            synced,
            write_failed: AtomicBool::new(false),
        }
    }

    /// Identity of the layer.
    pub fn toc_digest(&self) -> Digest {
        self.binding.toc
    }

    /// Directory of the layer's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where the layer is to be mounted.
    pub fn mount_point(&self) -> PathBuf {
        self.dir.join("mnt")
    }

    /// What is where in the layer.
    pub fn index(&self) -> &LayerIndex<Mmap> {
        &self.index
    }

    /// Which chunks are resident.
    pub fn residency(&self) -> &Residency {
        &self.residency
    }

    /// The bytes of `data` at `range`, which the caller knows to be resident.
    ///
    /// One `pread` into fresh memory: no copy follows, and a failing disk is an error here instead of a signal.
    pub fn read(&self, range: Range<u64>) -> io::Result<Bytes> {
        let wanted = usize::try_from(range.end.saturating_sub(range.start)).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut bytes = Vec::with_capacity(wanted);
        while bytes.len() < wanted {
            let at = range.start + bytes.len() as u64;
            // The capacity may exceed what was asked for; what is read too much is cut off below.
            match rustix::io::pread(&self.data, spare_capacity(&mut bytes), at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        bytes.truncate(wanted);
        Ok(bytes.into())
    }

    /// Writes one chunk after comparing its digest and marks it resident; false if it already was.
    ///
    /// The only way into `data`.
    pub fn store(&self, chunk: u32, bytes: &[u8]) -> Result<bool, StoreError> {
        if self.residency.contains(chunk) {
            return Ok(false);
        }
        let entry = self.index.chunk(chunk).ok_or(StoreError::NoChunk { chunk })?;
        let found = Digest::of(bytes);
        if found != entry.digest || bytes.len() as u64 != u64::from(entry.size) {
            return Err(StoreError::Digest {
                chunk,
                expected: entry.digest,
                found,
            });
        }
        self.data
            .write_all_at(bytes, entry.data_offset)
            .map_err(|source| self.write_error(chunk, source))?;
        self.write_failed.store(false, Ordering::Relaxed);
        Ok(self.residency.insert(chunk))
    }

    fn write_error(&self, chunk: u32, source: io::Error) -> StoreError {
        let path = self.dir.join("data");
        if !self.write_failed.swap(true, Ordering::Relaxed) {
            tracing::error!(path = %path.display(), error = %source, "cannot write to the layer cache; reads of what is not resident fail until it has room");
        }
        StoreError::Write { chunk, path, source }
    }

    /// Whether chunks became resident since the last checkpoint.
    pub fn is_dirty(&self) -> bool {
        self.checkpointed.load(Ordering::Relaxed) != self.residency.count()
    }

    /// Makes what is resident now survive an unclean stop.
    ///
    /// The bitmap is taken before the data is synced, so every bit in it has its data on disk when the file gets its name.
    pub fn checkpoint(&self) -> io::Result<()> {
        self.checkpoint_after(File::sync_data)
    }

    /// The kernel tells of a failed write-back once and then takes the pages for clean. What was written since the last
    /// good sync may be lost from then on, whatever the next sync says, so it is not resident any more.
    pub(super) fn checkpoint_after(&self, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        // A snapshot is replaced whole.
        let mut synced = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.residency.snapshot();
        if now.count() == self.checkpointed.load(Ordering::Relaxed) {
            return Ok(());
        }
        if let Err(error) = sync(&self.data) {
            self.residency.fall_back(&synced);
            return Err(error);
        }
        let bitmap = self.residency.encode(&now, &self.binding);
        let count = now.count();
        *synced = now;
        files::replace(&self.dir, RESIDENT, &bitmap)?;
        self.checkpointed.store(count, Ordering::Relaxed);
        Ok(())
    }
}
