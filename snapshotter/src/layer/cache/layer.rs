//! One layer of the cache: its index, its data, and which of it is resident.
//!
//! Bytes leave `data` again while the layer is mounted and read ([`OpenLayer::give_up`]). What keeps a reader from seeing a hole:
//! - bits are cleared durably, then in memory, then a count rises, and only then the hole is punched; nothing is stored in between;
//! - [`OpenLayer::read_resident`] looks at the bits, reads, and looks whether anything was given up meanwhile; if so, what it read
//!   does not count;
//! - whoever waits for chunks holds them ([`OpenLayer::hold`]), and held chunks are not given up.

mod kernel_use;
mod loss;

use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use estargz::digest::Digest;
use estargz::index::{Chunk, LayerIndex};
use rustix::buffer::spare_capacity;

use super::evict::Need;
use super::files;
use super::heat::Heat;
use super::hold::{Held, Holds};
use super::residency::{Binding, Residency, Snapshot};
use super::shelf::Shelf;
use super::stale::MOUNT_POINT;
use crate::layer::fault;
use crate::layer::sys::Mapped;

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
    /// There is no room for a chunk that nobody waits for: only for a reader others would have to give theirs up.
    #[error("there is no room for chunk {chunk}, which nobody waits for")]
    NoRoom {
        /// Number of the chunk in its layer.
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

/// A layer in the cache, open. Whoever opens a layer that is open already gets the same one.
#[derive(Debug, Clone)]
pub struct CachedLayer(pub(super) Arc<OpenLayer>);

impl Deref for CachedLayer {
    type Target = OpenLayer;

    fn deref(&self) -> &OpenLayer {
        &self.0
    }
}

/// What all handles of an open layer share.
pub struct OpenLayer {
    pub(super) dir: PathBuf,
    pub(super) shelf: Arc<Shelf>,
    binding: Binding,
    index: LayerIndex<Mapped>,
    map: Mapped,
    pub(super) data: File,
    residency: Residency,
    pub(super) heat: Heat,
    holds: Holds,
    /// Held for reading while a chunk is written and marked, for writing while chunks are given up or lost. Locked after `synced`.
    pub(super) writing: RwLock<()>,
    /// How often chunks were given up or lost.
    given_up: AtomicU64,
    /// Changes of the bitmap.
    changes: AtomicU64,
    /// How many of them the last checkpoint knew.
    checkpointed: AtomicU64,
    /// What was resident at the last sync of `data` that succeeded, and is in the file at most. Kept locked while the file is
    /// written, so that an older bitmap never replaces a newer one.
    synced: Mutex<Snapshot>,
    /// Set by the first failed write, so that a full disk is logged once and not once per chunk.
    write_failed: AtomicBool,
    /// Whether the kernel reads `data` by itself: see [`OpenLayer::leave_to_kernel`].
    pub(super) read_by_kernel: AtomicBool,
    /// Whether nobody can tell when the kernel has done with it before the next boot: an earlier process mounted it, or files were passed on to it.
    read_for_good: AtomicBool,
    /// Whether the allocated blocks changed since they were counted.
    pub(super) grown: AtomicBool,
    /// When it was read last, in seconds of the shelf's clock.
    pub(super) last_use: AtomicI64,
    activity: AtomicU8,
}

/// Whether the index was looked at: not since its pages were given back, not lately, lately.
const RESTING: u8 = 0;
const QUIET: u8 = 1;
const ACTIVE: u8 = 2;

/// What opening a layer found in its directory.
pub(super) struct Parts {
    pub(super) dir: PathBuf,
    pub(super) binding: Binding,
    pub(super) index: LayerIndex<Mapped>,
    pub(super) map: Mapped,
    pub(super) data: File,
    pub(super) residency: Residency,
    pub(super) read_by_kernel: bool,
}

impl std::fmt::Debug for OpenLayer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OpenLayer")
            .field("dir", &self.dir)
            .field("resident", &self.residency.count())
            .finish_non_exhaustive()
    }
}

