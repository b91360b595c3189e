//! What a reader may do with bytes from outside, all of it: shared by the fuzz targets and by tests/hostile.rs.
//!
//! Each probe either returns or panics. A panic is a bug: the library must answer any bytes with a result or an error
//! that says something, and whatever it has accepted it must be able to walk to the end.

use estargz::digest::Digest;
use estargz::footer::{Footer, FooterKind, MAX_FOOTER_SIZE};
use estargz::index::{self, BlobLayout, FileKind, LayerIndex, ROOT_INO};
use estargz::member::{Compression, unfold};
use estargz::toc::{MAX_DEPTH, Toc, parse_frame, parse_member};

/// The text of an error with all its causes; it must say something.
fn explained(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    assert!(text.len() > 10, "{text:?} explains nothing");
    assert!(text.len() < 10_000, "{} bytes of message", text.len());
    text
}

/// The end of a blob. Returns whether it was accepted.
pub(crate) fn footer(tail: &[u8]) -> bool {
    for blob_size in [tail.len() as u64, 1 << 40] {
        match Footer::parse(tail, blob_size) {
            Ok(footer) => {
                let end = blob_size - footer.size;
                assert!(footer.toc_offset <= end && footer.size <= MAX_FOOTER_SIZE as u64);
                let inside =
                    |toc: std::ops::Range<u64>| !toc.is_empty() && toc.end <= end && toc.start >= footer.toc_offset;
                assert!(footer.toc.map_or(footer.kind == FooterKind::ExternalToc, inside));
            }
            Err(error) => drop(explained(&error)),
        }
    }
    Footer::parse(tail, tail.len() as u64).is_ok()
}

/// A TOC member. Returns whether it was accepted.
pub(crate) fn member(bytes: &[u8]) -> bool {
    match parse_member(bytes) {
        Ok(document) => {
            assert_eq!(document.digest, Digest::of(&document.json));
            toc(&document.json);
            true
        }
        Err(error) => {
            explained(&error);
            false
        }
    }
}

/// A frame: as a TOC, and as a member of which some bytes are wanted. Returns whether it was accepted as a TOC.
pub(crate) fn frame(bytes: &[u8]) -> bool {
    let mut unfolded = Vec::new();
    for want in [0, 1, bytes.len(), 3 * bytes.len(), 1 << 16] {
        match unfold(Compression::Zstd, bytes, want, &mut unfolded) {
            Ok(()) => assert_eq!(unfolded.len(), want),
            Err(error) => drop(explained(&error)),
        }
    }
    match parse_frame(bytes) {
        Ok(document) => {
            assert_eq!(document.digest, Digest::of(&document.json));
            assert_eq!(Toc::parse(&document.json).ok(), Toc::parse_verified(bytes).ok());
            toc(&document.json);
            true
        }
        Err(error) => {
            explained(&error);
            false
        }
    }
}

/// A TOC document: read, written again, made into an index, walked. Returns whether an index came out.
pub(crate) fn toc(json: &[u8]) -> bool {
    let toc = match Toc::parse(json) {
        Ok(toc) => toc,
        Err(error) => {
            explained(&error);
            return false;
        }
    };
    assert_eq!(Toc::parse(&toc.to_json()).as_ref().ok(), Some(&toc));
    let mut built = false;
    for compression in [Compression::Gzip, Compression::Zstd] {
        let layout = BlobLayout {
            blob_size: 1 << 24,
            toc_offset: 1 << 23,
            compression,
        };
        match index::build(&toc, layout, Digest::of(json)) {
            Ok(bytes) => {
                assert!(index(&bytes), "an index that was just built does not open");
                built = true;
            }
            Err(error) => drop(explained(&error)),
        }
    }
    built
}

/// An index file: opened, and everything in it looked at. Returns whether it was accepted.
pub(crate) fn index(bytes: &[u8]) -> bool {
    let index = match LayerIndex::open(bytes) {
        Ok(index) => index,
        Err(error) => {
            explained(&error);
            return false;
        }
    };
    walk(&index);
    let mut end = 0;
    for id in 0..index.member_count() {
        let member = index.member(id).expect("member of the count");
        assert!(member.start >= end && member.end <= index.toc_offset() && !member.chunks.is_empty());
        for chunk in member.chunks {
            assert_eq!(index.chunk(chunk).expect("chunk of a member").member, id);
        }
        end = member.end;
    }
    assert!(index.member(index.member_count()).is_none() && index.chunk(index.chunk_count()).is_none());
    true
}

fn walk(index: &LayerIndex<&[u8]>) {
    let mut queue = vec![ROOT_INO];
    let mut dirs = 0;
    while let Some(dir) = queue.pop() {
        dirs += 1;
        assert!(dirs <= index.inode_count(), "directories loop");
        for entry in index.entries(dir, 0) {
            assert_eq!(index.lookup(dir, entry.name), Some(entry.ino));
            if entry.kind == FileKind::Directory {
                queue.push(entry.ino);
            }
        }
    }
    for ino in 1..=u64::from(index.inode_count()) {
        let inode = index.inode(ino).expect("inode of the count");
        assert!(index.path_of(ino).len() <= (MAX_DEPTH + 1) * 256);
        assert!(inode.xattrs().all(|(name, _)| !name.is_empty()));
        assert_eq!(inode.symlink_target().is_some(), inode.kind == FileKind::Symlink);
        let covering = index.chunks_in(ino, 0..u64::MAX);
        assert!(covering == inode.chunks || inode.chunks.is_empty());
        let mut end = 0;
        for id in covering {
            let chunk = index.chunk(id).expect("chunk of a file");
            assert_eq!(
                (chunk.ino, chunk.file_offset, chunk.data_offset),
                (ino, end, inode.data_offset + end)
            );
            end += u64::from(chunk.size);
            assert!(inode.data_offset + end <= index.data_size());
            assert_eq!(index.chunks_in(ino, end - 1..end), id..id + 1);
        }
        assert!(inode.kind != FileKind::Regular || end == inode.size);
    }
}

/// Makes the checksum and the size of an index file right, so that damage gets as far as the checks behind them.
pub(crate) fn seal_index(bytes: &mut [u8]) {
    if bytes.len() < 24 {
        return;
    }
    let size = (bytes.len() as u64).to_le_bytes();
    bytes[16..24].copy_from_slice(&size);
    let checksum = libdeflater::crc32(&bytes[16..]).to_le_bytes();
    bytes[12..16].copy_from_slice(&checksum);
}
