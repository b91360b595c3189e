//! Checks an index file once, so that nothing needs to be checked when it is used.
//!
//! The checksum catches what disks and crashes do. The checks behind it hold against any bytes at all, also ones made
//! to fit the checksum: afterwards every number points inside its table, directories form a tree, chunks tile their
//! files, members do not overlap. Time is linear in the file: sums are bounded before ranges are walked.

use std::ops::Range;

use zerocopy::FromBytes;

use super::error::IndexError;
use super::format::{
    CHECKED_FROM, DATA_ALIGN, FORMATS, Header, InodeRecord, MAGIC, NONE_U32, NONE_U64, Section, XattrRecord, sections,
};
use super::{FileKind, LayerIndex};
use crate::member::{Compression, MAX_MEMBER_SPAN};
use crate::toc::{MAX_CHUNK_BYTES, MAX_NAME_BYTES, MAX_XATTR_NAME_BYTES, MAX_XATTR_VALUE_BYTES};

/// Checks magic, format, size, checksum and section table.
pub(super) fn header(bytes: &[u8]) -> Result<(Header, Compression, [Range<usize>; Section::COUNT]), IndexError> {
    let (header, _) = Header::read_from_prefix(bytes).map_err(|_| IndexError::NotAnIndex {
        found: "fewer bytes than a header has",
    })?;
    if header.magic != MAGIC {
        return Err(IndexError::NotAnIndex {
            found: "another file's first bytes",
        });
    }
    let found = header.format.get();
    let known = FORMATS.iter().find(|(id, _)| *id == found);
    let (_, compression) = *known.ok_or(IndexError::Format { found })?;
    let damaged = |what, record| IndexError::Damaged {
        size: bytes.len(),
        what,
        table: "header field",
        record,
    };
    if header.file_size.get() != bytes.len() as u64 {
        return Err(damaged("another file size", 3));
    }
    if libdeflater::crc32(&bytes[CHECKED_FROM..]) != header.checksum.get() {
        return Err(damaged("another checksum", 2));
    }
    let (ranges, size) = sections(header.sections.map(|section| section.count.get() as usize))
        .ok_or_else(|| damaged("too many records", 9))?;
    if size != bytes.len() {
        return Err(damaged("tables of another size than the file", 9));
    }
    for ((section, record), range) in Section::ALL.into_iter().zip(&header.sections).zip(&ranges) {
        let fits =
            record.offset.get() == range.start as u64 && record.record_size.get() as usize == section.record_size();
        if !fits {
            return Err(damaged("a table in another place", 9));
        }
    }
    let (blob_size, toc_offset) = (header.blob_size.get(), header.toc_offset.get());
    let prefetch_end = header.prefetch_end.get();
    if toc_offset >= blob_size || (prefetch_end != NONE_U64 && prefetch_end >= toc_offset) {
        return Err(damaged("a blob offset outside the blob", 5));
    }
    Ok((header, compression, ranges))
}

/// Checks every record.
pub(super) fn tables<B: AsRef<[u8]>>(index: &LayerIndex<B>) -> Result<(), IndexError> {
    Check {
        index,
        size: index.bytes.as_ref().len(),
    }
    .all()
}

struct Check<'a, B> {
    index: &'a LayerIndex<B>,
    size: usize,
}

