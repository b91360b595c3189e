//! The footer: the last bytes of a layer, which say where its TOC begins.
//!
//! It is a gzip member with no content whose extra header field carries the TOC offset as 16 hexadecimal digits, so
//! that a plain gunzip of the layer never notices it. Two forms are read (51 bytes; the older one of 47 bytes has no
//! subfield header), one is written. Two more forms of the same family are recognised only to be named in the error.
//!
//! Invariant: a [`Footer`] points inside its blob, so [`Footer::toc_range`] is never empty and never out of bounds.

use std::ops::Range;

/// Size of the footer that is written today.
pub const FOOTER_SIZE: usize = 51;
/// Size of the footer of layers from before eStargz, which have no digests.
pub const LEGACY_FOOTER_SIZE: usize = 47;
/// Size of the footer of layers whose TOC is kept in another image.
const EXTERNAL_TOC_FOOTER_SIZE: usize = 46;

/// Gzip magic, deflate, only the extra field flag. The time, the compression hint and the system byte that follow mean
/// nothing and are not looked at.
const GZIP_HEAD: [u8; 4] = [0x1f, 0x8b, 0x08, 0x04];
const GZIP_HEAD_SIZE: usize = 10;
/// One empty stored block, then checksum and length of nothing.
const EMPTY_BODY: [u8; 13] = [0x01, 0x00, 0x00, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];
/// Extra field length 26, subfield `SG` of 22 bytes.
const EXTRA_HEAD: [u8; 6] = [26, 0, b'S', b'G', 22, 0];
/// Extra field length 22 without a subfield header, which RFC 1952 does not allow but gzip readers do.
const LEGACY_EXTRA_HEAD: [u8; 2] = [22, 0];
const EXTERNAL_TOC_EXTRA: &[u8] = b"\x15\x00SG\x11\x00STARGZEXTERNALTOC";
const MARK: &[u8] = b"STARGZ";
const ZSTD_CHUNKED_MARK: &[u8] = b"GnUlInUx";

/// Which of the two footer forms a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FooterKind {
    /// eStargz, 51 bytes.
    Gzip,
    /// The form before eStargz, 47 bytes; such layers carry no digests.
    LegacyGzip,
}

/// Where the TOC of a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Form of the footer.
    pub kind: FooterKind,
    /// Offset in the blob of the gzip member that holds the TOC.
    pub toc_offset: u64,
    /// Size of the footer in bytes.
    pub size: u64,
}

/// Why the end of a blob gives no TOC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FooterError {
    /// The caller has fewer bytes than any footer.
    #[error("{have} bytes are too few for a footer of {FOOTER_SIZE}, or {LEGACY_FOOTER_SIZE} in a blob that small")]
    TooShort {
        /// Bytes at hand.
        have: usize,
    },
    /// The tail is longer than the blob it is said to end.
    #[error("a tail of {tail} bytes cannot belong to a blob of {blob_size}")]
    TailExceedsBlob {
        /// Bytes at hand.
        tail: usize,
        /// Size of the blob.
        blob_size: u64,
    },
    /// The blob ends in no footer of this family: an ordinary layer, or a broken one.
    #[error("the blob of {blob_size} bytes does not end in an eStargz footer")]
    NotEstargz {
        /// Size of the blob.
        blob_size: u64,
    },
    /// A relative of eStargz that this library does not read.
    #[error("the layer is in the {variant} form, which is not supported")]
    Unsupported {
        /// Name of the form.
        variant: &'static str,
    },
    /// The footer is of the right shape but holds no number.
    #[error("the footer's TOC offset {text:?} is not 16 hexadecimal digits")]
    BadOffset {
        /// What stands in place of the number, made printable.
        text: String,
    },
    /// The footer points outside its blob.
    #[error("the footer puts the TOC at {toc_offset}, but the footer itself begins at {footer_offset}")]
    OffsetOutOfRange {
        /// Offset that the footer gives.
        toc_offset: u64,
        /// Where the footer begins.
        footer_offset: u64,
    },
}

impl Footer {
    /// Reads the footer at the end of `tail`, the last bytes of a blob of `blob_size` bytes.
    ///
    /// `tail` may be longer than a footer: one range request usually brings footer and TOC together.
    pub fn parse(tail: &[u8], blob_size: u64) -> Result<Self, FooterError> {
        if tail.len() as u64 > blob_size {
            return Err(FooterError::TailExceedsBlob {
                tail: tail.len(),
                blob_size,
            });
        }
        if let Some(digits) = tail
            .last_chunk::<FOOTER_SIZE>()
            .and_then(|f| offset_digits(f, &EXTRA_HEAD))
        {
            return Self::located(FooterKind::Gzip, digits, blob_size, FOOTER_SIZE);
        }
        if let Some(digits) = tail
            .last_chunk::<LEGACY_FOOTER_SIZE>()
            .and_then(|f| offset_digits(f, &LEGACY_EXTRA_HEAD))
        {
            return Self::located(FooterKind::LegacyGzip, digits, blob_size, LEGACY_FOOTER_SIZE);
        }
        if tail.ends_with(ZSTD_CHUNKED_MARK) {
            return Err(FooterError::Unsupported {
                variant: "zstd:chunked",
            });
        }
        if tail
            .last_chunk::<EXTERNAL_TOC_FOOTER_SIZE>()
            .is_some_and(|f| body_of(f) == Some(EXTERNAL_TOC_EXTRA))
        {
            return Err(FooterError::Unsupported {
                variant: "eStargz with external TOC",
            });
        }
        if tail.len() < FOOTER_SIZE && (tail.len() as u64) < blob_size || tail.len() < LEGACY_FOOTER_SIZE {
            return Err(FooterError::TooShort { have: tail.len() });
        }
        Err(FooterError::NotEstargz { blob_size })
    }

