//! The records of the EROFS on-disk format that an image is made of.
//!
//! Little endian throughout. The names of the fields are those of the format; docs/format.md says how they are used.

use estargz::index::FileKind;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a block, in the image and in the data file.
pub(crate) const BLOCK: usize = 4096;
pub(crate) const BLOCK_BITS: u8 = 12;
/// Where the superblock begins.
pub(crate) const SUPER_OFFSET: usize = 1024;
/// Inodes begin at multiples of this from the start of the image; an inode's number is which multiple.
pub(crate) const SLOT: usize = 32;
pub(crate) const MAGIC: u32 = 0xe0f5_e1e2;

/// The superblock has a checksum.
pub(crate) const COMPAT_CHECKSUM: u32 = 1 << 0;
/// Times are modification times (images of old tools had change times).
pub(crate) const COMPAT_MTIME: u32 = 1 << 1;
/// Inodes with attributes say which ones they do not have.
pub(crate) const COMPAT_XATTR_FILTER: u32 = 1 << 2;
/// There are files that are made of chunks.
pub(crate) const INCOMPAT_CHUNKS: u32 = 1 << 2;
/// There is a device table.
pub(crate) const INCOMPAT_DEVICES: u32 = 1 << 3;

/// Extended inode; the layout of the data is in the bits above.
const EXTENDED: u16 = 1;
/// How an inode's data is stored, shifted to its place in `i_format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// In blocks of the image; also of what has no data.
    Plain,
    /// Whole blocks in the image, the rest behind the inode.
    Inline,
    /// Chunks, wherever.
    Chunks,
}

impl Layout {
    pub(crate) const fn i_format(self) -> u16 {
        let layout = match self {
            Self::Plain => 0,
            Self::Inline => 2,
            Self::Chunks => 4,
        };
        EXTENDED | layout << 1
    }
}

/// A chunk index has 8 bytes and names its device.
pub(crate) const CHUNK_INDEXES: u16 = 1 << 5;
/// Largest chunk, in block bits above [`BLOCK_BITS`]: 8 TiB.
pub(crate) const MAX_CHUNK_BITS: u8 = 31;
/// The device with the contents: the one entry of the device table. The image itself is device 0.
pub(crate) const DATA_DEVICE: u16 = 1;

