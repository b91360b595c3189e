//! The rules of the tree and of chunks, one at a time, and what opening refuses.

use super::*;
use crate::toc::{EntryType, Toc, TocEntry};

const LAYOUT: BlobLayout = BlobLayout {
    blob_size: 1 << 30,
    toc_offset: 1 << 29,
    compression: Compression::Gzip,
};

fn entry(name: &str, kind: EntryType) -> TocEntry {
    TocEntry::new(name, kind)
}

fn dir(name: &str) -> TocEntry {
    TocEntry {
        mode: 0o755,
        ..entry(name, EntryType::Dir)
    }
}

/// A file of one chunk.
fn reg(name: &str, size: u64, offset: u64) -> TocEntry {
    TocEntry {
        size,
        offset,
        mode: 0o644,
        chunk_digest: Some(Digest::of(name)),
        ..entry(name, EntryType::Reg)
    }
}

fn link(name: &str, kind: EntryType, target: &str) -> TocEntry {
    TocEntry {
        link_name: target.into(),
        ..entry(name, kind)
    }
}

fn chunk(file_offset: u64, size: u64, offset: u64) -> TocEntry {
    TocEntry {
        chunk_offset: file_offset,
        chunk_size: size,
        offset,
        chunk_digest: Some(Digest::of(file_offset.to_le_bytes())),
        ..entry("ignored", EntryType::Chunk)
    }
}

fn toc(entries: impl Into<Vec<TocEntry>>) -> Toc {
    Toc {
        version: 1,
        entries: entries.into(),
    }
}

fn index_of(entries: impl Into<Vec<TocEntry>>) -> LayerIndex<Vec<u8>> {
    let bytes = build(&toc(entries), LAYOUT, Digest::of("toc")).unwrap();
    LayerIndex::open(bytes).unwrap()
}

fn fault_of(entries: impl Into<Vec<TocEntry>>) -> String {
    build(&toc(entries), LAYOUT, Digest::of("toc")).unwrap_err().to_string()
}

/// The whole tree as text: path, inode number, type letter, permissions, link count.
fn listing<B: AsRef<[u8]>>(index: &LayerIndex<B>) -> Vec<String> {
    let mut lines = Vec::new();
    let mut stack = vec![(String::new(), ROOT_INO)];
    while let Some((path, ino)) = stack.pop() {
        let inode = index.inode(ino).unwrap();
        let letter = match inode.kind {
            FileKind::Directory => 'd',
            FileKind::Regular => 'f',
            FileKind::Symlink => 'l',
            FileKind::CharDevice => 'c',
            FileKind::BlockDevice => 'b',
            FileKind::Fifo => 'p',
        };
        lines.push(format!("{path}/ {ino} {letter}{:o} {}", inode.mode, inode.nlink));
        for entry in index.entries(ino, 0) {
            let name = String::from_utf8(entry.name.to_vec()).unwrap();
            assert_eq!(index.lookup(ino, entry.name), Some(entry.ino));
            assert_eq!(index.inode(entry.ino).unwrap().kind, entry.kind);
            stack.push((format!("{path}/{name}"), entry.ino));
        }
    }
    lines.sort();
    lines
}

#[test]
fn an_empty_toc_is_an_empty_root() {
    let index = index_of([]);
    assert_eq!(listing(&index), ["/ 1 d755 2"]);
    assert_eq!(
        (
            index.inode_count(),
            index.chunk_count(),
            index.member_count(),
            index.data_size()
        ),
        (1, 0, 0, 0)
    );
    assert_eq!(
        (index.toc_digest(), index.blob_size(), index.toc_offset()),
        (Digest::of("toc"), 1 << 30, 1 << 29)
    );
    assert_eq!(index.prefetch_end(), None);
    assert_eq!(index.path_of(1), b"/");
    assert_eq!(index.path_of(2), b"");
    assert!(index.inode(0).is_none() && index.inode(2).is_none() && index.inode(u64::MAX).is_none());
    assert!(index.chunk(0).is_none() && index.member(0).is_none());
}