    fn located(kind: FooterKind, digits: &[u8], blob_size: u64, size: usize) -> Result<Self, FooterError> {
        let size = size as u64;
        let toc_offset = std::str::from_utf8(digits)
            .ok()
            // `from_str_radix` also takes a sign.
            .filter(|text| text.bytes().all(|b| b.is_ascii_hexdigit()))
            .and_then(|text| u64::from_str_radix(text, 16).ok())
            .ok_or_else(|| FooterError::BadOffset {
                text: digits.escape_ascii().to_string(),
            })?;
        let footer_offset = blob_size - size;
        if toc_offset >= footer_offset {
            return Err(FooterError::OffsetOutOfRange {
                toc_offset,
                footer_offset,
            });
        }
        Ok(Self { kind, toc_offset, size })
    }

    /// The range of the TOC member in a blob of `blob_size` bytes, the size that [`Footer::parse`] was given.
    pub fn toc_range(&self, blob_size: u64) -> Range<u64> {
        self.toc_offset..blob_size.saturating_sub(self.size)
    }
}

/// The footer of a layer whose TOC member begins at `toc_offset`.
pub fn encode(toc_offset: u64) -> [u8; FOOTER_SIZE] {
    let mut footer = [0; FOOTER_SIZE];
    let digits = format!("{toc_offset:016x}");
    // Time and hint 0, system 255 (unknown), as the reference writer has them.
    let parts: [&[u8]; 7] = [
        &GZIP_HEAD,
        &[0; 5],
        &[0xff],
        &EXTRA_HEAD,
        digits.as_bytes(),
        MARK,
        &EMPTY_BODY,
    ];
    for (slot, byte) in footer.iter_mut().zip(parts.concat()) {
        *slot = byte;
    }
    footer
}

/// The 16 bytes before the mark in a footer whose extra field begins with `extra_head`.
fn offset_digits<'a>(footer: &'a [u8], extra_head: &[u8]) -> Option<&'a [u8]> {
    body_of(footer)?
        .strip_prefix(extra_head)?
        .strip_suffix(MARK)
        .filter(|digits| digits.len() == 16)
}

/// The extra field of an empty gzip member, with its length.
fn body_of(footer: &[u8]) -> Option<&[u8]> {
    let after_head = footer
        .strip_prefix(&GZIP_HEAD)?
        .get(GZIP_HEAD_SIZE - GZIP_HEAD.len()..)?;
    after_head.strip_suffix(&EMPTY_BODY)
}

#[cfg(test)]
mod tests {
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
                    size: 51
                }
            );
            assert_eq!(footer.toc_range(offset + 100), offset..offset + 49);
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
            size: 47,
        };
        assert_eq!(legacy(5).len(), 47);
        assert_eq!(Footer::parse(&legacy(5), 60), Ok(want));
        assert_eq!(Footer::parse(&[&[0; 13][..], &legacy(5)].concat(), 60), Ok(want));
    }

    #[test]
    fn header_bytes_without_meaning_may_differ() {
        let mut footer = encode(9);
        footer[4..10].copy_from_slice(&[1, 2, 3, 4, 2, 3]);
        assert_eq!(Footer::parse(&footer, 100).unwrap().toc_offset, 9);
    }

    #[test]
    fn relatives_are_named() {
        let external = bytes(
            "1f8b080400000000 00ff 1500 5347 1100 535441 52475a 45585445524e414c544f43 010000ffff 0000000000000000",
        );
        assert_eq!(external.len(), 46);
        let error = Footer::parse(&external, 4096).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the layer is in the eStargz with external TOC form, which is not supported"
        );
        let zstd = [&[0x50, 0x2a, 0x4d, 0x18, 40, 0, 0, 0][..], &[0; 32], b"GnUlInUx"].concat();
        let error = Footer::parse(&zstd, 4096).unwrap_err();
        assert_eq!(
            error.to_string(),
            "the layer is in the zstd:chunked form, which is not supported"
        );
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
            (
                vec![],
                0,
                "0 bytes are too few for a footer of 51, or 47 in a blob that small",
            ),
            (
                footer[1..].to_vec(),
                500,
                "50 bytes are too few for a footer of 51, or 47 in a blob that small",
            ),
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
}
