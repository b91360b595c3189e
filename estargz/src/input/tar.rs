//! A strict, bounded reader of tar streams.
//!
//! Follows Go's `archive/tar` where dialects leave room (it is what unpacks layers on every containerd node), so that a
//! converted layer means what the original meant: links, directories and devices have no content whatever their size
//! field says; the name of a pax sparse file wins over a GNU long name, which wins over a pax path, which wins over the header.
//! Handles old (v7), ustar, star, GNU and
//! pax headers, and GNU's sparse formats, which it expands. Global pax headers are skipped, as containerd and Docker do.
//!
//! Names are passed on as bytes, unchecked: what is an acceptable name is the caller's business.

use std::io::{self, Read};

mod body;
mod fields;

use super::pax::{self, Record, Timestamp};
use super::sparse;
use fields::{Decoded, checksum_matches, is_zero, sort_records, text};

pub(super) use fields::numeric;

/// Tar counts in blocks of 512 bytes.
pub const BLOCK: usize = 512;
const BLOCK_U64: u64 = BLOCK as u64;
/// Largest extended header or long name: Go's limit, so nothing that containerd can unpack is refused.
pub const MAX_EXTENSION_BYTES: u64 = 1 << 20;
/// Zeros that sparse files may add to one stream. Without a limit a kilobyte of tar could expand to exabytes.
pub const MAX_HOLE_BYTES: u64 = 64 << 30;

/// Why a stream is not a readable tar archive. Offsets count from the start of the uncompressed stream.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    /// The source failed, or its decompression did.
    #[error("cannot read the tar stream at offset {offset}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The stream has no bytes.
    #[error("the tar stream is empty")]
    Empty,
    /// The stream stops inside something.
    #[error("the tar stream is truncated at offset {offset}, inside {inside}")]
    Truncated {
        /// Where.
        offset: u64,
        /// In what.
        inside: String,
    },
    /// A block is where a header should be and is none.
    #[error("no tar header at offset {offset}: wrong checksum")]
    NoHeader {
        /// Where.
        offset: u64,
    },
    /// A header has a field that makes no sense.
    #[error("tar entry {name:?} at offset {offset}: bad {field}")]
    BadField {
        /// Which entry.
        name: String,
        /// Where its header begins.
        offset: u64,
        /// What is wrong.
        field: &'static str,
    },
    /// An entry of a type that has no place in a layer.
    #[error("tar entry {name:?} at offset {offset}: type {:?} is not supported in a layer", char::from(*.typeflag))]
    UnsupportedType {
        /// Which entry.
        name: String,
        /// Where its header begins.
        offset: u64,
        /// The type byte of its header.
        typeflag: u8,
    },
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TarKind {
    /// Directory.
    Directory,
    /// Regular file.
    Regular,
    /// Symbolic link.
    Symlink,
    /// Another name of an earlier entry.
    Hardlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
}

/// One entry's metadata, with all extensions applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Name as it is in the stream.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: TarKind,
    /// Target of a link as it is in the stream.
    pub link: Vec<u8>,
    /// Bytes of content, expanded if sparse; 0 for everything but regular files.
    pub size: u64,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Owner's name.
    pub user: Vec<u8>,
    /// Group's name.
    pub group: Vec<u8>,
    /// Modification time.
    pub mtime: Timestamp,
    /// Major and minor number of a device.
    pub device: (u64, u64),
    /// Extended attributes in the order of their names.
    pub xattrs: Vec<Record>,
    /// Pax records that say nothing of the above (`atime`, `comment`, …), in the order of their keys.
    pub records: Vec<Record>,
    /// Where the entry begins, including its extension headers.
    pub offset: u64,
}

/// Reads a tar stream entry by entry; see the module.
#[derive(Debug)]
pub struct TarReader<R> {
    inner: R,
    position: u64,
    body: Body,
    ended: bool,
    holes_left: u64,
}

/// What is left of the current entry's content.
#[derive(Debug, Default)]
struct Body {
    name: String,
    /// Position in the expanded file, and its size.
    position: u64,
    size: u64,
    segments: std::vec::IntoIter<sparse::Segment>,
    segment: sparse::Segment,
    stored_left: u64,
    padding: u64,
}

/// The extension headers in front of an entry.
#[derive(Default)]
struct Extensions {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    records: Vec<Record>,
    any: bool,
}

type Block = [u8; BLOCK];

