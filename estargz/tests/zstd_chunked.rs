//! zstd:chunked layers that skopeo wrote, two versions of it: found, indexed, unfolded. How they were made: tests/data/README.md.
#![allow(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use estargz::digest::Digest;
use estargz::footer::FooterKind;
use estargz::footer::zstd::Position;
use estargz::index::{self, LayerIndex};
use estargz::member::{Compression, unfold};
use estargz::reader::LayerBlob;
use estargz::toc::Toc;

/// A layer and what its manifest said about it.
struct Written {
    blob: &'static [u8],
    checksum: &'static str,
    position: &'static str,
    footer_size: u64,
}

const LAYERS: [Written; 2] = [
    Written {
        blob: include_bytes!("data/storage.zstd-chunked"),
        checksum: "sha256:ebf815981f98857157e3d5ac2a44a60dd1b560c291f82cb162d9be7efa61178a",
        position: "4662:680:1732:1",
        footer_size: 72,
    },
    Written {
        blob: include_bytes!("data/storage-2023.zstd-chunked"),
        checksum: "sha256:e86dff988b50517ef08e722bfff485dcd6bbcaa8917475f18fb3d8096ecec63e",
        position: "4663:671:2217:1",
        footer_size: 48,
    },
];

#[test]
fn footer_and_annotation_agree_and_the_toc_is_the_one_that_is_named() {
    for written in LAYERS {
        let layer = LayerBlob::open(written.blob).unwrap();
        assert_eq!(
            (layer.footer.kind, layer.footer.size),
            (FooterKind::ZstdChunked, written.footer_size)
        );
        let told = Position::parse(written.position).unwrap();
        let told = told.footer(written.blob.len() as u64).unwrap();
        assert_eq!(
            (&told.toc, told.toc_offset),
            (&layer.footer.toc, layer.footer.toc_offset)
        );
        assert_eq!(layer.compressed_toc_digest, written.checksum.parse().unwrap());
        let toc = layer.footer.toc.unwrap();
        let frame = &written.blob[usize::try_from(toc.start).unwrap()..usize::try_from(toc.end).unwrap()];
        assert_eq!(Toc::parse_verified(frame).unwrap(), layer.toc);
        assert_eq!(Toc::parse_verified(&layer.toc_document.json).unwrap(), layer.toc);
    }
}

#[test]
fn the_index_has_the_tree_and_every_chunk_unfolds_to_its_digest() {
    for written in LAYERS {
        let layer = LayerBlob::open(written.blob).unwrap();
        let bytes = index::build(&layer.toc, layer.layout(), layer.compressed_toc_digest).unwrap();
        assert_eq!(bytes[8..12], 2_u32.to_le_bytes(), "the format id says zstd");
        let index = LayerIndex::open(bytes).unwrap();
        assert_eq!(index.compression(), Compression::Zstd);
        let path = |ino| String::from_utf8(index.path_of(ino)).unwrap();
        let paths: Vec<_> = (1..=u64::from(index.inode_count())).map(path).collect();
        let expected = [
            "/",
            "/usr/bin/tool",
            "/usr/share/big",
            "/etc/empty",
            "/etc/link",
            "/usr/share/removed",
            "/usr/share/<name> & é",
            "/usr",
            "/usr/bin",
            "/usr/share",
            "/etc",
        ];
        let sorted = |paths: &[&str]| {
            let mut paths: Vec<_> = paths.iter().map(ToString::to_string).collect();
            paths.sort();
            paths
        };
        assert_eq!(
            sorted(&paths.iter().map(String::as_str).collect::<Vec<_>>()),
            sorted(&expected)
        );
        let big = index
            .inode(1 + paths.iter().position(|path| path == "/usr/share/big").unwrap() as u64)
            .unwrap();
        // Data, a run of zeros, data.
        assert_eq!((big.size, big.chunks.len()), (38_000, 3));
        let mut content = Vec::new();
        for id in 0..index.chunk_count() {
            let chunk = index.chunk(id).unwrap();
            let member = index.member(chunk.member).unwrap();
            let compressed =
                &written.blob[usize::try_from(member.start).unwrap()..usize::try_from(member.end).unwrap()];
            assert_eq!(Compression::of(compressed), Some(Compression::Zstd));
            let inner = usize::try_from(chunk.inner_offset).unwrap();
            let mut bytes = Vec::new();
            unfold(Compression::Zstd, compressed, inner + chunk.size as usize, &mut bytes).unwrap();
            assert_eq!(Digest::of(&bytes[inner..]), chunk.digest, "chunk {id}");
            if big.chunks.contains(&id) {
                content.extend_from_slice(&bytes[inner..]);
            }
        }
        assert!(content[5_000..35_000].iter().all(|byte| *byte == 0));
        let entry = layer.toc.entries.iter().find(|entry| entry.name == "usr/share/big");
        assert_eq!(entry.unwrap().digest, Some(Digest::of(content)));
    }
}
