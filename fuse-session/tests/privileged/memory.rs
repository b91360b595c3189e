//! A read-only file system in memory, with files and names that misbehave on request.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use fuse3::raw::reply::*;
use fuse3::raw::{Filesystem, Request};
use fuse3::{Errno, FileType, Result, Timestamp};
use futures_util::stream::{self, Stream};

pub(crate) const TTL: Duration = Duration::from_secs(3600);
const KEEP_CACHE: u32 = 1 << 1;
const CACHE_DIR: u32 = 1 << 3;
const DIRECT_IO: u32 = 1 << 0;

/// What a regular file's reads do.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Bytes(Bytes),
    /// Answers after a while.
    Slow(Duration, Bytes),
    /// Answers after a while; its reads go past the page cache, so that signals interrupt them.
    SlowDirect(Duration, Bytes),
    /// Each read comes from here, and its handler sleeps on its thread before it answers.
    Blocking(Duration, Bytes),
    /// A block over and over, up to a length.
    Repeated(Bytes, u64),
    /// Answers once there is a file of this name on the host.
    When(std::path::PathBuf, Bytes),
    /// Never answers; its reads go past the page cache.
    Never,
    /// Panics at once.
    Panic,
    /// Panics after having waited.
    PanicLater,
    /// More bytes than asked for, always.
    TooMuch(Bytes),
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Directory(Vec<(OsString, u64)>),
    File(Content),
    Symlink(Bytes),
    Device,
}

#[derive(Debug, Clone)]
pub(crate) struct Node {
    pub(crate) kind: Kind,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) xattrs: Vec<(OsString, Bytes)>,
    parent: u64,
}

/// Counts of calls, to see what the kernel caches.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    pub(crate) lookup: AtomicU64,
    pub(crate) readlink: AtomicU64,
    pub(crate) getattr: AtomicU64,
    pub(crate) getxattr: AtomicU64,
    pub(crate) destroy: AtomicU64,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct MemoryFs {
    nodes: Arc<Vec<Node>>,
    pub(crate) calls: Arc<Calls>,
    pub(crate) refuse_init: bool,
    /// Whether the kernel is to forget at once what it is told of names and attributes.
    pub(crate) forgetful: bool,
}

/// Makes a tree; node 1 is the root.
#[derive(Debug)]
pub(crate) struct Tree {
    nodes: Vec<Node>,
}

impl Default for Tree {
    fn default() -> Self {
        let root = Node {
            kind: Kind::Directory(Vec::new()),
            mode: 0o755,
            uid: 0,
            xattrs: Vec::new(),
            parent: 1,
        };
        Self { nodes: vec![root] }
    }
}

impl Tree {
    pub(crate) fn add(&mut self, parent: u64, name: &str, kind: Kind, mode: u16) -> u64 {
        self.nodes.push(Node {
            kind,
            mode,
            uid: 0,
            xattrs: Vec::new(),
            parent,
        });
        let ino = self.nodes.len() as u64;
        let Kind::Directory(entries) = &mut self.node(parent).kind else {
            panic!("parent is a directory")
        };
        entries.push((name.into(), ino));
        ino
    }

    pub(crate) fn file(&mut self, parent: u64, name: &str, content: impl Into<Bytes>) -> u64 {
        self.add(parent, name, Kind::File(Content::Bytes(content.into())), 0o644)
    }

    pub(crate) fn node(&mut self, ino: u64) -> &mut Node {
        &mut self.nodes[usize::try_from(ino).expect("few nodes") - 1]
    }

    pub(crate) fn build(self) -> MemoryFs {
        MemoryFs {
            nodes: Arc::new(self.nodes),
            ..MemoryFs::default()
        }
    }
}

impl MemoryFs {
    fn node(&self, ino: u64) -> Result<&Node> {
        usize::try_from(ino)
            .ok()
            .and_then(|ino| self.nodes.get(ino.wrapping_sub(1)))
            .ok_or(Errno::from(libc::ESTALE))
    }

