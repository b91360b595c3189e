//! Makes an image in two passes: the first gives everything its place, the second writes.
//!
//! The order of places is that of a walk through the tree, breadth first: the inodes of a directory's files follow each
//! other in the order of their names, each with its attributes, its link target or the end of its entries, so that
//! listing a directory reads neighbouring blocks. Superblock, device table, root and shared attributes come first.

use estargz::digest::Digest;
use estargz::index::{FileKind, Inode, LayerIndex, ROOT_INO};
use zerocopy::IntoBytes;

use crate::directory;
use crate::error::{ImageError, MAX_DATA_BYTES, MAX_IMAGE_BYTES, shown};
use crate::format::{
    BLOCK, BLOCK_BITS, CHUNK_INDEXES, COMPAT_CHECKSUM, COMPAT_MTIME, COMPAT_XATTR_FILTER, ChunkIndex, DATA_DEVICE,
    DeviceSlot, INCOMPAT_CHUNKS, INCOMPAT_DEVICES, InodeRecord, Layout, MAGIC, MAX_CHUNK_BITS, SLOT, SUPER_OFFSET,
    SuperBlock, device_number, mode_type,
};
use crate::hash::crc32c;
use crate::space::Space;
use crate::xattrs::Attributes;

/// Where the device table begins, in multiples of a slot's size: right behind the superblock.
const DEVICE_TABLE_SLOT: u8 = 9;
const DEVICE_TABLE: usize = DEVICE_TABLE_SLOT as usize * size_of::<DeviceSlot>();
const _: () = assert!(DEVICE_TABLE == SUPER_OFFSET + size_of::<SuperBlock>());
const FIRST_INODE: usize = DEVICE_TABLE + size_of::<DeviceSlot>();
const VOLUME_NAME: &[u8] = b"hullspeed";
const DEVICE_TAG: &[u8] = b"data";

/// Makes the metadata image of a layer: a pure function of the index.
///
/// Regular files name blocks of the layer's data file, which is the image's one extra device. Attributes with names that
/// EROFS does not have (anything but `user.`, `trusted.`, `security.` and the two POSIX ACLs) are left out, as they are
/// where a layer is unpacked onto a file system that does not have them either.
pub fn image<B: AsRef<[u8]>>(index: &LayerIndex<B>) -> Result<Vec<u8>, ImageError> {
    Plan::of(index)?.write()
}

/// Where everything goes.
struct Plan<'a, B> {
    index: &'a LayerIndex<B>,
    attributes: Attributes<'a>,
    shared_start: usize,
    /// Each inode's number in the image, in the order of the index's numbers; 0 is none.
    nids: Vec<u32>,
    /// First block of those that have blocks, in the same order.
    first_blocks: Vec<u32>,
    blocks: usize,
}

impl<'a, B: AsRef<[u8]>> Plan<'a, B> {
    fn of(index: &'a LayerIndex<B>) -> Result<Self, ImageError> {
        if index.data_size() > MAX_DATA_BYTES {
            return Err(ImageError::DataTooLarge {
                size: index.data_size(),
            });
        }
        let inodes = index.inode_count() as usize;
        let mut plan = Self {
            index,
            attributes: Attributes::of(index)?,
            shared_start: 0,
            nids: vec![0; inodes],
            first_blocks: vec![0; inodes],
            blocks: 0,
        };
        let mut space = Space::from(FIRST_INODE);
        plan.place(ROOT_INO, &mut space)?;
        let shared_size = plan.attributes.shared_size();
        if shared_size > 0 {
            plan.shared_start = space.bytes(shared_size);
            within_limit(&space)?;
            plan.attributes.place(plan.shared_start)?;
        }
        let mut directories = vec![ROOT_INO];
        let mut next = 0;
        while let Some(dir) = directories.get(next).copied() {
            next += 1;
            for entry in index.entries(dir, 0) {
                if plan.nid(entry.ino).is_ok() {
                    continue;
                }
                plan.place(entry.ino, &mut space)?;
                if entry.kind == FileKind::Directory {
                    directories.push(entry.ino);
                }
            }
        }
        // fsck.erofs reads where the attributes of any inode would begin, also behind the last one of the image.
        plan.blocks = space.block_count() + usize::from(space.is_full());
        Ok(plan)
    }

