//! Extended attributes: which an image has, which of them files share, and their bytes.
//!
//! An attribute that several files have (an SELinux label) is written once and costs each of them four bytes; so is a
//! large one, to keep inodes small. The others lie behind their inode.

use std::collections::HashMap;

use estargz::index::LayerIndex;
use zerocopy::IntoBytes;

use crate::error::{ImageError, MAX_ATTRIBUTES, shown};
use crate::format::{FILTER_SEED, MAX_SHARED, XATTR_ALIGN, XattrEntry, XattrHeader};
use crate::hash::xxh32;

/// Beyond this many bytes an attribute is written in the shared area also if only one file has it: a reader of inodes
/// seldom wants it.
const INLINE_BYTES: usize = 256;
/// Most bytes of one inode's attributes: the header, and 2^16 - 2 units behind it.
const MAX_INODE_BYTES: usize = size_of::<XattrHeader>() + (u16::MAX as usize - 1) * XATTR_ALIGN;

/// A name and value that at least one file has.
#[derive(Debug)]
struct Attribute<'a> {
    name_index: u8,
    /// The name behind its prefix.
    name: &'a [u8],
    value: &'a [u8],
    /// How many files have it.
    uses: u32,
    /// Where it lies in the image in units of [`XATTR_ALIGN`], if it is shared.
    id: Option<u32>,
}

impl Attribute<'_> {
    fn size(&self) -> usize {
        (size_of::<XattrEntry>() + self.name.len() + self.value.len()).next_multiple_of(XATTR_ALIGN)
    }

    /// Its bit in the filter of an inode that has it.
    fn filter_bit(&self) -> u32 {
        1 << (xxh32(self.name, FILTER_SEED.wrapping_add(self.name_index.into())) % u32::BITS)
    }

    fn is_shared(&self) -> bool {
        self.uses > 1 || self.size() > INLINE_BYTES
    }

    fn write(&self, bytes: &mut Vec<u8>) {
        let end = bytes.len() + self.size();
        let entry = XattrEntry {
            name_len: u8::try_from(self.name.len()).unwrap_or(u8::MAX),
            name_index: self.name_index,
            value_size: u16::try_from(self.value.len()).unwrap_or(u16::MAX).into(),
        };
        bytes.extend_from_slice(entry.as_bytes());
        bytes.extend_from_slice(self.name);
        bytes.extend_from_slice(self.value);
        bytes.resize(end, 0);
    }
}

/// The attributes of a layer's files, as far as EROFS has them.
#[derive(Debug)]
pub(crate) struct Attributes<'a> {
    distinct: Vec<Attribute<'a>>,
    /// Positions in `distinct`, file by file.
    of_files: Vec<u32>,
    /// Where each file's begin in `of_files`, by inode number; and the end.
    first: Vec<usize>,
}

impl<'a> Attributes<'a> {
    /// Collects the attributes of all files.
    pub(crate) fn of<B: AsRef<[u8]>>(index: &'a LayerIndex<B>) -> Result<Self, ImageError> {
        let mut attributes = Self {
            distinct: Vec::new(),
            of_files: Vec::new(),
            first: vec![0, 0],
        };
        // An index has the bytes of equal names and values once, so where they are says which they are. Hashing values
        // of 64 KiB for each of a million files that share them would take a made-up index's time, not ours.
        let mut known = HashMap::new();
        let mut seen = 0usize;
        for ino in 1..=u64::from(index.inode_count()) {
            let inode = index.inode(ino).ok_or(ImageError::Changed { ino })?;
            let xattrs = inode.xattrs();
            seen = seen.saturating_add(xattrs.len());
            if seen > MAX_ATTRIBUTES {
                return Err(ImageError::TooManyAttributes);
            }
            for (full_name, value) in xattrs {
                let Some((name_index, name)) = expressed(full_name) else {
                    continue;
                };
                if value.len() > usize::from(u16::MAX) {
                    return Err(ImageError::ValueTooLong {
                        path: shown(&index.path_of(ino)),
                        name: shown(full_name),
                        size: value.len(),
                    });
                }
                let key = (full_name.as_ptr(), full_name.len(), value.as_ptr(), value.len());
                let next = attributes.distinct.len();
                let at = *known.entry(key).or_insert(next);
                if at == next {
                    attributes.distinct.push(Attribute {
                        name_index,
                        name,
                        value,
                        uses: 0,
                        id: None,
                    });
                }
                let attribute = &mut attributes.distinct[at];
                attribute.uses = attribute.uses.saturating_add(1);
                // MAX_ATTRIBUTES bounds both.
                attributes
                    .of_files
                    .push(u32::try_from(at).map_err(|_| ImageError::TooManyAttributes)?);
            }
            attributes.first.push(attributes.of_files.len());
        }
        Ok(attributes)
    }

    /// Bytes of all shared attributes.
    pub(crate) fn shared_size(&self) -> usize {
        let shared = self.distinct.iter().filter(|attribute| attribute.is_shared());
        shared.map(Attribute::size).sum()
    }

