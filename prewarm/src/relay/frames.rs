//! gRPC messages in a body: a flag, a length, that many bytes. Gathered within a budget, unpacked if need be.

use std::io::Read;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use flate2::read::MultiGzDecoder;
use h2::RecvStream;
use http::HeaderMap;
use tonic::Status;

use super::budget::{Allowance, Bite};
use super::status::GRPC_ENCODING;

/// Bytes before a message.
pub(super) const PREFIX: usize = 5;

/// What is unpacked at a time.
const STEP: usize = 64 << 10;

/// How messages of a body are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// Not at all.
    Identity,
    /// By gzip.
    Gzip,
}

impl Encoding {
    /// What the headers of a request or an answer say.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Status> {
        match headers.get(GRPC_ENCODING).map(http::HeaderValue::as_bytes) {
            None | Some(b"" | b"identity") => Ok(Self::Identity),
            Some(b"gzip") => Ok(Self::Gzip),
            Some(other) => {
                let other = String::from_utf8_lossy(other);
                let text = format!("grpc: Decompressor is not installed for grpc-encoding {other:?}");
                let mut status = Status::unimplemented(text);
                let accepted = tonic::metadata::MetadataValue::from_static("gzip");
                status.metadata_mut().insert("grpc-accept-encoding", accepted);
                Err(status)
            }
        }
    }
}

/// Why no message came.
#[derive(Debug)]
pub(super) enum Unread {
    /// The stream or its connection broke.
    Broken(h2::Error),
    /// What came is not gRPC, or too much.
    Bad(Status),
    /// Nothing came for so long, or not all of it.
    Stalled(Duration),
}

impl From<Status> for Unread {
    fn from(status: Status) -> Self {
        Self::Bad(status)
    }
}

/// The messages of a body.
pub(super) struct Frames {
    body: RecvStream,
    encoding: Encoding,
    allowance: Allowance,
    bounds: Bounds,
    /// Read and not used yet.
    rest: Bytes,
}

/// What a message must keep to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Its size.
    pub(super) most: usize,
    /// Between two pieces of it, and until its end.
    pub(super) quiet: Duration,
    /// From its memory's being there to its last byte.
    pub(super) whole: Duration,
}

/// A message and its share of the memory.
pub(super) struct Frame {
    pub(super) message: Bytes,
    pub(super) bite: Bite,
}

impl Frames {
    pub(super) fn new(body: RecvStream, encoding: Encoding, allowance: Allowance, bounds: Bounds) -> Self {
        Self {
            body,
            encoding,
            allowance,
            bounds,
            rest: Bytes::new(),
        }
    }

    /// The only message of a body.
    pub(super) async fn only(&mut self) -> Result<Frame, Unread> {
        let Some(frame) = self.next().await? else {
            return Err(violation("received no message where one is expected").into());
        };
        self.end().await?;
        Ok(frame)
    }

    /// Makes sure that nothing follows.
    pub(super) async fn end(&mut self) -> Result<(), Unread> {
        while self.rest.is_empty() {
            if !self.soon().await? {
                return Ok(());
            }
        }
        Err(violation("received another message where one is expected").into())
    }

    /// The next message; `None` at the end. Waits for its share of the memory before it reads it. What was given before
    /// must have been dropped.
    pub(super) async fn next(&mut self) -> Result<Option<Frame>, Unread> {
        let Some((packed, length)) = self.prefix().await? else {
            return Ok(None);
        };
        let Bounds { most, whole, .. } = self.bounds;
        if length > most {
            return Err(too_large("", length, most).into());
        }
        if packed && self.encoding == Encoding::Identity {
            let text = "grpc: compressed flag set with identity or empty encoding";
            return Err(Status::internal(text).into());
        }
        // Both forms of a packed message are there at once. Taken in one bite: see the allowance.
        let mut bite = self.allowance.take(if packed { length + most } else { length }).await;
        let taken = tokio::time::timeout(whole, self.take(length)).await;
        let mut message = taken.map_err(|_| Unread::Stalled(whole))??;
        if packed {
            message = unpack(&message, most)?;
            bite.shrink(message.len());
        }
        Ok(Some(Frame { message, bite }))
    }

    /// Trailers, behind the last message.
    pub(super) async fn trailers(&mut self) -> Result<Option<HeaderMap>, Unread> {
        self.body.trailers().await.map_err(Unread::Broken)
    }

