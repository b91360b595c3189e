//! Checks a whole eStargz layer against what its TOC says; called by `estargz verify`.
//!
//! One pass over the blob in constant memory (plus the TOC): all members are unfolded in order, the tar stream inside is
//! compared with the TOC entry by entry, and every chunk is hashed where the TOC says it lies. That proves both views of
//! the layer equal: the one of a runtime that unpacks it, and the one of a snapshotter that reads single members.
//! Layers of other writers pass too: chunks inside shared members (`innerOffset`), members without any chunk, a
//! `chunkSize` on the last chunk, times rounded to seconds, the legacy footer.

mod compare;
mod members;

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::footer::FooterKind;
use crate::input::tar::{TarEntry, TarError, TarKind, TarReader, shown};
use crate::member::Compression;
use crate::reader::{LayerBlob, ReadAt, ReadError};
use crate::toc::{EntryType, TOC_TAR_NAME, TocEntry, clean_path};
use members::MemberStream;

const READ_BYTES: usize = 64 << 10;

/// What was checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
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
    /// Entries in the layer, the TOC's own not counted.
    pub entries: u64,
    /// Chunks whose digest was checked.
    pub chunks: u64,
    /// Gzip members, those of TOC and footer included.
    pub members: u64,
}

/// Why a layer failed the check.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Footer or TOC are not usable.
    #[error("the layer is not a usable eStargz layer")]
    Open(#[source] ReadError),
    /// A form of the format whose layers are not checked whole.
    #[error("layers in the {} form are not checked", kind.name())]
    Unchecked {
        /// The form.
        kind: FooterKind,
    },
    /// The TOC is not the one that was expected.
    #[error("the TOC's digest is {found}, not {expected}")]
    TocDigest {
        /// What was asked for.
        expected: Digest,
        /// What the layer has.
        found: Digest,
    },
    /// The uncompressed stream is not the one that was expected.
    #[error("the diffID is {found}, not {expected}")]
    DiffId {
        /// What was asked for.
        expected: Digest,
        /// What the layer has.
        found: Digest,
    },
    /// The blob does not unfold to a tar stream.
    #[error("the layer does not unfold to a readable tar stream")]
    Tar(#[source] TarError),
    /// The TOC is not where, or not what, the tar stream has.
    #[error("the layer's structure is wrong: {0}")]
    Structure(&'static str),
    /// An entry differs between tar stream and TOC. `offset` counts in the uncompressed stream.
    #[error("entry {name:?} (tar offset {offset}): {fault}")]
    Entry {
        /// Which one.
        name: String,
        /// Where its header begins.
        offset: u64,
        /// What differs.
        fault: String,
    },
    /// A chunk is not where, or not what, the TOC says. `offset` counts in the blob.
    #[error("entry {name:?}, chunk {chunk} (blob offset {offset}): {fault}")]
    Chunk {
        /// The file.
        name: String,
        /// Its chunk, counted from 0.
        chunk: usize,
        /// Where the chunk's member begins.
        offset: u64,
        /// What is wrong.
        fault: String,
    },
}

/// Checks a layer: footer, TOC, every digest, and that the tar stream and the TOC agree.
pub fn verify_layer(
    blob: impl ReadAt,
    expected_toc: Option<Digest>,
    expected_diff_id: Option<Digest>,
) -> Result<Report, VerifyError> {
    let layer = LayerBlob::open(blob).map_err(VerifyError::Open)?;
    let kind = layer.footer.kind;
    if kind.compression() != Compression::Gzip {
        return Err(VerifyError::Unchecked { kind });
    }
    let toc_digest = layer.toc_document.digest;
    if let Some(expected) = expected_toc.filter(|&expected| expected != toc_digest) {
        return Err(VerifyError::TocDigest {
            expected,
            found: toc_digest,
        });
    }
    let offsets = layer
        .toc
        .entries
        .iter()
        .map(|entry| entry.offset)
        .chain([layer.footer.toc_offset]);
    let mut check = Check {
        tar: TarReader::new(MemberStream::new(&layer.source, offsets)),
        buf: vec![0; READ_BYTES],
        entries: 0,
        chunks: 0,
    };
    check.entries(&layer.toc.entries)?;
    check.toc(layer.footer.toc_offset, toc_digest)?;
    let totals = check
        .tar
        .source()
        .totals()
        .ok_or(VerifyError::Structure("the blob ends inside a gzip member"))?;
    if let Some(expected) = expected_diff_id.filter(|&expected| expected != totals.diff_id) {
        return Err(VerifyError::DiffId {
            expected,
            found: totals.diff_id,
        });
    }
    Ok(Report {
        toc_digest,
        diff_id: totals.diff_id,
        blob_digest: totals.blob_digest,
        blob_size: layer.source.size(),
        uncompressed_size: totals.uncompressed_size,
        entries: check.entries,
        chunks: check.chunks,
        members: totals.members,
    })
}

struct Check<R> {
    tar: TarReader<MemberStream<R>>,
    buf: Vec<u8>,
    entries: u64,
    chunks: u64,
}

impl<R: ReadAt> Check<R> {
    /// Goes through tar stream and TOC side by side, up to the TOC's own entry in the tar stream.
    fn entries(&mut self, toc: &[TocEntry]) -> Result<(), VerifyError> {
        let mut left = toc;
        loop {
            let tar = self.tar.next_entry().map_err(VerifyError::Tar)?;
            let tar = tar.ok_or(VerifyError::Structure("the tar stream ends without the TOC"))?;
            if is_toc(&tar) {
                let Some(more) = left.first() else { return Ok(()) };
                let fault = "is in the TOC and not in the tar stream".to_owned();
                return Err(VerifyError::Entry {
                    name: shown(more.name.as_bytes()),
                    offset: tar.offset,
                    fault,
                });
            }
            let error = |fault| VerifyError::Entry {
                name: shown(&tar.name),
                offset: tar.offset,
                fault,
            };
            let Some((entry, rest)) = left.split_first() else {
                return Err(error("is in the tar stream and not in the TOC".to_owned()));
            };
            if let Some(fault) = compare::difference(&tar, entry) {
                return Err(error(fault));
            }
            let count = rest.iter().take_while(|entry| entry.kind == EntryType::Chunk).count();
            if tar.kind == TarKind::Regular {
                self.file(&tar, &left[..=count])?;
            } else if count > 0 {
                return Err(error("has chunks without being a regular file".to_owned()));
            }
            self.entries += 1;
            left = &rest[count..];
        }
    }

    /// Checks a regular file: `chunks` is its TOC entry and those of its further chunks.
    fn file(&mut self, tar: &TarEntry, chunks: &[TocEntry]) -> Result<(), VerifyError> {
        let error = |fault: String| VerifyError::Entry {
            name: shown(&tar.name),
            offset: tar.offset,
            fault,
        };
        let expected = chunks[0]
            .digest
            .ok_or_else(|| error("has no digest in the TOC".to_owned()))?;
        let mut hash = Sha256::new();
        let mut done = 0;
        for (number, chunk) in chunks.iter().enumerate() {
            if tar.size > 0 {
                done += self.chunk(tar, chunk, (number, chunks.len()), done, &mut hash)?;
            }
        }
        if done != tar.size {
            return Err(error(format!("its chunks cover {done} of {} bytes", tar.size)));
        }
        let found = Digest::from_bytes(hash.finalize().into());
        if found != expected {
            return Err(error(format!("the digest of its content is {found}, not {expected}")));
        }
        Ok(())
    }

    /// Checks chunk `number` of `count`, which begins at `done` in its file, and returns its size.
    fn chunk(
        &mut self,
        tar: &TarEntry,
        chunk: &TocEntry,
        (number, count): (usize, usize),
        done: u64,
        file_hash: &mut Sha256,
    ) -> Result<u64, VerifyError> {
        let error = |fault: String| VerifyError::Chunk {
            name: shown(&tar.name),
            chunk: number,
            offset: chunk.offset,
            fault,
        };
        let left = tar.size - done;
        let size = if chunk.chunk_size == 0 { left } else { chunk.chunk_size };
        if chunk.chunk_offset != done || size > left || size == 0 {
            let (offset, end) = (chunk.chunk_offset, chunk.chunk_offset.saturating_add(size));
            return Err(error(format!(
                "it is said to cover {offset} to {end} of a file of {}, not to begin at {done}",
                tar.size
            )));
        }
        let alone = chunk.digest.filter(|_| count == 1);
        let expected = chunk
            .chunk_digest
            .or(alone)
            .ok_or_else(|| error("it has no digest in the TOC".to_owned()))?;
        let mut hash = Sha256::new();
        let mut hashed = 0;
        while hashed < size {
            let position = self.tar.position();
            let most = self.buf.len().min(usize::try_from(size - hashed).unwrap_or(usize::MAX));
            let read = self.tar.read_body(&mut self.buf[..most]).map_err(VerifyError::Tar)?;
            if hashed == 0 {
                // Only now is a member that begins here known to.
                let begins = self.tar.source().start_of(chunk.offset);
                let begins = begins.ok_or_else(|| error("no gzip member begins there".to_owned()))?;
                if begins.checked_add(chunk.inner_offset) != Some(position) {
                    return Err(error(format!(
                        "it lies {} bytes into the wrong place",
                        chunk.inner_offset
                    )));
                }
            }
            hash.update(&self.buf[..read]);
            file_hash.update(&self.buf[..read]);
            hashed += read as u64;
        }
        let found = Digest::from_bytes(hash.finalize().into());
        if found != expected {
            return Err(error(format!("its digest is {found}, not {expected}")));
        }
        self.chunks += 1;
        Ok(size)
    }

    /// Checks the rest of the stream: the TOC's content and the end.
    fn toc(&mut self, toc_offset: u64, expected: Digest) -> Result<(), VerifyError> {
        let mut hash = Sha256::new();
        let mut first = None;
        loop {
            let position = self.tar.position();
            let read = self.tar.read_body(&mut self.buf).map_err(VerifyError::Tar)?;
            first.get_or_insert(position);
            if read == 0 {
                break;
            }
            hash.update(&self.buf[..read]);
        }
        let begins = self.tar.source().start_of(toc_offset);
        // The member begins with the header, one block (the reference writer needs no more, nor do we).
        if begins.is_none() || begins.and_then(|start| start.checked_add(512)) != first {
            return Err(VerifyError::Structure(
                "the TOC in the tar stream is not where the footer says",
            ));
        }
        if Digest::from_bytes(hash.finalize().into()) != expected {
            return Err(VerifyError::Structure(
                "the TOC in the tar stream differs from the one the footer points to",
            ));
        }
        if self.tar.next_entry().map_err(VerifyError::Tar)?.is_some() {
            return Err(VerifyError::Structure("the tar stream goes on after the TOC"));
        }
        if !self.tar.finish().map_err(VerifyError::Tar)? {
            return Err(VerifyError::Structure("there is data behind the end of the tar stream"));
        }
        Ok(())
    }
}

fn is_toc(tar: &TarEntry) -> bool {
    std::str::from_utf8(&tar.name).is_ok_and(|name| clean_path(name) == [TOC_TAR_NAME])
}

#[cfg(test)]
mod tests;
