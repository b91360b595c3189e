//! A layer that the reference converter wrote: what it says, byte for byte. How it was made: tests/data/README.md.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use estargz::digest::Digest;
use estargz::footer::{self, FooterKind};
use estargz::index::{self, FileKind, LayerIndex};
use estargz::member::{Compression, unfold};
use estargz::reader::{LayerBlob, ReadAt};
use estargz::toc::EntryType;

const LAYER: &[u8] = include_bytes!("data/reference.esgz");
const INDEX_DIGEST: &str = "sha256:0ed052b0e16721ab15bf83325fa4799c8c6cc12512d8d05eafe4f3ce36c0eb03";
const TOC_DIGEST: &str = "sha256:f89b6a7f4c4ed754a8984a3aec1d228350f87df31e984928193168b2b4f0327e";

fn opened() -> LayerBlob<&'static [u8]> {
    LayerBlob::open(LAYER).unwrap()
}

fn indexed() -> LayerIndex<Vec<u8>> {
    let blob = opened();
    LayerIndex::open(index::build(&blob.toc, blob.layout(), blob.toc_document.digest).unwrap()).unwrap()
}

#[test]
fn footer_and_toc_are_found() {
    let blob = opened();
    assert_eq!((blob.footer.kind, blob.footer.toc_offset), (FooterKind::Gzip, 13_900));
    assert_eq!(blob.toc_document.digest, TOC_DIGEST.parse().unwrap());
    assert_eq!(blob.toc.entries.len(), 16);
    assert_eq!(footer::encode(13_900), LAYER[LAYER.len() - 51..]);
}

#[test]
fn the_toc_is_written_as_it_was_read() {
    let blob = opened();
    assert_eq!(blob.toc.to_json(), blob.toc_document.json);
    let xattr = blob.toc.entries.iter().find(|entry| !entry.xattrs.is_empty()).unwrap();
    assert_eq!(
        (xattr.name.as_str(), xattr.kind),
        ("usr/share/<name> & é", EntryType::Reg)
    );
}

#[test]
fn the_toc_member_is_framed_as_we_frame_it() {
    let blob = opened();
    let member = &LAYER[13_900..LAYER.len() - 51];
    let framed = estargz::toc::encode_member(&blob.toc_document.json);
    let mut unfolded = Vec::new();
    unfold(Compression::Gzip, member, framed.len(), &mut unfolded).unwrap();
    assert_eq!(unfolded, framed);
}

#[test]
fn the_index_shows_the_tree_that_went_in() {
    let index = indexed();
    let mut lines = Vec::new();
    for ino in 1..=u64::from(index.inode_count()) {
        let inode = index.inode(ino).unwrap();
        let path = String::from_utf8(index.path_of(ino)).unwrap();
        let kind = match inode.kind {
            FileKind::Directory => "dir",
            FileKind::Regular => "file",
            FileKind::Symlink => "symlink",
            FileKind::CharDevice => "char",
            FileKind::BlockDevice => "block",
            FileKind::Fifo => "fifo",
        };
        let (major, minor) = inode.rdev;
        lines.push(format!(
            "{ino} {path} {kind} {:o} {}:{} links {} size {} mtime {} dev {major}:{minor}",
            inode.mode, inode.uid, inode.gid, inode.nlink, inode.size, inode.mtime_sec
        ));
    }
    assert_eq!(
        lines,
        [
            "1 / dir 755 0:0 links 7 size 0 mtime 1700000000 dev 0:0",
            "2 /usr dir 755 0:0 links 4 size 0 mtime 1700000000 dev 0:0",
            "3 /usr/bin/tool file 4755 0:0 links 2 size 20 mtime 1700000000 dev 0:0",
            "4 /usr/share/big file 644 1000:1001 links 1 size 25000 mtime 1700000000 dev 0:0",
            "5 /etc/empty file 600 0:0 links 1 size 0 mtime 1700000000 dev 0:0",
            "6 /etc/link symlink 777 0:0 links 1 size 16 mtime 1700000000 dev 0:0",
            "7 /dev/null char 666 0:0 links 1 size 0 mtime 1700000000 dev 1:3",
            "8 /dev/disk block 660 0:0 links 1 size 0 mtime 1700000000 dev 8:1",
            "9 /run/pipe fifo 644 0:0 links 1 size 0 mtime 0 dev 0:0",
            "10 /usr/share/<name> & é file 644 0:0 links 1 size 4 mtime 1700000001 dev 0:0",
            "11 /usr/share/removed char 0 0:0 links 1 size 0 mtime 0 dev 0:0",
            "12 /usr/bin dir 755 0:0 links 2 size 0 mtime 0 dev 0:0",
            "13 /usr/share dir 755 0:0 links 2 size 0 mtime 0 dev 0:0",
            "14 /etc dir 755 0:0 links 2 size 0 mtime 0 dev 0:0",
            "15 /dev dir 755 0:0 links 2 size 0 mtime 0 dev 0:0",
            "16 /run dir 755 0:0 links 2 size 0 mtime 0 dev 0:0",
            "17 /var dir 755 0:0 links 2 size 0 mtime 0 dev 0:0",
        ]
    );
    assert_eq!(index.lookup(12, b"other"), Some(3));
    assert_eq!(
        index.inode(10).unwrap().xattrs().collect::<Vec<_>>(),
        [(&b"user.note"[..], &b"a<b"[..])]
    );
    assert_eq!(
        index.inode(17).unwrap().xattrs().collect::<Vec<_>>(),
        [(&b"trusted.overlay.opaque"[..], &b"y"[..])]
    );
    assert_eq!(index.prefetch_end(), None);
}

/// The index file is a function of the TOC alone: caches of earlier daemons are read by later ones, and inode numbers
/// that containers have seen stay. What changes these bytes needs a new format id, and then another digest here.
#[test]
fn the_index_file_has_the_bytes_of_its_format_id() {
    let blob = opened();
    let bytes = index::build(&blob.toc, blob.layout(), blob.toc_document.digest).unwrap();
    // Magic, then the format id.
    assert_eq!(bytes[8..12], 1_u32.to_le_bytes());
    assert_eq!(Digest::of(&bytes).to_string(), INDEX_DIGEST);
}

#[test]
fn every_chunk_unfolds_to_its_digest() {
    let index = indexed();
    assert_eq!((index.chunk_count(), index.member_count()), (5, 5));
    let mut big = Vec::new();
    for id in 0..index.chunk_count() {
        let chunk = index.chunk(id).unwrap();
        let member = index.member(chunk.member).unwrap();
        let mut compressed = vec![0; usize::try_from(member.end - member.start).unwrap()];
        LAYER.read_exact_at(member.start, &mut compressed).unwrap();
        let mut bytes = Vec::new();
        let inner = usize::try_from(chunk.inner_offset).unwrap();
        unfold(Compression::Gzip, &compressed, inner + chunk.size as usize, &mut bytes).unwrap();
        assert_eq!(Digest::of(&bytes[inner..]), chunk.digest, "chunk {id}");
        if chunk.ino == 4 {
            big.extend_from_slice(&bytes[inner..]);
        }
    }
    let entry = opened()
        .toc
        .entries
        .into_iter()
        .find(|entry| entry.name == "usr/share/big")
        .unwrap();
    assert_eq!(Some(Digest::of(big)), entry.digest);
}
