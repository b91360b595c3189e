//! The bytes of an index file: a header, six tables of fixed-size little-endian records, and an arena of names.
//!
//! Everything is unaligned plain data, so the file can be used where it is mapped. docs/format.md describes it; a
//! change of any record, of the numbering, of the data layout or of what entries mean needs new [`FORMATS`].

use std::mem::size_of;
use std::ops::Range;

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::member::Compression;

/// First bytes of an index file.
pub(super) const MAGIC: [u8; 8] = *b"HULLIDX\n";
/// Ids of this form of the file, including inode numbering, data layout and what was made of the entries. The id also says how
/// the members are compressed: 1 is gzip, which is all there was at first, 2 is zstd. Nothing else differs between them. An index
/// of format 1 may hold `trusted.` attributes of the image.
pub(super) const FORMATS: [(u32, Compression); 2] = [(1, Compression::Gzip), (2, Compression::Zstd)];
/// What `prefetch_end` and `dirent` hold when there is none.
pub(super) const NONE_U64: u64 = u64::MAX;
pub(super) const NONE_U32: u32 = u32::MAX;
/// Extents in the data file begin at multiples of this.
pub(super) const DATA_ALIGN: u64 = 4096;
/// Tables and arena begin at multiples of this.
const SECTION_ALIGN: u64 = 8;
/// The checksum covers everything behind itself.
pub(super) const CHECKED_FROM: usize = 16;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Header {
    pub(super) magic: [u8; 8],
    pub(super) format: U32,
    /// CRC-32 of the file from [`CHECKED_FROM`].
    pub(super) checksum: U32,
    pub(super) file_size: U64,
    pub(super) toc_digest: [u8; 32],
    pub(super) blob_size: U64,
    pub(super) toc_offset: U64,
    pub(super) data_size: U64,
    pub(super) prefetch_end: U64,
    pub(super) sections: [SectionRecord; Section::COUNT],
}

/// Where a table lies.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct SectionRecord {
    pub(super) offset: U64,
    /// Records in the table.
    pub(super) count: U32,
    /// Bytes of one record.
    pub(super) record_size: U32,
}

/// The tables in file order.
#[derive(Clone, Copy, Debug)]
pub(super) enum Section {
    Inodes,
    Dirents,
    Chunks,
    Members,
    Xattrs,
    Arena,
}

impl Section {
    pub(super) const COUNT: usize = 6;
    pub(super) const ALL: [Self; Self::COUNT] = [
        Self::Inodes,
        Self::Dirents,
        Self::Chunks,
        Self::Members,
        Self::Xattrs,
        Self::Arena,
    ];

    pub(super) const fn record_size(self) -> usize {
        match self {
            Self::Inodes => size_of::<InodeRecord>(),
            Self::Dirents => size_of::<DirentRecord>(),
            Self::Chunks => size_of::<ChunkRecord>(),
            Self::Members => size_of::<MemberRecord>(),
            Self::Xattrs => size_of::<XattrRecord>(),
            Self::Arena => 1,
        }
    }

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Inodes => "inode table",
            Self::Dirents => "directory entry table",
            Self::Chunks => "chunk table",
            Self::Members => "member table",
            Self::Xattrs => "attribute table",
            Self::Arena => "name arena",
        }
    }
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy, Default)]
#[repr(C)]
pub(super) struct InodeRecord {
    pub(super) size: U64,
    pub(super) data_offset: U64,
    pub(super) mtime_sec: I64,
    pub(super) mtime_nsec: U32,
    pub(super) uid: U32,
    pub(super) gid: U32,
    pub(super) nlink: U32,
    pub(super) rdev_major: U32,
    pub(super) rdev_minor: U32,
    /// First directory entry of a directory, first chunk of a regular file.
    pub(super) first: U32,
    /// How many of them.
    pub(super) count: U32,
    pub(super) xattr_first: U32,
    pub(super) xattr_count: U32,
    /// Symbolic link target in the arena.
    pub(super) link_offset: U32,
    /// Inode number of the directory that holds the name that is no hard link.
    pub(super) parent: U32,
    /// Directory entry of that name.
    pub(super) dirent: U32,
    pub(super) link_len: U16,
    pub(super) mode: U16,
    pub(super) kind: u8,
    pub(super) padding: [u8; 7],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct DirentRecord {
    pub(super) ino: U32,
    pub(super) name_offset: U32,
    pub(super) name_len: u8,
    pub(super) kind: u8,
    pub(super) padding: [u8; 2],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct ChunkRecord {
    pub(super) file_offset: U64,
    pub(super) ino: U32,
    pub(super) member: U32,
    pub(super) inner_offset: U32,
    pub(super) size: U32,
    pub(super) digest: [u8; 32],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct MemberRecord {
    pub(super) start: U64,
    pub(super) end: U64,
    pub(super) first_chunk: U32,
    pub(super) chunk_count: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct XattrRecord {
    pub(super) name_offset: U32,
    pub(super) value_offset: U32,
    pub(super) value_len: U32,
    pub(super) name_len: U16,
    pub(super) padding: [u8; 2],
}

/// Where the sections of a file with these record counts lie, and its size; `None` beyond the address space.
pub(super) fn sections(counts: [usize; Section::COUNT]) -> Option<([Range<usize>; Section::COUNT], usize)> {
    let mut ranges = [const { 0..0 }; Section::COUNT];
    let mut end = size_of::<Header>();
    for ((range, section), count) in ranges.iter_mut().zip(Section::ALL).zip(counts) {
        let start = end.checked_next_multiple_of(usize::try_from(SECTION_ALIGN).ok()?)?;
        end = section.record_size().checked_mul(count)?.checked_add(start)?;
        *range = start..end;
    }
    Some((ranges, end))
}

/// The format id of an index whose members are compressed so.
pub(super) fn format_id(compression: Compression) -> u32 {
    let known = FORMATS.iter().find(|(_, known)| *known == compression);
    known.map_or(FORMATS[0].0, |(id, _)| *id)
}
