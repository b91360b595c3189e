//! The footer: the last bytes of a layer, which say where its TOC is.
//!
//! In gzip layers it is a member with no content whose extra header field carries the TOC offset as 16 hexadecimal digits, so
//! that a plain gunzip of the layer never notices it. Two such forms are read (51 bytes; the older one of 47 bytes has no
//! subfield header), one is written. A third (46 bytes) says that the TOC is in another image. Layers of zstd frames end in a
//! frame that decoders skip ([`zstd`]).
//!
//! Invariant: what a [`Footer`] names lies inside its blob and before the footer: [`Footer::toc`] is never empty, and
//! [`Footer::toc_offset`], the end of the part that holds files, is never behind it.

pub mod zstd;

use std::ops::Range;

use crate::member::Compression;

/// Size of the footer that is written today.
pub const FOOTER_SIZE: usize = 51;
/// Size of the footer of layers from before eStargz, which have no digests.
pub const LEGACY_FOOTER_SIZE: usize = 47;
/// Size of the footer of layers whose TOC is kept in another image.
pub const EXTERNAL_TOC_FOOTER_SIZE: usize = 46;
/// Size of the largest footer: a tail of this many bytes tells the form of any layer.
pub const MAX_FOOTER_SIZE: usize = zstd::MAX_FOOTER_SIZE;

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

/// Which form of the format a layer has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FooterKind {
    /// eStargz, 51 bytes.
    Gzip,
    /// The form before eStargz, 47 bytes; such layers carry no digests.
    LegacyGzip,
    /// eStargz whose TOC is in another image, 46 bytes.
    ExternalToc,
    /// zstd:chunked, 40 or 64 bytes in a frame of their own.
    ZstdChunked,
}

impl FooterKind {
    /// What people call the form.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "eStargz",
            Self::LegacyGzip => "legacy stargz",
            Self::ExternalToc => "eStargz with external TOC",
            Self::ZstdChunked => "zstd:chunked",
        }
    }

    /// How the layer's members are compressed.
    pub const fn compression(self) -> Compression {
        match self {
            Self::Gzip | Self::LegacyGzip | Self::ExternalToc => Compression::Gzip,
            Self::ZstdChunked => Compression::Zstd,
        }
    }
}

/// Where the TOC of a layer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Footer {
    /// Form of the footer.
    pub kind: FooterKind,
    /// Where the part of the blob that holds files ends: where the TOC begins with what frames it, or the footer if the TOC
    /// is elsewhere.
    pub toc_offset: u64,
    /// Where in the blob the compressed TOC is: a gzip member, or the frame in the skippable frame. `None` if it is in
    /// another image.
    pub toc: Option<Range<u64>>,
    /// Size of the footer in bytes.
    pub size: u64,
}

/// Why the end of a blob gives no TOC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FooterError {
    /// The caller has fewer bytes than any footer.
    #[error("{have} bytes are too few for a footer")]
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
    #[error("the layer is {variant}, which is not supported")]
    Unsupported {
        /// Name of the form.
        variant: String,
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
    /// The TOC is not where a TOC can be.
    #[error("the TOC is said to be {length} bytes at {offset}, which do not lie in the blob before {end}")]
    OutOfRange {
        /// Where it is said to begin.
        offset: u64,
        /// Its length in bytes.
        length: u64,
        /// Where it has to end at the latest.
        end: u64,
    },
    /// The annotation that places the TOC is not four numbers.
    #[error("the position of the TOC {text:?} is not of the form offset:length:length:type")]
    BadPosition {
        /// What stands there, made printable.
        text: String,
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
        if let Some(footer) = zstd::parse(tail, blob_size) {
            return footer;
        }
        if tail
            .last_chunk::<EXTERNAL_TOC_FOOTER_SIZE>()
            .is_some_and(|f| body_of(f) == Some(EXTERNAL_TOC_EXTRA))
        {
            let size = EXTERNAL_TOC_FOOTER_SIZE as u64;
            return Ok(Self {
                kind: FooterKind::ExternalToc,
                toc_offset: blob_size - size,
                toc: None,
                size,
            });
        }
        if tail.len() < FOOTER_SIZE && (tail.len() as u64) < blob_size || tail.len() < EXTERNAL_TOC_FOOTER_SIZE {
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
        Ok(Self {
            kind,
            toc_offset,
            toc: Some(toc_offset..footer_offset),
            size,
        })
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
mod tests;
