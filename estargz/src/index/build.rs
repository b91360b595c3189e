//! Makes the bytes of an index from a TOC.
//!
//! The result is a pure function of TOC, layout and digest: nothing here depends on hashing order or time.

use std::collections::{BTreeMap, HashMap};

use zerocopy::IntoBytes;

use super::chunks::Chunks;
use super::error::{EntryFault, IndexError};
use super::format::{
    CHECKED_FROM, DirentRecord, Header, InodeRecord, MAGIC, NONE_U32, NONE_U64, Section, SectionRecord, XattrRecord,
    format_id, sections,
};
use super::tree::{Origin, Tree, prefetch_end};
use super::{BlobLayout, FileKind};
use crate::digest::Digest;
use crate::toc::time::Timestamp;
use crate::toc::{EntryType, MAX_LINK_BYTES, MAX_XATTR_VALUE_BYTES, Toc, TocEntry, decode_xattr};

const OPAQUE_XATTR: &[u8] = b"trusted.overlay.opaque";
const OPAQUE_VALUE: &[u8] = b"y";
/// Attributes with this prefix are orders to the kernel from the machine's administrator.
const ADMIN_XATTRS: &[u8] = b"trusted.";
const IMPLIED_DIR_MODE: u16 = 0o755;
/// Device numbers as Linux packs them into 32 bits.
const MAX_MAJOR: u64 = (1 << 12) - 1;
const MAX_MINOR: u64 = (1 << 20) - 1;

/// Makes the index of a layer from its TOC; open it with [`super::LayerIndex::open`].
pub fn build(toc: &Toc, layout: BlobLayout, toc_digest: Digest) -> Result<Vec<u8>, IndexError> {
    let BlobLayout {
        blob_size,
        toc_offset,
        compression,
    } = layout;
    if toc_offset >= blob_size {
        return Err(IndexError::Layout { toc_offset, blob_size });
    }
    let tree = Tree::of(toc)?;
    let numbered = tree.numbered();
    let mut tables = Tables {
        inodes: Vec::with_capacity(numbered.len()),
        ..Tables::default()
    };
    let mut chunks = Chunks::of(toc, layout)?;
    for (ino, node) in (1..).zip(&numbered) {
        tables.add_inode(toc, &tree, *node, ino, &mut chunks)?;
    }
    tables.add_names(&tree, &numbered)?;
    // The file is about to be put together beside its tables: what is not needed any more makes room.
    drop((tree, numbered));
    let (chunks, members, data_size) = chunks.finish()?;
    let prefetch_end = prefetch_end(toc, toc_offset)?.unwrap_or(NONE_U64);
    let tables: [(usize, &[u8]); Section::COUNT] = [
        (tables.inodes.len(), tables.inodes.as_bytes()),
        (tables.dirents.len(), tables.dirents.as_bytes()),
        (chunks.len(), chunks.as_bytes()),
        (members.len(), members.as_bytes()),
        (tables.xattrs.len(), tables.xattrs.as_bytes()),
        (tables.arena.bytes.len(), &tables.arena.bytes),
    ];
    let header = Header {
        magic: MAGIC,
        format: format_id(compression).into(),
        checksum: 0.into(),
        file_size: 0.into(),
        toc_digest: *toc_digest.as_bytes(),
        blob_size: blob_size.into(),
        toc_offset: toc_offset.into(),
        data_size: data_size.into(),
        prefetch_end: prefetch_end.into(),
        sections: [SectionRecord::default(); Section::COUNT],
    };
    assemble(header, tables)
}

