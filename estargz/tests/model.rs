//! Arbitrary layers against a model: the same rules said a second time, in the plainest form (whole paths in sorted
//! maps, every question answered by a search), compared with what the index says.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::{BTreeMap, BTreeSet};

use estargz::digest::Digest;
use estargz::index::{self, BlobLayout, FileKind, LayerIndex, ROOT_INO};
use estargz::member::Compression;
use estargz::toc::{EntryType, Toc, TocEntry};
use proptest::prelude::*;

const LAYOUT: BlobLayout = BlobLayout {
    blob_size: 1 << 24,
    toc_offset: 1 << 23,
    compression: Compression::Gzip,
};
const CHUNK: u64 = 100;

/// A path as a model sees it: its names, joined; the root is empty.
type Path = String;

/// What both sides have to agree on about one path.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    kind: FileKind,
    mode: u32,
    nlink: u32,
    size: u64,
    target: Option<String>,
    opaque: bool,
    /// Digests of the chunks in file order.
    chunks: Vec<Digest>,
    /// All paths of the same inode.
    names: BTreeSet<Path>,
}

fn path_text() -> impl Strategy<Value = String> {
    let name = prop_oneof![
        6 => Just("a"), 6 => Just("b"), 3 => Just("c"), 1 => Just(".wh.a"), 1 => Just(".wh.b"), 1 => Just(".wh..wh..opq"),
        1 => Just(".wh..wh.plnk"), 1 => Just(".prefetch.landmark"),
    ];
    let prefix = prop_oneof![4 => Just(""), 1 => Just("./"), 1 => Just("/"), 1 => Just("a/../"), 1 => Just("../")];
    let suffix = prop_oneof![4 => Just(""), 1 => Just("/"), 1 => Just("/.")];
    (prefix, prop::collection::vec(name, 1..4), suffix)
        .prop_map(|(prefix, names, suffix)| format!("{prefix}{}{suffix}", names.join("/")))
}

/// An entry without its place in the blob, and in how many chunks it is cut.
fn entry() -> impl Strategy<Value = (TocEntry, u64)> {
    let kind = prop_oneof![
        5 => Just(EntryType::Dir), 5 => Just(EntryType::Reg), 2 => Just(EntryType::Symlink), 3 => Just(EntryType::Hardlink),
        1 => Just(EntryType::Fifo), 1 => Just(EntryType::Char),
    ];
    let name = prop_oneof![12 => path_text(), 1 => Just("./".to_owned())];
    (name, kind, path_text(), 0..0o10_000u64, 0..4u64, 1..=CHUNK).prop_map(
        |(name, kind, target, mode, chunks, tail)| {
            let mut entry = TocEntry {
                mode,
                dev_major: 1,
                ..TocEntry::new(name, kind)
            };
            if matches!(kind, EntryType::Symlink | EntryType::Hardlink) {
                entry.link_name = target;
            }
            if kind == EntryType::Reg && chunks > 0 {
                entry.size = (chunks - 1) * CHUNK + tail;
            }
            (entry, chunks)
        },
    )
}

/// Gives every chunk a member and a digest of its own.
fn placed(entries: Vec<(TocEntry, u64)>) -> Toc {
    let mut toc = Toc {
        version: 1,
        entries: Vec::new(),
    };
    let mut offset = 50;
    for (mut file, chunks) in entries {
        let mut next = || {
            offset += 100;
            (offset, Some(Digest::of(u64::to_le_bytes(offset))))
        };
        let cut = file.kind == EntryType::Reg && file.size > 0;
        let (size, name) = (file.size, file.name.clone());
        if cut {
            (file.offset, file.chunk_digest) = next();
            file.chunk_size = if size > CHUNK { CHUNK } else { 0 };
        }
        toc.entries.push(file);
        for at in 1..if cut { chunks } else { 0 } {
            let (offset, chunk_digest) = next();
            let chunk_size = if at + 1 == chunks { 0 } else { CHUNK };
            let chunk = TocEntry::new(name.clone(), EntryType::Chunk);
            toc.entries.push(TocEntry {
                offset,
                chunk_digest,
                chunk_size,
                chunk_offset: at * CHUNK,
                ..chunk
            });
        }
    }
    toc
}