#[test]
fn numbers_follow_the_toc_and_implied_directories_come_last() {
    let index = index_of([
        reg("usr/bin/tool", 3, 600),
        dir("etc/"),
        reg("./etc/hosts", 0, 0),
        dir("./"),
        dir("var"),
    ]);
    assert_eq!(
        listing(&index),
        [
            "/ 1 d755 5",
            "/etc/ 3 d755 2",
            "/etc/hosts/ 4 f644 1",
            "/usr/ 6 d755 3",
            "/usr/bin/ 7 d755 2",
            "/usr/bin/tool/ 2 f644 1",
            "/var/ 5 d755 2",
        ]
    );
    assert_eq!(index.path_of(2), b"/usr/bin/tool");
    assert_eq!(index.inode(7).unwrap().parent, 6);
    assert_eq!(index.lookup(1, b"usr"), Some(6));
    assert_eq!(index.lookup(1, b"us"), None);
    assert_eq!(index.lookup(2, b"x"), None, "a file has no entries");
    let names: Vec<_> = index.entries(1, 1).map(|entry| entry.name).collect();
    assert_eq!(names, [b"usr", b"var"]);
    assert_eq!(
        index.entries(1, 9).len() + index.entries(2, 0).len() + index.entries(99, 0).len(),
        0
    );
}

#[test]
fn attributes_are_kept() {
    let mut file = reg("f", 5, 512);
    file.mode = 0o104_755;
    (file.uid, file.gid) = (1000, u64::from(u32::MAX));
    file.mod_time = "1969-12-31T23:59:58.25Z".into();
    file.xattrs.insert("user.b".into(), "AP8=".into());
    file.xattrs.insert("security.capability".into(), String::new());
    let device = TocEntry {
        dev_major: 4095,
        dev_minor: 1_048_575,
        mode: 0o600,
        ..entry("dev", EntryType::Block)
    };
    let index = index_of([
        file,
        device,
        link("s", EntryType::Symlink, "/some/where"),
        entry("p", EntryType::Fifo),
    ]);
    let file = index.inode(2).unwrap();
    assert_eq!((file.mode, file.uid, file.gid, file.size), (0o4755, 1000, u32::MAX, 5));
    assert_eq!((file.mtime_sec, file.mtime_nsec), (-2, 250_000_000));
    let xattrs: Vec<_> = file.xattrs().collect();
    assert_eq!(
        xattrs,
        [(&b"security.capability"[..], &b""[..]), (b"user.b", &[0, 0xff])]
    );
    assert_eq!(file.symlink_target(), None);
    assert_eq!(index.inode(3).unwrap().rdev, (4095, 1_048_575));
    let symlink = index.inode(4).unwrap();
    assert_eq!(
        (symlink.symlink_target(), symlink.size),
        (Some(&b"/some/where"[..]), 11)
    );
    assert_eq!(index.inode(5).unwrap().kind, FileKind::Fifo);
}

#[test]
fn later_duplicates_win_and_directories_keep_their_files() {
    let index = index_of([
        dir("d"),
        reg("d/f", 100, 700),
        reg("x", 10, 800),
        TocEntry {
            mode: 0o700,
            ..dir("./d/")
        },
        link("x", EntryType::Symlink, "d"),
        TocEntry {
            mode: 0o711,
            ..dir("/")
        },
    ]);
    assert_eq!(
        listing(&index),
        ["/ 1 d711 3", "/d/ 3 d700 2", "/d/f/ 2 f644 1", "/x/ 4 l777 1"]
    );
    assert_eq!(index.chunk_count(), 1, "the replaced file's chunk is gone");
    assert_eq!(
        index.member(0).unwrap().end,
        800,
        "its member still ends the one before"
    );
}

