//! The compact index of a layer: everything the TOC says, in a form that is mapped and used as it lies on disk.
//!
//! [`build()`] turns a TOC into the bytes of an index file once, when the layer is first seen; [`LayerIndex::open`]
//! checks all of a file once, in linear time, so that no accessor can fail, panic or loop afterwards. The snapshotter
//! asks it for every lookup, attribute and read; the cache and the fetch engine plan with its chunk and member tables.
//!
//! Inode numbers, chunk ids and the place of every file in the data file are a pure function of the TOC, the same on
//! every node: they survive restarts and mean the same to every version that knows the file's format id.

mod build;
mod chunks;
mod error;
mod format;
mod tree;
mod validate;

use std::ops::Range;

use zerocopy::FromBytes;

use crate::digest::Digest;
use crate::member::Compression;
use format::{ChunkRecord, DirentRecord, InodeRecord, MemberRecord, NONE_U64, Section, XattrRecord};

pub use build::build;
pub use error::{EntryFault, IndexError};
pub use tree::MAX_INODES;

/// Inode number of the root directory.
pub const ROOT_INO: u64 = 1;

/// What the index needs to know about the blob besides its TOC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobLayout {
    /// Size of the whole blob in bytes.
    pub blob_size: u64,
    /// Where the last member with file content ends: where the TOC begins, or the footer if the TOC is elsewhere.
    pub toc_offset: u64,
    /// How the members are compressed.
    pub compression: Compression,
}

/// Type of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular,
    /// Symbolic link.
    Symlink,
    /// Character device; 0:0 is a whiteout.
    CharDevice,
    /// Block device.
    BlockDevice,
    /// Named pipe.
    Fifo,
}

impl FileKind {
    const ALL: [Self; 6] = [
        Self::Directory,
        Self::Regular,
        Self::Symlink,
        Self::CharDevice,
        Self::BlockDevice,
        Self::Fifo,
    ];

    /// The byte that stands for the kind in an index file.
    const fn code(self) -> u8 {
        match self {
            Self::Directory => 1,
            Self::Regular => 2,
            Self::Symlink => 3,
            Self::CharDevice => 4,
            Self::BlockDevice => 5,
            Self::Fifo => 6,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.code() == code)
    }
}

/// A file, without its name.
#[derive(Debug, Clone)]
pub struct Inode<'a> {
    /// Inode number.
    pub ino: u64,
    /// Type.
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky; no file type bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Number of names; 2 and the number of subdirectories for a directory.
    pub nlink: u32,
    /// Major and minor number of a device, else zeros.
    pub rdev: (u32, u32),
    /// Size of a regular file, length of a symbolic link's target, 0 for everything else.
    pub size: u64,
    /// Modification time in seconds since the epoch.
    pub mtime_sec: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// Where a regular file's content lies in the data file, a multiple of 4096.
    pub data_offset: u64,
    /// Inode number of the directory that holds it, for files with several names the one that is no hard link; the root's is
    /// itself.
    pub parent: u64,
    /// Ids of a regular file's chunks in the order of its content.
    pub chunks: Range<u32>,
    link: Range<usize>,
    xattrs: &'a [XattrRecord],
    arena: &'a [u8],
}

impl<'a> Inode<'a> {
    /// Target of a symbolic link.
    pub fn symlink_target(&self) -> Option<&'a [u8]> {
        (self.kind == FileKind::Symlink).then(|| self.arena.get(self.link.clone()).unwrap_or_default())
    }

    /// Names and values of the extended attributes, sorted by name.
    pub fn xattrs(&self) -> impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])> + use<'a> {
        let arena = self.arena;
        self.xattrs
            .iter()
            .map(move |xattr| (xattr.name(arena), xattr.value(arena)))
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// The name.
    pub name: &'a [u8],
    /// Inode number.
    pub ino: u64,
    /// Type of the file.
    pub kind: FileKind,
}

