//! Gzip members and the threads that compress them.

use std::sync::mpsc::{Receiver, SyncSender};
use std::sync::{Mutex, PoisonError};

use libdeflater::{CompressionLvl, Compressor};

use crate::digest::Digest;

/// Levels that libdeflate has, without "stored".
pub(super) const LEVELS: std::ops::RangeInclusive<u32> = 1..=12;

/// Makes single gzip members: no name, no time, "unknown" operating system.
pub(super) struct MemberCompressor(Compressor);

impl MemberCompressor {
    /// `None` for a level outside [`LEVELS`].
    pub(super) fn new(level: u32) -> Option<Self> {
        let level = i32::try_from(level).ok().filter(|_| LEVELS.contains(&level))?;
        Some(Self(Compressor::new(CompressionLvl::new(level).ok()?)))
    }

    pub(super) fn compress(&mut self, data: &[u8]) -> Vec<u8> {
        let mut out = vec![0; self.0.gzip_compress_bound(data.len())];
        let size = self
            .0
            .gzip_compress(data, &mut out)
            .expect("the bound leaves room for any input");
        out.truncate(size);
        out
    }
}

/// One member to make: a chunk of a file, and what the tar stream has between it and the next chunk.
pub(super) struct Job {
    pub(super) data: Vec<u8>,
    /// How much of `data` is the chunk, if its digest is not known yet.
    pub(super) digest_of: Option<usize>,
    /// Takes exactly one answer. If the thread dies instead, the receiver notices.
    pub(super) reply: SyncSender<Member>,
}

/// A compressed member.
pub(super) struct Member {
    pub(super) compressed: Vec<u8>,
    pub(super) digest: Option<Digest>,
}

/// Body of a compressing thread: works until the sending side of `jobs` is gone.
pub(super) fn work(jobs: &Mutex<Receiver<Job>>, mut compressor: MemberCompressor) {
    loop {
        // The lock is held while waiting; whoever gets the job lets the next one wait.
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { data, digest_of, reply }) = job else {
            return;
        };
        let digest = digest_of.map(|size| Digest::of(&data[..size]));
        // Nobody waits for the answer after an error elsewhere.
        let _ = reply.send(Member {
            compressed: compressor.compress(&data),
            digest,
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn members_have_a_fixed_header_and_unfold() {
        for level in LEVELS {
            let mut compressor = MemberCompressor::new(level).unwrap();
            for data in [vec![], vec![7; 100_000], (0..=255).collect()] {
                let member = compressor.compress(&data);
                assert_eq!(member[..8], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0]);
                assert_eq!(member[9], 0xff);
                let mut back = Vec::new();
                flate2::read::GzDecoder::new(member.as_slice())
                    .read_to_end(&mut back)
                    .unwrap();
                assert_eq!(back, data);
            }
        }
        assert!(MemberCompressor::new(0).is_none() && MemberCompressor::new(13).is_none());
    }
}
