//! The data path's only unsafe calls: files of the cache mapped into memory.

use std::fs::File;
use std::io;
use std::sync::Arc;

use memmap2::{Mmap, UncheckedAdvice};

/// A file of the cache, mapped for reading. Cheap to clone; clones are the same mapping.
#[derive(Debug, Clone)]
pub struct Mapped(Arc<Mmap>);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Mapped {
    /// Gives the pages that were looked at back to the kernel. They stay in its cache, and whoever looks again has them back
    /// without a read from disk; but they count no longer as memory of this process.
    #[expect(unsafe_code, reason = "advice that drops pages cannot be given safely")]
    pub(super) fn rest(&self) {
        // SAFETY: the mapping is shared with the file and never written to, so what is dropped comes back from the file as it was.
        let rested = unsafe { self.0.unchecked_advise(UncheckedAdvice::DontNeed) };
        if let Err(error) = rested {
            tracing::debug!(%error, "the kernel keeps the pages of an index");
        }
    }
}

/// Maps a file of the cache for reading.
#[expect(unsafe_code, reason = "mapping a file cannot be expressed safely")]
pub(super) fn map_read_only(file: &File) -> io::Result<Mapped> {
    // SAFETY: the files given here are indexes, which are complete before they get their name and are then only ever replaced by
    // rename, never written or truncated, in a directory that only root may enter and that one daemon holds locked.
    unsafe { Mmap::map(file) }.map(|map| Mapped(Arc::new(map)))
}