#[test]
fn hard_links_share_an_inode_in_any_order_and_through_chains() {
    let index = index_of([
        link("a", EntryType::Hardlink, "./b"),
        link("d/b2", EntryType::Hardlink, "/c"),
        link("b", EntryType::Hardlink, "c"),
        reg("c", 9, 600),
        link("s", EntryType::Symlink, "nowhere"),
        link("s2", EntryType::Hardlink, "s"),
    ]);
    assert_eq!(
        listing(&index),
        [
            "/ 1 d755 3",
            "/a/ 2 f644 4",
            "/b/ 2 f644 4",
            "/c/ 2 f644 4",
            "/d/ 4 d755 2",
            "/d/b2/ 2 f644 4",
            "/s/ 3 l777 2",
            "/s2/ 3 l777 2"
        ]
    );
    assert_eq!(index.path_of(2), b"/c");
    assert_eq!(index.inode_count(), 4);
}

#[test]
fn trusted_attributes_of_an_image_are_left_out() {
    let carries = |mut entry: TocEntry| {
        for name in ["opaque", "redirect", "metacopy", "origin"] {
            entry
                .xattrs
                .insert(format!("trusted.overlay.{name}"), "L2V0Yw==".into());
        }
        entry.xattrs.insert("trusted.other".into(), "AQ==".into());
        entry.xattrs.insert("trusted".into(), "AQ==".into());
        entry.xattrs.insert("user.trusted.overlay.opaque".into(), "AQ==".into());
        entry
    };
    let index = index_of([
        carries(dir("d")),
        carries(dir("o")),
        entry("o/.wh..wh..opq", EntryType::Reg),
        carries(reg("f", 5, 512)),
    ]);
    let kept: [(&[u8], &[u8]); 2] = [(b"trusted", &[1]), (b"user.trusted.overlay.opaque", &[1])];
    let xattrs = |ino| index.inode(ino).unwrap().xattrs().collect::<Vec<_>>();
    assert_eq!((xattrs(2), xattrs(4)), (kept.to_vec(), kept.to_vec()));
    // Our own mark is there, and says what the whiteout says.
    let opaque: (&[u8], &[u8]) = (b"trusted.overlay.opaque", b"y");
    assert_eq!(xattrs(3), [kept[0], opaque, kept[1]]);
    // What is left out must be well formed all the same.
    let mut damaged = dir("d");
    damaged.xattrs.insert("trusted.x".into(), "=".into());
    assert!(fault_of([damaged]).contains("trusted.x"));
}

#[test]
fn whiteouts_become_devices_and_opaque_marks_attributes() {
    let index = index_of([
        entry("d/.wh.gone", EntryType::Reg),
        entry("d/.wh.gone", EntryType::Reg),
        entry(".wh.kept", EntryType::Reg),
        reg("kept/file", 1, 600),
        entry("o/.wh..wh..opq", EntryType::Reg),
        entry(".wh..wh..opq", EntryType::Reg),
        entry(".wh..wh.plnk/7.8", EntryType::Reg),
        entry(".wh..wh.aufs", EntryType::Reg),
        entry("d/.wh.dir/inside", EntryType::Reg),
    ]);
    assert_eq!(
        listing(&index),
        [
            "/ 1 d755 5",
            "/d/ 4 d755 3",
            "/d/gone/ 2 c0 1",
            "/kept/ 5 d755 2",
            "/kept/file/ 3 f644 1",
            "/o/ 6 d755 2"
        ]
        .map(|line| line.replace("/d/ 4 d755 3", "/d/ 4 d755 2"))
    );
    assert_eq!(index.inode(2).unwrap().rdev, (0, 0));
    for ino in [1, 6] {
        let xattrs: Vec<_> = index.inode(ino).unwrap().xattrs().collect();
        assert_eq!(xattrs, [(&b"trusted.overlay.opaque"[..], &b"y"[..])], "inode {ino}");
    }
    assert_eq!(index.inode(4).unwrap().xattrs().len(), 0);
    assert_eq!(index.lookup(4, b".wh.gone"), None);
}

