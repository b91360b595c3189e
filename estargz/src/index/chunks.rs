//! The chunks of files and the compressed members that hold them, taken from a TOC.
//!
//! Used only by [`super::build()`]. Invariants of the result: the chunks of one file have consecutive ids and cover it
//! without gap or overlap; members are sorted, do not overlap, end before the TOC, and each one's chunks have
//! consecutive ids.

use std::ops::Range;

use super::BlobLayout;
use super::error::{EntryFault, IndexError};
use super::format::{ChunkRecord, DATA_ALIGN, MemberRecord};
use crate::digest::Digest;
use crate::member::MAX_MEMBER_SPAN;
use crate::toc::{EntryType, MAX_CHUNK_BYTES, Toc, TocEntry};

/// Collects chunks, file by file in inode order.
pub(super) struct Chunks<'a> {
    toc: &'a Toc,
    layout: BlobLayout,
    /// Where members begin, sorted; the TOC last.
    starts: Vec<u64>,
    chunks: Vec<ChunkRecord>,
    /// For each chunk the entry it came from.
    entries: Vec<usize>,
    data_size: u64,
}

impl<'a> Chunks<'a> {
    pub(super) fn of(toc: &'a Toc, layout: BlobLayout) -> Result<Self, IndexError> {
        let mut last = EntryType::Dir;
        for (at, entry) in toc.entries.iter().enumerate() {
            if entry.kind != EntryType::Chunk {
                last = entry.kind;
            } else if last != EntryType::Reg {
                return Err(IndexError::entry(at, &entry.name, EntryFault::StrayChunk));
            }
        }
        // Every entry counts, also of files that are hidden or replaced: their members end others all the same.
        let mut starts: Vec<u64> = toc
            .entries
            .iter()
            .map(|entry| entry.offset)
            .filter(|at| *at < layout.toc_offset)
            .collect();
        starts.push(layout.toc_offset);
        starts.sort_unstable();
        starts.dedup();
        Ok(Self {
            toc,
            layout,
            starts,
            chunks: Vec::new(),
            entries: Vec::new(),
            data_size: 0,
        })
    }

    /// Adds the regular file that entry `at` describes; returns its chunk ids and its place in the data file.
    pub(super) fn add_file(&mut self, at: usize, ino: u32) -> Result<(Range<u32>, u64), IndexError> {
        let file = &self.toc.entries[at];
        let first = self.next_id()?;
        let mut pieces: Vec<usize> = vec![at];
        pieces.extend((at + 1..self.toc.entries.len()).take_while(|at| self.toc.entries[*at].kind == EntryType::Chunk));
        if file.size == 0 && pieces.len() == 1 {
            return Ok((first..first, 0));
        }
        pieces.sort_by_key(|at| self.toc.entries[*at].chunk_offset);
        let mut end = 0;
        for piece in &pieces {
            end = self.add_chunk(file, *piece, pieces.len() == 1, end, ino)?;
        }
        if end != file.size {
            return Err(self.fault(
                at,
                EntryFault::ChunksMissing {
                    end,
                    file_size: file.size,
                },
            ));
        }
        let data_offset = self.data_size;
        let past = data_offset
            .checked_add(file.size)
            .and_then(|end| end.checked_next_multiple_of(DATA_ALIGN));
        self.data_size = past.filter(|end| i64::try_from(*end).is_ok()).ok_or_else(|| {
            self.fault(
                at,
                EntryFault::Number {
                    field: "size",
                    value: file.size,
                    limit: i64::MAX.unsigned_abs(),
                },
            )
        })?;
        Ok((first..self.next_id()?, data_offset))
    }

    fn fault(&self, at: usize, fault: EntryFault) -> IndexError {
        IndexError::entry(at, &self.toc.entries[at].name, fault)
    }

    fn next_id(&self) -> Result<u32, IndexError> {
        u32::try_from(self.chunks.len()).map_err(|_| IndexError::TooLarge { table: "chunk table" })
    }

