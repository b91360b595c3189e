//! A gzip member.
//!
//! libdeflate unfolds whole members about twice as fast as a streaming inflater, but needs to know the size beforehand. The
//! size in the member's trailer is only a hint (it is data from outside, and the bytes handed in may hold a further member), so
//! a stream takes over where the hint was wrong.

use std::io::{self, Read};

use flate2::bufread::GzDecoder;
use libdeflater::Decompressor;

use super::SLACK;

/// The fast path: how many bytes came out, or `None` if the stream has to judge.
pub(super) fn whole(compressed: &[u8], want: usize, out: &mut Vec<u8>) -> Option<usize> {
    let hint = usize::try_from(u32::from_le_bytes(*compressed.last_chunk::<4>()?)).ok()?;
    let capacity = if (want..=want + SLACK).contains(&hint) {
        hint
    } else {
        want
    };
    out.clear();
    out.resize(capacity, 0);
    Decompressor::new().gzip_decompress(compressed, out).ok()
}

/// The first `want` bytes, or all there are, behind what `out` holds.
pub(super) fn stream(compressed: &[u8], want: usize, out: &mut Vec<u8>) -> io::Result<usize> {
    let limit = u64::try_from(want).unwrap_or(u64::MAX);
    GzDecoder::new(compressed).take(limit).read_to_end(out)
}