    /// Gives an inode and its data their places.
    fn place(&mut self, ino: u64, space: &mut Space) -> Result<(), ImageError> {
        let changed = ImageError::Changed { ino };
        let inode = self.index.inode(ino).ok_or(changed.clone())?;
        let shape = self.shape(&inode)?;
        let at = position(ino).ok_or(changed.clone())?;
        let nid = space.bytes(shape.head + shape.tail) / SLOT;
        *self.nids.get_mut(at).ok_or(changed.clone())? = u32::try_from(nid).map_err(|_| ImageError::TooLarge)?;
        if shape.blocks > 0 {
            let first = space.blocks(shape.blocks);
            *self.first_blocks.get_mut(at).ok_or(changed)? = u32::try_from(first).map_err(|_| ImageError::TooLarge)?;
        }
        within_limit(space)
    }

    /// How large an inode and its parts are.
    fn shape(&self, inode: &Inode<'_>) -> Result<Shape, ImageError> {
        let attributes = self.attributes.size_of(inode.ino);
        let count = Attributes::count_of(attributes).ok_or_else(|| ImageError::AttributesTooLong {
            path: self.path(inode.ino),
            size: attributes,
        })?;
        let head = size_of::<InodeRecord>() + attributes;
        let mut shape = match inode.kind {
            FileKind::Directory => Shape::of_data(head, directory::size(directory::entries(self.index, inode))),
            FileKind::Symlink => Shape::of_data(head, inode.symlink_target().map_or(0, <[u8]>::len)),
            FileKind::Regular if inode.size > 0 => Shape::of_chunks(head, inode.size),
            _ => Shape::of_data(head, 0),
        };
        shape.attributes = count;
        Ok(shape)
    }

    fn write(&self) -> Result<Vec<u8>, ImageError> {
        let mut out = Output {
            bytes: vec![0; self.blocks * BLOCK],
        };
        if self.shared_start > 0 {
            out.put(self.shared_start, &self.attributes.shared_bytes(), ROOT_INO)?;
        }
        let mut buffer = Vec::with_capacity(BLOCK);
        for ino in 1..=u64::from(self.index.inode_count()) {
            let inode = self.index.inode(ino).ok_or(ImageError::Changed { ino })?;
            self.write_inode(&inode, &mut buffer, &mut out)?;
        }
        self.write_super(&mut out)?;
        Ok(out.bytes)
    }

