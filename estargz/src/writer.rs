//! Builds an eStargz layer from a plain tar stream; called by `estargz convert`.
//!
//! The work has two passes, because later entries of a tar can replace earlier ones: `scan` reads the stream once,
//! keeps each entry's metadata in memory and its content in a spool file; [`crate::order`] decides what survives and in
//! which order; `emit` writes headers and contents again as independent gzip members, compressed by a fixed pool of
//! threads. Nothing about the result depends on time, machine or thread count: the same tar gives the same bytes.

use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use crate::digest::Digest;

/// Uncompressed size of a chunk unless told otherwise, the reference writer's.
pub const DEFAULT_CHUNK_SIZE: u32 = 4 << 20;
/// Deflate level unless told otherwise.
pub const DEFAULT_LEVEL: u32 = 9;

/// How to build a layer.
#[derive(Debug, Clone)]
pub struct BuildOptions {
    /// Largest uncompressed chunk in bytes.
    pub chunk_size: u32,
    /// Deflate level, 1 to 12.
    pub level: u32,
    /// Compressing threads. The result does not depend on it.
    pub threads: NonZeroUsize,
    /// Paths to put at the front, in this order, for prefetching.
    pub prioritized: Vec<Vec<u8>>,
    /// Directory for the (unnamed) spool file; the system's temporary directory if `None`.
    pub spool_dir: Option<PathBuf>,
}

impl Default for BuildOptions {
    fn default() -> Self {
        Self {
            chunk_size: DEFAULT_CHUNK_SIZE,
            level: DEFAULT_LEVEL,
            threads: std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN),
            prioritized: Vec::new(),
            spool_dir: None,
        }
    }
}

/// What was built.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BuiltLayer {
    /// Digest of the TOC document.
    pub toc_digest: Digest,
    /// Digest of the uncompressed stream.
    pub diff_id: Digest,
    /// Digest of the blob.
    pub blob_digest: Digest,
    /// Size of the blob in bytes.
    pub blob_size: u64,
    /// Size of the uncompressed stream in bytes.
    pub uncompressed_size: u64,
    /// Offset of the TOC's gzip member in the blob.
    pub toc_offset: u64,
    /// Prioritized paths that the layer does not have, as they were given.
    pub missing_prioritized: Vec<Vec<u8>>,
}

/// Why a layer could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// The blob could not be written.
    #[error("cannot write the layer")]
    Write(#[source] io::Error),
}

/// Converts the plain tar stream `tar` to an eStargz layer written to `out`.
pub fn build(_tar: impl Read, _out: impl Write, _options: &BuildOptions) -> Result<BuiltLayer, BuildError> {
    Err(BuildError::Write(io::Error::other("not there yet")))
}
