use std::io::Write;

use flate2::write::GzEncoder;
use proptest::prelude::*;

use super::*;

const BOTH: [Compression; 2] = [Compression::Gzip, Compression::Zstd];

fn member(compression: Compression, text: &[u8]) -> Vec<u8> {
    match compression {
        Compression::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
            encoder.write_all(text).unwrap();
            encoder.finish().unwrap()
        }
        Compression::Zstd => ::zstd::bulk::compress(text, 3).unwrap(),
    }
}

/// A frame as streaming writers make it, which does not say its size.
fn streamed(text: &[u8]) -> Vec<u8> {
    ::zstd::stream::encode_all(text, 3).unwrap()
}

#[test]
fn every_prefix_length_comes_out_whatever_follows_the_member() {
    let text: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.to_le_bytes()).collect();
    let next = b"tar header of the next entry";
    let mut out = vec![9; 10];
    type Maker = fn(&[u8]) -> Vec<u8>;
    let makers: [(Compression, Maker); 3] = [
        (Compression::Gzip, |text| member(Compression::Gzip, text)),
        (Compression::Zstd, |text| member(Compression::Zstd, text)),
        (Compression::Zstd, streamed),
    ];
    for (compression, make) in makers {
        let one = make(&text);
        let two = [&one[..], &make(next)].concat();
        for compressed in [&one, &two, &[&one[..], b"garbage"].concat()] {
            for want in [
                0,
                1,
                512,
                text.len() - SLACK - 1,
                text.len() - SLACK,
                text.len() - 1,
                text.len(),
            ] {
                unfold(compression, compressed, want, &mut out).unwrap();
                assert_eq!(out.len(), want);
                assert!(out == text[..want], "{compression:?} want {want}");
            }
            let error = unfold(compression, compressed, text.len() + 1, &mut out).unwrap_err();
            assert_eq!(
                error.to_string(),
                "the member holds 12000000 bytes, but 12000001 are needed"
            );
        }
    }
}

#[test]
fn a_bomb_costs_no_more_than_what_was_asked_for() {
    let text = vec![0; 64 << 20];
    for (compression, bomb) in [
        (Compression::Gzip, member(Compression::Gzip, &text)),
        (Compression::Zstd, member(Compression::Zstd, &text)),
        (Compression::Zstd, streamed(&text)),
    ] {
        let mut out = Vec::new();
        unfold(compression, &bomb, 4096, &mut out).unwrap();
        assert_eq!(out, [0; 4096]);
        assert!(out.capacity() <= 4096 + SLACK, "{}", out.capacity());
        let error = unfold(compression, &bomb, MAX_MEMBER_SPAN + 1, &mut out).unwrap_err();
        assert_eq!(
            error.to_string(),
            "134217729 bytes of one member were asked for, more than the limit of 134217728"
        );
        assert!(text.len() as u64 <= compression.max_expansion() * bomb.len() as u64);
    }
}

#[test]
fn broken_members_and_members_of_the_other_kind_are_errors() {
    let text = b"some text that is long enough to be cut somewhere in the middle of it";
    for (compression, other) in [BOTH, [BOTH[1], BOTH[0]]].map(|[one, other]| (one, other)) {
        let whole = member(compression, text);
        let foreign = member(other, text);
        // A frame of nothing that decoders skip.
        let skippable = [&b"\x50\x2a\x4d\x18\x04\0\0\0abcd"[..], &whole].concat();
        for bad in [
            &[][..],
            &whole[..2],
            b"neither of them",
            &whole[..whole.len() / 2],
            &foreign,
            &skippable,
        ] {
            let error = unfold(compression, bad, text.len(), &mut Vec::new()).unwrap_err();
            assert!(!matches!(error, MemberError::TooLarge { .. }), "{bad:?}: {error}");
        }
    }
    let error = unfold(Compression::Zstd, b"no frame", 1, &mut Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "the 8 bytes are not a sound zstd member");
}

proptest! {
    /// Damage gives an error or bytes of the wanted number; what they are, the chunk's digest tells.
    #[test]
    fn damaged_members_never_give_another_number_of_bytes(
        text in prop::collection::vec(any::<u8>(), 1..3000),
        zeros in 0usize..200_000,
        flips in prop::collection::vec((0usize..4000, 1u8..), 0..4),
        cut in 0usize..50,
        want in 0usize..220_000,
        compression in prop::sample::select(&BOTH),
    ) {
        let whole = [text, vec![0; zeros]].concat();
        let mut bytes = member(compression, &whole);
        let damaged = cut > 0 || !flips.is_empty();
        bytes.truncate(bytes.len() - cut.min(bytes.len()));
        for (at, flip) in flips {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= flip;
            }
        }
        let mut out = Vec::new();
        match unfold(compression, &bytes, want, &mut out) {
            Ok(()) => {
                prop_assert_eq!(out.len(), want);
                prop_assert!(damaged || out == whole[..want]);
            }
            Err(error) => prop_assert!(damaged || want > whole.len(), "{error}"),
        }
    }
}