impl<R: Read> TarReader<R> {
    /// Reads from the start of a stream.
    pub fn new(inner: R) -> Self {
        Self {
            inner,
            position: 0,
            body: Body::default(),
            ended: false,
            holes_left: MAX_HOLE_BYTES,
        }
    }

    /// The source.
    pub fn source(&self) -> &R {
        &self.inner
    }

    /// Bytes of the stream consumed so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next entry, or `None` at the end of the archive. What is left of the entry before is skipped.
    pub fn next_entry(&mut self) -> Result<Option<TarEntry>, TarError> {
        if self.ended {
            return Ok(None);
        }
        self.skip_body()?;
        let start = self.position;
        let mut extensions = Extensions::default();
        loop {
            let offset = self.position;
            let Some(header) = self.header(extensions.any)? else {
                self.ended = true;
                return Ok(None);
            };
            match header[156] {
                b'x' | b'g' | b'L' | b'K' => self.extension(&header, offset, &mut extensions)?,
                // A volume label names the archive and nothing in it.
                b'V' => self.discard_extension(&header, offset)?,
                _ => return self.entry(&header, start, extensions).map(Some),
            }
        }
    }

    /// Reads content of the current entry; 0 at its end.
    pub fn read_body(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        loop {
            let left = self.body.size - self.body.position;
            if left == 0 || buf.is_empty() {
                return Ok(0);
            }
            let (offset, length) = self.body.segment;
            let (limit, stored) = if self.body.position < offset {
                (offset - self.body.position, false)
            } else if self.body.position < offset + length {
                (offset + length - self.body.position, true)
            } else {
                // Behind the last segment the file is zeros to its end.
                self.body.segment = self.body.segments.next().unwrap_or((self.body.size, 0));
                continue;
            };
            let most = buf.len().min(usize::try_from(limit.min(left)).unwrap_or(usize::MAX));
            let buf = &mut buf[..most];
            let count = if stored {
                self.read_stored(buf)?
            } else {
                self.read_hole(buf)
            };
            self.body.position += count as u64;
            return Ok(count);
        }
    }

    fn read_stored(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let count = self.read(buf)?;
        if count == 0 {
            let inside = format!("the content of {:?}", self.body.name);
            return Err(TarError::Truncated {
                offset: self.position,
                inside,
            });
        }
        self.body.stored_left -= count as u64;
        Ok(count)
    }

    fn read_hole(&mut self, buf: &mut [u8]) -> usize {
        buf.fill(0);
        buf.len()
    }

