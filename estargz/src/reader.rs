//! Opens a layer that lies somewhere with random access: footer, TOC member, TOC.
//!
//! Used by `estargz inspect` and `estargz verify`. The snapshotter reads ranges over HTTP and calls the pieces
//! ([`Footer::parse`], [`parse_member`], [`parse_frame`], [`Toc::parse`]) itself, because it compares the digest before it parses.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::digest::Digest;
use crate::footer::{Footer, FooterError, MAX_FOOTER_SIZE};
use crate::index::BlobLayout;
use crate::member::Compression;
use crate::toc::{MAX_TOC_MEMBER_BYTES, Toc, TocDocument, TocError, parse_frame, parse_member};

/// Bytes at offsets: a blob in a file or in memory.
pub trait ReadAt {
    /// Reads some bytes at `offset` into `buf`; 0 only at the end or for an empty `buf`.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;

    /// Size of the whole in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`, or fails.
    fn read_exact_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.read_at(offset + done as u64, &mut buf[done..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl<T: ReadAt + ?Sized> ReadAt for &T {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        (**self).read_at(offset, buf)
    }

    fn size(&self) -> u64 {
        (**self).size()
    }
}

impl ReadAt for [u8] {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|start| self.get(start..))
            .unwrap_or_default();
        let read = rest.len().min(buf.len());
        buf[..read].copy_from_slice(&rest[..read]);
        Ok(read)
    }

    fn size(&self) -> u64 {
        self.len() as u64
    }
}

impl ReadAt for Vec<u8> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.as_slice().read_at(offset, buf)
    }

    fn size(&self) -> u64 {
        self.len() as u64
    }
}

/// A file whose size was taken when it was opened.
#[derive(Debug)]
pub struct FileBlob {
    file: File,
    size: u64,
}

impl FileBlob {
    /// A blob in `file`, which must not change from here on.
    pub fn new(file: File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        Ok(Self { file, size })
    }
}

impl ReadAt for FileBlob {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }

    fn size(&self) -> u64 {
        self.size
    }
}

/// Why a layer could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The source of the bytes failed.
    #[error("{len} bytes at offset {offset} of the layer could not be read")]
    Io {
        /// Where the read began.
        offset: u64,
        /// How much it asked for.
        len: usize,
        /// What the system says.
        #[source]
        source: io::Error,
    },
    /// The layer has no footer that can be used.
    #[error("the layer's footer is not usable")]
    Footer(#[source] FooterError),
    /// The layer's TOC is in another image.
    #[error("the layer's TOC is not in the layer but in another image")]
    ExternalToc,
    /// The layer's TOC cannot be used.
    #[error("the layer's TOC at offset {offset} is not usable")]
    Toc {
        /// Where the TOC member begins.
        offset: u64,
        /// What is wrong with it.
        #[source]
        source: TocError,
    },
}

/// A layer whose TOC has been read.
#[derive(Debug)]
pub struct LayerBlob<R> {
    /// Where the bytes come from.
    pub source: R,
    /// The footer.
    pub footer: Footer,
    /// The TOC as it stands in the layer, with its digest.
    pub toc_document: TocDocument,
    /// Digest of the TOC as it is compressed in the layer, by which some manifests name it.
    pub compressed_toc_digest: Digest,
    /// The TOC.
    pub toc: Toc,
}

impl<R: ReadAt> LayerBlob<R> {
    /// Reads footer and TOC. Nothing is compared with an expected digest: that is the caller's part.
    pub fn open(source: R) -> Result<Self, ReadError> {
        let size = source.size();
        let tail_size = MAX_FOOTER_SIZE.min(usize::try_from(size).unwrap_or(MAX_FOOTER_SIZE));
        let tail = read(&source, size - tail_size as u64, tail_size)?;
        let footer = Footer::parse(&tail, size).map_err(ReadError::Footer)?;
        let range = footer.toc.clone().ok_or(ReadError::ExternalToc)?;
        let toc_error = |source| ReadError::Toc {
            offset: range.start,
            source,
        };
        let too_large = || TocError::TooLarge {
            limit: MAX_TOC_MEMBER_BYTES,
            form: "compressed",
        };
        let member_size = Some(range.end - range.start).filter(|size| *size <= MAX_TOC_MEMBER_BYTES);
        let member_size = member_size
            .and_then(|size| usize::try_from(size).ok())
            .ok_or_else(|| toc_error(too_large()))?;
        let member = read(&source, range.start, member_size)?;
        let toc_document = match footer.kind.compression() {
            Compression::Gzip => parse_member(&member),
            Compression::Zstd => parse_frame(&member),
        };
        let toc_document = toc_document.map_err(toc_error)?;
        let toc = Toc::parse(&toc_document.json).map_err(toc_error)?;
        Ok(Self {
            source,
            footer,
            toc_document,
            compressed_toc_digest: Digest::of(&member),
            toc,
        })
    }

    /// What the index needs to know about the blob.
    pub fn layout(&self) -> BlobLayout {
        BlobLayout {
            blob_size: self.source.size(),
            toc_offset: self.footer.toc_offset,
            compression: self.footer.kind.compression(),
        }
    }
}

fn read<R: ReadAt>(source: &R, offset: u64, len: usize) -> Result<Vec<u8>, ReadError> {
    let mut buf = vec![0; len];
    source
        .read_exact_at(offset, &mut buf)
        .map_err(|source| ReadError::Io { offset, len, source })?;
    Ok(buf)
}
