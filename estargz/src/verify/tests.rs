//! Sound layers pass; every kind of damage is found and named.

use super::*;
use crate::footer;
use crate::toc::{Toc, encode_member};
use crate::writer::{BuildOptions, BuiltLayer, build};

use proptest::prelude::*;
use std::io::{Read as _, Write as _};
use std::num::NonZeroUsize;

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// A layer with a directory, a file of three chunks, a small file, a link and an empty file.
fn layer() -> (Vec<u8>, BuiltLayer) {
    let mut tar = tar::Builder::new(Vec::new());
    let mut add = |name: &str, typeflag: u8, content: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::new(typeflag));
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_mtime(1_600_000_000);
        header.set_uid(7);
        header.set_gid(8);
        if typeflag == b'1' {
            header.set_size(0);
            tar.append_link(&mut header, name, "dir/small").unwrap();
        } else {
            tar.append_data(&mut header, name, content).unwrap();
        }
    };
    add("dir/", b'5', b"");
    add(
        "dir/large",
        b'0',
        &(0..2500_u32).flat_map(u32::to_le_bytes).collect::<Vec<_>>(),
    );
    add("dir/small", b'0', b"small");
    add("link", b'1', b"");
    add("empty", b'0', b"");
    let tar = tar.into_inner().unwrap();
    let options = BuildOptions {
        chunk_size: 4000,
        threads: NonZeroUsize::MIN,
        ..BuildOptions::default()
    };
    let mut blob = Vec::new();
    let built = build(tar.as_slice(), &mut blob, &options).unwrap();
    (blob, built)
}

/// The same members with another TOC.
fn with_toc(blob: &[u8], change: impl FnOnce(&mut Toc)) -> Vec<u8> {
    let opened = LayerBlob::open(blob.to_vec()).unwrap();
    let mut toc = opened.toc;
    change(&mut toc);
    let mut out = blob[..usize::try_from(opened.footer.toc_offset).unwrap()].to_vec();
    let toc_offset = out.len() as u64;
    out.extend(gzip(&encode_member(&toc.to_json())));
    out.extend(footer::encode(toc_offset));
    out
}

fn fault(blob: Vec<u8>) -> String {
    let error = verify_layer(blob, None, None).unwrap_err();
    let source = std::error::Error::source(&error)
        .map(ToString::to_string)
        .unwrap_or_default();
    format!("{error}: {source}")
}

#[test]
fn a_sound_layer_passes_and_expectations_are_compared() {
    let (blob, built) = layer();
    let report = verify_layer(blob.clone(), Some(built.toc_digest), Some(built.diff_id)).unwrap();
    assert_eq!((report.entries, report.chunks), (6, 1 + 3 + 1));
    let other = Digest::of("other");
    let toc = verify_layer(blob.clone(), Some(other), None);
    assert!(matches!(toc, Err(VerifyError::TocDigest { expected, .. }) if expected == other));
    let diff_id = verify_layer(blob.clone(), None, Some(other));
    assert!(matches!(diff_id, Err(VerifyError::DiffId { expected, .. }) if expected == other));
    verify_layer(with_toc(&blob, |_| ()), None, None).unwrap();
}

