//! Builds an eStargz layer from a plain tar stream; called by `estargz convert`.
//!
//! The work has two passes, because later entries of a tar can replace earlier ones: `scan` reads the stream once,
//! keeps each entry's metadata in memory and its content in a spool file; [`crate::order`] decides what survives and in
//! which order; `emit` writes headers and contents again as independent gzip members, compressed by a fixed pool of
//! threads. Nothing about the result depends on time, machine or thread count: the same tar gives the same bytes.

mod emit;
mod header;
mod listing;
mod member;
mod scan;
mod spool;

use std::io::{self, Read, Write};
use std::num::NonZeroUsize;
use std::path::PathBuf;

use crate::digest::Digest;
use crate::input::pax::Timestamp;
use crate::input::tar::{TarEntry, TarError, TarKind};
use crate::order::{self, OrderError};
use crate::toc::{LANDMARK_CONTENTS, MAX_CHUNK_BYTES, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK};
use emit::Item;
use scan::{Scanned, Source};
use spool::Spool;

/// Uncompressed size of a chunk unless told otherwise. A chunk is fetched and verified whole before a byte of it is read: with the
/// reference writer's 4 MiB a page fault in a large library costs 170 ms on a link of 200 Mbit/s, with these a quarter. The demo's
/// image, 86.5 MB, grows by 0.04 % for it.
pub const DEFAULT_CHUNK_SIZE: u32 = 1 << 20;
/// Deflate level unless told otherwise: libdeflate at 6 already makes smaller layers than the reference writer at its 9
/// (97.4 against 98.2 MB for 213 MB of binaries, Python and documents) in a tenth of its processor time; our 9 gains
/// another 0.5 % for twice the time.
pub const DEFAULT_LEVEL: u32 = 6;
/// Most compressing threads; more are not an error, they just do not start.
pub const MAX_THREADS: usize = 256;
/// Most bytes of names, link targets, attributes and other pax records in one layer.
pub const MAX_METADATA_BYTES: usize = 256 << 20;

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
    /// An option outside what is possible.
    #[error("the {option} {value} is out of range; possible are {possible}")]
    Option {
        /// Which one.
        option: &'static str,
        /// What was asked for.
        value: u64,
        /// What can be asked for.
        possible: String,
    },
    /// The input is not a tar stream that can be read to its end.
    #[error("the layer's tar stream is not readable")]
    Tar(#[source] TarError),
    /// The entries do not make a file tree.
    #[error("the layer's entries do not make a file tree")]
    Order(#[source] OrderError),
    /// An entry that no eStargz layer can hold.
    #[error("entry {name:?} cannot be converted: {fault}")]
    Entry {
        /// Which one.
        name: String,
        /// Why.
        fault: &'static str,
    },
    /// More metadata than a layer may have.
    #[error("the layer has more than {limit} entries, or more than {bytes} bytes of names and attributes")]
    TooMuch {
        /// Most entries.
        limit: usize,
        /// Most bytes.
        bytes: usize,
    },
    /// Too small chunks for too large files.
    #[error("the layer has more than {limit} entries and chunks; choose a larger chunk size")]
    TooManyChunks {
        /// Most entries and chunks.
        limit: usize,
    },
    /// A TOC that readers would refuse.
    #[error("the TOC of {size} bytes ({compressed} compressed) is larger than readers accept")]
    TocTooLarge {
        /// Size of the JSON document.
        size: usize,
        /// Size of its gzip member.
        compressed: usize,
    },
    /// The spool file could not be written or read.
    #[error("cannot use the temporary file for the layer's contents")]
    Spool(#[source] io::Error),
    /// The blob could not be written.
    #[error("cannot write the layer")]
    Write(#[source] io::Error),
    /// A compressing thread died.
    #[error("a compressing thread has stopped working")]
    Worker,
}

impl BuildError {
    fn level(level: u32) -> Self {
        let possible = format!("{} to {}", member::LEVELS.start(), member::LEVELS.end());
        Self::Option {
            option: "deflate level",
            value: level.into(),
            possible,
        }
    }
}

/// Converts the plain tar stream `tar` to an eStargz layer written to `out`.
///
/// `out` is flushed, not synced. On an error it is left with part of a layer.
pub fn build(tar: impl Read, out: impl Write, options: &BuildOptions) -> Result<BuiltLayer, BuildError> {
    let chunk_size = u64::from(options.chunk_size);
    if !(1..=MAX_CHUNK_BYTES).contains(&chunk_size) {
        let possible = format!("1 to {MAX_CHUNK_BYTES} bytes");
        return Err(BuildError::Option {
            option: "chunk size",
            value: chunk_size,
            possible,
        });
    }
    if !member::LEVELS.contains(&options.level) {
        return Err(BuildError::level(options.level));
    }
    let mut spool = Spool::new(options.spool_dir.as_deref());
    let scanned = scan::scan(tar, &mut spool)?;
    let landmark = landmark(&mut spool)?;
    let arranged = order::arrange(&scanned.placed, &options.prioritized);
    let (front, rest) = arranged.order.split_at(arranged.prioritized);
    let item = |&position: &usize| item(&scanned, position);
    let landmark_name = if options.prioritized.is_empty() {
        NO_PREFETCH_LANDMARK
    } else {
        PREFETCH_LANDMARK
    };
    let landmark = Item {
        source: &landmark,
        name: landmark_name.to_owned(),
        kind: TarKind::Regular,
        link: String::new(),
    };
    let items = front.iter().map(item).chain([landmark]).chain(rest.iter().map(item));
    let built = emit::emit(items, &spool, out, options)?;
    Ok(BuiltLayer {
        missing_prioritized: arranged.missing,
        ..built
    })
}

/// The entry that ends what is to be prefetched. Like the reference writer's it has no owner, mode or time.
fn landmark(spool: &mut Spool) -> Result<Source, BuildError> {
    let content = spool.end();
    spool.append(LANDMARK_CONTENTS).map_err(BuildError::Spool)?;
    let entry = TarEntry {
        name: Vec::new(),
        kind: TarKind::Regular,
        link: Vec::new(),
        size: LANDMARK_CONTENTS.len() as u64,
        mode: 0,
        uid: 0,
        gid: 0,
        user: Vec::new(),
        group: Vec::new(),
        mtime: Timestamp::default(),
        device: (0, 0),
        xattrs: Vec::new(),
        records: Vec::new(),
        offset: 0,
    };
    Ok(Source {
        entry,
        content,
        digest: Some(Digest::of(LANDMARK_CONTENTS)),
    })
}

fn item(scanned: &Scanned, position: usize) -> Item<'_> {
    let placed = &scanned.placed[position];
    let source = &scanned.sources[placed.source];
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (kind, link) = match placed.target {
        Some(target) => (TarKind::Hardlink, text(&scanned.placed[target].path)),
        None => (source.entry.kind, text(&source.entry.link)),
    };
    let mut name = text(&placed.path);
    if kind == TarKind::Directory {
        // The root is "./", every other directory "path/", as tar has it.
        name.push_str(if name.is_empty() { "./" } else { "/" });
    }
    Item {
        source,
        name,
        kind,
        link,
    }
}

#[cfg(test)]
mod tests;
