//! A layer as a read-only file tree: its index and its cache turned into file operations.
//!
//! No FUSE types here: [`super::fuse`] translates, and the EROFS path asks the same cache. Every operation but a read of what is
//! not resident is answered from memory or by one `pread`, without waiting.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use estargz::index::{FileKind, Inode};

use super::cache::CachedLayer;
use super::fetch::{Failure, LayerFetch, Reading};

/// Unit of `statfs` and preferred size of reads.
pub const BLOCK_SIZE: u32 = 4096;
/// Longest name.
pub const NAME_MAX: u32 = 255;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// No such inode or name.
    #[error("no such file")]
    NotFound,
    /// A directory was needed.
    #[error("not a directory")]
    NotDirectory,
    /// Anything but a directory was needed.
    #[error("is a directory")]
    IsDirectory,
    /// Not a symbolic link, or not a regular file.
    #[error("wrong type of file")]
    WrongKind,
    /// The file has no such extended attribute.
    #[error("no such attribute")]
    NoAttribute,
    /// The caller's buffer is too small.
    #[error("buffer too small")]
    BufferTooSmall,
    /// Layers cannot be written to.
    #[error("read-only file system")]
    ReadOnly,
    /// The content could not be fetched or stored.
    #[error("cannot fetch the content")]
    Fetch(#[source] Failure),
    /// The cache could not be read.
    #[error("cannot read the cache")]
    Cache(#[source] std::io::Error),
}

impl FsError {
    /// What the reader is told. Only a full disk gets through as itself: it is the one fault that the reader's owner can mend.
    pub fn errno(&self) -> i32 {
        self.answer().0
    }

    /// Name of the errno for metrics.
    pub fn name(&self) -> &'static str {
        self.answer().1
    }

    fn answer(&self) -> (i32, &'static str) {
        match self {
            Self::NotFound => (libc::ENOENT, "ENOENT"),
            Self::NotDirectory => (libc::ENOTDIR, "ENOTDIR"),
            Self::IsDirectory => (libc::EISDIR, "EISDIR"),
            Self::WrongKind => (libc::EINVAL, "EINVAL"),
            Self::NoAttribute => (libc::ENODATA, "ENODATA"),
            Self::BufferTooSmall => (libc::ERANGE, "ERANGE"),
            Self::ReadOnly => (libc::EROFS, "EROFS"),
            Self::Fetch(failure) => match failure.disk_error().and_then(std::io::Error::raw_os_error) {
                Some(libc::ENOSPC) => (libc::ENOSPC, "ENOSPC"),
                Some(libc::EDQUOT) => (libc::EDQUOT, "EDQUOT"),
                Some(_) | None => (libc::EIO, "EIO"),
            },
            Self::Cache(_) => (libc::EIO, "EIO"),
        }
    }

    /// Whether something is broken, rather than the caller having asked for what is not there.
    pub fn is_fault(&self) -> bool {
        matches!(self, Self::Fetch(_) | Self::Cache(_))
    }
}

/// The attributes of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub ino: u64,
    /// Type of the file.
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names.
    pub nlink: u32,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    /// Size in bytes.
    pub size: u64,
    /// Size in blocks of 512 bytes.
    pub blocks: u64,
    /// Modification time: seconds since the epoch.
    pub mtime_sec: i64,
    /// Modification time: nanoseconds.
    pub mtime_nsec: u32,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name.
    pub name: Vec<u8>,
    /// What it names.
    pub ino: u64,
    /// Type of the file.
    pub kind: FileKind,
    /// Where the listing goes on after this entry.
    pub next: u64,
}

/// True figures of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// Size of all content, in blocks of [`BLOCK_SIZE`].
    pub blocks: u64,
    /// Number of inodes.
    pub files: u64,
}

/// The file tree of one layer.
#[derive(Clone)]
pub struct LayerFs {
    fetch: Arc<LayerFetch>,
}

/// A read of a file's first bytes that is as long as this is one of many: headers are shorter.
const LARGE_READ: u32 = 128 << 10;

/// The first two entries of a listing are `.` and `..`; the index's own follow.
const DOTS: u64 = 2;

impl LayerFs {
    /// The tree of the layer that `fetch` fetches.
    pub fn new(fetch: Arc<LayerFetch>) -> Self {
        Self { fetch }
    }

    /// The fetch engine's view of the layer.
    pub fn fetch(&self) -> &Arc<LayerFetch> {
        &self.fetch
    }

    fn layer(&self) -> &CachedLayer {
        self.fetch.layer()
    }