#[test]
fn names_of_the_format_are_hidden_in_the_root_only() {
    let index = index_of([
        reg("a/first", 100, 600),
        reg(".prefetch.landmark", 1, 700),
        reg("a/.prefetch.landmark", 1, 800),
        reg("./.no.prefetch.landmark", 1, 900),
        reg("stargz.index.json", 1, 1000),
    ]);
    assert_eq!(
        listing(&index),
        [
            "/ 1 d755 3",
            "/a/ 4 d755 2",
            "/a/.prefetch.landmark/ 3 f644 1",
            "/a/first/ 2 f644 1"
        ]
    );
    assert_eq!(index.prefetch_end(), Some(700));
    assert_eq!(
        (
            index.member_count(),
            index.member(0).unwrap().end,
            index.member(1).unwrap().end
        ),
        (2, 700, 900)
    );
    assert_eq!(index_of([reg(".no.prefetch.landmark", 1, 900)]).prefetch_end(), None);
}

#[test]
fn chunks_tile_files_and_extents_are_aligned() {
    let mut big = reg("big", 10_000, 1000);
    big.chunk_size = 4000;
    let index = index_of([
        reg("small", 1, 600),
        big,
        // As some writers do, out of order, with the name of another file, the last one without a size.
        chunk(8000, 0, 3000),
        chunk(4000, 4000, 2000),
        reg("empty", 0, 0),
        reg("last", 4096, 4000),
    ]);
    let big = index.inode(3).unwrap();
    assert_eq!(
        (big.chunks.clone(), big.data_offset, index.data_size()),
        (1..4, 4096, 4096 + 12_288 + 4096)
    );
    let ranges: Vec<_> = (0..5)
        .map(|id| index.chunk(id).unwrap())
        .map(|c| (c.ino, c.file_offset, c.data_offset, c.size))
        .collect();
    assert_eq!(
        ranges,
        [
            (2, 0, 0, 1),
            (3, 0, 4096, 4000),
            (3, 4000, 8096, 4000),
            (3, 8000, 12_096, 2000),
            (5, 0, 16_384, 4096)
        ]
    );
    for (range, want) in [
        (0..1, 1..2),
        (0..4000, 1..2),
        (3999..4001, 1..3),
        (4000..4001, 2..3),
        (0..10_000, 1..4),
        (9999..u64::MAX, 3..4),
        (10_000..20_000, 4..4),
        (5..5, 1..1),
    ] {
        assert_eq!(index.chunks_in(3, range.clone()), want, "{range:?}");
    }
    for (range, want) in [
        (0..1, 0..1),
        (0..4096, 0..1),
        (1..4096, 1..1),
        (1..4097, 1..2),
        (8000..8097, 1..3),
        (4096..20_480, 1..5),
        (15_000..16_384, 4..4),
        (20_479..99_999, 4..5),
        (20_480..99_999, 5..5),
        (7..7, 0..0),
    ] {
        assert_eq!(index.chunks_at(range.clone()), want, "{range:?} of the data");
    }
    assert!(
        index.chunks_in(4, 0..1).is_empty()
            && index.chunks_in(1, 0..1).is_empty()
            && index.chunks_in(77, 0..1).is_empty()
    );
    let members: Vec<_> = (0..5)
        .map(|id| index.member(id).unwrap())
        .map(|m| (m.start, m.end, m.chunks))
        .collect();
    assert_eq!(
        members,
        [
            (600, 1000, 0..1),
            (1000, 2000, 1..2),
            (2000, 3000, 2..3),
            (3000, 4000, 3..4),
            (4000, 1 << 29, 4..5)
        ]
    );
    assert_eq!(index.chunk(2).unwrap().digest, Digest::of(4000u64.to_le_bytes()));
}

#[test]
fn members_may_hold_several_chunks() {
    let inner = |name: &str, size, offset, inner_offset| TocEntry {
        inner_offset,
        ..reg(name, size, offset)
    };
    let index = index_of([
        inner("a", 10, 0, 512),
        inner("b", 10, 0, 1536),
        reg("c", 10, 300),
        inner("d", 10, 300, 1024),
    ]);
    let members: Vec<_> = (0..2)
        .map(|id| index.member(id).unwrap())
        .map(|m| (m.start, m.end, m.chunks))
        .collect();
    assert_eq!(members, [(0, 300, 0..2), (300, 1 << 29, 2..4)]);
    let places: Vec<_> = (0..4)
        .map(|id| index.chunk(id).unwrap())
        .map(|c| (c.member, c.inner_offset))
        .collect();
    assert_eq!(places, [(0, 512), (0, 1536), (1, 0), (1, 1024)]);
}

