//! A zstd frame.
//!
//! A frame is found by its block headers, so that what follows it is left alone, and unfolded in one go into a buffer that has
//! room for a little more than what is wanted. Only a frame that holds much more (a member of many chunks of which the first are
//! wanted) goes through the stream, which needs a window of its own.

use std::io::{self, Read};

use ::zstd::bulk::Decompressor;
use ::zstd::stream::read::Decoder;
use ::zstd::zstd_safe;

/// Room beyond what is wanted in a frame that does not say its size: tar padding and the headers of the entries that follow.
const SLACK: usize = 128 << 10;
/// First bytes of a frame that holds data.
pub(crate) const FRAME_MAGIC: [u8; 4] = [0x28, 0xb5, 0x2f, 0xfd];
/// Largest window accepted, as a power of two: 128 MiB, the limit of the format's reference decoder.
pub(crate) const WINDOW_LOG_MAX: u32 = 27;

/// The fast path: how many bytes came out, or `None` if the stream has to judge.
pub(super) fn whole(compressed: &[u8], want: usize, out: &mut Vec<u8>) -> Option<usize> {
    let frame = first_frame(compressed)?;
    // A frame that says its size is given no more room than that.
    let size = zstd_safe::get_frame_content_size(frame).ok()?;
    let size = size.and_then(|size| usize::try_from(size).ok());
    let capacity = match size {
        Some(size) if size > want + super::SLACK => return None,
        Some(size) => size,
        None => want + SLACK,
    };
    out.clear();
    out.reserve_exact(capacity);
    Decompressor::new().ok()?.decompress_to_buffer(frame, out).ok()
}

/// The first `want` bytes, or all there are, behind what `out` holds.
pub(super) fn stream(compressed: &[u8], want: usize, out: &mut Vec<u8>) -> io::Result<usize> {
    let limit = u64::try_from(want).unwrap_or(u64::MAX);
    let mut decoder = Decoder::with_buffer(compressed)?.single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    decoder.take(limit).read_to_end(out)
}

/// The bytes of the frame at the start of `bytes`, if it is whole and holds data.
fn first_frame(bytes: &[u8]) -> Option<&[u8]> {
    bytes.strip_prefix(&FRAME_MAGIC)?;
    let length = zstd_safe::find_frame_compressed_size(bytes).ok()?;
    bytes.get(..length)
}