/// A piece of a regular file, the unit of fetching and of verification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    /// The file it belongs to.
    pub ino: u64,
    /// Where it begins in the file.
    pub file_offset: u64,
    /// Where it begins in the data file.
    pub data_offset: u64,
    /// Its size in bytes, never 0.
    pub size: u32,
    /// Digest of its bytes.
    pub digest: Digest,
    /// The member that holds it.
    pub member: u32,
    /// Where it begins in the uncompressed member.
    pub inner_offset: u64,
}

/// A compressed member of the blob that holds chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Where it begins in the blob.
    pub start: u64,
    /// Where it ends at the latest: the bytes up to here may hold further members without file content.
    pub end: u64,
    /// Ids of the chunks in it.
    pub chunks: Range<u32>,
}

/// An opened index file: bytes that [`LayerIndex::open`] has found sound.
#[derive(Debug)]
pub struct LayerIndex<B> {
    bytes: B,
    tables: [Range<usize>; Section::COUNT],
    toc_digest: Digest,
    layout: BlobLayout,
    data_size: u64,
    prefetch_end: Option<u64>,
    counts: [u32; Section::COUNT],
}

impl<B: AsRef<[u8]>> LayerIndex<B> {
    /// Checks every byte of an index file and opens it. `bytes` must not change afterwards; if a mapped file does, the
    /// answers are wrong, but nothing panics or loops.
    pub fn open(bytes: B) -> Result<Self, IndexError> {
        let (header, compression, tables) = validate::header(bytes.as_ref())?;
        let index = Self {
            tables,
            toc_digest: Digest::from_bytes(header.toc_digest),
            layout: BlobLayout {
                blob_size: header.blob_size.get(),
                toc_offset: header.toc_offset.get(),
                compression,
            },
            data_size: header.data_size.get(),
            prefetch_end: Some(header.prefetch_end.get()).filter(|end| *end != NONE_U64),
            counts: header.sections.map(|section| section.count.get()),
            bytes,
        };
        validate::tables(&index)?;
        Ok(index)
    }

    /// Digest of the TOC that the index was made from.
    pub fn toc_digest(&self) -> Digest {
        self.toc_digest
    }

    /// Size of the layer's blob.
    pub fn blob_size(&self) -> u64 {
        self.layout.blob_size
    }

    /// How the members are compressed.
    pub fn compression(&self) -> Compression {
        self.layout.compression
    }

    /// Where the part of the blob that holds files ends.
    pub fn toc_offset(&self) -> u64 {
        self.layout.toc_offset
    }

    /// Size of the data file.
    pub fn data_size(&self) -> u64 {
        self.data_size
    }

    /// Number of inodes; they are 1 to this.
    pub fn inode_count(&self) -> u32 {
        self.counts[Section::Inodes as usize]
    }

    /// Number of chunks; their ids are 0 up to this.
    pub fn chunk_count(&self) -> u32 {
        self.counts[Section::Chunks as usize]
    }

    /// Number of members that hold chunks, sorted by their place in the blob.
    pub fn member_count(&self) -> u32 {
        self.counts[Section::Members as usize]
    }

    /// Up to where the blob holds the files that are to be fetched first; `None` if the layer does not say.
    pub fn prefetch_end(&self) -> Option<u64> {
        self.prefetch_end
    }