    fn write_inode(&self, inode: &Inode<'_>, buffer: &mut Vec<u8>, out: &mut Output) -> Result<(), ImageError> {
        let ino = inode.ino;
        let shape = self.shape(inode)?;
        let first_block = position(ino).and_then(|at| self.first_blocks.get(at)).copied();
        let first_block = first_block.unwrap_or_default();
        let device = || {
            let (major, minor) = inode.rdev;
            device_number(inode.rdev).ok_or_else(|| ImageError::Device {
                path: self.path(ino),
                major,
                minor,
            })
        };
        let special = match inode.kind {
            FileKind::CharDevice | FileKind::BlockDevice => device()?,
            _ if shape.layout == Layout::Chunks => u32::from(CHUNK_INDEXES) | u32::from(shape.chunk_bits),
            _ => first_block,
        };
        let record = InodeRecord {
            i_format: shape.layout.i_format().into(),
            i_xattr_icount: shape.attributes.into(),
            i_mode: (mode_type(inode.kind) | u16::try_from(inode.mode & 0o7777).unwrap_or_default()).into(),
            i_size: shape.size.into(),
            i_u: special.into(),
            i_ino: u32::try_from(ino).unwrap_or_default().into(),
            i_uid: inode.uid.into(),
            i_gid: inode.gid.into(),
            i_mtime: inode.mtime_sec.cast_unsigned().into(),
            i_mtime_nsec: inode.mtime_nsec.into(),
            i_nlink: inode.nlink.into(),
            ..InodeRecord::default()
        };
        buffer.clear();
        buffer.extend_from_slice(record.as_bytes());
        if shape.attributes > 0 {
            self.attributes.write(ino, buffer);
        }
        buffer.resize(shape.head, 0);
        let start = usize::try_from(self.nid(ino)?).map_err(|_| ImageError::TooLarge)? * SLOT;
        out.put(start, buffer, ino)?;

        let mut data = Data {
            out,
            ino,
            blocks: first_block as usize..first_block as usize + shape.blocks,
            tail: start + shape.head,
        };
        match inode.kind {
            FileKind::Directory => {
                let entries = directory::entries(self.index, inode);
                directory::write(entries, |ino| self.nid(ino), |block| data.put(block))
            }
            FileKind::Symlink => data.put(inode.symlink_target().unwrap_or_default()),
            FileKind::Regular if inode.size > 0 => data.put_chunks(inode, &shape),
            _ => Ok(()),
        }
    }

    fn write_super(&self, out: &mut Output) -> Result<(), ImageError> {
        let number = |n: u64| u32::try_from(n).map_err(|_| ImageError::TooLarge);
        let blocks = number(self.blocks as u64)?;
        let device = DeviceSlot {
            tag: padded(DEVICE_TAG),
            blocks: number(self.index.data_size().div_ceil(BLOCK as u64))?.into(),
            mapped_blkaddr: blocks.into(),
            reserved: [0; 56],
        };
        let mut super_block = SuperBlock {
            magic: MAGIC.into(),
            feature_compat: (COMPAT_CHECKSUM | COMPAT_MTIME | COMPAT_XATTR_FILTER).into(),
            blkszbits: BLOCK_BITS,
            root_nid: u16::try_from(self.nid(ROOT_INO)?)
                .map_err(|_| ImageError::TooLarge)?
                .into(),
            inos: u64::from(self.index.inode_count()).into(),
            blocks: blocks.into(),
            uuid: uuid(self.index.toc_digest()),
            volume_name: padded(VOLUME_NAME),
            feature_incompat: (INCOMPAT_CHUNKS | INCOMPAT_DEVICES).into(),
            extra_devices: 1.into(),
            devt_slotoff: u16::from(DEVICE_TABLE_SLOT).into(),
            ..SuperBlock::default()
        };
        out.put(DEVICE_TABLE, device.as_bytes(), ROOT_INO)?;
        out.put(SUPER_OFFSET, super_block.as_bytes(), ROOT_INO)?;
        super_block.checksum = crc32c(out.bytes.get(SUPER_OFFSET..BLOCK).unwrap_or_default()).into();
        out.put(SUPER_OFFSET, super_block.as_bytes(), ROOT_INO)
    }

    fn nid(&self, ino: u64) -> Result<u64, ImageError> {
        let nid = position(ino).and_then(|at| self.nids.get(at)).copied();
        nid.filter(|nid| *nid > 0)
            .map(u64::from)
            .ok_or(ImageError::Changed { ino })
    }

    fn path(&self, ino: u64) -> String {
        shown(&self.index.path_of(ino))
    }
}

/// How large an inode is, and how its data is stored.
#[derive(Debug, Clone, Copy)]
struct Shape {
    layout: Layout,
    /// The inode with its attributes, rounded up to where its data may begin.
    head: usize,
    /// Data right behind that: chunk indexes, or what does not fill a block.
    tail: usize,
    /// Blocks of data elsewhere.
    blocks: usize,
    /// Size of the file.
    size: u64,
    chunk_bits: u8,
    attributes: u16,
}

