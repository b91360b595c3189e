//! [`LayerFs`] as a [`fuse3::raw::Filesystem`]: translation only.
//!
//! A layer never changes, so the kernel may keep everything it was told: entries, absent entries, attributes, directory
//! listings and pages. Node ids are inode numbers, which are a function of the TOC; handles carry nothing. A kernel that was
//! talking to another process before finds the same tree here.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroU32;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::time::{Duration, Instant};

use bytes::Bytes;
use estargz::index::FileKind;
use fuse3::raw::Request;
use fuse3::raw::reply::{
    DirectoryEntry, DirectoryEntryPlus, FileAttr, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry,
    ReplyInit, ReplyOpen, ReplyStatFs, ReplyXAttr,
};
use fuse3::{Errno, FileType, Timestamp};
use futures_util::{Stream, stream};

use super::fault;
use super::fs::{Attributes, BLOCK_SIZE, Entry, FsError, LayerFs, NAME_MAX};
use crate::metrics::Metrics;
use crate::metrics::defs::{OpErrorLabels, OpLabels};

/// How long the kernel may keep what it was told. Not for ever only because the protocol adds it to the current time.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// Answer to `open`: pages read before are still right.
const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// Answer to `opendir`: the listing may be kept.
const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// Nothing is written; the protocol wants a number.
const MAX_WRITE: NonZeroU32 = NonZeroU32::MIN.saturating_add(128 * 1024 - 1);

type FuseResult<T> = Result<T, Errno>;

/// A layer's file tree, served by FUSE.
pub struct LayerFuse {
    fs: LayerFs,
    metrics: Metrics,
}

impl LayerFuse {
    /// Serves `fs`.
    pub fn new(fs: LayerFs, metrics: Metrics) -> Self {
        Self { fs, metrics }
    }

    /// Counts an operation and translates its error.
    fn done<T>(&self, op: &'static str, began: Instant, result: Result<T, FsError>) -> FuseResult<T> {
        self.metrics
            .fuse_operation
            .get_or_create(&OpLabels { op })
            .observe(began.elapsed().as_secs_f64());
        result.map_err(|error| {
            if error.is_fault() {
                self.metrics
                    .fuse_operation_errors
                    .get_or_create(&OpErrorLabels {
                        op,
                        error: error.name(),
                    })
                    .inc();
            }
            Errno::from(error.errno())
        })
    }

    fn entry(&self, parent: u64, name: &[u8]) -> Result<ReplyEntry, FsError> {
        let attr = match self.fs.lookup(parent, name)? {
            Some(ino) => file_attr(&self.fs.attributes(ino)?),
            // Inode 0 tells the kernel to remember that there is nothing.
            None => absent(),
        };
        Ok(ReplyEntry {
            ttl: FOREVER,
            attr,
            generation: 0,
        })
    }

    fn plus(&self, entry: Entry) -> FuseResult<DirectoryEntryPlus> {
        let attributes = self
            .fs
            .attributes(entry.ino)
            .map_err(|error| Errno::from(error.errno()))?;
        Ok(DirectoryEntryPlus {
            inode: entry.ino,
            generation: 0,
            kind: file_type(entry.kind),
            name: OsString::from_vec(entry.name),
            offset: position(entry.next),
            attr: file_attr(&attributes),
            entry_ttl: FOREVER,
            attr_ttl: FOREVER,
        })
    }
}

fn plain(entry: Entry) -> DirectoryEntry {
    DirectoryEntry {
        inode: entry.ino,
        kind: file_type(entry.kind),
        name: OsString::from_vec(entry.name),
        offset: position(entry.next),
    }
}

fn position(next: u64) -> i64 {
    i64::try_from(next).unwrap_or(i64::MAX)
}

fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Directory => FileType::Directory,
        FileKind::Regular => FileType::RegularFile,
        FileKind::Symlink => FileType::Symlink,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::Fifo => FileType::NamedPipe,
    }
}

/// The kernel's form of a device number: 12 bits of major between the halves of 20 bits of minor.
fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & 0xf_ff00) << 12)
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    let mtime = Timestamp::new(attributes.mtime_sec, attributes.mtime_nsec);
    FileAttr {
        ino: attributes.ino,
        size: attributes.size,
        blocks: attributes.blocks,
        atime: mtime,
        mtime,
        ctime: mtime,
        kind: file_type(attributes.kind),
        perm: u16::try_from(attributes.mode & 0o7777).expect("twelve bits fit"),
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: device_number(attributes.rdev),
        blksize: BLOCK_SIZE,
    }
}

fn absent() -> FileAttr {
    let never = Timestamp::new(0, 0);
    FileAttr {
        ino: 0,
        size: 0,
        blocks: 0,
        atime: never,
        mtime: never,
        ctime: never,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_SIZE,
    }
}

/// The two-step protocol of extended attributes: a size of 0 asks for the size.
fn sized(bytes: Bytes, size: u32) -> Result<ReplyXAttr, FsError> {
    let length = u32::try_from(bytes.len()).map_err(|_| FsError::BufferTooSmall)?;
    match size {
        0 => Ok(ReplyXAttr::Size(length)),
        size if length > size => Err(FsError::BufferTooSmall),
        _ => Ok(ReplyXAttr::Data(bytes)),
    }
}

impl fuse3::raw::Filesystem for LayerFuse {
    async fn init(&self, _req: Request) -> FuseResult<ReplyInit> {
        Ok(ReplyInit::new(MAX_WRITE))
    }

    async fn destroy(&self, _req: Request) {}

