//! Whole blobs: existence, and pulls that verify their digest and survive broken connections.

use std::fmt;

use bytes::Bytes;
use futures_util::Stream;
use http::Method;

use crate::body;
use crate::client::Client;
use crate::digest::{Digest, Hasher};
use crate::endpoint::Endpoint;
use crate::error::{Error, Fault};
use crate::range::{RangeResponse, RangeSpec, blob_ask, check_coding};
use crate::reference::Reference;
use crate::turns::Need;

/// A blob on its way. Its bytes are good only once [`BlobStream::chunk`] has given `None`: then the digest has matched.
#[derive(Debug)]
pub struct BlobStream {
    client: Client,
    image: Reference,
    digest: Digest,
    host: String,
    asked: String,
    size: Option<u64>,
    source: Source,
    offset: u64,
    hasher: Option<Hasher>,
    /// Failures since the last byte that arrived.
    failures: u32,
}

enum Source {
    Whole(reqwest::Response),
    Rest(RangeResponse),
    Broken,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The address that answers may be signed.
        f.write_str(match self {
            Self::Whole(_) => "Whole",
            Self::Rest(_) => "Rest",
            Self::Broken => "Broken",
        })
    }
}

impl Client {
    /// Whether the repository of `image` has the blob.
    pub async fn blob_exists(&self, image: &Reference, digest: &Digest) -> Result<bool, Error> {
        let endpoint = self.endpoint(image)?;
        let asked = format!("look-up of blob {digest} of {}", image.repository());
        let mut ask = blob_ask(&endpoint, image, digest, asked)?;
        ask.method = Method::HEAD;
        match self.send(&endpoint, &ask, self.retry().attempts).await {
            Ok(_) => Ok(true),
            Err(error) if matches!(error.fault(), Fault::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Pulls a blob whose descriptor promises `size` bytes, if that is known, from the first of the image's hosts that has it. A
    /// connection that breaks is resumed at the last byte as long as each attempt makes progress.
    pub async fn pull_blob(&self, image: &Reference, digest: &Digest, size: Option<u64>) -> Result<BlobStream, Error> {
        let asked = format!("pull of blob {digest} of {}", image.repository());
        let mut turns = self.turns(image, Need::Pull, &asked)?;
        loop {
            let (endpoint, attempts) = (turns.host(), turns.attempts());
            match self.pull_at(endpoint, image, digest, size, attempts).await {
                Ok(stream) => {
                    turns.succeeded();
                    return Ok(stream);
                }
                Err(error) => turns.failed(error)?,
            }
        }
    }

    async fn pull_at(
        &self,
        endpoint: &Endpoint,
        image: &Reference,
        digest: &Digest,
        size: Option<u64>,
        attempts: u32,
    ) -> Result<BlobStream, Error> {
        let asked = format!("pull of blob {digest} of {}", image.repository());
        let ask = blob_ask(endpoint, image, digest, asked)?;
        let answer = self.send(endpoint, &ask, attempts).await?;
        check_coding(answer.response.headers()).map_err(|fault| fault.at(&endpoint.name, &ask.asked))?;
        let announced = answer.response.content_length();
        if let (Some(expected), Some(actual)) = (size, announced)
            && expected != actual
        {
            return Err(Fault::Size { expected, actual }.at(&endpoint.name, &ask.asked));
        }
        Ok(BlobStream {
            client: self.clone(),
            image: image.clone(),
            digest: digest.clone(),
            host: endpoint.name.clone(),
            asked: ask.asked,
            size: size.or(announced),
            source: Source::Whole(answer.response),
            offset: 0,
            hasher: Some(digest.hasher()),
            failures: 0,
        })
    }

    /// Pulls a small blob of at most `limit` bytes whole, digest checked.
    pub async fn pull_blob_bytes(&self, image: &Reference, digest: &Digest, limit: u64) -> Result<Bytes, Error> {
        let mut stream = self.pull_blob(image, digest, None).await?;
        let too_large =
            || Fault::TooLarge { limit }.at(image.host(), format!("pull of blob {digest} of {}", image.repository()));
        if stream.size().is_some_and(|size| size > limit) {
            return Err(too_large());
        }
        let mut bytes = Vec::new();
        while let Some(piece) = stream.chunk().await? {
            if (bytes.len() + piece.len()) as u64 > limit {
                return Err(too_large());
            }
            bytes.extend_from_slice(&piece);
        }
        Ok(bytes.into())
    }
}

impl BlobStream {
    /// Size of the blob, if the descriptor or the server says it.
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// The next piece; `None` means that all bytes have come and their digest is right.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            let piece = match &mut self.source {
                Source::Whole(response) => body::next(response, self.client.idle()).await,
                Source::Rest(rest) => rest.chunk().await.map_err(|error| *error.fault),
                Source::Broken => self.resume().await.map(|()| Some(Bytes::new())),
            };
            // An early end without an error is a broken connection all the same.
            let piece = piece.and_then(|piece| match (piece, self.size) {
                (None, Some(size)) if self.offset < size => Err(Fault::Truncated {
                    got: self.offset,
                    expected: size,
                }),
                (piece, _) => Ok(piece),
            });
            match piece {
                Ok(Some(piece)) if piece.is_empty() => {}
                Ok(Some(piece)) => return self.take(piece).map(Some).map_err(|fault| self.error(fault)),
                Ok(None) => return self.finish().map(|()| None).map_err(|fault| self.error(fault)),
                Err(fault) => {
                    if self.size.is_none() {
                        return Err(self.error(fault));
                    }
                    self.source = Source::Broken;
                    let mut failures = self.failures;
                    let paused = self
                        .client
                        .pause(&mut failures, self.client.retry().attempts, fault)
                        .await;
                    self.failures = failures;
                    paused.map_err(|fault| self.error(fault))?;
                }
            }
        }
    }

    /// The pieces as a stream that ends after the first error.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Error>> + Send {
        futures_util::stream::try_unfold(self, |mut this| async move {
            Ok(this.chunk().await?.map(|piece| (piece, this)))
        })
    }

    async fn resume(&mut self) -> Result<(), Fault> {
        let Some(size) = self.size else {
            return Err(Fault::Truncated {
                got: self.offset,
                expected: self.offset,
            });
        };
        let range = RangeSpec::From(self.offset..size);
        let rest = self
            .client
            .blob_range(&self.image, &self.digest, range)
            .await
            .map_err(|error| *error.fault)?;
        self.source = Source::Rest(rest);
        Ok(())
    }

    fn take(&mut self, piece: Bytes) -> Result<Bytes, Fault> {
        self.offset += piece.len() as u64;
        self.failures = 0;
        if let Some(size) = self.size.filter(|size| self.offset > *size) {
            return Err(Fault::TooLarge { limit: size });
        }
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&piece);
        }
        Ok(piece)
    }

    fn finish(&mut self) -> Result<(), Fault> {
        // Taken: a caller that asks again after the end gets `None` again.
        let Some(hasher) = self.hasher.take() else {
            return Ok(());
        };
        let actual = hasher.finish();
        if actual == self.digest {
            Ok(())
        } else {
            Err(Fault::Digest {
                expected: self.digest.clone(),
                actual,
            })
        }
    }

    fn error(&self, fault: Fault) -> Error {
        fault.at(&self.host, &self.asked)
    }
}