    /// Reads the rest of the stream behind the end of the archive, so that its checksums are checked.
    /// Returns whether all of it was zeros.
    pub fn finish(&mut self) -> Result<bool, TarError> {
        let mut buf = [0; 8192];
        let mut zeros = true;
        loop {
            match self.read(&mut buf)? {
                0 => return Ok(zeros),
                count => zeros &= buf[..count].iter().all(|&b| b == 0),
            }
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        loop {
            match self.inner.read(buf) {
                Ok(count) => {
                    self.position += count as u64;
                    return Ok(count);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    return Err(TarError::Read {
                        offset: self.position,
                        source,
                    });
                }
            }
        }
    }

    /// Fills as much of `buf` as the stream has.
    fn fill(&mut self, buf: &mut [u8]) -> Result<usize, TarError> {
        let mut filled = 0;
        while filled < buf.len() {
            match self.read(&mut buf[filled..])? {
                0 => break,
                count => filled += count,
            }
        }
        Ok(filled)
    }

    fn exact(&mut self, buf: &mut [u8], inside: &str) -> Result<(), TarError> {
        if self.fill(buf)? == buf.len() {
            return Ok(());
        }
        Err(TarError::Truncated {
            offset: self.position,
            inside: inside.to_owned(),
        })
    }

    fn skip(&mut self, mut count: u64, inside: &str) -> Result<(), TarError> {
        let mut buf = [0; 8192];
        while count > 0 {
            let most = buf.len().min(usize::try_from(count).unwrap_or(usize::MAX));
            self.exact(&mut buf[..most], inside)?;
            count -= most as u64;
        }
        Ok(())
    }

    fn skip_body(&mut self) -> Result<(), TarError> {
        let body = std::mem::take(&mut self.body);
        let inside = format!("the content of {:?}", body.name);
        // The padding may be missing at the very end of a stream, as Go has it.
        self.skip(body.stored_left, &inside)?;
        let mut padding = [0; BLOCK];
        let padding_size = usize::try_from(body.padding).unwrap_or(0);
        self.fill(&mut padding[..padding_size])?;
        Ok(())
    }

    /// The next header block; `None` at the end of the archive, marked or not.
    fn header(&mut self, after_extension: bool) -> Result<Option<Box<Block>>, TarError> {
        let offset = self.position;
        let mut block = Box::new([0; BLOCK]);
        let end = match self.fill(block.as_mut_slice())? {
            0 if self.position == 0 => return Err(TarError::Empty),
            0 => true,
            BLOCK => {
                let zeros = is_zero(block.as_slice());
                if zeros {
                    // Two blocks of zeros end an archive; some writers leave out the second.
                    let mut second = [0; BLOCK];
                    let filled = self.fill(&mut second)?;
                    if !is_zero(&second[..filled]) {
                        return Err(TarError::NoHeader { offset });
                    }
                }
                zeros
            }
            _ => {
                // Something shorter than a block was never a tar; say so rather than "truncated".
                let inside = if offset == 0 {
                    "the first header; is this a tar stream?"
                } else {
                    "a header"
                };
                return Err(TarError::Truncated {
                    offset: self.position,
                    inside: inside.to_owned(),
                });
            }
        };
        if end {
            if after_extension {
                let inside = "an entry: its extended header is the last thing".to_owned();
                return Err(TarError::Truncated {
                    offset: self.position,
                    inside,
                });
            }
            return Ok(None);
        }
        if !checksum_matches(&block) {
            return Err(TarError::NoHeader { offset });
        }
        Ok(Some(block))
    }

    fn extension(&mut self, header: &Block, offset: u64, extensions: &mut Extensions) -> Result<(), TarError> {
        let bad = |field| TarError::BadField {
            name: shown(text(&header[..100])),
            offset,
            field,
        };
        let body = self.extension_body(header, offset)?;
        match header[156] {
            b'L' => extensions.long_name = Some(text(&body).to_vec()),
            b'K' => extensions.long_link = Some(text(&body).to_vec()),
            b'x' => extensions.records = pax::parse(&body).ok_or_else(|| bad("pax record"))?,
            // Global: checked, and otherwise ignored.
            _ => {
                pax::parse(&body).ok_or_else(|| bad("pax record"))?;
                return Ok(());
            }
        }
        extensions.any = true;
        Ok(())
    }

    fn extension_body(&mut self, header: &Block, offset: u64) -> Result<Vec<u8>, TarError> {
        let bad = |field| TarError::BadField {
            name: shown(text(&header[..100])),
            offset,
            field,
        };
        let size = numeric(&header[124..136])
            .and_then(|n| u64::try_from(n).ok())
            .ok_or_else(|| bad("size"))?;
        if size > MAX_EXTENSION_BYTES {
            return Err(bad("extended header: larger than 1 MiB"));
        }
        let mut body = vec![0; usize::try_from(size).map_err(|_| bad("size"))?];
        self.exact(&mut body, "an extended header")?;
        self.skip(padding_of(size), "an extended header")?;
        Ok(body)
    }

    fn discard_extension(&mut self, header: &Block, offset: u64) -> Result<(), TarError> {
        self.extension_body(header, offset).map(drop)
    }

    fn entry(&mut self, header: &Block, start: u64, extensions: Extensions) -> Result<TarEntry, TarError> {
        let Decoded {
            mut entry,
            stored,
            sparseness,
            records,
        } = fields::decode(header, start, extensions)?;
        if entry.kind == TarKind::Regular {
            let name = shown(&entry.name);
            let bad = |field| TarError::BadField {
                name: name.clone(),
                offset: start,
                field,
            };
            entry.size = self.open_body(header, sparseness, stored, &bad)?;
            self.body.name = name;
        }
        (entry.xattrs, entry.records) = sort_records(records);
        Ok(entry)
    }
}

/// Bytes from the end of content of `size` bytes to the next block.
pub fn padding_of(size: u64) -> u64 {
    (BLOCK_U64 - size % BLOCK_U64) % BLOCK_U64
}

/// A name for an error message: readable whatever its bytes, and of bounded length.
pub fn shown(name: &[u8]) -> String {
    const LONGEST: usize = 256;
    let mut text = String::from_utf8_lossy(&name[..name.len().min(LONGEST)]).into_owned();
    if name.len() > LONGEST {
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests;
