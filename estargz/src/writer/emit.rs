//! Second pass of a conversion: headers and contents as independent gzip members, then TOC and footer.
//!
//! A member begins with every non-empty file and with every further chunk of a large one, and ends with the headers
//! before the next. A thread reads the spool, hashes the uncompressed stream and writes the members in order; the pool
//! compresses. Where members begin depends on the entries alone, never on the pool.

use std::collections::VecDeque;
use std::io::{BufWriter, Write};
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, SyncSender};

use sha2::{Digest as _, Sha256};

use super::listing::Listing;
use super::member::{Job, Member, MemberCompressor, work};
use super::scan::Source;
use super::spool::Spool;
use super::{BuildError, BuildOptions, BuiltLayer, MAX_THREADS, header};
use crate::digest::Digest;
use crate::footer;
use crate::input::tar::{TarEntry, TarKind};
use crate::toc::{MAX_ENTRIES, MAX_TOC_BYTES, MAX_TOC_MEMBER_BYTES, Toc, encode_member};

/// Headers without any content between them get a member of their own from this size on, so that no member is large.
const HEADER_RUN_BYTES: usize = 64 << 10;
/// Members under way at once. What they hold is bounded by bytes as well; see [`Emitter::submit`].
const MAX_IN_FLIGHT: usize = 1024;
const WRITE_BUFFER: usize = 1 << 20;

/// One entry to write.
pub(super) struct Item<'a> {
    pub(super) source: &'a Source,
    pub(super) name: String,
    pub(super) kind: TarKind,
    pub(super) link: String,
}

impl Item<'_> {
    fn entry(&self) -> &TarEntry {
        &self.source.entry
    }
}

/// Writes a layer of `items`.
pub(super) fn emit<'a>(
    items: impl Iterator<Item = Item<'a>>,
    spool: &Spool,
    out: impl Write,
    options: &BuildOptions,
) -> Result<BuiltLayer, BuildError> {
    let threads = options.threads.get().min(MAX_THREADS);
    let (sender, receiver) = mpsc::sync_channel(MAX_IN_FLIGHT);
    let receiver = Mutex::new(receiver);
    let compressor = || MemberCompressor::new(options.level).ok_or_else(|| BuildError::level(options.level));
    let compressors = (0..threads).map(|_| compressor()).collect::<Result<Vec<_>, _>>()?;
    let chunk_size = options.chunk_size.into();
    std::thread::scope(|scope| {
        for compressor in compressors {
            scope.spawn(|| work(&receiver, compressor));
        }
        let mut emitter = Emitter {
            spool,
            jobs: sender,
            pending: VecDeque::new(),
            in_flight: 0,
            most_in_flight: (threads as u64 + 2) * chunk_size,
            chunk_size,
            listing: Listing::default(),
            diff_id: Sha256::new(),
            uncompressed_size: 0,
            out: HashingWriter {
                out: BufWriter::with_capacity(WRITE_BUFFER, out),
                hash: Sha256::new(),
                size: 0,
            },
        };
        emitter.entries(items)?;
        emitter.finish(compressor()?)
        // The emitter owned the sending side, so that the threads end here whatever happened.
    })
}

/// A member that is being put together.
#[derive(Default)]
struct Segment {
    chunk: Option<Chunk>,
    tail: Vec<u8>,
}

/// A stretch of the spool, and the TOC entry that describes it.
struct Chunk {
    start: u64,
    size: u64,
    entry: usize,
    digest_known: bool,
}

/// A member that is being compressed.
struct Pending {
    reply: Receiver<Member>,
    size: u64,
    entry: Option<usize>,
}

struct Emitter<'a, W: Write> {
    spool: &'a Spool,
    jobs: SyncSender<Job>,
    pending: VecDeque<Pending>,
    in_flight: u64,
    most_in_flight: u64,
    chunk_size: u64,
    listing: Listing,
    diff_id: Sha256,
    uncompressed_size: u64,
    out: HashingWriter<W>,
}