    fn attr(&self, ino: u64) -> Result<FileAttr> {
        let node = self.node(ino)?;
        let (kind, size) = match &node.kind {
            Kind::Directory(_) => (FileType::Directory, 4096),
            Kind::File(
                Content::Bytes(b)
                | Content::Slow(_, b)
                | Content::SlowDirect(_, b)
                | Content::Blocking(_, b)
                | Content::When(_, b),
            ) => (FileType::RegularFile, b.len() as u64),
            Kind::File(Content::Repeated(_, len)) => (FileType::RegularFile, *len),
            Kind::File(_) => (FileType::RegularFile, 4096),
            Kind::Symlink(target) => (FileType::Symlink, target.len() as u64),
            Kind::Device => (FileType::CharDevice, 0),
        };
        let time = |offset: i64| Timestamp::new(-1_000_000 + 86_400 * offset + ino as i64, 123_456_789);
        Ok(FileAttr {
            ino,
            size,
            blocks: size.div_ceil(512),
            atime: time(0),
            mtime: time(1),
            ctime: time(2),
            kind,
            perm: node.mode,
            nlink: if kind == FileType::Directory { 2 } else { 1 },
            uid: node.uid,
            gid: 7,
            rdev: if kind == FileType::CharDevice { 0x0103 } else { 0 },
            blksize: 4096,
        })
    }

    fn ttl(&self) -> Duration {
        if self.forgetful { Duration::ZERO } else { TTL }
    }

    fn listing(&self, parent: u64) -> Result<Vec<(OsString, u64)>> {
        let node = self.node(parent)?;
        let Kind::Directory(entries) = &node.kind else {
            return Err(libc::ENOTDIR.into());
        };
        let mut listing = vec![(".".into(), parent), ("..".into(), node.parent)];
        listing.extend(entries.iter().cloned());
        Ok(listing)
    }
}

impl Filesystem for MemoryFs {
    async fn init(&self, _req: Request) -> Result<ReplyInit> {
        tokio::time::sleep(Duration::from_millis(5)).await;
        if self.refuse_init {
            return Err(libc::ENOMEM.into());
        }
        Ok(ReplyInit::new(std::num::NonZeroU32::MIN.saturating_add(4095)))
    }

    async fn destroy(&self, _req: Request) {
        self.calls.destroy.fetch_add(1, Ordering::SeqCst);
    }

    async fn lookup(&self, _req: Request, parent: u64, name: &OsStr) -> Result<ReplyEntry> {
        self.calls.lookup.fetch_add(1, Ordering::SeqCst);
        match name.as_bytes() {
            b"hang" => std::future::pending().await,
            b"panic" => panic!("lookup was told to panic"),
            _ => {}
        }
        let Kind::Directory(entries) = &self.node(parent)?.kind else {
            return Err(libc::ENOTDIR.into());
        };
        match entries.iter().find(|(entry, _)| entry == name) {
            Some((_, ino)) => Ok(ReplyEntry {
                ttl: self.ttl(),
                attr: self.attr(*ino)?,
                generation: 0,
            }),
            None => {
                let attr = FileAttr {
                    ino: 0,
                    ..self.attr(1)?
                };
                Ok(ReplyEntry {
                    ttl: self.ttl(),
                    attr,
                    generation: 0,
                })
            }
        }
    }

    async fn getattr(&self, _req: Request, inode: u64, _fh: Option<u64>, _flags: u32) -> Result<ReplyAttr> {
        self.calls.getattr.fetch_add(1, Ordering::SeqCst);
        Ok(ReplyAttr {
            ttl: self.ttl(),
            attr: self.attr(inode)?,
        })
    }

    async fn readlink(&self, _req: Request, inode: u64) -> Result<ReplyData> {
        self.calls.readlink.fetch_add(1, Ordering::SeqCst);
        match &self.node(inode)?.kind {
            Kind::Symlink(target) => Ok(ReplyData { data: target.clone() }),
            _ => Err(libc::EINVAL.into()),
        }
    }

    async fn open(&self, _req: Request, inode: u64, _flags: u32) -> Result<ReplyOpen> {
        let flags = match &self.node(inode)?.kind {
            Kind::File(Content::Never | Content::SlowDirect(..) | Content::Blocking(..) | Content::TooMuch(_)) => {
                DIRECT_IO
            }
            _ => KEEP_CACHE,
        };
        Ok(ReplyOpen { fh: 0, flags })
    }

