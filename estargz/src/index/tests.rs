use super::*;
use crate::toc::{EntryType, Toc, TocEntry};

const LAYOUT: BlobLayout = BlobLayout {
    blob_size: 1 << 30,
    toc_offset: 1 << 29,
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