    /// A file by its number.
    pub fn inode(&self, ino: u64) -> Option<Inode<'_>> {
        let record = self.inode_record(ino)?;
        let kind = FileKind::from_code(record.kind)?;
        let link = record.link_offset.get() as usize;
        let chunks = if kind == FileKind::Regular {
            record.children()
        } else {
            0..0
        };
        Some(Inode {
            ino,
            kind,
            mode: record.mode.get().into(),
            uid: record.uid.get(),
            gid: record.gid.get(),
            nlink: record.nlink.get(),
            rdev: (record.rdev_major.get(), record.rdev_minor.get()),
            size: record.size.get(),
            mtime_sec: record.mtime_sec.get(),
            mtime_nsec: record.mtime_nsec.get(),
            data_offset: record.data_offset.get(),
            parent: record.parent.get().into(),
            chunks,
            link: link..link.saturating_add(record.link_len.get().into()),
            xattrs: slice(self.xattr_records(), record.xattrs()),
            arena: self.arena(),
        })
    }

    /// The file called `name` in directory `dir`.
    pub fn lookup(&self, dir: u64, name: &[u8]) -> Option<u64> {
        let arena = self.arena();
        let dirents = self.dirents_of(dir);
        let at = dirents.binary_search_by(|dirent| dirent.name(arena).cmp(name)).ok()?;
        dirents.get(at).map(|dirent| dirent.ino.get().into())
    }

    /// The names in directory `dir` from position `from` on, sorted by name; without `.` and `..`.
    pub fn entries(&self, dir: u64, from: u32) -> impl ExactSizeIterator<Item = DirEntry<'_>> {
        let arena = self.arena();
        let dirents = self.dirents_of(dir);
        dirents
            .get(from as usize..)
            .unwrap_or_default()
            .iter()
            .map(move |dirent| DirEntry {
                name: dirent.name(arena),
                ino: dirent.ino.get().into(),
                // The kind was checked on opening; the fallback is for a file that changed under its mapping.
                kind: FileKind::from_code(dirent.kind).unwrap_or(FileKind::Regular),
            })
    }

    /// A chunk by its id.
    pub fn chunk(&self, id: u32) -> Option<Chunk> {
        let record = self.chunk_records().get(id as usize)?;
        let file = self.inode_record(record.ino.get().into())?;
        Some(Chunk {
            ino: record.ino.get().into(),
            file_offset: record.file_offset.get(),
            data_offset: file.data_offset.get().saturating_add(record.file_offset.get()),
            size: record.size.get(),
            digest: Digest::from_bytes(record.digest),
            member: record.member.get(),
            inner_offset: record.inner_offset.get().into(),
        })
    }

    /// Ids of the chunks that hold bytes `range` of file `ino`; empty if the range or the file is.
    pub fn chunks_in(&self, ino: u64, range: Range<u64>) -> Range<u32> {
        let Some(inode) = self.inode(ino) else { return 0..0 };
        let first = inode.chunks.start;
        let chunks = slice(self.chunk_records(), inode.chunks);
        if range.is_empty() {
            return first..first;
        }
        let before = |position: usize| first.saturating_add(u32::try_from(position).unwrap_or(u32::MAX));
        let start = chunks.partition_point(|chunk| chunk.end() <= range.start);
        let end = chunks.partition_point(|chunk| chunk.file_offset.get() < range.end);
        before(start)..before(end.max(start))
    }

    /// Ids of the chunks that hold bytes `range` of the data file; empty if none does. Padding belongs to no chunk.
    pub fn chunks_at(&self, range: Range<u64>) -> Range<u32> {
        let chunks = self.chunk_records();
        let begins = |chunk: &ChunkRecord| {
            let file = self.inode_record(chunk.ino.get().into());
            file.map_or(0, |file| file.data_offset.get())
                .saturating_add(chunk.file_offset.get())
        };
        if range.is_empty() {
            return 0..0;
        }
        let id = |position: usize| u32::try_from(position).unwrap_or(u32::MAX);
        let ends = |chunk: &ChunkRecord| begins(chunk).saturating_add(chunk.size.get().into());
        let start = chunks.partition_point(|chunk| ends(chunk) <= range.start);
        let end = chunks.partition_point(|chunk| begins(chunk) < range.end);
        id(start)..id(end.max(start))
    }

    /// A member by its id.
    pub fn member(&self, id: u32) -> Option<Member> {
        let record = self.member_records().get(id as usize)?;
        Some(Member {
            start: record.start.get(),
            end: record.end.get(),
            chunks: record.chunks(),
        })
    }

    /// The path of a file from the root of the layer, beginning with `/`; empty if there is no such file. Of a file with
    /// several names it is the one that is no hard link. For messages.
    pub fn path_of(&self, ino: u64) -> Vec<u8> {
        let mut names = Vec::new();
        let mut at = ino;
        while at != ROOT_INO {
            let Some(record) = self.inode_record(at) else {
                return Vec::new();
            };
            // No TOC gives deeper trees; opening has made sure that parents lead to the root at all.
            if names.len() > crate::toc::MAX_DEPTH {
                return Vec::new();
            }
            let dirent = self.dirent_records().get(record.dirent.get() as usize);
            names.push(dirent.map_or(&[][..], |dirent| dirent.name(self.arena())));
            at = record.parent.get().into();
        }
        names.push(b"");
        names.reverse();
        if names.len() == 1 {
            b"/".to_vec()
        } else {
            names.join(&b'/')
        }
    }

    fn table(&self, section: Section) -> &[u8] {
        self.bytes
            .as_ref()
            .get(self.tables[section as usize].clone())
            .unwrap_or_default()
    }

    fn arena(&self) -> &[u8] {
        self.table(Section::Arena)
    }

    fn inode_records(&self) -> &[InodeRecord] {
        records(self.table(Section::Inodes))
    }

    fn inode_record(&self, ino: u64) -> Option<&InodeRecord> {
        self.inode_records().get(usize::try_from(ino).ok()?.checked_sub(1)?)
    }

    fn dirent_records(&self) -> &[DirentRecord] {
        records(self.table(Section::Dirents))
    }

    fn dirents_of(&self, dir: u64) -> &[DirentRecord] {
        let dir = self
            .inode_record(dir)
            .filter(|record| record.kind == FileKind::Directory.code());
        dir.map(|dir| slice(self.dirent_records(), dir.children()))
            .unwrap_or_default()
    }

    fn chunk_records(&self) -> &[ChunkRecord] {
        records(self.table(Section::Chunks))
    }

    fn member_records(&self) -> &[MemberRecord] {
        records(self.table(Section::Members))
    }

    fn xattr_records(&self) -> &[XattrRecord] {
        records(self.table(Section::Xattrs))
    }
}

