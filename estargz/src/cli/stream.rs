//! Byte streams between transports and the format library: cancellable, counted, and checked at their end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Buf, Bytes};
use estargz::reader::ReadAt;
use hullspeed_registry::{BlobStream, Digest, Error, Hasher};
use tokio::sync::mpsc;

use super::document::BlobRef;

/// Pieces of a download that wait for the decompressor; it is the slower side.
const PIECES_AHEAD: usize = 32;

/// Set once when the command is to end early.
#[derive(Debug, Clone, Default)]
pub(super) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    pub(super) fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(super) fn check(&self) -> io::Result<()> {
        if self.0.load(Ordering::Relaxed) {
            Err(io::Error::other("interrupted"))
        } else {
            Ok(())
        }
    }
}

/// Content that is not what its descriptor says.
#[derive(Debug, thiserror::Error)]
#[error("{what} has {kind} {actual}, not {expected}")]
pub(super) struct Mismatch {
    pub(super) what: String,
    pub(super) kind: &'static str,
    pub(super) actual: String,
    pub(super) expected: String,
}

/// A part of a file.
#[derive(Debug)]
pub(super) struct Section {
    file: Arc<File>,
    start: u64,
    size: u64,
    position: u64,
}

impl Section {
    pub(super) fn new(file: Arc<File>, start: u64, size: u64) -> Self {
        Self {
            file,
            start,
            size,
            position: 0,
        }
    }
}

impl Read for Section {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.read_at(self.position, buf)?;
        self.position += read as u64;
        Ok(read)
    }
}

impl ReadAt for Section {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let left = self.size.saturating_sub(offset);
        let wanted = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        self.file.read_at(&mut buf[..wanted], self.start + offset)
    }

    fn size(&self) -> u64 {
        self.size
    }
}

/// A download as a blocking reader. Dropping it ends the download.
pub(super) struct Download {
    pieces: mpsc::Receiver<Result<Bytes, Error>>,
    current: Bytes,
}

impl Download {
    /// Pumps `stream` from a task of the current runtime.
    pub(super) fn start(mut stream: BlobStream) -> Self {
        let (sender, pieces) = mpsc::channel(PIECES_AHEAD);
        tokio::spawn(async move {
            while let Some(piece) = stream.chunk().await.transpose() {
                let last = piece.is_err();
                if sender.send(piece).await.is_err() || last {
                    break;
                }
            }
        });
        Self {
            pieces,
            current: Bytes::new(),
        }
    }
}

impl Read for Download {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !self.current.has_remaining() {
            match self.pieces.blocking_recv() {
                Some(Ok(piece)) => self.current = piece,
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => return Ok(0),
            }
        }
        let read = self.current.len().min(buf.len());
        self.current.copy_to_slice(&mut buf[..read]);
        Ok(read)
    }
}

/// A blob's bytes; the end is reached only if size and digest are right.
pub(super) struct BlobReader {
    inner: Box<dyn Read + Send>,
    blob: BlobRef,
    hasher: Option<Hasher>,
    seen: u64,
    cancel: Cancel,
    progress: Box<dyn FnMut(u64) + Send>,
}

impl BlobReader {
    pub(super) fn new(inner: Box<dyn Read + Send>, blob: &BlobRef, cancel: Cancel) -> Self {
        let hasher = Some(blob.digest.hasher());
        Self {
            inner,
            blob: blob.clone(),
            hasher,
            seen: 0,
            cancel,
            progress: Box::new(|_| {}),
        }
    }

    /// Tells the number of bytes of each piece read.
    pub(super) fn on_progress(mut self, progress: impl FnMut(u64) + Send + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    fn check_end(&mut self) -> io::Result<()> {
        let Some(hasher) = self.hasher.take() else {
            return Ok(());
        };
        let wrong = |kind, actual: String, expected: String| {
            io::Error::other(Mismatch {
                what: format!("blob {}", self.blob.digest),
                kind,
                actual,
                expected,
            })
        };
        if self.seen != self.blob.size {
            return Err(wrong("size", self.seen.to_string(), self.blob.size.to_string()));
        }
        match hasher.finish() {
            actual if actual == self.blob.digest => Ok(()),
            actual => Err(wrong("digest", actual.to_string(), self.blob.digest.to_string())),
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.cancel.check()?;
        let read = self.inner.read(buf)?;
        if read == 0 && !buf.is_empty() {
            self.check_end()?;
        }
        self.seen += read as u64;
        if self.seen > self.blob.size {
            self.check_end()?;
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buf[..read]);
        }
        (self.progress)(read as u64);
        Ok(read)
    }
}

/// Hashes what is read through it.
pub(super) struct HashRead<R> {
    inner: R,
    hasher: Hasher,
}

impl<R: Read> HashRead<R> {
    pub(super) fn new(inner: R) -> Self {
        // Any SHA-256 digest names the algorithm.
        Self {
            inner,
            hasher: Digest::sha256(&[0; 32]).hasher(),
        }
    }

    /// Reads the rest and returns the digest of everything.
    pub(super) fn finish(mut self) -> io::Result<Digest> {
        io::copy(&mut self, &mut io::sink())?;
        Ok(self.hasher.finish())
    }
}

impl<R: Read> Read for HashRead<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buf)?;
        self.hasher.update(&buf[..read]);
        Ok(read)
    }
}

/// Random access that fails once the command is to end.
pub(super) struct CancelReadAt<R> {
    pub(super) inner: R,
    pub(super) cancel: Cancel,
}

impl<R: ReadAt> ReadAt for CancelReadAt<R> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.cancel.check()?;
        self.inner.read_at(offset, buf)
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }
}

/// A writer that fails once the command is to end.
pub(super) struct CancelWrite<W> {
    pub(super) inner: W,
    pub(super) cancel: Cancel,
}

impl<W: Write> Write for CancelWrite<W> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.cancel.check()?;
        self.inner.write(buf)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &'static [u8], blob: &BlobRef) -> io::Result<Vec<u8>> {
        let mut all = Vec::new();
        BlobReader::new(Box::new(bytes), blob, Cancel::default())
            .read_to_end(&mut all)
            .map(|_| all)
    }

    #[test]
    fn only_the_described_bytes_reach_the_end() {
        let blob = BlobRef::of(b"hello");
        assert_eq!(read(b"hello", &blob).unwrap(), b"hello");
        for wrong in [&b""[..], b"hell", b"hello!", b"hallo"] {
            let error = read(wrong, &blob).unwrap_err();
            assert!(error.get_ref().unwrap().is::<Mismatch>(), "{error}");
        }
        let cancel = Cancel::default();
        cancel.set();
        let mut reader = BlobReader::new(Box::new(&b"hello"[..]), &blob, cancel);
        assert!(reader.read(&mut [0; 8]).is_err());
    }
}