impl<W: Write> Emitter<'_, W> {
    fn entries<'a>(&mut self, items: impl Iterator<Item = Item<'a>>) -> Result<(), BuildError> {
        let mut segment = Segment::default();
        for item in items {
            header::encode(
                item.entry(),
                item.name.as_bytes(),
                item.kind,
                item.link.as_bytes(),
                &mut segment.tail,
            );
            if segment.tail.len() > HEADER_RUN_BYTES {
                self.submit(std::mem::take(&mut segment))?;
            }
            let size = if item.kind == TarKind::Regular {
                item.entry().size
            } else {
                0
            };
            let chunked = size > self.chunk_size;
            let mut offset = 0;
            self.listing.entry(&item, if chunked { self.chunk_size } else { 0 });
            while offset < size {
                let left = size - offset;
                if offset > 0 {
                    self.listing
                        .chunk(&item, offset, if left > self.chunk_size { self.chunk_size } else { 0 });
                }
                let size = left.min(self.chunk_size);
                let chunk = Chunk {
                    start: item.source.content + offset,
                    size,
                    entry: self.listing.last(),
                    digest_known: !chunked,
                };
                self.submit(std::mem::replace(
                    &mut segment,
                    Segment {
                        chunk: Some(chunk),
                        tail: Vec::new(),
                    },
                ))?;
                offset += size;
            }
            header::pad(size, &mut segment.tail);
            if self.listing.len() > MAX_ENTRIES {
                return Err(BuildError::TooManyChunks { limit: MAX_ENTRIES });
            }
        }
        self.submit(segment)?;
        while !self.pending.is_empty() {
            self.collect()?;
        }
        Ok(())
    }

    /// Sends a member to the pool, first waiting until there is room: what waits holds about two chunks per thread.
    fn submit(&mut self, segment: Segment) -> Result<(), BuildError> {
        let chunk_size = segment.chunk.as_ref().map_or(0, |chunk| chunk.size);
        let chunk_bytes = usize::try_from(chunk_size).expect("chunks are at most 64 MiB");
        let size = chunk_size + segment.tail.len() as u64;
        if size == 0 {
            return Ok(());
        }
        while !self.pending.is_empty()
            && (self.in_flight + size > self.most_in_flight || self.pending.len() >= MAX_IN_FLIGHT)
        {
            self.collect()?;
        }
        let mut data = vec![0; chunk_bytes];
        if let Some(chunk) = &segment.chunk {
            self.spool.read(chunk.start, &mut data).map_err(BuildError::Spool)?;
        }
        data.extend_from_slice(&segment.tail);
        self.diff_id.update(&data);
        self.uncompressed_size += size;
        let (answer, reply) = mpsc::sync_channel(1);
        let digest_of = segment
            .chunk
            .as_ref()
            .filter(|chunk| !chunk.digest_known)
            .map(|_| chunk_bytes);
        self.jobs
            .send(Job {
                data,
                digest_of,
                reply: answer,
            })
            .map_err(|_| BuildError::Worker)?;
        self.in_flight += size;
        self.pending.push_back(Pending {
            reply,
            size,
            entry: segment.chunk.map(|chunk| chunk.entry),
        });
        Ok(())
    }

    /// Waits for the oldest member and writes it.
    fn collect(&mut self) -> Result<(), BuildError> {
        let Some(pending) = self.pending.pop_front() else {
            return Ok(());
        };
        let member = pending.reply.recv().map_err(|_| BuildError::Worker)?;
        self.in_flight -= pending.size;
        if let Some(entry) = pending.entry {
            self.listing.place(entry, self.out.size, member.digest);
        }
        self.out.write(&member.compressed)
    }

    fn finish(mut self, mut compressor: MemberCompressor) -> Result<BuiltLayer, BuildError> {
        let toc: Toc = self.listing.finish();
        let json = toc.to_json();
        drop(toc);
        let toc_offset = self.out.size;
        let toc_digest = Digest::of(&json);
        let member = encode_member(&json);
        self.diff_id.update(&member);
        self.uncompressed_size += member.len() as u64;
        let compressed = compressor.compress(&member);
        if json.len() > MAX_TOC_BYTES || compressed.len() as u64 > MAX_TOC_MEMBER_BYTES {
            return Err(BuildError::TocTooLarge {
                size: json.len(),
                compressed: compressed.len(),
            });
        }
        self.out.write(&compressed)?;
        self.out.write(&footer::encode(toc_offset))?;
        self.out.out.flush().map_err(BuildError::Write)?;
        Ok(BuiltLayer {
            toc_digest,
            diff_id: Digest::from_bytes(self.diff_id.finalize().into()),
            blob_digest: Digest::from_bytes(self.out.hash.finalize().into()),
            blob_size: self.out.size,
            uncompressed_size: self.uncompressed_size,
            toc_offset,
            missing_prioritized: Vec::new(),
        })
    }
}

struct HashingWriter<W: Write> {
    out: BufWriter<W>,
    hash: Sha256,
    size: u64,
}

impl<W: Write> HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), BuildError> {
        self.hash.update(bytes);
        self.size += bytes.len() as u64;
        self.out.write_all(bytes).map_err(BuildError::Write)
    }
}