impl OpenLayer {
    pub(super) fn new(shelf: Arc<Shelf>, parts: Parts) -> Self {
        let Parts {
            dir,
            binding,
            index,
            map,
            data,
            residency,
            read_by_kernel,
        } = parts;
        let synced = Mutex::new(residency.snapshot());
        Self {
            dir,
            binding,
            map,
            data,
            synced,
            residency,
            heat: Heat::cold(index.chunk_count()),
            holds: Holds::default(),
            writing: RwLock::default(),
            given_up: AtomicU64::new(0),
            changes: AtomicU64::new(0),
            checkpointed: AtomicU64::new(0),
            write_failed: AtomicBool::new(false),
            read_by_kernel: AtomicBool::new(read_by_kernel),
            read_for_good: AtomicBool::new(read_by_kernel),
            grown: AtomicBool::new(true),
            last_use: AtomicI64::new(shelf.now()),
            activity: AtomicU8::new(ACTIVE),
            index,
            shelf,
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
        self.dir.join(MOUNT_POINT)
    }

    /// `data`, as it was opened here. What is read and written through it raises no events, if it was opened before the mark was set.
    pub fn content(&self) -> &File {
        &self.data
    }

    /// Whether all of it is resident, and will be after an unclean stop.
    pub fn is_whole(&self) -> bool {
        self.residency.is_complete() && !self.is_dirty()
    }

    /// What its content takes when all of it is here.
    pub(super) fn whole_bytes(&self) -> u64 {
        self.index.data_size()
    }

    /// Its files take more than was counted.
    pub(super) fn note_growth(&self) {
        self.grown.store(true, Ordering::Relaxed);
    }

    /// What is where in the layer.
    pub fn index(&self) -> &LayerIndex<Mapped> {
        if self.activity.load(Ordering::Relaxed) != ACTIVE {
            self.activity.store(ACTIVE, Ordering::Relaxed);
        }
        &self.index
    }

    /// Gives the memory of an index back that nobody looked at since the last call but one; whether it did now. Called every now
    /// and then.
    pub(super) fn rest(&self) -> bool {
        let next = |activity: u8| activity.checked_sub(1);
        let was = self
            .activity
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, next)
            .unwrap_or(RESTING);
        if was == QUIET {
            self.map.rest();
        }
        was == QUIET
    }

    /// Which chunks are resident.
    pub fn residency(&self) -> &Residency {
        &self.residency
    }

    /// Whether what nobody waits for may be stored: see [`super::LayerStore::no_room`].
    pub fn has_room(&self) -> bool {
        self.shelf.has_room()
    }

