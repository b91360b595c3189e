//! One compressed member of a layer at a time, with a bound on what it may unfold to.
//!
//! Every read of a chunk goes through [`unfold`]. A member is a gzip member or a zstd frame ([`Compression`]). The TOC says how
//! much of a member is wanted, and no more than that, and a constant, is ever held.

mod gzip;
mod zstd;

use serde::{Deserialize, Serialize};

/// The furthest byte of an unfolded member that may be asked for, 128 MiB.
///
/// A chunk is at most [`crate::toc::MAX_CHUNK_BYTES`]; a writer that packs several chunks into one member starts the
/// next one after some tens of kilobytes of compressed data, so this bound is met only by layers of almost nothing but
/// zeros, and bounds the memory that one member can cost.
pub const MAX_MEMBER_SPAN: usize = 128 << 20;

/// How much a member may hold beyond what is wanted (tar padding and the headers of the entries that follow) and
/// still be unfolded in one go.
const SLACK: usize = 1 << 20;

/// How the members of a layer are compressed; all of one layer alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Gzip members: eStargz and its forebear.
    #[default]
    Gzip,
    /// Zstd frames: zstd:chunked.
    Zstd,
}

impl Compression {
    /// What the first bytes of a member say.
    pub fn of(member: &[u8]) -> Option<Self> {
        match member {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            _ if member.starts_with(&FRAME_MAGIC) => Some(Self::Zstd),
            _ => None,
        }
    }

    /// The name that media types use.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        }
    }

    /// Most bytes that one compressed byte can stand for. Deflate says at most 258 bytes in 2 bits; a zstd block of at most
    /// 128 KiB takes at least 4 bytes.
    pub const fn max_expansion(self) -> u64 {
        match self {
            Self::Gzip => 1032,
            Self::Zstd => (128 << 10) / 4,
        }
    }
}

/// Why a member could not be unfolded.
#[derive(Debug, thiserror::Error)]
pub enum MemberError {
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
    /// The bytes are no member of the layer's compression.
    #[error("the {compressed} bytes are not a sound {} member", compression.name())]
    Broken {
        /// What they should be.
        compression: Compression,
        /// Compressed bytes at hand.
        compressed: usize,
        /// What the decompressor says.
        #[source]
        source: std::io::Error,
    },
}

/// Unfolds the member at the start of `compressed` and leaves exactly its first `want` bytes in `out`.
///
/// What follows the member is ignored. The member's checksum is checked only if nothing stands in the way of doing it
/// for free: callers compare the chunk's digest, which is the check that counts. Memory is bounded by `want` plus
/// 1 MiB whatever the member claims, and for zstd by the window besides, of which no more is touched than was unfolded.
pub fn unfold(compression: Compression, compressed: &[u8], want: usize, out: &mut Vec<u8>) -> Result<(), MemberError> {
    if want > MAX_MEMBER_SPAN {
        return Err(MemberError::TooLarge { want });
    }
    let whole = match compression {
        Compression::Gzip => gzip::whole(compressed, want, out),
        Compression::Zstd => zstd::whole(compressed, want, out),
    };
    let have = match whole {
        Some(have) => Ok(have),
        None => {
            out.clear();
            match compression {
                Compression::Gzip => gzip::stream(compressed, want, out),
                Compression::Zstd => zstd::stream(compressed, want, out),
            }
        }
    };
    let have = have.map_err(|source| MemberError::Broken {
        compression,
        compressed: compressed.len(),
        source,
    })?;
    if have < want {
        return Err(MemberError::Short { have, want });
    }
    out.truncate(want);
    Ok(())
}

pub(crate) use zstd::{FRAME_MAGIC, WINDOW_LOG_MAX};

#[cfg(test)]
mod tests;
