//! The footer of zstd:chunked, and the annotation that says the same.
//!
//! Both writers of the format end a layer in a frame that zstd decoders skip. It holds little-endian numbers of 64 bits (where
//! the compressed TOC is, its length, its length when unfolded, its type), for one of them also where the tar-split data is, and
//! a mark. stargz-snapshotter writes 40 bytes and the mark `GnUlInUx`, containers/storage writes 64 bytes and `GNUlInUx`. The
//! TOC itself is a frame inside another skippable frame.

use super::{Footer, FooterError, FooterKind};

/// Annotation of stargz-snapshotter on the layer with the digest of the compressed TOC.
pub const STARGZ_CHECKSUM_ANNOTATION: &str = "io.containers.zstd-chunked.manifest-checksum";
/// Annotation of stargz-snapshotter on the layer with the place of the compressed TOC; see [`Position`].
pub const STARGZ_POSITION_ANNOTATION: &str = "io.containers.zstd-chunked.manifest-position";
/// Annotation of containers/storage on the layer with the digest of the compressed TOC.
pub const CHECKSUM_ANNOTATION: &str = "io.github.containers.zstd-chunked.manifest-checksum";
/// Annotation of containers/storage on the layer with the place of the compressed TOC; see [`Position`].
pub const POSITION_ANNOTATION: &str = "io.github.containers.zstd-chunked.manifest-position";

/// Magic and length of a skippable frame.
pub const FRAME_HEADER_SIZE: usize = 8;
/// Size of the larger footer with its frame header.
pub(super) const MAX_FOOTER_SIZE: usize = FRAME_HEADER_SIZE + 64;

const SKIPPABLE_MAGIC: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
const MARKS: [&[u8; 8]; 2] = [b"GnUlInUx", b"GNUlInUx"];
/// The lengths that are known: with four numbers, and with seven.
const LENGTHS: [usize; 2] = [40, 64];
/// The only type of TOC there is.
const TOC_TYPE: u64 = 1;

/// The place of a TOC as footer and annotation give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    offset: u64,
    length: u64,
    kind: u64,
}

impl Position {
    /// Reads the annotation `offset:length:unfolded length:type`.
    pub fn parse(text: &str) -> Result<Self, FooterError> {
        let bad = || FooterError::BadPosition {
            text: text.chars().take(100).collect(),
        };
        let digits = |text: &&str| text.bytes().all(|byte| byte.is_ascii_digit());
        let number = |text: &str| Some(text).filter(digits)?.parse().ok();
        let numbers: Option<Vec<u64>> = text.splitn(5, ':').map(number).collect();
        match numbers.as_deref() {
            Some([offset, length, _, kind]) => Ok(Self {
                offset: *offset,
                length: *length,
                kind: *kind,
            }),
            _ => Err(bad()),
        }
    }

    /// The footer that a layer with this annotation has, without reading it: the annotation is part of the manifest, and
    /// whoever wrote that could have written the footer too.
    pub fn footer(self, blob_size: u64) -> Result<Footer, FooterError> {
        located(self, blob_size, (FRAME_HEADER_SIZE + LENGTHS[0]) as u64)
    }
}

/// Reads the footer at the end of `tail`; `None` if it is of another family.
pub(super) fn parse(tail: &[u8], blob_size: u64) -> Option<Result<Footer, FooterError>> {
    let mark = tail.last_chunk::<8>()?;
    if !MARKS.contains(&mark) {
        return None;
    }
    for length in LENGTHS {
        let size = FRAME_HEADER_SIZE + length;
        let Some(frame) = tail.len().checked_sub(size).and_then(|start| tail.get(start..)) else {
            return Some(Err(FooterError::TooShort { have: tail.len() }));
        };
        if let Some(numbers) = content(frame, length) {
            let number = |at: usize| {
                let bytes = numbers.get(at * 8..)?.first_chunk()?;
                Some(u64::from_le_bytes(*bytes))
            };
            let position = number(0).zip(number(1)).zip(number(3));
            let ((offset, length), kind) = position?;
            let position = Position { offset, length, kind };
            return Some(located(position, blob_size, size as u64));
        }
    }
    Some(Err(unsupported("zstd:chunked with a footer of another length")))
}

/// What a skippable frame of `length` bytes holds.
fn content(frame: &[u8], length: usize) -> Option<&[u8]> {
    let (said, content) = frame.strip_prefix(&SKIPPABLE_MAGIC)?.split_first_chunk::<4>()?;
    let said = usize::try_from(u32::from_le_bytes(*said)).ok()?;
    (said == length && content.len() == length).then_some(content)
}

/// A footer of `size` bytes that says `position`.
fn located(position: Position, blob_size: u64, size: u64) -> Result<Footer, FooterError> {
    let Position { offset, length, kind } = position;
    if kind != TOC_TYPE {
        return Err(unsupported(&format!("zstd:chunked with a TOC of type {kind}")));
    }
    let last = blob_size.saturating_sub(size);
    let outside = FooterError::OutOfRange {
        offset,
        length,
        end: last,
    };
    let end = offset.checked_add(length).filter(|end| length > 0 && *end <= last);
    let begin = offset.checked_sub(FRAME_HEADER_SIZE as u64);
    let (Some(end), Some(toc_offset)) = (end, begin) else {
        return Err(outside);
    };
    Ok(Footer {
        kind: FooterKind::ZstdChunked,
        toc_offset,
        toc: Some(offset..end),
        size,
    })
}

fn unsupported(variant: &str) -> FooterError {
    FooterError::Unsupported {
        variant: variant.to_owned(),
    }
}

/// The TOC in its frame and the footer of stargz-snapshotter's form behind it: what follows a layer's last member, which ends
/// at `toc_offset`. `raw_length` is the length of the TOC when unfolded.
///
/// `None` for a TOC longer than a frame can be.
pub fn encode(toc_offset: u64, compressed_toc: &[u8], raw_length: u64) -> Option<Vec<u8>> {
    let length = u32::try_from(compressed_toc.len()).ok()?;
    let offset = toc_offset.checked_add(FRAME_HEADER_SIZE as u64)?;
    let mut bytes = Vec::with_capacity(compressed_toc.len() + FRAME_HEADER_SIZE + MAX_FOOTER_SIZE);
    bytes.extend_from_slice(&SKIPPABLE_MAGIC);
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(compressed_toc);
    bytes.extend_from_slice(&SKIPPABLE_MAGIC);
    bytes.extend_from_slice(&40_u32.to_le_bytes());
    for number in [offset, length.into(), raw_length, TOC_TYPE] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(MARKS[0]);
    Some(bytes)
}