    fn inode(&self, ino: u64) -> Result<Inode<'_>, FsError> {
        self.layer().index().inode(ino).ok_or(FsError::NotFound)
    }

    fn directory(&self, ino: u64) -> Result<Inode<'_>, FsError> {
        let inode = self.inode(ino)?;
        if inode.kind == FileKind::Directory {
            Ok(inode)
        } else {
            Err(FsError::NotDirectory)
        }
    }

    fn file(&self, ino: u64) -> Result<Inode<'_>, FsError> {
        let inode = self.inode(ino)?;
        match inode.kind {
            FileKind::Regular => Ok(inode),
            FileKind::Directory => Err(FsError::IsDirectory),
            FileKind::Symlink | FileKind::CharDevice | FileKind::BlockDevice | FileKind::Fifo => {
                Err(FsError::WrongKind)
            }
        }
    }

    /// Attributes of an inode.
    pub fn attributes(&self, ino: u64) -> Result<Attributes, FsError> {
        let inode = self.inode(ino)?;
        // What overlayfs shows for directories comes from here; a directory with a size looks like one.
        let size = match inode.kind {
            FileKind::Regular => inode.size,
            FileKind::Symlink => inode.symlink_target().map_or(0, |target| target.len() as u64),
            FileKind::Directory => u64::from(BLOCK_SIZE),
            FileKind::CharDevice | FileKind::BlockDevice | FileKind::Fifo => 0,
        };
        let stored = if inode.kind == FileKind::Symlink { 0 } else { size };
        Ok(Attributes {
            ino: inode.ino,
            kind: inode.kind,
            mode: inode.mode,
            uid: inode.uid,
            gid: inode.gid,
            nlink: inode.nlink,
            rdev: inode.rdev,
            size,
            blocks: stored.div_ceil(512),
            mtime_sec: inode.mtime_sec,
            mtime_nsec: inode.mtime_nsec,
        })
    }

    /// The inode that `name` in the directory `parent` names; `None` if there is none.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<u64>, FsError> {
        self.directory(parent)?;
        Ok(self.layer().index().lookup(parent, name))
    }

    /// Target of a symbolic link.
    pub fn link_target(&self, ino: u64) -> Result<Bytes, FsError> {
        self.inode(ino)?
            .symlink_target()
            .map(Bytes::copy_from_slice)
            .ok_or(FsError::WrongKind)
    }

    /// The entries of a directory from position `from` on (0 is its start), with `.` and `..` first.
    pub fn entries(&self, ino: u64, from: u64) -> Result<impl Iterator<Item = Entry> + Send + '_, FsError> {
        let directory = self.directory(ino)?;
        let dots = [(&b"."[..], ino), (&b".."[..], directory.parent)];
        let dots = dots.into_iter().zip(1..).map(|((name, ino), next)| Entry {
            name: name.to_vec(),
            ino,
            kind: FileKind::Directory,
            next,
        });
        // A position beyond the last possible entry is an end like any other.
        let first = u32::try_from(from.saturating_sub(DOTS)).unwrap_or(u32::MAX);
        let named = self.layer().index().entries(ino, first).zip(from.max(DOTS) + 1..);
        let named = named.map(|(entry, next)| Entry {
            name: entry.name.to_vec(),
            ino: entry.ino,
            kind: entry.kind,
            next,
        });
        Ok(dots.skip(usize::try_from(from).unwrap_or(usize::MAX)).chain(named))
    }

    /// Value of an extended attribute.
    pub fn attribute(&self, ino: u64, name: &[u8]) -> Result<Bytes, FsError> {
        let inode = self.inode(ino)?;
        let found = inode
            .xattrs()
            .find(|(found, _)| *found == name)
            .map(|(_, value)| Bytes::copy_from_slice(value));
        found.ok_or(FsError::NoAttribute)
    }

    /// Names of all extended attributes, each with a NUL behind it.
    pub fn attribute_names(&self, ino: u64) -> Result<Bytes, FsError> {
        let inode = self.inode(ino)?;
        Ok(inode
            .xattrs()
            .flat_map(|(name, _)| name.iter().copied().chain([0]))
            .collect())
    }

    /// Checks that an inode can be opened for reading.
    pub fn open(&self, ino: u64, for_writing: bool) -> Result<(), FsError> {
        self.file(ino)?;
        if for_writing { Err(FsError::ReadOnly) } else { Ok(()) }
    }

    /// Checks that an inode can be listed.
    pub fn open_directory(&self, ino: u64) -> Result<(), FsError> {
        self.directory(ino).map(drop)
    }

    /// At most `size` bytes of a file from `offset` on; fewer only at its end. The process `reader` asks for them, or nobody that is
    /// known (0).
    ///
    /// What is resident is read at the first poll; what is not is waited for without a thread.
    pub async fn read(&self, ino: u64, offset: u64, size: u32, reader: i32) -> Result<Bytes, FsError> {
        let (place, chunks) = self.locate(ino, offset, size)?;
        if place.is_empty() {
            return Ok(Bytes::new());
        }
        self.fetch.note_read(&chunks);
        let resident = self.layer().read_resident(place.clone(), chunks.clone());
        if let Some(bytes) = resident.map_err(FsError::Cache)? {
            self.fetch.count_read(true, bytes.len());
            return Ok(bytes);
        }
        // Nothing of it is given up between its coming and its being read.
        let _held = self.layer().hold(chunks.clone());
        let began = Instant::now();
        let reading = if offset == 0 && size >= LARGE_READ {
            Reading::Front
        } else {
            Reading::Part
        };
        let fetched = self.fetch.ensure(chunks, reading).await;
        let bytes = fetched
            .map_err(FsError::Fetch)
            .and_then(|()| self.layer().read(place).map_err(FsError::Cache));
        // Who waited for an error has waited, too.
        let length = bytes.as_ref().map_or(0, Bytes::len);
        self.fetch.readers().note(reader, length as u64, began.elapsed());
        let bytes = bytes?;
        self.fetch.count_read(false, bytes.len());
        Ok(bytes)
    }

    /// Where in `data` a part of a file lies, and the chunks that cover it.
    fn locate(&self, ino: u64, offset: u64, size: u32) -> Result<(Range<u64>, Range<u32>), FsError> {
        let inode = self.file(ino)?;
        let start = offset.min(inode.size);
        let end = start.saturating_add(u64::from(size)).min(inode.size);
        if start == end {
            return Ok((0..0, 0..0));
        }
        let chunks = self.layer().index().chunks_in(ino, start..end);
        Ok((inode.data_offset + start..inode.data_offset + end, chunks))
    }

    /// Figures for `statfs`.
    pub fn statistics(&self) -> Statistics {
        let index = self.layer().index();
        Statistics {
            blocks: index.data_size().div_ceil(u64::from(BLOCK_SIZE)),
            files: u64::from(index.inode_count()),
        }
    }
}