/// Most shared attributes of one inode.
pub(crate) const MAX_SHARED: usize = u8::MAX as usize;
/// Seed of the hash that picks an attribute's bit in a filter; its prefix index is added.
pub(crate) const FILTER_SEED: u32 = 0x25bb_e08f;
/// Attributes begin at multiples of this, and sizes and places are counted in it.
pub(crate) const XATTR_ALIGN: usize = 4;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct SuperBlock {
    pub(crate) magic: U32,
    /// CRC-32C of the block from here to its end, with zero in this place.
    pub(crate) checksum: U32,
    pub(crate) feature_compat: U32,
    pub(crate) blkszbits: u8,
    pub(crate) sb_extslots: u8,
    pub(crate) root_nid: U16,
    pub(crate) inos: U64,
    /// For inodes without a time of their own; there are none.
    pub(crate) build_time: U64,
    pub(crate) build_time_nsec: U32,
    pub(crate) blocks: U32,
    /// Inode numbers and attribute ids count from these blocks; both 0, so they are places in the file.
    pub(crate) meta_blkaddr: U32,
    pub(crate) xattr_blkaddr: U32,
    pub(crate) uuid: [u8; 16],
    pub(crate) volume_name: [u8; 16],
    pub(crate) feature_incompat: U32,
    pub(crate) compression: U16,
    pub(crate) extra_devices: U16,
    /// Where the device table begins, in multiples of a slot's size.
    pub(crate) devt_slotoff: U16,
    pub(crate) dirblkbits: u8,
    pub(crate) long_prefixes: [u8; 5],
    pub(crate) packed_nid: U64,
    pub(crate) reserved: [u8; 24],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct DeviceSlot {
    pub(crate) tag: [u8; 64],
    pub(crate) blocks: U32,
    /// Where the device would begin if both were one; behind the image.
    pub(crate) mapped_blkaddr: U32,
    pub(crate) reserved: [u8; 56],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct InodeRecord {
    pub(crate) i_format: U16,
    /// 0, or 1 and the size of the attributes behind their header in multiples of four bytes.
    pub(crate) i_xattr_icount: U16,
    pub(crate) i_mode: U16,
    pub(crate) reserved: U16,
    pub(crate) i_size: U64,
    /// First block, chunk format or device number.
    pub(crate) i_u: U32,
    pub(crate) i_ino: U32,
    pub(crate) i_uid: U32,
    pub(crate) i_gid: U32,
    pub(crate) i_mtime: U64,
    pub(crate) i_mtime_nsec: U32,
    pub(crate) i_nlink: U32,
    pub(crate) reserved2: [u8; 16],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct ChunkIndex {
    pub(crate) advise: U16,
    pub(crate) device_id: U16,
    pub(crate) blkaddr: U32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct Dirent {
    pub(crate) nid: U64,
    pub(crate) nameoff: U16,
    pub(crate) file_type: u8,
    pub(crate) reserved: u8,
}

/// In front of an inode's attributes; the ids of the shared ones follow, then the others.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct XattrHeader {
    /// A bit for each value of a hash of names: 1 if the inode has no attribute with such a name.
    pub(crate) name_filter: U32,
    pub(crate) shared_count: u8,
    pub(crate) reserved: [u8; 7],
}

/// In front of an attribute's name (without its prefix) and value.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned, Debug, Clone, Copy)]
#[repr(C)]
pub(crate) struct XattrEntry {
    pub(crate) name_len: u8,
    pub(crate) name_index: u8,
    pub(crate) value_size: U16,
}

/// Type of a file in a directory entry.
pub(crate) const fn file_type(kind: FileKind) -> u8 {
    match kind {
        FileKind::Regular => 1,
        FileKind::Directory => 2,
        FileKind::CharDevice => 3,
        FileKind::BlockDevice => 4,
        FileKind::Fifo => 5,
        FileKind::Symlink => 7,
    }
}

/// Type of a file in its mode.
pub(crate) const fn mode_type(kind: FileKind) -> u16 {
    match kind {
        FileKind::Fifo => 0o010_000,
        FileKind::CharDevice => 0o020_000,
        FileKind::Directory => 0o040_000,
        FileKind::BlockDevice => 0o060_000,
        FileKind::Regular => 0o100_000,
        FileKind::Symlink => 0o120_000,
    }
}

/// A device number as Linux packs it into 32 bits: 12 bits of major, 20 of minor; `None` beyond them.
pub(crate) const fn device_number((major, minor): (u32, u32)) -> Option<u32> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return None;
    }
    Some((minor & 0xff) | major << 8 | (minor & !0xff) << 12)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_the_sizes_of_the_format() {
        assert_eq!(size_of::<SuperBlock>(), 128);
        assert_eq!(size_of::<DeviceSlot>(), 128);
        assert_eq!(size_of::<InodeRecord>(), 64);
        assert_eq!(size_of::<ChunkIndex>(), 8);
        assert_eq!(size_of::<Dirent>(), 12);
        assert_eq!(size_of::<XattrHeader>(), 12);
        assert_eq!(size_of::<XattrEntry>(), 4);
    }

    #[test]
    fn device_numbers_are_packed_as_linux_packs_them() {
        for (device, packed) in [
            ((0, 0), 0),
            ((1, 3), 0x103),
            ((8, 0x12345), 0x1230_0845),
            ((4095, 0xf_ffff), u32::MAX),
        ] {
            assert_eq!(device_number(device), Some(packed), "{device:?}");
        }
        assert_eq!(device_number((4096, 0)), None);
        assert_eq!(device_number((0, 1 << 20)), None);
    }
}