impl Shape {
    /// Whole blocks apart, and the rest behind the inode if both fit in a block.
    fn of_data(head: usize, size: usize) -> Self {
        let tail = size % BLOCK;
        let inline = tail > 0 && head + tail <= BLOCK;
        Self {
            layout: if inline { Layout::Inline } else { Layout::Plain },
            head,
            tail: if inline { tail } else { 0 },
            blocks: if inline { size / BLOCK } else { size.div_ceil(BLOCK) },
            size: size as u64,
            chunk_bits: 0,
            attributes: 0,
        }
    }

    /// One chunk that holds the whole file, or as many of the largest as it takes.
    fn of_chunks(head: usize, size: u64) -> Self {
        let blocks = size.div_ceil(BLOCK as u64);
        let bits = u8::try_from(blocks.next_power_of_two().trailing_zeros()).unwrap_or(MAX_CHUNK_BITS);
        let chunk_bits = bits.min(MAX_CHUNK_BITS);
        // MAX_DATA_BYTES is two of the largest chunks.
        let chunks = usize::try_from(blocks.div_ceil(1 << chunk_bits)).unwrap_or(usize::MAX);
        let index = size_of::<ChunkIndex>();
        Self {
            layout: Layout::Chunks,
            head: head.next_multiple_of(index),
            tail: chunks.saturating_mul(index),
            blocks: 0,
            size,
            chunk_bits,
            attributes: 0,
        }
    }
}

/// The image while it is written. A place outside of it means that the index said something else before.
struct Output {
    bytes: Vec<u8>,
}

impl Output {
    fn put(&mut self, at: usize, bytes: &[u8], ino: u64) -> Result<(), ImageError> {
        let end = at.checked_add(bytes.len());
        let place = end.and_then(|end| self.bytes.get_mut(at..end));
        place.ok_or(ImageError::Changed { ino })?.copy_from_slice(bytes);
        Ok(())
    }
}

/// Where the data of one inode goes, piece by piece.
struct Data<'a> {
    out: &'a mut Output,
    ino: u64,
    blocks: std::ops::Range<usize>,
    tail: usize,
}

impl Data<'_> {
    /// The next block or, when there are none left, what is behind the inode.
    fn put(&mut self, bytes: &[u8]) -> Result<(), ImageError> {
        let at = self.blocks.next().map_or(self.tail, |block| block * BLOCK);
        self.out.put(at, bytes, self.ino)
    }

    fn put_chunks(&mut self, inode: &Inode<'_>, shape: &Shape) -> Result<(), ImageError> {
        let first = inode.data_offset / BLOCK as u64;
        let mut indexes = Vec::with_capacity(2 * size_of::<ChunkIndex>());
        for chunk in 0..(shape.tail / size_of::<ChunkIndex>()) as u64 {
            let block = first.saturating_add(chunk << shape.chunk_bits);
            let index = ChunkIndex {
                advise: 0.into(),
                device_id: DATA_DEVICE.into(),
                blkaddr: u32::try_from(block)
                    .map_err(|_| ImageError::Changed { ino: inode.ino })?
                    .into(),
            };
            indexes.extend_from_slice(index.as_bytes());
        }
        self.put(&indexes)
    }
}

fn position(ino: u64) -> Option<usize> {
    usize::try_from(ino.checked_sub(1)?).ok()
}

fn within_limit(space: &Space) -> Result<(), ImageError> {
    if space.block_count() > MAX_IMAGE_BYTES / BLOCK {
        return Err(ImageError::TooLarge);
    }
    Ok(())
}

fn padded<const N: usize>(text: &[u8]) -> [u8; N] {
    let mut bytes = [0; N];
    for (byte, letter) in bytes.iter_mut().zip(text) {
        *byte = *letter;
    }
    bytes
}

/// A UUID of the kind that says nothing but what its maker likes (version 8): the first bytes of the TOC digest.
fn uuid(toc_digest: Digest) -> [u8; 16] {
    let mut uuid: [u8; 16] = padded(toc_digest.as_bytes());
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