    async fn read(&self, _req: Request, inode: u64, _fh: u64, offset: u64, size: u32) -> Result<ReplyData> {
        let Kind::File(content) = &self.node(inode)?.kind else {
            return Err(libc::EISDIR.into());
        };
        let part = |bytes: &Bytes| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
            bytes.slice(start..(start + size as usize).min(bytes.len()))
        };
        let data = match content {
            Content::Bytes(bytes) => part(bytes),
            Content::Slow(wait, bytes) | Content::SlowDirect(wait, bytes) => {
                tokio::time::sleep(*wait).await;
                part(bytes)
            }
            Content::Blocking(wait, bytes) => {
                std::thread::sleep(*wait);
                part(bytes)
            }
            Content::When(name, bytes) => {
                while !name.exists() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                part(bytes)
            }
            Content::Repeated(block, _) => {
                let start = usize::try_from(offset % block.len() as u64).unwrap_or(0);
                block.slice(start..(start + size as usize).min(block.len()))
            }
            Content::Never => std::future::pending().await,
            Content::Panic => panic!("read was told to panic"),
            Content::PanicLater => {
                tokio::time::sleep(Duration::from_millis(20)).await;
                panic!("read was told to panic later")
            }
            Content::TooMuch(bytes) => bytes.clone(),
        };
        Ok(ReplyData { data })
    }

    async fn statfs(&self, _req: Request, _inode: u64) -> Result<ReplyStatFs> {
        let files = self.nodes.len() as u64;
        Ok(ReplyStatFs {
            blocks: 1000,
            bfree: 1,
            bavail: 2,
            files,
            ffree: 3,
            bsize: 4096,
            namelen: 255,
            frsize: 4096,
        })
    }

    async fn getxattr(&self, _req: Request, inode: u64, name: &OsStr, size: u32) -> Result<ReplyXAttr> {
        self.calls.getxattr.fetch_add(1, Ordering::SeqCst);
        let xattrs = &self.node(inode)?.xattrs;
        let (_, value) = xattrs
            .iter()
            .find(|(have, _)| have == name)
            .ok_or(Errno::from(libc::ENODATA))?;
        sized(value.clone(), size)
    }

    async fn listxattr(&self, _req: Request, inode: u64, size: u32) -> Result<ReplyXAttr> {
        let mut list = Vec::new();
        for (name, _) in &self.node(inode)?.xattrs {
            list.extend_from_slice(name.as_bytes());
            list.push(0);
        }
        sized(list.into(), size)
    }

    async fn opendir(&self, _req: Request, _inode: u64, _flags: u32) -> Result<ReplyOpen> {
        Ok(ReplyOpen {
            fh: 0,
            flags: KEEP_CACHE | CACHE_DIR,
        })
    }

    async fn readdir<'a>(
        &'a self,
        _req: Request,
        parent: u64,
        _fh: u64,
        offset: i64,
    ) -> Result<ReplyDirectory<impl Stream<Item = Result<DirectoryEntry>> + Send + 'a>> {
        let listing = self
            .listing(parent)?
            .into_iter()
            .zip(1..)
            .skip(usize::try_from(offset).unwrap_or(usize::MAX));
        let entries = listing.map(move |((name, inode), offset)| {
            Ok(DirectoryEntry {
                inode,
                kind: self.attr(inode)?.kind,
                name,
                offset,
            })
        });
        Ok(ReplyDirectory {
            entries: stream::iter(entries),
        })
    }

    async fn readdirplus<'a>(
        &'a self,
        _req: Request,
        parent: u64,
        _fh: u64,
        offset: u64,
        _lock_owner: u64,
    ) -> Result<ReplyDirectoryPlus<impl Stream<Item = Result<DirectoryEntryPlus>> + Send + 'a>> {
        let listing = self
            .listing(parent)?
            .into_iter()
            .zip(1..)
            .skip(usize::try_from(offset).unwrap_or(usize::MAX));
        let entries = listing.map(move |((name, inode), offset)| {
            let attr = self.attr(inode)?;
            let (generation, entry_ttl, attr_ttl) = (0, self.ttl(), self.ttl());
            Ok(DirectoryEntryPlus {
                inode,
                generation,
                kind: attr.kind,
                name,
                offset,
                attr,
                entry_ttl,
                attr_ttl,
            })
        });
        Ok(ReplyDirectoryPlus {
            entries: stream::iter(entries),
        })
    }
}

fn sized(data: Bytes, size: u32) -> Result<ReplyXAttr> {
    match (size as usize, data.len()) {
        (0, len) => Ok(ReplyXAttr::Size(u32::try_from(len).expect("small values"))),
        (room, len) if room < len => Err(libc::ERANGE.into()),
        _ => Ok(ReplyXAttr::Data(data)),
    }
}

/// Deterministic bytes that repeat nowhere near a page.
pub(crate) fn pattern(len: usize) -> Bytes {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes.into()
}
