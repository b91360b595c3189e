//! A repository in a registry as source and destination.

use std::io;
use std::path::Path;

use bytes::Bytes;
use estargz::reader::ReadAt;
use hullspeed_registry::{
    Client, Digest, Error, MANIFEST_ACCEPT, Progress, RangeSpec, Reference, Upload, Uploaded, Version,
};
use tokio::runtime::Handle;

use crate::cli::document::BlobRef;
use crate::cli::failure::{Failure, Side};
use crate::cli::stream::Download;
use crate::cli::transport::Fetched;

/// One repository, and the tag or digest that is meant.
#[derive(Debug, Clone)]
pub(in crate::cli) struct Repository {
    client: Client,
    image: Reference,
}

impl Repository {
    pub(super) fn new(client: &Client, image: &Reference) -> Self {
        Self {
            client: client.clone(),
            image: image.clone(),
        }
    }

    pub(super) fn image(&self) -> &Reference {
        &self.image
    }

    /// The manifest named by the reference, or by `digest`.
    pub(super) async fn manifest(&self, digest: Option<&Digest>) -> Result<Fetched, Failure> {
        let version = digest.map_or_else(|| self.image.version(), |digest| Version::Digest(digest.clone()));
        let manifest = self
            .client
            .manifest(&self.image, &version, MANIFEST_ACCEPT)
            .await
            .map_err(read)?;
        Ok(Fetched {
            bytes: manifest.bytes,
            media_type: manifest.media_type,
            digest: manifest.digest,
        })
    }

    pub(super) async fn bytes(&self, blob: &BlobRef) -> Result<Bytes, Failure> {
        self.client
            .pull_blob_bytes(&self.image, &blob.digest, blob.size)
            .await
            .map_err(read)
    }

    pub(super) async fn download(&self, blob: &BlobRef) -> Result<Download, Failure> {
        let stream = self.client.pull_blob(&self.image, &blob.digest, Some(blob.size)).await;
        stream.map(Download::start).map_err(read)
    }

    pub(super) fn ranges(&self, blob: &BlobRef) -> Ranges {
        Ranges {
            repository: self.clone(),
            blob: blob.clone(),
            runtime: Handle::current(),
        }
    }

    pub(super) async fn has(&self, side: Side, digest: &Digest) -> Result<bool, Failure> {
        self.client
            .blob_exists(&self.image, digest)
            .await
            .map_err(|error| Failure::registry(side, &error))
    }

    pub(super) async fn mount(&self, blob: &BlobRef, source: &Self) -> Result<bool, Failure> {
        if self.image.host() != source.image.host() || self.image.repository() == source.image.repository() {
            return self.has(Side::Destination, &blob.digest).await;
        }
        self.client
            .mount_blob(&self.image, &blob.digest, &source.image)
            .await
            .map_err(write)
    }

    pub(super) async fn push_file(
        &self,
        blob: &BlobRef,
        file: &Path,
        progress: Option<Progress>,
    ) -> Result<(), Failure> {
        self.push(blob, Upload::File(file.to_owned()), progress).await
    }

    pub(super) async fn push_bytes(&self, bytes: Bytes) -> Result<(), Failure> {
        self.push(&BlobRef::of(&bytes), Upload::Bytes(bytes), None).await
    }

    async fn push(&self, blob: &BlobRef, content: Upload, progress: Option<Progress>) -> Result<(), Failure> {
        let pushed = self
            .client
            .push_blob(&self.image, &blob.digest, blob.size, content, progress)
            .await;
        let uploaded = pushed.map_err(write)?;
        tracing::debug!(digest = %blob.digest, existed = uploaded == Uploaded::Existed, "blob pushed");
        Ok(())
    }

    /// Puts a manifest under the reference's tag (`top`) or under its digest.
    pub(super) async fn push_manifest(&self, bytes: Bytes, media_type: &str, top: bool) -> Result<(), Failure> {
        let version = if top {
            self.image.version()
        } else {
            Version::Digest(Digest::of(&bytes))
        };
        let put = self.client.put_manifest(&self.image, &version, bytes, media_type).await;
        put.map(|_| ()).map_err(write)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "used in map_err")]
fn read(error: Error) -> Failure {
    Failure::registry(Side::Source, &error)
}

#[expect(clippy::needless_pass_by_value, reason = "used in map_err")]
fn write(error: Error) -> Failure {
    Failure::registry(Side::Destination, &error)
}

/// A blob read in ranges. Only for threads outside the runtime.
pub(super) struct Ranges {
    repository: Repository,
    blob: BlobRef,
    runtime: Handle,
}

impl ReadAt for Ranges {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let end = self.blob.size.min(offset.saturating_add(buf.len() as u64));
        if offset >= end {
            return Ok(0);
        }
        let Repository { client, image } = &self.repository;
        let read = async {
            client
                .blob_range(image, &self.blob.digest, RangeSpec::From(offset..end))
                .await?
                .bytes()
                .await
        };
        let bytes = self.runtime.block_on(read).map_err(io::Error::other)?;
        let read = bytes.len().min(buf.len());
        buf[..read].copy_from_slice(&bytes[..read]);
        Ok(read)
    }

    fn size(&self) -> u64 {
        self.blob.size
    }
}
