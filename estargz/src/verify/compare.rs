//! Whether a tar entry and a TOC entry say the same.

use crate::input::tar::{TarEntry, TarKind};
use crate::toc::time::Timestamp;
use crate::toc::{EntryType, TocEntry, clean_path, decode_xattr};

/// The first thing in which the two differ, with both values.
pub(super) fn difference(tar: &TarEntry, toc: &TocEntry) -> Option<String> {
    let differ = |what: &str, tar: &dyn std::fmt::Debug, toc: &dyn std::fmt::Debug| {
        Some(format!("{what} is {tar:?} in the tar stream and {toc:?} in the TOC"))
    };
    let name = std::str::from_utf8(&tar.name);
    if name.map(clean_path) != Ok(clean_path(&toc.name)) {
        return differ("the name", &String::from_utf8_lossy(&tar.name), &toc.name);
    }
    if !same_kind(tar.kind, toc.kind) {
        return differ("the type", &tar.kind, &toc.kind);
    }
    if tar.link != toc.link_name.as_bytes() {
        return differ("the link target", &String::from_utf8_lossy(&tar.link), &toc.link_name);
    }
    for (what, in_tar, in_toc) in [
        ("the size", tar.size, toc.size),
        ("the mode", tar.mode.into(), toc.mode & 0o7777),
        ("the owner", tar.uid, toc.uid),
        ("the group", tar.gid, toc.gid),
        ("the device's major number", tar.device.0, toc.dev_major),
        ("the device's minor number", tar.device.1, toc.dev_minor),
    ] {
        if in_tar != in_toc {
            return differ(what, &in_tar, &in_toc);
        }
    }
    if !same_time(tar, toc) {
        return differ("the modification time", &tar.mtime.to_pax(), &toc.mod_time);
    }
    // All names of a file have the attributes of the entry that hard links point to.
    if tar.kind != TarKind::Hardlink && !same_xattrs(tar, toc) {
        let names: Vec<_> = tar
            .xattrs
            .iter()
            .map(|(name, _)| String::from_utf8_lossy(name))
            .collect();
        return differ(
            "the set of extended attributes",
            &names,
            &toc.xattrs.keys().collect::<Vec<_>>(),
        );
    }
    None
}

fn same_kind(tar: TarKind, toc: EntryType) -> bool {
    match tar {
        TarKind::Directory => toc == EntryType::Dir,
        TarKind::Regular => toc == EntryType::Reg,
        TarKind::Symlink => toc == EntryType::Symlink,
        TarKind::Hardlink => toc == EntryType::Hardlink,
        TarKind::Char => toc == EntryType::Char,
        TarKind::Block => toc == EntryType::Block,
        TarKind::Fifo => toc == EntryType::Fifo,
    }
}

/// The reference writer rounds to whole seconds, halves up; ours keeps fractions.
fn same_time(tar: &TarEntry, toc: &TocEntry) -> bool {
    let Some(toc) = Timestamp::parse(&toc.mod_time) else {
        return false;
    };
    let exact = (tar.mtime.seconds, tar.mtime.nanos);
    let rounded = (
        tar.mtime
            .seconds
            .saturating_add(i64::from(tar.mtime.nanos >= 500_000_000)),
        0,
    );
    [exact, rounded].contains(&(toc.seconds, toc.nanoseconds))
}

fn same_xattrs(tar: &TarEntry, toc: &TocEntry) -> bool {
    tar.xattrs.len() == toc.xattrs.len()
        && tar.xattrs.iter().all(|(name, value)| {
            let toc = std::str::from_utf8(name).ok().and_then(|name| toc.xattrs.get(name));
            toc.and_then(|text| decode_xattr(text)).as_ref() == Some(value)
        })
}