fn cleaned(text: &str) -> Path {
    let mut names: Vec<&str> = Vec::new();
    for name in text.split('/').filter(|name| !name.is_empty() && *name != ".") {
        if name == ".." {
            names.truncate(names.len().saturating_sub(1))
        } else {
            names.push(name)
        }
    }
    names.join("/")
}

fn parent_of(path: &str) -> Path {
    path.rsplit_once('/')
        .map_or(String::new(), |(parent, _)| parent.to_owned())
}

/// The plain form of the rules. `None`: the layer has to be refused.
fn modelled(toc: &Toc) -> Option<BTreeMap<Path, Seen>> {
    let mut described: BTreeMap<Path, Option<usize>> = BTreeMap::from([(String::new(), None)]);
    let mut parents: BTreeSet<Path> = BTreeSet::new();
    let mut opaque: BTreeSet<Path> = BTreeSet::new();
    let mut removed: BTreeSet<Path> = BTreeSet::new();
    for (at, entry) in toc.entries.iter().enumerate() {
        let path = cleaned(&entry.name);
        let names: Vec<&str> = path.split('/').collect();
        let (base, above) = names.split_last()?;
        if entry.kind == EntryType::Chunk
            || names[0] == ".prefetch.landmark"
            || above.iter().any(|name| name.starts_with(".wh."))
        {
            continue;
        }
        let parent = parent_of(&path);
        for end in 1..=above.len() {
            parents.insert(above[..end].join("/"));
        }
        let joined = |name: &str| {
            if parent.is_empty() {
                name.to_owned()
            } else {
                format!("{parent}/{name}")
            }
        };
        match *base {
            ".wh..wh..opq" => drop(opaque.insert(parent)),
            ".wh..wh.plnk" => {}
            _ if base.starts_with(".wh.") => drop(removed.insert(joined(&base[4..]))),
            _ => drop(described.insert(path.clone(), Some(at))),
        }
    }
    for parent in &parents {
        described.entry(parent.clone()).or_insert(None);
    }
    removed.retain(|path| !described.contains_key(path));
    let kind_of = |path: &str| {
        described
            .get(path)
            .map(|at| at.map_or(EntryType::Dir, |at| toc.entries[at].kind))
    };
    // Everything lies in directories.
    let holders = described
        .keys()
        .chain(&removed)
        .map(|path| parent_of(path))
        .chain(opaque.iter().cloned());
    for holder in holders {
        if kind_of(&holder)? != EntryType::Dir {
            return None;
        }
    }
    // Every path ends at a path that is no hard link.
    let mut ends: BTreeMap<Path, Path> = BTreeMap::new();
    for path in described.keys() {
        let mut end = path.clone();
        for step in 0.. {
            match kind_of(&end)? {
                EntryType::Hardlink if step > described.len() => return None,
                EntryType::Hardlink => end = cleaned(&toc.entries[described[&end]?].link_name),
                EntryType::Dir if step > 0 => return None,
                _ => break,
            }
        }
        ends.insert(path.clone(), end);
    }
    let mut seen = BTreeMap::new();
    for (path, end) in &ends {
        let names: BTreeSet<Path> = ends
            .iter()
            .filter(|(_, other)| *other == end)
            .map(|(path, _)| path.clone())
            .collect();
        let subdirs = described
            .keys()
            .filter(|p| !p.is_empty() && parent_of(p) == *path && kind_of(p) == Some(EntryType::Dir))
            .count();
        let entry = described[end].map(|at| (at, &toc.entries[at]));
        let kind = match kind_of(end)? {
            EntryType::Dir => FileKind::Directory,
            EntryType::Reg => FileKind::Regular,
            EntryType::Symlink => FileKind::Symlink,
            EntryType::Char => FileKind::CharDevice,
            _ => FileKind::Fifo,
        };
        let target = entry
            .filter(|_| kind == FileKind::Symlink)
            .map(|(_, entry)| entry.link_name.clone());
        let chunks = entry
            .filter(|(_, entry)| entry.size > 0)
            .map_or(Vec::new(), |(at, file)| {
                let more = toc.entries[at + 1..]
                    .iter()
                    .take_while(|entry| entry.kind == EntryType::Chunk);
                std::iter::once(file)
                    .chain(more)
                    .map(|chunk| chunk.chunk_digest.unwrap())
                    .collect()
            });
        let nlink = if kind == FileKind::Directory {
            2 + subdirs
        } else {
            names.len()
        };
        seen.insert(
            path.clone(),
            Seen {
                kind,
                // Linux gives every symbolic link these bits.
                mode: entry.map_or(0o755, |(_, entry)| match entry.kind {
                    EntryType::Symlink => 0o777,
                    _ => u32::try_from(entry.mode).unwrap(),
                }),
                nlink: u32::try_from(nlink).unwrap(),
                size: target
                    .as_ref()
                    .map_or(entry.map_or(0, |(_, entry)| entry.size), |target| target.len() as u64),
                target,
                opaque: opaque.contains(end),
                chunks,
                names,
            },
        );
    }
    for path in removed {
        let names = BTreeSet::from([path.clone()]);
        let gone = Seen {
            kind: FileKind::CharDevice,
            mode: 0,
            nlink: 1,
            size: 0,
            target: None,
            opaque: false,
            chunks: vec![],
            names,
        };
        seen.insert(path, gone);
    }
    Some(seen)
}