#[test]
fn the_digest_of_a_file_serves_its_only_chunk() {
    let mut file = reg("f", 8, 600);
    file.chunk_digest = None;
    file.digest = Some(Digest::of("whole"));
    assert_eq!(index_of([file.clone()]).chunk(0).unwrap().digest, Digest::of("whole"));
    file.chunk_size = 4;
    assert_eq!(
        fault_of([file, chunk(4, 4, 700)]),
        "entry 0 of the TOC (\"f\"): no chunk digest for the chunk at file offset 0"
    );
    // A legacy layer has no digests at all.
    let legacy = TocEntry {
        chunk_digest: None,
        ..reg("f", 8, 600)
    };
    assert_eq!(
        fault_of([legacy]),
        "entry 0 of the TOC (\"f\"): no chunk digest for the chunk at file offset 0"
    );
}

#[test]
fn trees_that_cannot_be() {
    let long = "n".repeat(256);
    let deep = "d/".repeat(1025);
    for (entries, want) in [
        (
            vec![reg("", 0, 0)],
            "entry 0 of the TOC (\"\"): the root of the layer is not a directory",
        ),
        (
            vec![reg("a/b", 1, 600), reg("a", 1, 700)],
            "entry 0 of the TOC (\"a/b\"): its parent \"a\" (entry 1) is not a directory",
        ),
        (
            vec![link("l", EntryType::Symlink, "d"), reg("l/x/y", 1, 7)],
            "entry 1 of the TOC (\"l/x/y\"): its parent \"l\" (entry 0) is not a directory",
        ),
        (
            vec![reg("a", 1, 7), entry("a/.wh..wh..opq", EntryType::Reg)],
            "entry 1 of the TOC (\"a/.wh..wh..opq\"): its parent \"a\" (entry 0) is not a directory",
        ),
        (
            vec![reg("a", 1, 7), entry("a/.wh.x", EntryType::Reg)],
            "entry 1 of the TOC (\"a/.wh.x\"): its parent \"a\" (entry 0) is not a directory",
        ),
        (
            vec![link("h", EntryType::Hardlink, "r"), reg("r", 0, 0), dir("h/d")],
            "entry 2 of the TOC (\"h/d\"): its parent \"h\" (entry 0) is not a directory",
        ),
        (
            vec![dir(&long)],
            "fault: a name in the path has 256 bytes, the limit is 255",
        ),
        (
            vec![dir(&deep)],
            "fault: the path has 1025 components, the limit is 1024",
        ),
        (
            vec![dir("a\0b")],
            "entry 0 of the TOC (\"a\\0b\"): name contains a NUL byte",
        ),
        (
            vec![entry("d/.wh.", EntryType::Reg)],
            "entry 0 of the TOC (\"d/.wh.\"): the whiteout names no file that could be removed",
        ),
        (
            vec![entry("d/.wh...", EntryType::Reg)],
            "entry 0 of the TOC (\"d/.wh...\"): the whiteout names no file that could be removed",
        ),
        (
            vec![link("h", EntryType::Hardlink, "x")],
            "entry 0 of the TOC (\"h\"): hard link to \"x\", which is not in the layer",
        ),
        (
            vec![entry(".wh.x", EntryType::Reg), link("h", EntryType::Hardlink, "x")],
            "entry 1 of the TOC (\"h\"): hard link to \"x\", which is not in the layer",
        ),
        (
            vec![link("h", EntryType::Hardlink, "h")],
            "entry 0 of the TOC (\"h\"): hard link to \"h\", which leads back to itself",
        ),
        (
            vec![
                link("a", EntryType::Hardlink, "b"),
                link("b", EntryType::Hardlink, "c"),
                link("c", EntryType::Hardlink, "a"),
            ],
            "entry 2 of the TOC (\"c\"): hard link to \"a\", which leads back to itself",
        ),
        (
            vec![dir("d"), link("h", EntryType::Hardlink, "d/")],
            "entry 1 of the TOC (\"h\"): hard link to \"d/\", which is a directory",
        ),
        (
            vec![link("h", EntryType::Hardlink, "..")],
            "entry 0 of the TOC (\"h\"): hard link to \"..\", which is a directory",
        ),
        (
            vec![link("s", EntryType::Symlink, "")],
            "entry 0 of the TOC (\"s\"): symbolic link with a target of 0 bytes, 1 to 4095 are possible",
        ),
        (
            vec![link("s", EntryType::Symlink, "a\0")],
            "entry 0 of the TOC (\"s\"): linkName contains a NUL byte",
        ),
        (
            vec![TocEntry {
                uid: 1 << 32,
                ..dir("d")
            }],
            "entry 0 of the TOC (\"d\"): uid is 4294967296, the limit is 4294967295",
        ),
        (
            vec![TocEntry {
                dev_major: 4096,
                ..entry("c", EntryType::Char)
            }],
            "entry 0 of the TOC (\"c\"): devMajor is 4096, the limit is 4095",
        ),
        (
            vec![TocEntry {
                mod_time: "now".into(),
                ..dir("d")
            }],
            "entry 0 of the TOC (\"d\"): modtime \"now\" is not an RFC 3339 time",
        ),
        (
            vec![TocEntry {
                xattrs: [("user.x".into(), "=".into())].into(),
                ..dir("d")
            }],
            "entry 0 of the TOC (\"d\"): extended attribute \"user.x\" has no name, or a value that is not base64 of at most 65536 bytes",
        ),
    ] {
        let fault = fault_of(entries);
        assert!(
            fault == want || want.strip_prefix("fault").is_some_and(|end| fault.ends_with(end)),
            "{fault}\n{want}"
        );
    }
}