#[test]
fn every_lie_in_the_toc_is_found_and_named() {
    let (blob, _) = layer();
    let (dir, large, second, third, small, link, empty) = (1, 2, 3, 4, 5, 6, 7);
    type Lie = (&'static str, Box<dyn Fn(&mut Toc)>);
    fn entry(at: usize, change: impl Fn(&mut TocEntry) + 'static) -> Box<dyn Fn(&mut Toc)> {
        Box::new(move |toc| change(&mut toc.entries[at]))
    }
    let other = || Some(Digest::of("other"));
    let lies: Vec<Lie> = vec![
        (
            "\"dir/\" (tar offset 1024): the name is",
            entry(dir, |e| e.name = "dirt/".into()),
        ),
        ("the type is", entry(dir, |e| e.kind = EntryType::Reg)),
        ("the mode is 493", entry(dir, |e| e.mode = 0o4755)),
        ("the owner is 7", entry(small, |e| e.uid = 0)),
        ("the group is 8", entry(small, |e| e.gid = 0)),
        ("the modification time is", entry(small, |e| e.mod_time.clear())),
        (
            "the link target is \"dir/small\"",
            entry(link, |e| e.link_name = "dir/large".into()),
        ),
        ("\"dir/small\" (tar offset", entry(small, |e| e.size = 6)),
        (
            "extended attributes",
            entry(small, |e| drop(e.xattrs.insert("user.a".into(), "dg==".into()))),
        ),
        (
            "\"dir/large\", chunk 0 (blob offset",
            entry(large, move |e| e.chunk_digest = other()),
        ),
        (
            "\"dir/large\", chunk 1 (blob offset",
            entry(second, move |e| e.chunk_digest = other()),
        ),
        ("chunk 1 (blob offset", entry(second, |e| e.chunk_digest = None)),
        (
            "the digest of its content is",
            entry(large, move |e| e.digest = other()),
        ),
        ("\"empty\" (tar offset", entry(empty, move |e| e.digest = other())),
        ("has no digest", entry(empty, |e| e.digest = None)),
        ("no gzip member begins there", entry(second, |e| e.offset += 1)),
        ("wrong place", entry(second, |e| e.inner_offset = 1)),
        ("said to cover", entry(second, |e| e.chunk_offset = 3999)),
        ("said to cover", entry(second, |e| e.chunk_size = i64::MAX as u64)),
        ("chunk 2 (blob offset", entry(third, |e| e.chunk_size = 2001)),
        ("cover 9999 of 10000", entry(third, |e| e.chunk_size = 1999)),
        (
            "no gzip member begins there",
            Box::new(|toc| toc.entries[5].offset = toc.entries[3].offset - 1),
        ),
        (
            "wrong place",
            Box::new(|toc| toc.entries[5].offset = toc.entries[3].offset),
        ),
        (
            "in the tar stream and not in the TOC",
            Box::new(|toc| toc.entries.truncate(7)),
        ),
        (
            "in the TOC and not in the tar stream",
            Box::new(|toc| toc.entries.push(toc.entries[6].clone())),
        ),
        (
            "without being a regular file",
            Box::new(|toc| toc.entries.insert(2, toc.entries[3].clone())),
        ),
        (
            "said to cover",
            Box::new(|toc| toc.entries.insert(6, toc.entries[4].clone())),
        ),
    ];
    for (number, (expected, lie)) in lies.into_iter().enumerate() {
        let found = fault(with_toc(&blob, lie));
        // A cut-off last chunk is noticed by its digest before it is by the sum.
        let digest_first = expected.starts_with("cover 9999") && found.contains("chunk 2") && found.contains("digest");
        assert!(
            found.contains(expected) || digest_first,
            "lie {number}: {found:?} instead of {expected:?}"
        );
    }
}

#[test]
fn a_toc_that_is_not_the_last_entry_is_refused() {
    let (blob, built) = layer();
    let toc_offset = usize::try_from(built.toc_offset).unwrap();
    // A second TOC in front of the one the footer points to.
    let mut twice = blob[..toc_offset].to_vec();
    let member = blob[toc_offset..blob.len() - footer::FOOTER_SIZE].to_vec();
    twice.extend(&member);
    let second = twice.len() as u64;
    twice.extend(&member);
    twice.extend(footer::encode(second));
    assert!(fault(twice).contains("not where the footer says"));
    // Something behind the end of the archive.
    let mut behind = blob[..blob.len() - footer::FOOTER_SIZE].to_vec();
    behind.extend(gzip(b"behind"));
    behind.extend(footer::encode(built.toc_offset));
    let found = fault(behind);
    assert!(found.contains("behind the end"), "{found}");
}

/// As `--estargz-min-chunk-size` of newer reference converters makes them: several chunks in one member.
#[test]
fn chunks_that_share_a_member_pass() {
    let (blob, _) = layer();
    let opened = LayerBlob::open(blob.clone()).unwrap();
    let body = &blob[..usize::try_from(opened.footer.toc_offset).unwrap()];
    let mut plain = Vec::new();
    let mut starts = std::collections::HashMap::new();
    let mut left = body;
    while !left.is_empty() {
        starts.insert((body.len() - left.len()) as u64, plain.len() as u64);
        let mut decoder = flate2::bufread::GzDecoder::new(left);
        decoder.read_to_end(&mut plain).unwrap();
        left = decoder.into_inner();
    }
    let mut toc = opened.toc;
    for entry in toc.entries.iter_mut().filter(|entry| entry.chunk_digest.is_some()) {
        entry.inner_offset = starts[&entry.offset];
        entry.offset = 0;
    }
    let mut packed = gzip(&plain);
    let toc_offset = packed.len() as u64;
    packed.extend(gzip(&encode_member(&toc.to_json())));
    packed.extend(footer::encode(toc_offset));
    assert_eq!(verify_layer(packed.clone(), None, None).unwrap().members, 3);
    let shifted = with_toc(&packed, |toc| toc.entries[5].inner_offset += 512);
    assert!(fault(shifted).contains("wrong place"));
}

#[test]
fn every_truncation_is_an_error() {
    let (blob, _) = layer();
    for end in 0..blob.len() {
        assert!(verify_layer(blob[..end].to_vec(), None, None).is_err(), "{end}");
        // With its footer kept, the hole is inside.
        if end < blob.len() - footer::FOOTER_SIZE {
            let holed = [&blob[..end], &blob[blob.len() - footer::FOOTER_SIZE..]].concat();
            assert!(verify_layer(holed, None, None).is_err(), "{end}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    /// A damaged layer never passes for another one.
    #[test]
    fn damage_is_found(damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
        let (mut blob, built) = layer();
        for (index, byte) in damage {
            let at = index.index(blob.len());
            blob[at] = byte;
        }
        if let Ok(report) = verify_layer(blob, None, None) {
            // Only what no reader looks at can differ, such as the time in a member's header.
            prop_assert_eq!(report.diff_id, built.diff_id);
            prop_assert_eq!(report.toc_digest, built.toc_digest);
        }
    }
}