    /// Adds the chunk that should begin at `expected`; returns where it ends.
    fn add_chunk(
        &mut self,
        file: &TocEntry,
        at: usize,
        only: bool,
        expected: u64,
        ino: u32,
    ) -> Result<u64, IndexError> {
        let chunk = &self.toc.entries[at];
        let offset = chunk.chunk_offset;
        if offset != expected {
            return Err(self.fault(
                at,
                EntryFault::ChunkPlace {
                    found: offset,
                    expected,
                },
            ));
        }
        let size = if chunk.chunk_size == 0 {
            file.size.saturating_sub(offset)
        } else {
            chunk.chunk_size
        };
        let end = offset.checked_add(size).filter(|end| size > 0 && *end <= file.size);
        let end = end.ok_or_else(|| {
            self.fault(
                at,
                EntryFault::ChunkSize {
                    offset,
                    size,
                    file_size: file.size,
                },
            )
        })?;
        if size > MAX_CHUNK_BYTES {
            return Err(self.fault(at, EntryFault::ChunkTooLarge { offset, size }));
        }
        let digest = chunk.chunk_digest.or(file.digest.filter(|_| only));
        let digest = digest.ok_or_else(|| self.fault(at, EntryFault::NoChunkDigest { offset }))?;
        let record = self.placed(at, size)?;
        self.chunks.push(ChunkRecord {
            file_offset: offset.into(),
            ino: ino.into(),
            digest: *digest.as_bytes(),
            ..record
        });
        self.entries.push(at);
        Ok(end)
    }

    /// Where in the blob the chunk of `size` bytes lies; `member` is still the position in `starts`.
    fn placed(&self, at: usize, size: u64) -> Result<ChunkRecord, IndexError> {
        let TocEntry {
            offset, inner_offset, ..
        } = self.toc.entries[at];
        let outside = EntryFault::Offset {
            offset,
            toc_offset: self.layout.toc_offset,
        };
        let start = self
            .starts
            .binary_search(&offset)
            .ok()
            .filter(|_| offset < self.layout.toc_offset);
        let start = start.ok_or_else(|| self.fault(at, outside))?;
        let end = inner_offset.saturating_add(size);
        if end > MAX_MEMBER_SPAN as u64 {
            return Err(self.fault(at, EntryFault::MemberSpan { end }));
        }
        let compressed = self.starts[start + 1] - offset;
        if end > compressed.saturating_mul(self.layout.compression.max_expansion()) {
            return Err(self.fault(at, EntryFault::Expansion { end, compressed }));
        }
        let small = |n: u64| u32::try_from(n).expect("within MAX_MEMBER_SPAN");
        let start = u32::try_from(start).map_err(|_| IndexError::TooLarge { table: "member table" })?;
        Ok(ChunkRecord {
            file_offset: 0.into(),
            ino: 0.into(),
            member: start.into(),
            inner_offset: small(inner_offset).into(),
            size: small(size).into(),
            digest: *Digest::from_bytes([0; 32]).as_bytes(),
        })
    }

    /// The finished tables and the size of the data file. Only members that hold chunks are kept.
    pub(super) fn finish(mut self) -> Result<(Vec<ChunkRecord>, Vec<MemberRecord>, u64), IndexError> {
        let mut by_start: Vec<Option<Range<u32>>> = vec![None; self.starts.len()];
        for (id, chunk) in (0..).zip(&self.chunks) {
            let held = &mut by_start[chunk.member.get() as usize];
            let expected = held.as_ref().map_or(id, |held| held.end);
            if expected != id {
                let entry = self.entries[id as usize];
                let offset = self.toc.entries[entry].offset;
                return Err(self.fault(entry, EntryFault::ScatteredMember { offset }));
            }
            *held = Some(held.as_ref().map_or(id, |held| held.start)..id + 1);
        }
        let mut members = Vec::new();
        let mut number = vec![0; by_start.len()];
        for (at, held) in by_start.into_iter().enumerate() {
            let Some(held) = held else { continue };
            number[at] = u32::try_from(members.len()).map_err(|_| IndexError::TooLarge { table: "member table" })?;
            members.push(MemberRecord {
                start: self.starts[at].into(),
                end: self.starts[at + 1].into(),
                first_chunk: held.start.into(),
                chunk_count: (held.end - held.start).into(),
            });
        }
        for chunk in &mut self.chunks {
            chunk.member = number[chunk.member.get() as usize].into();
        }
        Ok((self.chunks, members, self.data_size))
    }
}
