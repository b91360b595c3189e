//! The TOC as it grows while a layer is written.

use std::collections::HashMap;

use super::emit::Item;
use crate::digest::Digest;
use crate::input::tar::TarKind;
use crate::toc::time::Timestamp;
use crate::toc::{EntryType, Toc, TocEntry, VERSION, encode_xattr};

/// Entries so far.
#[derive(Default)]
pub(super) struct Listing {
    entries: Vec<TocEntry>,
    users: HashMap<u64, String>,
    groups: HashMap<u64, String>,
}

impl Listing {
    /// Adds an entry, and its first chunk if it has content.
    pub(super) fn entry(&mut self, item: &Item<'_>, chunk_size: u64) {
        let tar = &item.source.entry;
        let device = matches!(item.kind, TarKind::Char | TarKind::Block);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let mut entry = TocEntry::new(item.name.clone(), kind(item.kind));
        entry.mod_time = rfc3339(tar.mtime.seconds, tar.mtime.nanos);
        entry.link_name.clone_from(&item.link);
        entry.mode = tar.mode.into();
        entry.uid = tar.uid;
        entry.gid = tar.gid;
        // As the reference writer has it: a name is written where an id first has it, readers remember.
        entry.user_name = if_new(&mut self.users, tar.uid, &tar.user);
        entry.group_name = if_new(&mut self.groups, tar.gid, &tar.group);
        if device {
            (entry.dev_major, entry.dev_minor) = tar.device;
        }
        if item.kind != TarKind::Hardlink {
            entry.xattrs = tar
                .xattrs
                .iter()
                .map(|(name, value)| (text(name), encode_xattr(value)))
                .collect();
        }
        if item.kind == TarKind::Regular {
            entry.size = tar.size;
            entry.digest = item.source.digest;
            entry.chunk_size = chunk_size;
            // What a chunk of several turns out to be is filled in by `place`.
            entry.chunk_digest = item.source.digest.filter(|_| tar.size > 0);
        }
        self.entries.push(entry);
    }

    /// Adds a further chunk of the entry before.
    pub(super) fn chunk(&mut self, item: &Item<'_>, offset: u64, size: u64) {
        let mut entry = TocEntry::new(item.name.clone(), EntryType::Chunk);
        entry.chunk_offset = offset;
        entry.chunk_size = size;
        self.entries.push(entry);
    }

    /// Position of the entry added last.
    pub(super) fn last(&self) -> usize {
        self.entries.len() - 1
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Where an entry's chunk came to lie, and its digest if it is not the file's.
    pub(super) fn place(&mut self, position: usize, offset: u64, digest: Option<Digest>) {
        let entry = &mut self.entries[position];
        entry.offset = offset;
        entry.chunk_digest = digest.or(entry.chunk_digest);
    }

    pub(super) fn finish(&mut self) -> Toc {
        Toc {
            version: VERSION,
            entries: std::mem::take(&mut self.entries),
        }
    }
}

fn kind(kind: TarKind) -> EntryType {
    match kind {
        TarKind::Directory => EntryType::Dir,
        TarKind::Regular => EntryType::Reg,
        TarKind::Symlink => EntryType::Symlink,
        TarKind::Hardlink => EntryType::Hardlink,
        TarKind::Char => EntryType::Char,
        TarKind::Block => EntryType::Block,
        TarKind::Fifo => EntryType::Fifo,
    }
}

fn if_new(known: &mut HashMap<u64, String>, id: u64, name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name).into_owned();
    if name.is_empty() || known.get(&id) == Some(&name) {
        return String::new();
    }
    known.insert(id, name.clone());
    name
}

/// RFC 3339 in UTC; with a fraction only where the tar has one, and empty for the epoch.
pub(crate) fn rfc3339(seconds: i64, nanos: u32) -> String {
    let whole = match seconds {
        0 if nanos > 0 => "1970-01-01T00:00:00Z".to_owned(),
        _ => Timestamp::format_seconds(seconds).expect("scan has checked the range"),
    };
    if nanos == 0 {
        return whole;
    }
    let fraction = format!("{nanos:09}");
    format!("{}.{}Z", whole.trim_end_matches('Z'), fraction.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_fraction_only_if_there_is_one() {
        for (seconds, nanos, text) in [
            (0, 0, ""),
            (0, 500_000_000, "1970-01-01T00:00:00.5Z"),
            (1_709_210_096, 0, "2024-02-29T12:34:56Z"),
            (1_709_210_096, 120, "2024-02-29T12:34:56.00000012Z"),
            (-1, 1, "1969-12-31T23:59:59.000000001Z"),
        ] {
            assert_eq!(rfc3339(seconds, nanos), text);
            let back = Timestamp::parse(text).unwrap();
            assert_eq!((back.seconds, back.nanoseconds), (seconds, nanos));
        }
    }
}
