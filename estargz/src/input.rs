//! What conversion and verification read: layer streams in their usual compressions, and the tar format inside them.
//!
//! [`decompress`] is called by the converter on every layer blob; [`tar`] is shared by the writer, which is strict about
//! what it finds, and the verifier, which compares what it finds with the TOC. Nothing here trusts its input.

pub mod pax;
mod sparse;
pub mod tar;

use std::io::{self, BufReader, Chain, Cursor, Read};

use flate2::bufread::MultiGzDecoder;

use crate::member::WINDOW_LOG_MAX;

/// Bytes that decide the compression of a stream.
const SNIFF_BYTES: usize = 6;
/// Read-ahead on the compressed side.
const INPUT_BUFFER: usize = 128 << 10;

/// Why a layer stream cannot be decompressed at all.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// Not a single byte.
    #[error("the layer is empty (0 bytes)")]
    Empty,
    /// A compression that images do not use.
    #[error("the layer is compressed with {0}; supported are tar, tar+gzip and tar+zstd")]
    Unsupported(&'static str),
    /// The first bytes could not be read.
    #[error("cannot read the start of the layer")]
    Read(#[source] io::Error),
    /// The decompressor could not be set up.
    #[error("cannot set up the zstd decompressor")]
    Zstd(#[source] io::Error),
}

/// A stream whose first bytes were looked at and put back.
type Sniffed<R> = BufReader<Chain<Cursor<Vec<u8>>, R>>;

/// A layer stream being decompressed; see [`decompress`].
pub struct Decompressed<R: Read>(Kind<R>);

enum Kind<R: Read> {
    Plain(Sniffed<R>),
    // Boxed: its state is much larger than the others.
    Gzip(Box<MultiGzDecoder<Sniffed<R>>>),
    Zstd(Box<zstd::stream::read::Decoder<'static, Sniffed<R>>>),
}

impl<R: Read> Decompressed<R> {
    /// The compression that was recognised: `tar`, `gzip` or `zstd`.
    pub fn compression(&self) -> &'static str {
        match self.0 {
            Kind::Plain(_) => "tar",
            Kind::Gzip(_) => "gzip",
            Kind::Zstd(_) => "zstd",
        }
    }
}

/// Recognises the compression of a layer by its first bytes and returns the plain tar stream.
///
/// All members of a gzip stream and all frames of a zstd stream are read; a stream that stops in the middle of one, or
/// has garbage behind the last, fails with an error on reading.
pub fn decompress<R: Read>(mut input: R) -> Result<Decompressed<R>, InputError> {
    let mut head = Vec::with_capacity(SNIFF_BYTES);
    input
        .by_ref()
        .take(SNIFF_BYTES as u64)
        .read_to_end(&mut head)
        .map_err(InputError::Read)?;
    let magic = head.clone();
    let input = BufReader::with_capacity(INPUT_BUFFER, Cursor::new(head).chain(input));
    Ok(Decompressed(match magic.as_slice() {
        [] => return Err(InputError::Empty),
        [0x1f, 0x8b, ..] => Kind::Gzip(Box::new(MultiGzDecoder::new(input))),
        // A frame, or a skippable frame before it.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(input).map_err(InputError::Zstd)?;
            decoder.window_log_max(WINDOW_LOG_MAX).map_err(InputError::Zstd)?;
            Kind::Zstd(Box::new(decoder))
        }
        [b'B', b'Z', b'h', b'1'..=b'9', ..] => return Err(InputError::Unsupported("bzip2")),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => return Err(InputError::Unsupported("xz")),
        _ => Kind::Plain(input),
    }))
}

impl<R: Read> Read for Decompressed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Kind::Plain(reader) => reader.read(buf),
            Kind::Gzip(reader) => reader.read(buf),
            Kind::Zstd(reader) => reader.read(buf),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        decompress(bytes).map_err(io::Error::other)?.read_to_end(&mut out)?;
        Ok(out)
    }

    #[test]
    fn every_compression_is_recognised() {
        let text = b"a layer, or something like it".repeat(1000);
        let members = [gzip(&text[..10]), gzip(&text[10..])].concat();
        let frames = [
            zstd::encode_all(&text[..10], 1).unwrap(),
            zstd::encode_all(&text[10..], 1).unwrap(),
        ]
        .concat();
        let mut skippable = b"\x50\x2a\x4d\x18\x03\0\0\0abc".to_vec();
        skippable.extend(&frames);
        for (bytes, kind) in [
            (&text, "tar"),
            (&gzip(&text), "gzip"),
            (&members, "gzip"),
            (&frames, "zstd"),
            (&skippable, "zstd"),
        ] {
            assert_eq!(decompress(bytes.as_slice()).unwrap().compression(), kind);
            assert_eq!(read(bytes).unwrap(), text, "{kind}");
        }
    }

    #[test]
    fn every_truncation_is_an_error() {
        let text = b"some text".repeat(10);
        for bytes in [gzip(&text), zstd::encode_all(text.as_slice(), 1).unwrap()] {
            for end in SNIFF_BYTES..bytes.len() {
                assert!(read(&bytes[..end]).is_err(), "{end} of {}", bytes.len());
            }
        }
        assert!(matches!(decompress(&b""[..]), Err(InputError::Empty)));
    }

    #[test]
    fn other_compressions_are_named() {
        assert!(matches!(
            decompress(&b"BZh91AY"[..]),
            Err(InputError::Unsupported("bzip2"))
        ));
        assert!(matches!(
            decompress(&b"\xfd7zXZ\0\0"[..]),
            Err(InputError::Unsupported("xz"))
        ));
    }
}