/// The same from the index.
fn indexed(index: &LayerIndex<Vec<u8>>) -> BTreeMap<Path, Seen> {
    let mut names: BTreeMap<u64, BTreeSet<Path>> = BTreeMap::from([(ROOT_INO, BTreeSet::from([String::new()]))]);
    let mut queue = vec![(String::new(), ROOT_INO)];
    while let Some((dir, ino)) = queue.pop() {
        for entry in index.entries(ino, 0) {
            let name = std::str::from_utf8(entry.name).unwrap();
            let path = if dir.is_empty() {
                name.to_owned()
            } else {
                format!("{dir}/{name}")
            };
            names.entry(entry.ino).or_default().insert(path.clone());
            if entry.kind == FileKind::Directory {
                assert_eq!(index.path_of(entry.ino), format!("/{path}").into_bytes());
                queue.push((path, entry.ino));
            }
        }
    }
    assert_eq!(names.len(), index.inode_count() as usize, "every inode has a name");
    let mut seen = BTreeMap::new();
    for (ino, names) in names {
        let inode = index.inode(ino).unwrap();
        let chunks = index
            .chunks_in(ino, 0..inode.size)
            .map(|id| index.chunk(id).unwrap().digest)
            .collect();
        let what = Seen {
            kind: inode.kind,
            mode: inode.mode,
            nlink: inode.nlink,
            size: inode.size,
            target: inode
                .symlink_target()
                .map(|target| String::from_utf8(target.to_vec()).unwrap()),
            opaque: inode.xattrs().any(|xattr| xattr == (b"trusted.overlay.opaque", b"y")),
            chunks,
            names: names.clone(),
        };
        seen.extend(names.into_iter().map(|path| (path, what.clone())));
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_index_agrees_with_the_model(entries in prop::collection::vec(entry(), 0..12)) {
        let toc = placed(entries);
        let toc = Toc::parse(&toc.to_json()).unwrap();
        match (index::build(&toc, LAYOUT, Digest::of("toc")), modelled(&toc)) {
            (Ok(bytes), Some(model)) => {
                prop_assert_eq!(&bytes, &index::build(&toc, LAYOUT, Digest::of("toc")).unwrap());
                prop_assert_eq!(indexed(&LayerIndex::open(bytes).unwrap()), model);
            }
            (Err(_), None) => {}
            (Ok(_), None) => prop_assert!(false, "accepted, but the model refuses it"),
            (Err(error), Some(_)) => prop_assert!(false, "refused: {}", error),
        }
    }
}