fn assemble(mut header: Header, tables: [(usize, &[u8]); Section::COUNT]) -> Result<Vec<u8>, IndexError> {
    let whole = || IndexError::TooLarge { table: "whole" };
    let (ranges, size) = sections(tables.map(|(count, _)| count)).ok_or_else(whole)?;
    header.file_size = (size as u64).into();
    for (((record, section), (count, _)), range) in
        header.sections.iter_mut().zip(Section::ALL).zip(tables).zip(&ranges)
    {
        let number = |n: usize| u32::try_from(n).map_err(|_| IndexError::TooLarge { table: section.name() });
        record.offset = (range.start as u64).into();
        record.count = number(count)?.into();
        record.record_size = number(section.record_size())?.into();
    }
    let mut bytes = Vec::with_capacity(size);
    bytes.extend_from_slice(header.as_bytes());
    for ((_, table), range) in tables.iter().zip(ranges) {
        bytes.resize(range.start, 0);
        bytes.extend_from_slice(table);
    }
    header.checksum = libdeflater::crc32(&bytes[CHECKED_FROM..]).into();
    bytes[..CHECKED_FROM].copy_from_slice(&header.as_bytes()[..CHECKED_FROM]);
    Ok(bytes)
}

#[derive(Default)]
struct Tables {
    inodes: Vec<InodeRecord>,
    dirents: Vec<DirentRecord>,
    xattrs: Vec<XattrRecord>,
    arena: Arena,
}

impl Tables {
    fn add_inode(
        &mut self,
        toc: &Toc,
        tree: &Tree<'_>,
        node: u32,
        ino: u32,
        chunks: &mut Chunks<'_>,
    ) -> Result<(), IndexError> {
        let place = &tree.nodes[node as usize];
        let mut record = InodeRecord {
            nlink: 1.into(),
            dirent: NONE_U32.into(),
            parent: 1.into(),
            ..InodeRecord::default()
        };
        record.xattr_first = number(self.xattrs.len(), Section::Xattrs)?.into();
        let mut xattrs = BTreeMap::new();
        match place.origin {
            Origin::Whiteout(_) => record.kind = FileKind::CharDevice.code(),
            Origin::Implied => {
                record.kind = FileKind::Directory.code();
                record.mode = IMPLIED_DIR_MODE.into();
            }
            Origin::Entry(at) => {
                let at = at as usize;
                let entry = &toc.entries[at];
                let fault = |fault| IndexError::entry(at, &entry.name, fault);
                describe(entry, &mut record).map_err(fault)?;
                xattrs = decoded_xattrs(entry).map_err(fault)?;
                if entry.kind == EntryType::Symlink {
                    record.link_offset = self.arena.append(entry.link_name.as_bytes())?.into();
                    record.link_len = u16::try_from(entry.link_name.len())
                        .map_err(|_| fault(too_long(entry)))?
                        .into();
                }
                if entry.kind == EntryType::Reg {
                    let (ids, data_offset) = chunks.add_file(at, ino)?;
                    record.first = ids.start.into();
                    record.count = (ids.end - ids.start).into();
                    record.data_offset = data_offset.into();
                }
            }
        }
        if place.opaque.is_some() {
            xattrs.insert(OPAQUE_XATTR, OPAQUE_VALUE.to_vec());
        }
        record.xattr_count = number(xattrs.len(), Section::Xattrs)?.into();
        for (name, value) in xattrs {
            self.add_xattr(name, &value)?;
        }
        self.inodes.push(record);
        Ok(())
    }

    fn add_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<(), IndexError> {
        self.xattrs.push(XattrRecord {
            name_offset: self.arena.intern(name)?.into(),
            value_offset: self.arena.intern(value)?.into(),
            value_len: number(value.len(), Section::Arena)?.into(),
            name_len: u16::try_from(name.len())
                .map_err(|_| IndexError::TooLarge {
                    table: Section::Xattrs.name(),
                })?
                .into(),
            padding: [0; 2],
        });
        Ok(())
    }