    /// Keeps chunks from being given up until they are read: they are about to be waited for.
    pub fn hold(&self, chunks: Range<u32>) -> Held<'_> {
        self.note_use(chunks.clone());
        self.holds.hold(chunks)
    }

    /// The bytes of `data` at `range`, which lies in `chunks`, if those are resident and stay so while it is read.
    pub fn read_resident(&self, range: Range<u64>, chunks: Range<u32>) -> io::Result<Option<Bytes>> {
        self.read_resident_by(range, chunks, |range| self.read(range))
    }

    pub(super) fn read_resident_by(
        &self,
        range: Range<u64>,
        chunks: Range<u32>,
        read: impl FnOnce(Range<u64>) -> io::Result<Bytes>,
    ) -> io::Result<Option<Bytes>> {
        let before = self.given_up.load(Ordering::SeqCst);
        if !self.residency.contains_all(chunks.clone()) {
            return Ok(None);
        }
        self.note_use(chunks);
        let bytes = read(range)?;
        // The count rises after the last bit is cleared and before a hole is punched. Who saw the new count before saw no bit of what
        // went; who saw the old one, and sees it still, has read before there was a hole.
        fence(Ordering::SeqCst);
        Ok((self.given_up.load(Ordering::SeqCst) == before).then_some(bytes))
    }

    fn note_use(&self, chunks: Range<u32>) {
        self.heat.mark(chunks);
        self.touch();
    }

    /// Notes that the layer is used now, as it is when it is mounted or warmed. Whoever only looks at it does not use it.
    pub fn touch(&self) {
        let now = self.shelf.now();
        if self.last_use.load(Ordering::Relaxed) != now {
            self.last_use.store(now, Ordering::Relaxed);
        }
    }

    /// The bytes of `data` at `range`, which the caller knows to be resident and holds.
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
    /// Where the quota or the disk has no room, room is made once: with layers that nobody uses, and for a chunk that is held also with
    /// what others have not read lately. Without any it is an error.
    pub fn store(&self, chunk: u32, bytes: &[u8]) -> Result<bool, StoreError> {
        if self.residency.contains(chunk) {
            return Ok(false);
        }
        let entry = self.chunk(chunk).ok_or(StoreError::NoChunk { chunk })?;
        let found = Digest::of(bytes);
        if found != entry.digest || bytes.len() as u64 != u64::from(entry.size) {
            return Err(StoreError::Digest {
                chunk,
                expected: entry.digest,
                found,
            });
        }
        self.with_room(chunk, entry.size, || {
            self.data.write_all_at(bytes, entry.data_offset)?;
            Ok(true)
        })
    }

    /// Runs `write`, which puts a chunk's verified bytes into `data`, where there is room, and marks the chunk if it says so.
    pub(super) fn with_room(
        &self,
        chunk: u32,
        size: u32,
        write: impl Fn() -> io::Result<bool>,
    ) -> Result<bool, StoreError> {
        self.in_room(chunk, size, || {
            // Nothing is given up until the chunk is marked.
            let _writing = self.writing.read().unwrap_or_else(PoisonError::into_inner);
            self.write_and_mark(chunk, size, &write)
        })
    }

    /// Like [`Self::with_room`], for a `write` whose bytes are verified only when they are there: nobody else writes meanwhile,
    /// and a chunk that is resident is left alone.
    pub(super) fn with_room_alone(
        &self,
        chunk: u32,
        size: u32,
        write: impl Fn() -> io::Result<bool>,
    ) -> Result<bool, StoreError> {
        self.in_room(chunk, size, || {
            let _alone = self.writing.write().unwrap_or_else(PoisonError::into_inner);
            if self.residency.contains(chunk) {
                return Ok(false);
            }
            self.write_and_mark(chunk, size, &write)
        })
    }

    fn write_and_mark(&self, chunk: u32, size: u32, write: impl Fn() -> io::Result<bool>) -> io::Result<bool> {
        let written = write()?;
        if written {
            fault::point("chunk-written");
            // Before the bit is set: who finds nothing changed must not find a bit that no checkpoint has seen.
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        let fresh = written && self.residency.insert(chunk);
        if fresh {
            fault::point("chunk-marked");
            self.grown.store(true, Ordering::Relaxed);
            self.shelf.add(u64::from(size));
        }
        Ok(fresh)
    }

    fn in_room(&self, chunk: u32, size: u32, write: impl Fn() -> io::Result<bool>) -> Result<bool, StoreError> {
        let need = if self.holds.fix().contains(chunk) {
            Need::Reader
        } else {
            Need::Nobody
        };
        let attempt = || {
            self.shelf.admit(u64::from(size), need)?;
            write()
        };
        let mut result = attempt();
        if result.as_ref().is_err_and(is_full) && self.shelf.make_room_on_disk(u64::from(size), need) {
            result = attempt();
        }
        match result {
            Ok(fresh) => {
                self.write_failed.store(false, Ordering::Relaxed);
                Ok(fresh)
            }
            Err(error) if is_full(&error) && need == Need::Nobody => Err(StoreError::NoRoom { chunk }),
            Err(source) => Err(self.write_error(chunk, source)),
        }
    }

    fn write_error(&self, chunk: u32, source: io::Error) -> StoreError {
        let path = self.dir.join("data");
        if !self.write_failed.swap(true, Ordering::Relaxed) {
            tracing::error!(path = %path.display(), error = %source, "cannot write to the layer cache; reads of what is not resident fail until it has room");
        }
        StoreError::Write { chunk, path, source }
    }

    /// Whether the bitmap changed since the last checkpoint.
    pub fn is_dirty(&self) -> bool {
        self.checkpointed.load(Ordering::Acquire) != self.changes.load(Ordering::Acquire)
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
        let changes = self.changes.load(Ordering::Acquire);
        if changes == self.checkpointed.load(Ordering::Acquire) {
            return Ok(());
        }
        let now = self.residency.snapshot();
        if let Err(error) = sync(&self.data) {
            // Who has written before the sync has marked it by now, and loses the mark with the others.
            let _alone = self.writing.write().unwrap_or_else(PoisonError::into_inner);
            self.residency.fall_back(&synced);
            self.given_up.fetch_add(1, Ordering::SeqCst);
            return Err(error);
        }
        fault::point("checkpoint-synced");
        let bitmap = self.residency.encode(&now, &self.binding);
        *synced = now;
        files::replace(&self.dir, RESIDENT, &bitmap)?;
        fault::point("checkpoint-done");
        self.checkpointed.store(changes, Ordering::Release);
        Ok(())
    }

    /// Keeps a chunk from being given up while it is copied; nobody has read it by that.
    pub(super) fn hold_for_copy(&self, chunk: u32) -> Held<'_> {
        self.holds.hold(chunk..chunk.saturating_add(1))
    }

    /// A chunk of the layer.
    pub(super) fn chunk(&self, chunk: u32) -> Option<Chunk> {
        self.index().chunk(chunk)
    }
}

/// Whether the disk, or the share of it that may be used, is full.
pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}
