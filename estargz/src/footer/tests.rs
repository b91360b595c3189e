//! Footers of all forms, whole, cut and damaged.

use super::*;

/// As the reference writer printed it for offset 0x6c1; see docs/format.md.
const REFERENCE: &str = "1f8b080400000000 00ff 1a00 5347 1600 30303030303030303030303030366331 53544152475a \
                         010000ffff 0000000000000000";

fn bytes(hex_text: &str) -> Vec<u8> {
    hex::decode(hex_text.replace(char::is_whitespace, "")).unwrap()
}

fn legacy(toc_offset: u64) -> Vec<u8> {
    let digits = format!("{toc_offset:016x}STARGZ");
    [&bytes("1f8b08040000000000ff1600")[..], digits.as_bytes(), &EMPTY_BODY].concat()
}

#[test]
fn encoding_is_the_reference_writers_and_reads_back() {
    assert_eq!(encode(0x6c1).as_slice(), bytes(REFERENCE));
    for offset in [0, 1, 0x6c1, 0xffff_ffff, u64::MAX - 1000] {
        let footer = Footer::parse(&encode(offset), offset + 100).unwrap();
        assert_eq!(
            footer,
            Footer {
                kind: FooterKind::Gzip,
                toc_offset: offset,
                toc: Some(offset..offset + 49),
                size: 51
            }
        );
    }
}

#[test]
fn the_footer_is_an_empty_gzip_member() {
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(&encode(77)[..]), &mut text).unwrap();
    assert_eq!(text, b"");
}

#[test]
fn legacy_form_is_read_with_and_without_bytes_before_it() {
    let want = Footer {
        kind: FooterKind::LegacyGzip,
        toc_offset: 5,
        toc: Some(5..13),
        size: 47,
    };
    assert_eq!(legacy(5).len(), 47);
    assert_eq!(Footer::parse(&legacy(5), 60), Ok(want.clone()));
    assert_eq!(Footer::parse(&[&[0; 13][..], &legacy(5)].concat(), 60), Ok(want));
}

#[test]
fn header_bytes_without_meaning_may_differ() {
    let mut footer = encode(9);
    footer[4..10].copy_from_slice(&[1, 2, 3, 4, 2, 3]);
    assert_eq!(Footer::parse(&footer, 100).unwrap().toc_offset, 9);
}

#[test]
fn an_external_toc_is_in_no_part_of_the_blob() {
    let external =
        bytes("1f8b080400000000 00ff 1500 5347 1100 535441 52475a 45585445524e414c544f43 010000ffff 0000000000000000");
    assert_eq!(external.len(), EXTERNAL_TOC_FOOTER_SIZE);
    let want = |toc_offset| Footer {
        kind: FooterKind::ExternalToc,
        toc_offset,
        toc: None,
        size: 46,
    };
    assert_eq!(Footer::parse(&external, 4096), Ok(want(4050)));
    assert_eq!(
        Footer::parse(&[&[7; 100][..], &external].concat(), 4096),
        Ok(want(4050))
    );
    assert_eq!(Footer::parse(&external, 46), Ok(want(0)));
}

fn positioned(text: &str, blob_size: u64) -> Result<Footer, FooterError> {
    zstd::Position::parse(text)?.footer(blob_size)
}

/// A zstd:chunked footer of containers/storage's form.
fn storage(numbers: [u64; 7]) -> Vec<u8> {
    let mut frame = bytes("502a4d18 40000000");
    frame.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
    frame.extend_from_slice(b"GNUlInUx");
    frame
}

#[test]
fn both_zstd_footers_give_the_place_of_the_frame_in_the_frame() {
    // As the reference writer printed it: offset 839, 849 bytes, 2744 unfolded, type 1.
    let reference =
        bytes("502a4d18 28000000 4703000000000000 5103000000000000 b80a000000000000 0100000000000000 476e556c496e5578");
    let ours = zstd::encode(831, &[7; 849], 2744).unwrap();
    assert!(ours[..8] == bytes("502a4d18 51030000") && ours[857..] == reference);
    let footer = Footer::parse(&ours, 1736).unwrap();
    let want = Footer {
        kind: FooterKind::ZstdChunked,
        toc_offset: 831,
        toc: Some(839..1688),
        size: 48,
    };
    assert_eq!(footer, want);
    assert_eq!(positioned("839:849:2744:1", 1736), Ok(want.clone()));
    let footer = Footer::parse(&storage([839, 849, 2744, 1, 1696, 100, 300]), 5000).unwrap();
    assert_eq!(footer, Footer { size: 72, ..want });
    assert_eq!(footer.kind.compression(), Compression::Zstd);
}

