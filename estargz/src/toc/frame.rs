//! The zstd frame that carries the TOC of zstd:chunked: the JSON form and nothing around it.

use std::io::{self, Read};

use zstd::stream::read::Decoder;

use super::{MAX_TOC_BYTES, MAX_TOC_MEMBER_BYTES, TocDocument, TocError};
use crate::digest::Digest;
use crate::member::{FRAME_MAGIC, WINDOW_LOG_MAX};

/// Unfolds the TOC's frame, the bytes at [`crate::footer::Footer::toc`] of a zstd:chunked layer.
///
/// Memory is bounded by [`MAX_TOC_BYTES`] and the largest window, whatever the frame holds.
pub fn parse_frame(frame: &[u8]) -> Result<TocDocument, TocError> {
    if frame.len() as u64 > MAX_TOC_MEMBER_BYTES {
        return Err(TocError::TooLarge {
            limit: MAX_TOC_MEMBER_BYTES,
            form: "compressed",
        });
    }
    let broken = |source| TocError::Frame {
        compressed: frame.len(),
        source,
    };
    if !frame.starts_with(&FRAME_MAGIC) {
        return Err(broken(io::Error::new(
            io::ErrorKind::InvalidData,
            "no frame begins there",
        )));
    }
    let limit = MAX_TOC_BYTES as u64;
    let mut decoder = Decoder::with_buffer(frame).map_err(broken)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(broken)?;
    let mut json = Vec::new();
    decoder.take(limit + 1).read_to_end(&mut json).map_err(broken)?;
    if json.len() as u64 > limit {
        return Err(TocError::TooLarge {
            limit,
            form: "uncompressed",
        });
    }
    Ok(TocDocument {
        digest: Digest::of(&json),
        json,
    })
}
