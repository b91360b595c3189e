//! Where images come from and go to: one interface over OCI layouts, archives of them, and registries.
//!
//! Sources check every digest. Destinations show nothing under the image's name before everything is there: layouts and
//! archives are staged beside their place and renamed, registries get the top manifest last.

pub(super) mod archive;
pub(super) mod docker;
pub(super) mod oci_layout;

use std::path::Path;

use bytes::Bytes;
use estargz::reader::ReadAt;
use hullspeed_registry::limits::MAX_MANIFEST_BYTES;
use hullspeed_registry::{Client, Digest, Progress};
use tempfile::TempPath;

use super::document::BlobRef;
use super::failure::{Code, Failure, Side};
use super::location::Location;
use super::stream::{BlobReader, Cancel, Section};

/// Largest image configuration that is read.
pub(super) const MAX_CONFIG_BYTES: u64 = 16 << 20;

/// A manifest or index with the type that its place gives it.
#[derive(Debug, Clone)]
pub(super) struct Fetched {
    pub(super) bytes: Bytes,
    pub(super) media_type: String,
    pub(super) digest: Digest,
}

/// Where an image comes from.
pub(super) enum Source {
    Layout(oci_layout::Layout),
    Archive(archive::Archive),
    Docker(docker::Repository),
}

impl Source {
    pub(super) fn open(location: &Location, client: &Client) -> Result<Self, Failure> {
        Ok(match location {
            Location::Layout { dir, tag } => Self::Layout(oci_layout::Layout::open(dir, tag.as_deref())?),
            Location::Archive { file, tag } => Self::Archive(archive::Archive::open(file, tag.as_deref())?),
            Location::Docker(image) => Self::Docker(docker::Repository::new(client, image)),
        })
    }

    /// The manifest or index that the location names.
    pub(super) async fn root(&self) -> Result<Fetched, Failure> {
        let (bytes, media_type, digest) = match self {
            Self::Layout(layout) => {
                let (blob, media_type) = layout.root()?;
                (self.bytes(&blob, MAX_MANIFEST_BYTES).await?, media_type, blob.digest)
            }
            Self::Archive(archive) => {
                let (blob, media_type) = archive.root()?;
                (self.bytes(&blob, MAX_MANIFEST_BYTES).await?, media_type, blob.digest)
            }
            Self::Docker(repository) => return repository.manifest(None).await,
        };
        Ok(Fetched {
            bytes,
            media_type,
            digest,
        })
    }

    /// A manifest that another one refers to.
    pub(super) async fn manifest(&self, blob: &BlobRef) -> Result<Bytes, Failure> {
        if let Self::Docker(repository) = self {
            return Ok(repository.manifest(Some(&blob.digest)).await?.bytes);
        }
        self.bytes(blob, MAX_MANIFEST_BYTES).await
    }

    /// A small blob whole.
    pub(super) async fn bytes(&self, blob: &BlobRef, limit: u64) -> Result<Bytes, Failure> {
        if blob.size > limit {
            let line = format!(
                "blob {} has {} bytes, more than the {limit} that are read",
                blob.digest, blob.size
            );
            return Err(Failure::new(Code::Runtime, line));
        }
        if let Self::Docker(repository) = self {
            return repository.bytes(blob).await;
        }
        let mut bytes = Vec::new();
        let mut reader = self.open_blob(blob, Cancel::default()).await?;
        std::io::Read::read_to_end(&mut reader, &mut bytes).map_err(|error| Failure::layer(&error))?;
        Ok(bytes.into())
    }

    /// A blob as a stream that checks its digest at its end.
    pub(super) async fn open_blob(&self, blob: &BlobRef, cancel: Cancel) -> Result<BlobReader, Failure> {
        let inner: Box<dyn std::io::Read + Send> = match self {
            Self::Docker(repository) => Box::new(repository.download(blob).await?),
            _ => Box::new(self.section(blob)?),
        };
        Ok(BlobReader::new(inner, blob, cancel))
    }

    /// A blob with random access, unchecked: for looking at footers and TOCs.
    pub(super) fn random(&self, blob: &BlobRef) -> Result<Box<dyn ReadAt + Send>, Failure> {
        Ok(match self {
            Self::Docker(repository) => Box::new(repository.ranges(blob)),
            _ => Box::new(self.section(blob)?),
        })
    }

    /// Whether the blob can be had here; layers that may not be distributed often cannot.
    pub(super) async fn has(&self, blob: &BlobRef) -> Result<bool, Failure> {
        match self {
            Self::Docker(repository) => repository.has(Side::Source, &blob.digest).await,
            _ => Ok(self.section(blob).is_ok()),
        }
    }