/// The records in a table; none in one of a wrong size, which opening has excluded.
fn records<T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned>(table: &[u8]) -> &[T] {
    <[T]>::ref_from_bytes(table).unwrap_or_default()
}

fn slice<T>(records: &[T], ids: Range<u32>) -> &[T] {
    records.get(ids.start as usize..ids.end as usize).unwrap_or_default()
}

fn text(arena: &[u8], offset: u32, len: usize) -> &[u8] {
    let start = offset as usize;
    arena.get(start..start.saturating_add(len)).unwrap_or_default()
}

impl InodeRecord {
    /// Directory entries or chunks. Saturates: before it is validated a record may hold any numbers.
    fn children(&self) -> Range<u32> {
        self.first.get()..self.first.get().saturating_add(self.count.get())
    }

    fn xattrs(&self) -> Range<u32> {
        self.xattr_first.get()..self.xattr_first.get().saturating_add(self.xattr_count.get())
    }
}

impl DirentRecord {
    fn name<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        text(arena, self.name_offset.get(), self.name_len.into())
    }
}

impl XattrRecord {
    fn name<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        text(arena, self.name_offset.get(), self.name_len.get().into())
    }

    fn value<'a>(&self, arena: &'a [u8]) -> &'a [u8] {
        text(arena, self.value_offset.get(), self.value_len.get() as usize)
    }
}

impl ChunkRecord {
    fn end(&self) -> u64 {
        self.file_offset.get().saturating_add(self.size.get().into())
    }
}

impl MemberRecord {
    fn chunks(&self) -> Range<u32> {
        self.first_chunk.get()..self.first_chunk.get().saturating_add(self.chunk_count.get())
    }
}

#[cfg(test)]
mod tests;
