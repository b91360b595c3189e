//! First pass of a conversion: metadata into memory, contents into the spool, everything checked.

use std::io::Read;

use sha2::{Digest as _, Sha256};

use super::spool::Spool;
use super::{BuildError, MAX_METADATA_BYTES};
use crate::digest::Digest;
use crate::input::tar::{TarEntry, TarKind, TarReader, shown};
use crate::order::{Placed, Tree, clean};
use crate::toc::time::Timestamp;
use crate::toc::{
    MAX_DEPTH, MAX_ENTRIES, MAX_LINK_BYTES, MAX_XATTR_LIST_BYTES, MAX_XATTR_NAME_BYTES, MAX_XATTR_VALUE_BYTES,
    NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_TAR_NAME,
};

const READ_BYTES: usize = 256 << 10;
/// Device numbers have 12 bits of major and 20 of minor in Linux.
const MAX_DEVICE: (u64, u64) = (0xfff, 0xf_ffff);

/// An entry that brings content or metadata, in other words not a hard link.
#[derive(Debug)]
pub(super) struct Source {
    /// Its metadata; the name is in [`Placed`].
    pub(super) entry: TarEntry,
    /// Where its content begins in the spool.
    pub(super) content: u64,
    /// Digest of its content; `None` for all but regular files.
    pub(super) digest: Option<Digest>,
}

/// The layer as sequential extraction would leave it.
#[derive(Debug)]
pub(super) struct Scanned {
    pub(super) placed: Vec<Placed>,
    pub(super) sources: Vec<Source>,
}

/// Reads the whole stream.
pub(super) fn scan(tar: impl Read, spool: &mut Spool) -> Result<Scanned, BuildError> {
    let mut reader = TarReader::new(tar);
    let mut tree = Tree::default();
    let mut sources = Vec::new();
    let mut buf = vec![0; READ_BYTES];
    let mut metadata = 0;
    let mut count = 0;
    while let Some(mut entry) = reader.next_entry().map_err(BuildError::Tar)? {
        let path = clean(&entry.name).map_err(BuildError::Order)?;
        if is_ours(&path) {
            continue;
        }
        count += 1;
        metadata += metadata_size(&entry);
        if count > MAX_ENTRIES || metadata > MAX_METADATA_BYTES {
            return Err(BuildError::TooMuch {
                limit: MAX_ENTRIES,
                bytes: MAX_METADATA_BYTES,
            });
        }
        check(&entry, &path)?;
        let link = match entry.kind {
            TarKind::Hardlink => clean(&entry.link).map_err(BuildError::Order)?,
            _ => entry.link.clone(),
        };
        tree.add(&path, entry.kind, &link, sources.len())
            .map_err(BuildError::Order)?;
        if entry.kind == TarKind::Hardlink {
            continue;
        }
        drop_unreadable_owners(&mut entry);
        let content = spool.end();
        let mut hash = Sha256::new();
        loop {
            let read = reader.read_body(&mut buf).map_err(BuildError::Tar)?;
            if read == 0 {
                break;
            }
            hash.update(&buf[..read]);
            spool.append(&buf[..read]).map_err(BuildError::Spool)?;
        }
        entry.name = Vec::new();
        let digest = (entry.kind == TarKind::Regular).then(|| Digest::from_bytes(hash.finalize().into()));
        sources.push(Source { entry, content, digest });
    }
    reader.finish().map_err(BuildError::Tar)?;
    Ok(Scanned {
        placed: tree.finish().map_err(BuildError::Order)?,
        sources,
    })
}

/// Whether the input was an eStargz layer already and this is what made it one; it is made anew.
fn is_ours(path: &[u8]) -> bool {
    let first = path.split(|&b| b == b'/').next().unwrap_or_default();
    [TOC_TAR_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK]
        .iter()
        .any(|name| name.as_bytes() == first)
}

fn metadata_size(entry: &TarEntry) -> usize {
    let records = entry.xattrs.iter().chain(&entry.records);
    entry.name.len() + entry.link.len() + records.map(|(key, value)| key.len() + value.len()).sum::<usize>()
}

/// Names of owners are decoration (ids decide), so one that the TOC cannot hold is not worth failing for.
fn drop_unreadable_owners(entry: &mut TarEntry) {
    for owner in [&mut entry.user, &mut entry.group] {
        if std::str::from_utf8(owner).is_err() || owner.contains(&0) {
            owner.clear();
        }
    }
}

/// Refuses what the TOC cannot say or the kernel cannot have.
fn check(entry: &TarEntry, path: &[u8]) -> Result<(), BuildError> {
    let bad = |fault| {
        Err(BuildError::Entry {
            name: shown(&entry.name),
            fault,
        })
    };
    if std::str::from_utf8(path).is_err() {
        return bad("its name is not UTF-8, which the TOC cannot hold");
    }
    if path.iter().filter(|&&b| b == b'/').count() >= MAX_DEPTH {
        return bad("it lies more than 1024 directories deep");
    }
    match entry.kind {
        TarKind::Symlink | TarKind::Hardlink if entry.link.is_empty() => return bad("it is a link without a target"),
        TarKind::Symlink | TarKind::Hardlink => {}
        TarKind::Char | TarKind::Block if entry.device.0 > MAX_DEVICE.0 || entry.device.1 > MAX_DEVICE.1 => {
            return bad("its device number is out of range");
        }
        _ => {}
    }
    if std::str::from_utf8(&entry.link).is_err() {
        return bad("its link target is not UTF-8, which the TOC cannot hold");
    }
    if entry.link.contains(&0) || entry.link.len() > MAX_LINK_BYTES {
        return bad("its link target contains a NUL or is longer than 4095 bytes");
    }
    // The largest id is the "no change" of chown.
    if entry.uid >= u32::MAX.into() || entry.gid >= u32::MAX.into() {
        return bad("its owner or group is out of range");
    }
    if Timestamp::format_seconds(entry.mtime.seconds).is_none() {
        return bad("its modification time is outside the years 0 to 9999");
    }
    check_xattrs(entry).map_or_else(bad, Ok)
}

fn check_xattrs(entry: &TarEntry) -> Result<(), &'static str> {
    let mut list = 0;
    for (name, value) in &entry.xattrs {
        list += name.len() + 1;
        if std::str::from_utf8(name).is_err() {
            return Err("the name of an extended attribute is not UTF-8, which the TOC cannot hold");
        }
        if name.is_empty() || name.len() > MAX_XATTR_NAME_BYTES || value.len() > MAX_XATTR_VALUE_BYTES {
            return Err("an extended attribute has no name, one longer than 255 bytes, or a value larger than 64 KiB");
        }
    }
    if list > MAX_XATTR_LIST_BYTES {
        return Err("the names of its extended attributes take more than 64 KiB");
    }
    Ok(())
}