    async fn lookup(&self, _req: Request, parent: u64, name: &OsStr) -> FuseResult<ReplyEntry> {
        let began = Instant::now();
        self.done("lookup", began, self.entry(parent, name.as_bytes()))
    }

    async fn getattr(&self, _req: Request, inode: u64, _fh: Option<u64>, _flags: u32) -> FuseResult<ReplyAttr> {
        let began = Instant::now();
        let attributes = self.done("getattr", began, self.fs.attributes(inode))?;
        Ok(ReplyAttr {
            ttl: FOREVER,
            attr: file_attr(&attributes),
        })
    }

    async fn readlink(&self, _req: Request, inode: u64) -> FuseResult<ReplyData> {
        let began = Instant::now();
        self.done("readlink", began, self.fs.link_target(inode))
            .map(ReplyData::from)
    }

    async fn open(&self, _req: Request, inode: u64, flags: u32) -> FuseResult<ReplyOpen> {
        let began = Instant::now();
        let for_writing = flags & libc::O_ACCMODE.cast_unsigned() != libc::O_RDONLY.cast_unsigned();
        self.done("open", began, self.fs.open(inode, for_writing))?;
        Ok(ReplyOpen {
            fh: 0,
            flags: FOPEN_KEEP_CACHE,
        })
    }

    async fn read(&self, req: Request, inode: u64, _fh: u64, offset: u64, size: u32) -> FuseResult<ReplyData> {
        let began = Instant::now();
        // Of another namespace it is 0.
        let reader = i32::try_from(req.pid).unwrap_or(0);
        fault::point("request-read");
        let result = self.fs.read(inode, offset, size, reader).await;
        fault::point("request-fetched");
        self.done("read", began, result).map(ReplyData::from)
    }

    async fn release(
        &self,
        _req: Request,
        _inode: u64,
        _fh: u64,
        _flags: u32,
        _lock_owner: u64,
        _flush: bool,
    ) -> FuseResult<()> {
        Ok(())
    }

    async fn statfs(&self, _req: Request, _inode: u64) -> FuseResult<ReplyStatFs> {
        let statistics = self.fs.statistics();
        Ok(ReplyStatFs {
            blocks: statistics.blocks,
            bfree: 0,
            bavail: 0,
            files: statistics.files,
            ffree: 0,
            bsize: BLOCK_SIZE,
            namelen: NAME_MAX,
            frsize: BLOCK_SIZE,
        })
    }

    async fn getxattr(&self, _req: Request, inode: u64, name: &OsStr, size: u32) -> FuseResult<ReplyXAttr> {
        let began = Instant::now();
        let value = self
            .fs
            .attribute(inode, name.as_bytes())
            .and_then(|value| sized(value, size));
        self.done("getxattr", began, value)
    }

    async fn listxattr(&self, _req: Request, inode: u64, size: u32) -> FuseResult<ReplyXAttr> {
        let began = Instant::now();
        let names = self.fs.attribute_names(inode).and_then(|names| sized(names, size));
        self.done("listxattr", began, names)
    }

    async fn opendir(&self, _req: Request, inode: u64, _flags: u32) -> FuseResult<ReplyOpen> {
        self.fs
            .open_directory(inode)
            .map_err(|error| Errno::from(error.errno()))?;
        Ok(ReplyOpen {
            fh: 0,
            flags: FOPEN_KEEP_CACHE | FOPEN_CACHE_DIR,
        })
    }

    async fn readdir<'a>(
        &'a self,
        _req: Request,
        parent: u64,
        _fh: u64,
        offset: i64,
    ) -> FuseResult<ReplyDirectory<impl Stream<Item = FuseResult<DirectoryEntry>> + Send + 'a>> {
        let began = Instant::now();
        let from = u64::try_from(offset).unwrap_or(0);
        let entries = self.done("readdir", began, self.fs.entries(parent, from))?;
        Ok(ReplyDirectory {
            entries: stream::iter(entries.map(|entry| Ok(plain(entry)))),
        })
    }

    async fn readdirplus<'a>(
        &'a self,
        _req: Request,
        parent: u64,
        _fh: u64,
        offset: u64,
        _lock_owner: u64,
    ) -> FuseResult<ReplyDirectoryPlus<impl Stream<Item = FuseResult<DirectoryEntryPlus>> + Send + 'a>> {
        let began = Instant::now();
        let entries = self.done("readdirplus", began, self.fs.entries(parent, offset))?;
        Ok(ReplyDirectoryPlus {
            entries: stream::iter(entries.map(|entry| self.plus(entry))),
        })
    }

    async fn releasedir(&self, _req: Request, _inode: u64, _fh: u64, _flags: u32) -> FuseResult<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_have_the_kernels_form() {
        for (major, minor) in [(0, 0), (1, 3), (8, 1), (259, 300), (0xfff, 0xf_ffff)] {
            let encoded = device_number((major, minor));
            // The kernel's new_decode_dev().
            assert_eq!(
                (
                    (encoded & 0xf_ff00) >> 8,
                    (encoded & 0xff) | ((encoded >> 12) & 0xf_ff00)
                ),
                (major, minor)
            );
        }
    }

    #[test]
    fn attribute_sizes_follow_the_two_step_protocol() {
        let value = Bytes::from_static(b"12345");
        assert!(matches!(sized(value.clone(), 0), Ok(ReplyXAttr::Size(5))));
        assert!(matches!(sized(value.clone(), 4), Err(FsError::BufferTooSmall)));
        assert!(matches!(sized(value, 5), Ok(ReplyXAttr::Data(_))));
    }
}
