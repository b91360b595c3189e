//! A blob read from end to end as the concatenation of gzip members it is, noting where members begin.

use std::collections::HashMap;
use std::io::{self, BufRead, Read};

use flate2::bufread::GzDecoder;
use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::reader::ReadAt;

const BUFFER_BYTES: usize = 128 << 10;

/// A member that does not unfold.
#[derive(Debug, thiserror::Error)]
#[error("the gzip member at offset {offset} of the blob is broken")]
struct BrokenMember {
    offset: u64,
    #[source]
    source: io::Error,
}

/// Digests and sizes of what was read.
#[derive(Debug)]
pub(super) struct Totals {
    pub(super) blob_digest: Digest,
    pub(super) diff_id: Digest,
    pub(super) uncompressed_size: u64,
    pub(super) members: u64,
}

/// The uncompressed stream of a blob.
pub(super) struct MemberStream<R> {
    state: State<R>,
    // Members that the TOC mentions, by their offset in the blob: where they begin in the uncompressed stream, once
    // known. Only these are kept, so that a blob of countless tiny members costs no memory.
    starts: HashMap<u64, Option<u64>>,
    hash: Sha256,
    position: u64,
    members: u64,
}

// A decoder owns its source, which has to be taken out between two members.
enum State<R> {
    Between(Box<Source<R>>),
    Inside {
        offset: u64,
        decoder: Box<GzDecoder<Box<Source<R>>>>,
    },
    Broken,
}

impl<R: ReadAt> MemberStream<R> {
    /// Reads `blob` from its start; `offsets` are those of the members whose position will be asked for.
    pub(super) fn new(blob: R, offsets: impl Iterator<Item = u64>) -> Self {
        let source = Source {
            blob,
            buffer: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
            next: 0,
            hash: Sha256::new(),
        };
        Self {
            state: State::Between(Box::new(source)),
            starts: offsets.map(|offset| (offset, None)).collect(),
            hash: Sha256::new(),
            position: 0,
            members: 0,
        }
    }

    /// Position in the uncompressed stream of the member at `offset`, if it begins there and has been reached.
    pub(super) fn start_of(&self, offset: u64) -> Option<u64> {
        self.starts.get(&offset).copied().flatten()
    }

    /// The totals, once the stream has been read to its end.
    pub(super) fn totals(&self) -> Option<Totals> {
        let State::Between(source) = &self.state else {
            return None;
        };
        Some(Totals {
            blob_digest: Digest::from_bytes(source.hash.clone().finalize().into()),
            diff_id: Digest::from_bytes(self.hash.clone().finalize().into()),
            uncompressed_size: self.position,
            members: self.members,
        })
    }
}

impl<R: ReadAt> Read for MemberStream<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            match std::mem::replace(&mut self.state, State::Broken) {
                State::Broken => return Err(io::Error::other("the stream failed before")),
                State::Between(mut source) => {
                    if source.fill_buf()?.is_empty() {
                        self.state = State::Between(source);
                        return Ok(0);
                    }
                    let offset = source.offset();
                    self.members += 1;
                    if let Some(start) = self.starts.get_mut(&offset) {
                        *start = Some(self.position);
                    }
                    self.state = State::Inside {
                        offset,
                        decoder: Box::new(GzDecoder::new(source)),
                    };
                }
                State::Inside { offset, mut decoder } => {
                    let broken = |source: io::Error| io::Error::new(source.kind(), BrokenMember { offset, source });
                    let count = decoder.read(buf).map_err(broken)?;
                    if count == 0 {
                        self.state = State::Between(decoder.into_inner());
                        continue;
                    }
                    self.state = State::Inside { offset, decoder };
                    self.hash.update(&buf[..count]);
                    self.position += count as u64;
                    return Ok(count);
                }
            }
        }
    }
}

/// The blob's bytes, hashed as they pass.
struct Source<R> {
    blob: R,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
    /// Offset in the blob behind the buffer.
    next: u64,
    hash: Sha256,
}

impl<R> Source<R> {
    fn offset(&self) -> u64 {
        self.next - (self.end - self.start) as u64
    }
}

impl<R: ReadAt> BufRead for Source<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.start == self.end {
            let left = self.blob.size().saturating_sub(self.next);
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            self.blob.read_exact_at(self.next, &mut self.buffer[..most])?;
            self.hash.update(&self.buffer[..most]);
            (self.start, self.end) = (0, most);
            self.next += most as u64;
        }
        Ok(&self.buffer[self.start..self.end])
    }

    fn consume(&mut self, count: usize) {
        self.start = self.end.min(self.start + count);
    }
}

impl<R: ReadAt> Read for Source<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buf.len());
        buf[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}