    async fn prefix(&mut self) -> Result<Option<(bool, usize)>, Unread> {
        while self.rest.is_empty() {
            if !self.more().await? {
                return Ok(None);
            }
        }
        let prefix = self.take(PREFIX).await?;
        let flag = prefix[0];
        let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]);
        match flag {
            0 | 1 => Ok(Some((flag == 1, length as usize))),
            _ => Err(Status::internal(format!("grpc: received unexpected payload format {flag}")).into()),
        }
    }

    /// So many bytes; not copied if they are there already.
    async fn take(&mut self, length: usize) -> Result<Bytes, Unread> {
        if self.rest.len() >= length {
            return Ok(self.rest.split_to(length));
        }
        let mut taken = BytesMut::with_capacity(length);
        loop {
            let part = self.rest.len().min(length - taken.len());
            taken.put(self.rest.split_to(part));
            if taken.len() == length {
                return Ok(taken.freeze());
            }
            if !self.soon().await? {
                return Err(Status::internal("unexpected EOF").into());
            }
        }
    }

    /// Reads on, where something must come.
    async fn soon(&mut self) -> Result<bool, Unread> {
        let quiet = self.bounds.quiet;
        let more = tokio::time::timeout(quiet, self.more()).await;
        more.map_err(|_| Unread::Stalled(quiet))?
    }

    /// Reads on. Whether there was anything; then it is in `rest`, which must be empty.
    async fn more(&mut self) -> Result<bool, Unread> {
        let Some(data) = self.body.data().await else {
            return Ok(false);
        };
        self.rest = data.map_err(Unread::Broken)?;
        // Fails only if the stream is gone, which the next read says.
        let _ = self.body.flow_control().release_capacity(self.rest.len());
        Ok(true)
    }
}

/// What comes before `message`. No message here is longer than a prefix can say: see [`Limits::message`].
pub(super) fn prefix(message: &Bytes) -> [u8; PREFIX] {
    let [a, b, c, d] = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    [0, a, b, c, d]
}

fn violation(what: &str) -> Status {
    Status::internal(format!("cardinality violation: {what}"))
}

fn too_large(when: &str, length: usize, most: usize) -> Status {
    let text = format!("grpc: received message {when}larger than max ({length} vs. {most})");
    Status::resource_exhausted(text)
}

fn unpack(packed: &[u8], most: usize) -> Result<Bytes, Status> {
    let mut reader = MultiGzDecoder::new(packed);
    let mut message = BytesMut::new();
    let mut step = vec![0; STEP];
    loop {
        let read = reader
            .read(&mut step)
            .map_err(|error| Status::internal(format!("grpc: failed to decompress the received message: {error}")))?;
        if read == 0 {
            return Ok(message.freeze());
        }
        if message.len() + read > most {
            return Err(too_large("after decompression ", message.len() + read, most));
        }
        message.extend_from_slice(&step[..read]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::GzEncoder;
    use std::io::Write;

    fn packed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn a_bomb_is_not_unpacked() {
        assert_eq!(unpack(&packed(&[7; 1000]), 1000).unwrap(), vec![7; 1000]);
        let status = unpack(&packed(&vec![0; 1 << 20]), (1 << 20) - 1).unwrap_err();
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(unpack(b"no gzip", 10).unwrap_err().code(), tonic::Code::Internal);
        let whole = packed(&[7; 1000]);
        assert!(unpack(&whole[..whole.len() - 1], 1000).is_err());
    }

    #[test]
    fn encodings_are_told_apart() {
        let of = |name: &'static str| {
            Encoding::of(&HeaderMap::from_iter([(
                GRPC_ENCODING,
                http::HeaderValue::from_static(name),
            )]))
        };
        assert_eq!(Encoding::of(&HeaderMap::new()).unwrap(), Encoding::Identity);
        assert_eq!(of("identity").unwrap(), Encoding::Identity);
        assert_eq!(of("gzip").unwrap(), Encoding::Gzip);
        let status = of("zstd").unwrap_err();
        assert_eq!(status.code(), tonic::Code::Unimplemented);
        assert_eq!(status.metadata().get("grpc-accept-encoding").unwrap(), "gzip");
    }
}