    /// Gives the shared attributes their places from `start` on.
    pub(crate) fn place(&mut self, start: usize) -> Result<(), ImageError> {
        let mut at = start;
        for attribute in self.distinct.iter_mut().filter(|attribute| attribute.is_shared()) {
            attribute.id = Some(u32::try_from(at / XATTR_ALIGN).map_err(|_| ImageError::TooLarge)?);
            at += attribute.size();
        }
        Ok(())
    }

    /// The bytes of the shared attributes.
    pub(crate) fn shared_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.shared_size());
        for attribute in self.distinct.iter().filter(|attribute| attribute.is_shared()) {
            attribute.write(&mut bytes);
        }
        bytes
    }

    /// How many bytes the attributes of a file take behind its inode; 0 if it has none.
    pub(crate) fn size_of(&self, ino: u64) -> usize {
        let (shared, inline) = self.split(ino);
        let sizes = shared.map(|_| XATTR_ALIGN).chain(inline.map(Attribute::size));
        match sizes.sum() {
            0 => 0,
            size => size_of::<XattrHeader>() + size,
        }
    }

    /// What an inode whose attributes take `size` bytes says about them; `None` beyond what it can say.
    pub(crate) fn count_of(size: usize) -> Option<u16> {
        if size > MAX_INODE_BYTES {
            return None;
        }
        let units = size.saturating_sub(size_of::<XattrHeader>()) / XATTR_ALIGN;
        u16::try_from(if size == 0 { 0 } else { units + 1 }).ok()
    }

    /// Appends what stands behind a file's inode; the shared attributes have their places.
    pub(crate) fn write(&self, ino: u64, bytes: &mut Vec<u8>) {
        let (shared, inline) = self.split(ino);
        let present = shared
            .chain(inline)
            .fold(0, |bits, attribute| bits | attribute.filter_bit());
        let (shared, inline) = self.split(ino);
        let ids: Vec<u32> = shared.filter_map(|attribute| attribute.id).collect();
        let header = XattrHeader {
            name_filter: (!present).into(),
            shared_count: u8::try_from(ids.len()).unwrap_or(u8::MAX),
            reserved: [0; 7],
        };
        bytes.extend_from_slice(header.as_bytes());
        for id in ids {
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        for attribute in inline {
            attribute.write(bytes);
        }
    }

    /// The attributes of a file that it shares with others, and the others.
    fn split(
        &self,
        ino: u64,
    ) -> (
        impl Iterator<Item = &Attribute<'a>>,
        impl Iterator<Item = &Attribute<'a>>,
    ) {
        let at = usize::try_from(ino).unwrap_or(usize::MAX);
        let range = match (self.first.get(at), self.first.get(at.saturating_add(1))) {
            (Some(start), Some(end)) => *start..*end,
            _ => 0..0,
        };
        let of_file = self.of_files.get(range).unwrap_or_default();
        let attributes = move || of_file.iter().filter_map(|at| self.distinct.get(*at as usize));
        let shared = attributes().filter(|attribute| attribute.is_shared());
        // What is beyond the count of shared attributes is written once more for this file.
        let beyond = attributes().filter(|attribute| attribute.is_shared()).skip(MAX_SHARED);
        let inline = attributes().filter(|attribute| !attribute.is_shared()).chain(beyond);
        (shared.take(MAX_SHARED), inline)
    }
}

/// The prefix index and the rest of an attribute's name; `None` if EROFS has no such names, or the kernel never asks
/// for one.
fn expressed(name: &[u8]) -> Option<(u8, &[u8])> {
    const WHOLE: [(u8, &[u8]); 2] = [(2, b"system.posix_acl_access"), (3, b"system.posix_acl_default")];
    const PREFIXES: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    if let Some((index, _)) = WHOLE.iter().find(|(_, whole)| *whole == name) {
        return Some((*index, b""));
    }
    let (index, rest) = PREFIXES
        .iter()
        .find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)))?;
    (!rest.is_empty() && !rest.contains(&0)).then_some((index, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_split_at_the_prefixes_of_the_format() {
        assert_eq!(expressed(b"user.a.b"), Some((1, &b"a.b"[..])));
        assert_eq!(expressed(b"system.posix_acl_access"), Some((2, &b""[..])));
        assert_eq!(expressed(b"system.posix_acl_default"), Some((3, &b""[..])));
        assert_eq!(expressed(b"trusted.overlay.opaque"), Some((4, &b"overlay.opaque"[..])));
        assert_eq!(expressed(b"security.capability"), Some((6, &b"capability"[..])));
        for none in [
            &b"user."[..],
            b"user",
            b"system.other",
            b"system.posix_acl_access2",
            b"user.a\0b",
            b"",
            b"USER.a",
        ] {
            assert_eq!(expressed(none), None, "{}", String::from_utf8_lossy(none));
        }
    }

    #[test]
    fn counts_of_bytes_behind_an_inode() {
        assert_eq!(Attributes::count_of(0), Some(0));
        assert_eq!(Attributes::count_of(16), Some(2));
        assert_eq!(Attributes::count_of(MAX_INODE_BYTES), Some(u16::MAX));
        assert_eq!(Attributes::count_of(MAX_INODE_BYTES + 4), None);
        assert_eq!(MAX_INODE_BYTES, 262_148);
    }
}