#[test]
fn what_is_wrong_with_a_zstd_footer_is_told() {
    let small = |numbers: [u64; 4]| {
        let mut frame = bytes("502a4d18 28000000");
        frame.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
        frame.extend_from_slice(b"GnUlInUx");
        frame
    };
    let longer = [&bytes("502a4d18 48000000")[..], &[0; 64], b"GNUlInUx"].concat();
    for (tail, message) in [
        (
            longer,
            "the layer is zstd:chunked with a footer of another length, which is not supported",
        ),
        (
            small([839, 849, 2744, 2]),
            "the layer is zstd:chunked with a TOC of type 2, which is not supported",
        ),
        (b"GNUlInUx".to_vec(), "8 bytes are too few for a footer"),
        (
            small([839, 849, 2744, 1])[1..].to_vec(),
            "47 bytes are too few for a footer",
        ),
        (
            small([7, 849, 2744, 1]),
            "the TOC is said to be 849 bytes at 7, which do not lie in the blob before 1688",
        ),
        (
            small([839, 850, 2744, 1]),
            "the TOC is said to be 850 bytes at 839, which do not lie in the blob before 1688",
        ),
        (
            small([839, 0, 2744, 1]),
            "the TOC is said to be 0 bytes at 839, which do not lie in the blob before 1688",
        ),
        (
            small([u64::MAX, 9, 2744, 1]),
            "the TOC is said to be 9 bytes at 18446744073709551615, which do not lie in the blob before 1688",
        ),
    ] {
        assert_eq!(Footer::parse(&tail, 1736).unwrap_err().to_string(), message);
    }
    for bad in [
        "",
        "1:2:3",
        "1:2:3:1:5",
        "-1:2:3:1",
        "1:+2:3:1",
        "a:2:3:1",
        "1::3:1",
        "99999999999999999999:2:3:1",
    ] {
        assert_eq!(
            zstd::Position::parse(bad),
            Err(FooterError::BadPosition { text: bad.to_owned() })
        );
    }
    assert!(matches!(
        positioned("1689:1:1:1", 1736),
        Err(FooterError::OutOfRange { .. })
    ));
}

proptest::proptest! {
    /// Whatever ends a blob, a footer that is accepted stays inside it.
    #[test]
    fn an_accepted_footer_lies_in_its_blob(
        mut numbers in proptest::array::uniform7(proptest::prop_oneof![0u64..4096, proptest::prelude::any::<u64>()]),
        kind in 0u64..3,
        larger in proptest::prelude::any::<bool>(),
        blob_size in proptest::prop_oneof![72u64..8192, proptest::prelude::any::<u64>()],
        flip in proptest::option::of((0usize..72, 1u8..)),
    ) {
        numbers[3] = kind;
        let mut tail = if larger {
            storage(numbers)
        } else {
            let mut frame = bytes("502a4d18 28000000");
            frame.extend(numbers[..4].iter().flat_map(|number| number.to_le_bytes()));
            frame.extend_from_slice(b"GnUlInUx");
            frame
        };
        if let Some((at, flip)) = flip && let Some(byte) = tail.get_mut(at) {
            *byte ^= flip;
        }
        let text = numbers[..4].iter().map(u64::to_string).collect::<Vec<_>>().join(":");
        for footer in [Footer::parse(&tail, blob_size), positioned(&text, blob_size)].into_iter().flatten() {
            let toc = footer.toc.clone().unwrap();
            proptest::prop_assert!(toc.start < toc.end && toc.end <= blob_size - footer.size);
            proptest::prop_assert!(footer.toc_offset + 8 == toc.start);
        }
    }
}

#[test]
fn faults_say_what_and_where() {
    let footer = encode(0x31);
    let bad_digit = |at: usize, byte: u8| {
        let mut footer = footer;
        footer[at] = byte;
        footer
    };
    for (tail, blob_size, message) in [
        (vec![], 0, "0 bytes are too few for a footer"),
        (footer[1..].to_vec(), 500, "50 bytes are too few for a footer"),
        (
            footer[1..].to_vec(),
            50,
            "the blob of 50 bytes does not end in an eStargz footer",
        ),
        (footer.to_vec(), 50, "a tail of 51 bytes cannot belong to a blob of 50"),
        (
            vec![0; 64],
            64,
            "the blob of 64 bytes does not end in an eStargz footer",
        ),
        (
            footer.to_vec(),
            51,
            "the footer puts the TOC at 49, but the footer itself begins at 0",
        ),
        (
            footer.to_vec(),
            100,
            "the footer puts the TOC at 49, but the footer itself begins at 49",
        ),
        (
            bad_digit(16, b'+').to_vec(),
            100,
            "the footer's TOC offset \"+000000000000031\" is not 16 hexadecimal digits",
        ),
        (
            bad_digit(17, 0xff).to_vec(),
            100,
            "the footer's TOC offset \"0\\\\xff00000000000031\" is not 16 hexadecimal digits",
        ),
        (
            encode(u64::MAX).to_vec(),
            100,
            "the footer puts the TOC at 18446744073709551615, but the footer itself begins at 49",
        ),
    ] {
        assert_eq!(Footer::parse(&tail, blob_size).unwrap_err().to_string(), message);
    }
    assert!(Footer::parse(&footer, 101).is_ok());
}
