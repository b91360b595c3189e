//! Which chunks of a layer were read since it was last looked at: one bit each, for choosing what to give up.
//!
//! What the kernel has in its page cache is read without our seeing it; but then it is read from there, and the disk can lose it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// The chunks that were read lately.
#[derive(Debug)]
pub(super) struct Heat(Box<[AtomicU64]>);

impl Heat {
    pub(super) fn cold(chunks: u32) -> Self {
        Self((0..chunks.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Notes that chunks are read.
    pub(super) fn mark(&self, chunks: Range<u32>) {
        for chunk in chunks {
            if let Some(word) = self.0.get((chunk / 64) as usize) {
                let mask = 1 << (chunk % 64);
                // Mostly set already, and then nothing is written that other threads have in their caches.
                if word.load(Ordering::Relaxed) & mask == 0 {
                    word.fetch_or(mask, Ordering::Relaxed);
                }
            }
        }
    }

    /// Whether the chunk was read since the last cooling.
    pub(super) fn is_warm(&self, chunk: u32) -> bool {
        self.0
            .get((chunk / 64) as usize)
            .is_some_and(|word| word.load(Ordering::Relaxed) & (1 << (chunk % 64)) != 0)
    }

    /// Forgets what was read.
    pub(super) fn cool(&self) {
        for word in &self.0 {
            word.store(0, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_is_warm_until_it_cools() {
        let heat = Heat::cold(130);
        heat.mark(60..70);
        heat.mark(129..200);
        assert!(heat.is_warm(63) && heat.is_warm(64) && heat.is_warm(129));
        assert!(!heat.is_warm(59) && !heat.is_warm(70) && !heat.is_warm(1 << 30));
        heat.cool();
        assert!(!heat.is_warm(63));
    }
}