    /// Writes the directories breadth first, so that a directory's entries always lie behind the entry that names it:
    /// that order is what lets a reader see in one pass that nothing loops.
    fn add_names(&mut self, tree: &Tree<'_>, numbered: &[u32]) -> Result<(), IndexError> {
        let mut ino_of = vec![0; tree.nodes.len()];
        for (ino, node) in (1u32..).zip(numbered) {
            ino_of[*node as usize] = ino;
        }
        for (node, end) in tree.inode_node.iter().enumerate() {
            ino_of[node] = ino_of[*end as usize];
        }
        let (mut children, first_child) = children_of(tree)?;
        let mut nlink = vec![0u32; self.inodes.len() + 1];
        let mut queue = Vec::from([0]);
        let mut at = 0;
        while let Some(dir) = queue.get(at).copied() {
            at += 1;
            let children = &mut children[first_child[dir as usize]..first_child[dir as usize + 1]];
            children.sort_unstable_by_key(|node| tree.nodes[*node as usize].name.as_bytes());
            let dir_ino = ino_of[dir as usize];
            let record = &mut self.inodes[dir_ino as usize - 1];
            record.first = number(self.dirents.len(), Section::Dirents)?.into();
            record.count = number(children.len(), Section::Dirents)?.into();
            nlink[dir_ino as usize] += 2;
            for node in &*children {
                let ino = ino_of[*node as usize];
                let own = tree.inode_node[*node as usize] == *node;
                self.add_name(tree.nodes[*node as usize].name, ino, own.then_some(dir_ino))?;
                if tree.is_dir(*node) {
                    queue.push(*node);
                    nlink[dir_ino as usize] += 1;
                } else {
                    nlink[ino as usize] += 1;
                }
            }
        }
        for (record, nlink) in self.inodes.iter_mut().zip(&nlink[1..]) {
            record.nlink = (*nlink).into();
        }
        Ok(())
    }

    /// Adds a name of inode `ino`; `parent` is the directory it is added to, if it is not the name of a hard link.
    fn add_name(&mut self, name: &str, ino: u32, parent: Option<u32>) -> Result<(), IndexError> {
        let dirent = number(self.dirents.len(), Section::Dirents)?;
        let record = &mut self.inodes[ino as usize - 1];
        if let Some(parent) = parent {
            record.dirent = dirent.into();
            record.parent = parent.into();
        }
        self.dirents.push(DirentRecord {
            ino: ino.into(),
            name_offset: self.arena.append(name.as_bytes())?.into(),
            name_len: u8::try_from(name.len()).expect("the tree holds no longer names than MAX_NAME_BYTES"),
            kind: record.kind,
            padding: [0; 2],
        });
        Ok(())
    }
}

/// All nodes but the root grouped by parent, and for each node where its children begin in that list.
fn children_of(tree: &Tree<'_>) -> Result<(Vec<u32>, Vec<usize>), IndexError> {
    let mut first_child = vec![0; tree.nodes.len() + 2];
    for node in &tree.nodes[1..] {
        first_child[node.parent as usize + 2] += 1;
    }
    for at in 1..first_child.len() {
        first_child[at] += first_child[at - 1];
    }
    // Filling moves the start of each group, kept one place behind its own, to the start of the next.
    let mut children = vec![0; tree.nodes.len() - 1];
    for (at, node) in tree.nodes.iter().enumerate().skip(1) {
        let slot = &mut first_child[node.parent as usize + 1];
        children[*slot] = number(at, Section::Dirents)?;
        *slot += 1;
    }
    Ok((children, first_child))
}

fn number(n: usize, section: Section) -> Result<u32, IndexError> {
    u32::try_from(n).map_err(|_| IndexError::TooLarge { table: section.name() })
}

/// Names, link targets and attributes, one behind the other.
#[derive(Default)]
struct Arena {
    bytes: Vec<u8>,
    /// Attributes repeat (one SELinux label on every file), names seldom do.
    known: HashMap<Vec<u8>, u32>,
}

impl Arena {
    fn append(&mut self, text: &[u8]) -> Result<u32, IndexError> {
        let offset = number(self.bytes.len(), Section::Arena)?;
        self.bytes.extend_from_slice(text);
        Ok(offset)
    }

