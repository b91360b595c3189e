//! Has the kernel forget what it has read of a chunk, in a file system that it serves itself.

use std::ffi::OsStr;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use estargz::index::Chunk;
use rustix::fs::{Advice, Mode, OFlags};

use crate::layer::cache::OpenLayer;

/// The largest page of any machine this runs on.
const PAGE: u64 = 64 << 10;

/// Forgets a chunk of the layer that is mounted at `root`.
pub(super) fn forget(root: impl AsFd, layer: &OpenLayer, chunk: &Chunk) -> io::Result<()> {
    let path = layer.index().path_of(chunk.ino);
    let path = Path::new(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(&path)));
    // It is a regular file by the index, and opening it reads nothing of it.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(root, path, flags, Mode::empty())?;
    // Only pages that lie in the range as a whole are dropped.
    let first = chunk.file_offset / PAGE * PAGE;
    let end = chunk
        .file_offset
        .saturating_add(u64::from(chunk.size))
        .next_multiple_of(PAGE);
    Ok(rustix::fs::fadvise(
        file,
        first,
        NonZeroU64::new(end - first),
        Advice::DontNeed,
    )?)
}