    fn section(&self, blob: &BlobRef) -> Result<Section, Failure> {
        let section = match self {
            Self::Layout(layout) => layout.section(&blob.digest)?,
            Self::Archive(archive) => archive.section(&blob.digest)?,
            Self::Docker(_) => None,
        };
        section.ok_or_else(|| {
            let line = format!(
                "blob {} is missing in {}; copy the image again",
                blob.digest,
                self.place()
            );
            Failure::new(Code::Source, line)
        })
    }

    fn place(&self) -> String {
        match self {
            Self::Layout(layout) => layout.place(),
            Self::Archive(archive) => archive.place(),
            Self::Docker(repository) => repository.image().to_string(),
        }
    }
}

/// Where an image goes.
pub(super) enum Target {
    Layout(oci_layout::Stage),
    Archive(archive::Output),
    Docker(docker::Repository, tempfile::TempDir),
}

impl Target {
    /// Prepares the destination; what can be found wrong now is.
    pub(super) async fn open(location: &Location, client: &Client) -> Result<Self, Failure> {
        Ok(match location {
            Location::Layout { dir, tag } => Self::Layout(oci_layout::Stage::beside(dir, tag.as_deref())?),
            Location::Archive { file, tag } => Self::Archive(archive::Output::open(file, tag.as_deref())?),
            Location::Docker(image) if image.digest().is_some() => {
                return Err(Failure::new(
                    Code::Usage,
                    format!("destination {image} must have a tag, not a digest"),
                ));
            }
            Location::Docker(image) => {
                let repository = docker::Repository::new(client, image);
                // Hours of work must not end at a closed door.
                repository.has(Side::Destination, &Digest::of("")).await?;
                let temporary = tempfile::Builder::new().prefix("estargz-").tempdir();
                let here = std::env::temp_dir();
                let temporary =
                    temporary.map_err(|error| Failure::file(Side::Destination, "write to", &here, &error))?;
                Self::Docker(repository, temporary)
            }
        })
    }

    /// Directory for temporary files; for local destinations on their file system.
    pub(super) fn scratch(&self) -> &Path {
        match self {
            Self::Layout(stage) => stage.scratch(),
            Self::Archive(output) => output.stage.scratch(),
            Self::Docker(_, temporary) => temporary.path(),
        }
    }

    /// Takes a blob whose file has been checked.
    pub(super) async fn put_file(
        &self,
        blob: &BlobRef,
        file: TempPath,
        progress: Option<Progress>,
    ) -> Result<(), Failure> {
        match self {
            Self::Layout(stage) | Self::Archive(archive::Output { stage, .. }) => stage.put_file(&blob.digest, file),
            Self::Docker(repository, _) => repository.push_file(blob, &file, progress).await,
        }
    }

    /// Takes a small blob.
    pub(super) async fn put_bytes(&self, bytes: Bytes) -> Result<(), Failure> {
        match self {
            Self::Layout(stage) | Self::Archive(archive::Output { stage, .. }) => stage.put_bytes(&bytes),
            Self::Docker(repository, _) => repository.push_bytes(bytes).await,
        }
    }

    /// Takes a manifest that another one refers to.
    pub(super) async fn put_manifest(&self, bytes: Bytes, media_type: &str) -> Result<(), Failure> {
        match self {
            Self::Layout(stage) | Self::Archive(archive::Output { stage, .. }) => stage.put_bytes(&bytes),
            Self::Docker(repository, _) => repository.push_manifest(bytes, media_type, false).await,
        }
    }

    /// Has or takes a blob without its being sent through here.
    pub(super) async fn mount(&self, blob: &BlobRef, source: &Source) -> Result<bool, Failure> {
        match (self, source) {
            (Self::Docker(target, _), Source::Docker(source)) => target.mount(blob, source).await,
            (Self::Docker(target, _), _) => target.has(Side::Destination, &blob.digest).await,
            (Self::Layout(stage), _) => Ok(stage.has(blob)),
            (Self::Archive(output), _) => Ok(output.stage.has(blob)),
        }
    }

    /// Takes the top manifest and makes everything visible.
    pub(super) async fn finish(self, bytes: Bytes, media_type: &str) -> Result<(), Failure> {
        match self {
            Self::Layout(stage) => stage.finish(&bytes, media_type),
            Self::Archive(output) => output.finish(&bytes, media_type),
            Self::Docker(repository, _) => repository.push_manifest(bytes, media_type, true).await,
        }
    }
}