    fn intern(&mut self, text: &[u8]) -> Result<u32, IndexError> {
        if let Some(offset) = self.known.get(text) {
            return Ok(*offset);
        }
        let offset = self.append(text)?;
        self.known.insert(text.to_vec(), offset);
        Ok(offset)
    }
}

/// What an entry says about its inode, chunks and attributes aside.
fn describe(entry: &TocEntry, record: &mut InodeRecord) -> Result<(), EntryFault> {
    let kind = match entry.kind {
        EntryType::Dir => FileKind::Directory,
        EntryType::Reg => FileKind::Regular,
        EntryType::Symlink => FileKind::Symlink,
        EntryType::Char => FileKind::CharDevice,
        EntryType::Block => FileKind::BlockDevice,
        EntryType::Fifo => FileKind::Fifo,
        EntryType::Hardlink | EntryType::Chunk => unreachable!("links are resolved and chunks are no nodes"),
    };
    record.kind = kind.code();
    // Linux gives every symbolic link these bits, whatever the archive says.
    let mode = if kind == FileKind::Symlink {
        0o777
    } else {
        entry.mode & 0o7777
    };
    record.mode = u16::try_from(mode).expect("12 bits").into();
    record.uid = bounded("uid", entry.uid, u64::from(u32::MAX))?.into();
    record.gid = bounded("gid", entry.gid, u64::from(u32::MAX))?.into();
    let time = Timestamp::parse(&entry.mod_time);
    let time = time.ok_or_else(|| EntryFault::Time(entry.mod_time.chars().take(100).collect()))?;
    record.mtime_sec = time.seconds.into();
    record.mtime_nsec = time.nanoseconds.into();
    match kind {
        FileKind::Regular => record.size = entry.size.into(),
        FileKind::CharDevice | FileKind::BlockDevice => {
            record.rdev_major = bounded("devMajor", entry.dev_major, MAX_MAJOR)?.into();
            record.rdev_minor = bounded("devMinor", entry.dev_minor, MAX_MINOR)?.into();
        }
        FileKind::Symlink => {
            if !(1..=MAX_LINK_BYTES).contains(&entry.link_name.len()) {
                return Err(too_long(entry));
            }
            if entry.link_name.contains('\0') {
                return Err(EntryFault::Nul { field: "linkName" });
            }
            record.size = (entry.link_name.len() as u64).into();
        }
        FileKind::Directory | FileKind::Fifo => {}
    }
    Ok(())
}

fn too_long(entry: &TocEntry) -> EntryFault {
    EntryFault::SymlinkLength(entry.link_name.len())
}

fn bounded(field: &'static str, value: u64, limit: u64) -> Result<u32, EntryFault> {
    u32::try_from(value)
        .ok()
        .filter(|_| value <= limit)
        .ok_or(EntryFault::Number { field, value, limit })
}

/// The attributes of an entry, those apart that only an administrator may set. Whoever has made the image is none:
/// overlayfs takes `trusted.overlay.*` of a lower layer as orders (another directory to look in, another file's content),
/// and containerd leaves all of `trusted.` out when it unpacks a layer.
fn decoded_xattrs(entry: &TocEntry) -> Result<BTreeMap<&[u8], Vec<u8>>, EntryFault> {
    let decoded = |(name, text): (&'_ String, &String)| {
        decode_xattr(text)
            .filter(|value| value.len() <= MAX_XATTR_VALUE_BYTES && !name.is_empty() && !name.contains('\0'))
            .ok_or_else(|| EntryFault::Xattr {
                name: name.chars().take(100).collect(),
            })
    };
    entry
        .xattrs
        .iter()
        .map(|(name, text)| Ok((name.as_bytes(), decoded((name, text))?)))
        .filter(|decoded| !matches!(decoded, Ok((name, _)) if name.starts_with(ADMIN_XATTRS)))
        .collect()
}