#[test]
fn chunks_that_cannot_be() {
    let toc_offset = LAYOUT.toc_offset;
    let sized = |chunk_size| TocEntry {
        chunk_size,
        ..reg("f", 100, 600)
    };
    let inner = |name: &str, offset, inner_offset| TocEntry {
        inner_offset,
        ..reg(name, 10, offset)
    };
    for (entries, want) in [
        (
            vec![chunk(0, 1, 600)],
            "entry 0 of the TOC (\"ignored\"): a chunk must follow the regular file it belongs to",
        ),
        (
            vec![dir("d"), chunk(0, 1, 600)],
            "entry 1 of the TOC (\"ignored\"): a chunk must follow the regular file it belongs to",
        ),
        (
            vec![sized(40), chunk(50, 50, 700)],
            "entry 1 of the TOC (\"ignored\"): the chunk at file offset 50 should begin at 40: the file's chunks leave a gap or overlap",
        ),
        (
            vec![sized(40), chunk(30, 70, 700)],
            "entry 1 of the TOC (\"ignored\"): the chunk at file offset 30 should begin at 40: the file's chunks leave a gap or overlap",
        ),
        (
            vec![sized(0), chunk(30, 70, 700)],
            "entry 1 of the TOC (\"ignored\"): the chunk at file offset 30 should begin at 100: the file's chunks leave a gap or overlap",
        ),
        (
            vec![sized(40), chunk(40, 61, 700)],
            "entry 1 of the TOC (\"ignored\"): the chunk at file offset 40 has 61 bytes, but the file has 100",
        ),
        (
            vec![sized(40), chunk(40, u64::MAX, 700)],
            "entry 1 of the TOC (\"ignored\"): the chunk at file offset 40 has 18446744073709551615 bytes, but the file has 100",
        ),
        (
            vec![sized(101)],
            "entry 0 of the TOC (\"f\"): the chunk at file offset 0 has 101 bytes, but the file has 100",
        ),
        (
            vec![sized(100), chunk(100, 0, 700)],
            "entry 1 of the TOC (\"ignored\"): the chunk at file offset 100 has 0 bytes, but the file has 100",
        ),
        (
            vec![reg("e", 0, 0), chunk(0, 0, 700)],
            "entry 0 of the TOC (\"e\"): the chunk at file offset 0 has 0 bytes, but the file has 0",
        ),
        (
            vec![sized(40)],
            "entry 0 of the TOC (\"f\"): the file's chunks end at 40, but the file has 100 bytes",
        ),
        (
            vec![reg("f", (64 << 20) + 1, 600)],
            "entry 0 of the TOC (\"f\"): the chunk at file offset 0 has 67108865 bytes, the limit is 67108864",
        ),
        (
            vec![reg("f", 1, toc_offset)],
            "entry 0 of the TOC (\"f\"): offset 536870912 is not before the TOC at 536870912",
        ),
        (
            vec![reg("f", 1, u64::MAX)],
            "entry 0 of the TOC (\"f\"): offset 18446744073709551615 is not before the TOC at 536870912",
        ),
        (
            vec![inner("f", 600, u64::MAX)],
            "entry 0 of the TOC (\"f\"): the chunk ends 18446744073709551615 bytes into its member, the limit is 134217728",
        ),
        (
            vec![reg("a", 1033, 600), reg("b", 1, 601)],
            "entry 0 of the TOC (\"a\"): the chunk ends 1033 bytes into a member of 1 compressed bytes, which cannot hold that much",
        ),
        (
            vec![reg("a", 10, 600), reg("b", 10, 500), inner("c", 600, 20)],
            "entry 2 of the TOC (\"c\"): the member at offset 600 also holds chunks of files that are not next to this one in the TOC",
        ),
        (
            vec![reg(".prefetch.landmark", 1, toc_offset)],
            "entry 0 of the TOC (\".prefetch.landmark\"): offset 536870912 is not before the TOC at 536870912",
        ),
    ] {
        assert_eq!(fault_of(entries), want);
    }
    let outside = BlobLayout {
        compression: Compression::Gzip,
        blob_size: 10,
        toc_offset: 10,
    };
    let error = build(&toc([]), outside, Digest::of("")).unwrap_err();
    assert_eq!(error.to_string(), "the TOC at 10 does not lie in the blob of 10 bytes");
}

