//! One gzip member at a time, with a bound on what it may unfold to.
//!
//! Every read of a chunk goes through here: libdeflate unfolds whole members about twice as fast as a streaming
//! inflater, but needs to know the size beforehand. The size in the member's trailer is only a hint (it is data from
//! outside, and the bytes handed in may hold a further member), so a stream takes over where the hint was wrong.

use std::io::Read;

use flate2::bufread::GzDecoder;
use libdeflater::Decompressor;

/// The furthest byte of an unfolded member that may be asked for, 128 MiB.
///
/// A chunk is at most [`crate::toc::MAX_CHUNK_BYTES`]; a writer that packs several chunks into one member starts the
/// next one after some tens of kilobytes of compressed data, so this bound is met only by layers of almost nothing but
/// zeros, and bounds the memory that one member can cost.
pub const MAX_MEMBER_SPAN: usize = 128 << 20;

/// How much a member may hold beyond what is wanted (tar padding and the headers of the entries that follow) and
/// still be unfolded in one go.
const SLACK: usize = 1 << 20;

/// Why a member could not be unfolded.
#[derive(Debug, thiserror::Error)]
pub enum GzipError {
    /// More was asked for than any member may hold.
    #[error("{want} bytes of one member were asked for, more than the limit of {MAX_MEMBER_SPAN}")]
    TooLarge {
        /// Bytes asked for.
        want: usize,
    },
    /// The member holds fewer bytes than the TOC says.
    #[error("the member holds {have} bytes, but {want} are needed")]
    Short {
        /// Bytes found.
        have: usize,
        /// Bytes asked for.
        want: usize,
    },
    /// The bytes are not a gzip member.
    #[error("the {compressed} bytes are not a sound gzip member")]
    Broken {
        /// Compressed bytes at hand.
        compressed: usize,
        /// What the inflater says.
        #[source]
        source: std::io::Error,
    },
}

/// Unfolds the gzip member at the start of `compressed` and leaves exactly its first `want` bytes in `out`.
///
/// What follows the member is ignored. The member's checksum is checked only if nothing stands in the way of doing it
/// for free: callers compare the chunk's digest, which is the check that counts. Memory is bounded by `want` plus
/// 1 MiB whatever the member claims.
pub fn inflate_member(compressed: &[u8], want: usize, out: &mut Vec<u8>) -> Result<(), GzipError> {
    if want > MAX_MEMBER_SPAN {
        return Err(GzipError::TooLarge { want });
    }
    let have = match inflate_whole(compressed, want, out) {
        Some(have) => have,
        None => inflate_stream(compressed, want, out)?,
    };
    if have < want {
        return Err(GzipError::Short { have, want });
    }
    out.truncate(want);
    Ok(())
}

/// The fast path; `None` if the stream has to judge.
fn inflate_whole(compressed: &[u8], want: usize, out: &mut Vec<u8>) -> Option<usize> {
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

fn inflate_stream(compressed: &[u8], want: usize, out: &mut Vec<u8>) -> Result<usize, GzipError> {
    out.clear();
    let limit = u64::try_from(want).unwrap_or(u64::MAX);
    GzDecoder::new(compressed)
        .take(limit)
        .read_to_end(out)
        .map_err(|source| GzipError::Broken {
            compressed: compressed.len(),
            source,
        })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::*;

    fn member(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn every_prefix_length_comes_out_whatever_follows_the_member() {
        let text: Vec<u8> = (0..3_000_000u32).flat_map(|n| n.to_le_bytes()).collect();
        let one = member(&text);
        let two = [&one[..], &member(b"tar header of the next entry")].concat();
        let mut out = vec![9; 10];
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
                inflate_member(compressed, want, &mut out).unwrap();
                assert_eq!(out.len(), want);
                assert!(out == text[..want], "want {want}");
            }
            let error = inflate_member(compressed, text.len() + 1, &mut out).unwrap_err();
            assert_eq!(
                error.to_string(),
                "the member holds 12000000 bytes, but 12000001 are needed"
            );
        }
    }

    #[test]
    fn a_bomb_costs_no_more_than_what_was_asked_for() {
        let bomb = member(&vec![0; 64 << 20]);
        let mut out = Vec::new();
        inflate_member(&bomb, 4096, &mut out).unwrap();
        assert_eq!(out, [0; 4096]);
        assert!(out.capacity() <= 4096 + SLACK, "{}", out.capacity());
        let error = inflate_member(&bomb, MAX_MEMBER_SPAN + 1, &mut out).unwrap_err();
        assert_eq!(
            error.to_string(),
            "134217729 bytes of one member were asked for, more than the limit of 134217728"
        );
    }

    #[test]
    fn broken_members_are_errors() {
        let whole = member(b"some text that is long enough to be cut somewhere in the middle of it");
        for bad in [&[][..], b"\x1f\x8b", b"no gzip at all", &whole[..whole.len() / 2]] {
            assert!(inflate_member(bad, 69, &mut Vec::new()).is_err(), "{bad:?}");
        }
    }
}