impl<B: AsRef<[u8]>> Check<'_, B> {
    fn all(&self) -> Result<(), IndexError> {
        self.root()?;
        let (mut dirents, mut chunks, mut data_end) = (0, 0, 0);
        for (at, record) in self.index.inode_records().iter().enumerate() {
            self.inode(at, record)?;
            let children = u64::from(record.count.get());
            match FileKind::from_code(record.kind) {
                Some(FileKind::Directory) => {
                    dirents += children;
                    self.require(
                        dirents <= self.index.dirent_records().len() as u64,
                        "shared names",
                        Section::Inodes,
                        at,
                    )?;
                    self.directory(at, record)?;
                }
                Some(FileKind::Regular) => {
                    // Who looks for what lies at a place of the data file searches the chunks as if they were sorted by it.
                    let in_order = record.first.get() as u64 == chunks && record.data_offset.get() >= data_end;
                    self.require(children == 0 || in_order, "content out of order", Section::Inodes, at)?;
                    if children > 0 {
                        data_end = record.data_offset.get().saturating_add(record.size.get());
                    }
                    chunks += children;
                    self.require(
                        chunks <= self.index.chunk_records().len() as u64,
                        "shared chunks",
                        Section::Inodes,
                        at,
                    )?;
                    self.file(at, record)?;
                }
                _ => self.require(children == 0, "children of what has none", Section::Inodes, at)?,
            }
        }
        self.require(
            dirents == self.index.dirent_records().len() as u64,
            "names in no directory",
            Section::Dirents,
            0,
        )?;
        self.require(
            chunks == self.index.chunk_records().len() as u64,
            "chunks of no file",
            Section::Chunks,
            0,
        )?;
        self.members()?;
        self.xattrs()
    }

    fn require(&self, holds: bool, what: &'static str, section: Section, record: usize) -> Result<(), IndexError> {
        if holds {
            Ok(())
        } else {
            Err(IndexError::Damaged {
                size: self.size,
                what,
                table: section.name(),
                record,
            })
        }
    }

    fn root(&self) -> Result<(), IndexError> {
        let sound = self.index.inode_record(1).is_some_and(|root| {
            root.kind == FileKind::Directory.code() && root.parent.get() == 1 && root.dirent.get() == NONE_U32
        });
        self.require(sound, "no root directory", Section::Inodes, 0)
    }

    /// What holds for inodes of every kind.
    fn inode(&self, at: usize, record: &InodeRecord) -> Result<(), IndexError> {
        let require = |holds, what| self.require(holds, what, Section::Inodes, at);
        let kind = FileKind::from_code(record.kind);
        require(kind.is_some(), "an unknown file type")?;
        require(
            record.mode.get() <= 0o7777 && record.mtime_nsec.get() < 1_000_000_000,
            "a mode or time out of range",
        )?;
        let arena = self.index.arena();
        let link_len = usize::from(record.link_len.get());
        let link = super::text(arena, record.link_offset.get(), link_len);
        let is_link = kind == Some(FileKind::Symlink);
        require(
            link.len() == link_len && is_link == (link_len > 0),
            "a link target out of range",
        )?;
        require(
            !is_link || record.size.get() == link_len as u64,
            "a link of another size",
        )?;
        let xattrs = self.index.xattr_records();
        require(record.xattrs().end as usize <= xattrs.len(), "attributes out of range")?;
        if at > 0 {
            let ino = u32::try_from(at + 1).unwrap_or(u32::MAX);
            let dirent = self.index.dirent_records().get(record.dirent.get() as usize);
            require(dirent.is_some_and(|dirent| dirent.ino.get() == ino), "no name")?;
            let parent = self.index.inode_record(record.parent.get().into());
            let in_parent = parent.is_some_and(|parent| {
                parent.kind == FileKind::Directory.code() && parent.children().contains(&record.dirent.get())
            });
            require(in_parent, "a name outside its parent")?;
        }
        Ok(())
    }

    fn directory(&self, at: usize, dir: &InodeRecord) -> Result<(), IndexError> {
        let require = |holds, what| self.require(holds, what, Section::Inodes, at);
        require(
            dir.children().end as usize <= self.index.dirent_records().len(),
            "names out of range",
        )?;
        // A directory's names begin behind its own name, so a way down only ever goes forward and cannot loop.
        require(at == 0 || dir.first.get() > dir.dirent.get(), "names before its own")?;
        let arena = self.index.arena();
        let mut previous: &[u8] = &[];
        for id in dir.children() {
            let record = id as usize;
            let require = |holds, what| self.require(holds, what, Section::Dirents, record);
            let Some(dirent) = self.index.dirent_records().get(record) else {
                return require(false, "out of range");
            };
            let name = dirent.name(arena);
            let legal = (1..=MAX_NAME_BYTES).contains(&name.len()) && !matches!(name, b"." | b"..");
            require(
                legal && !name.iter().any(|b| matches!(b, b'/' | 0)),
                "an impossible name",
            )?;
            require(name > previous, "names out of order")?;
            previous = name;
            let inode = self.index.inode_record(dirent.ino.get().into());
            require(
                inode.is_some_and(|inode| inode.kind == dirent.kind),
                "a file of another type",
            )?;
            let is_dir = dirent.kind == FileKind::Directory.code();
            require(
                !is_dir || inode.is_some_and(|inode| inode.dirent.get() == id),
                "a second name of a directory",
            )?;
        }
        Ok(())
    }

    fn file(&self, at: usize, file: &InodeRecord) -> Result<(), IndexError> {
        let require = |holds, what| self.require(holds, what, Section::Inodes, at);
        require(
            file.children().end as usize <= self.index.chunk_records().len(),
            "chunks out of range",
        )?;
        let end = file.data_offset.get().checked_add(file.size.get());
        let aligned = file.data_offset.get().is_multiple_of(DATA_ALIGN);
        require(
            aligned && end.is_some_and(|end| end <= self.index.data_size),
            "content outside the data file",
        )?;
        let mut expected = 0;
        for id in file.children() {
            let record = id as usize;
            let require = |holds, what| self.require(holds, what, Section::Chunks, record);
            let Some(chunk) = self.index.chunk_records().get(record) else {
                return require(false, "out of range");
            };
            require(
                chunk.ino.get() as usize == at + 1 && chunk.file_offset.get() == expected,
                "a chunk out of place",
            )?;
            let (size, inner) = (u64::from(chunk.size.get()), u64::from(chunk.inner_offset.get()));
            let bounded = (1..=MAX_CHUNK_BYTES).contains(&size) && inner + size <= MAX_MEMBER_SPAN as u64;
            require(bounded, "a chunk of impossible size")?;
            let member = self.index.member_records().get(chunk.member.get() as usize);
            require(
                member.is_some_and(|member| member.chunks().contains(&id)),
                "a chunk outside its member",
            )?;
            expected = chunk.end();
        }
        require(expected == file.size.get(), "chunks that do not cover it")
    }

    /// Each chunk lies in the member it names; so if the numbers add up, no member names another's chunk.
    fn members(&self) -> Result<(), IndexError> {
        let (mut blob_end, mut chunks) = (0, 0);
        for (at, member) in self.index.member_records().iter().enumerate() {
            let (start, end) = (member.start.get(), member.end.get());
            let placed = start >= blob_end && start < end && end <= self.index.layout.toc_offset;
            self.require(placed, "a member out of place", Section::Members, at)?;
            self.require(
                member.chunk_count.get() > 0,
                "a member without chunks",
                Section::Members,
                at,
            )?;
            blob_end = end;
            chunks += u64::from(member.chunk_count.get());
        }
        self.require(
            chunks == self.index.chunk_records().len() as u64,
            "members that share chunks",
            Section::Members,
            0,
        )
    }

    fn xattrs(&self) -> Result<(), IndexError> {
        let arena = self.index.arena();
        for (at, xattr) in self.index.xattr_records().iter().enumerate() {
            self.require(
                xattr_fits(xattr, arena),
                "an attribute out of range",
                Section::Xattrs,
                at,
            )?;
        }
        Ok(())
    }
}

fn xattr_fits(xattr: &XattrRecord, arena: &[u8]) -> bool {
    let (name, value) = (usize::from(xattr.name_len.get()), xattr.value_len.get() as usize);
    (1..=MAX_XATTR_NAME_BYTES).contains(&name)
        && value <= MAX_XATTR_VALUE_BYTES
        && xattr.name(arena).len() == name
        && xattr.value(arena).len() == value
}