#[test]
fn what_a_toc_may_imply_is_bounded() {
    let deep = "/d".repeat(1000);
    let entries: Vec<_> = (0..2200)
        .map(|n| entry(&format!("{n}{deep}"), EntryType::Fifo))
        .collect();
    assert!(fault_of(entries).starts_with("the TOC has more than 2097152 files and directories"));
}

/// A small layer with every kind of record.
fn sample() -> Vec<u8> {
    let mut file = reg("d/f", 100, 600);
    file.chunk_size = 60;
    file.xattrs.insert("user.a".into(), "AQ==".into());
    let entries = [
        dir("d"),
        file,
        chunk(60, 40, 700),
        link("s", EntryType::Symlink, "d/f"),
        link("d/h", EntryType::Hardlink, "d/f"),
    ];
    build(&toc(entries), LAYOUT, Digest::of("toc")).unwrap()
}

#[test]
fn building_is_deterministic() {
    assert_eq!(sample(), sample());
}

#[test]
fn other_files_and_damage_are_told_apart() {
    let bytes = sample();
    let fault = |bytes: &[u8]| LayerIndex::open(bytes).map(|_| ()).unwrap_err().to_string();
    assert_eq!(fault(b""), "not an index file: fewer bytes than a header has");
    assert_eq!(fault(&[0; 400]), "not an index file: another file's first bytes");
    let mut other = bytes.clone();
    other[8] = 3;
    assert_eq!(
        fault(&other),
        "the index file has format id 3, this version reads 1 and 2"
    );
    let size = bytes.len();
    assert_eq!(
        fault(&bytes[..size - 1]),
        format!(
            "the index file of {} bytes is damaged: another file size at header field 3",
            size - 1
        )
    );
    for at in 16..size {
        let mut flipped = bytes.clone();
        flipped[at] ^= 1 << (at % 8);
        let fault = fault(&flipped);
        assert!(
            fault.contains("another checksum") || fault.contains("another file size"),
            "byte {at}: {fault}"
        );
    }
}
