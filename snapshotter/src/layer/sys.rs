//! The data path's only unsafe call.

use std::fs::File;
use std::io;

use memmap2::Mmap;

/// Maps a file of the cache for reading.
#[expect(unsafe_code, reason = "mapping a file cannot be expressed safely")]
pub(super) fn map_read_only(file: &File) -> io::Result<Mmap> {
    // SAFETY: the files given here are indexes, which are complete before they get their name and are then only ever replaced by
    // rename, never written or truncated, in a directory that only root may enter and that one daemon holds locked.
    unsafe { Mmap::map(file) }
}
