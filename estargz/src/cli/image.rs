//! The tree of an image: index, manifests, configurations, layers; read and checked before any work begins.

use std::fmt;

use bytes::Bytes;
use hullspeed_registry::Digest;

use super::document::{
    BlobRef, DOCKER_CONFIG, DOCKER_MANIFEST, Document, OCI_CONFIG, OCI_MANIFEST, REFERENCE_DIGEST, is_index,
};
use super::failure::{Code, Failure};
use super::transport::{Fetched, MAX_CONFIG_BYTES, Source};

/// Indices may hold indices, this deep.
const MAX_DEPTH: usize = 4;
/// Most manifests of one image.
const MAX_MANIFESTS: usize = 1000;
/// Most layers of one manifest.
const MAX_LAYERS: usize = 1000;

/// A platform filter, and a platform as it is shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

impl Platform {
    /// Parses `os/arch[/variant]`.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/').map(str::to_owned);
        match (parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some(os), Some(architecture), variant, None) if !os.is_empty() && !architecture.is_empty() => Ok(Self {
                os,
                architecture,
                variant,
            }),
            _ => Err("write os/arch or os/arch/variant, as in linux/amd64".to_owned()),
        }
    }

    /// The platform of a descriptor's `platform` or of a configuration.
    fn from_document(document: &Document) -> Option<Self> {
        let text = |key| {
            document
                .find::<String>(key)
                .ok()
                .flatten()
                .filter(|text| !text.is_empty())
        };
        Some(Self {
            os: text("os")?,
            architecture: text("architecture")?,
            variant: text("variant"),
        })
    }

    /// Whether this filter lets `other` through; without a variant it lets all of them.
    fn admits(&self, other: &Self) -> bool {
        self.os == other.os
            && self.architecture == other.architecture
            && (self.variant.is_none() || self.variant == other.variant)
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

/// A manifest or index with all that it refers to.
#[derive(Debug)]
pub(super) struct Node {
    /// The document's exact bytes.
    pub(super) bytes: Bytes,
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) content: Content,
}

/// What a manifest is.
#[derive(Debug)]
pub(super) enum Content {
    /// An index: its document, and each entry's descriptor with what it points to.
    Index {
        document: Document,
        children: Vec<(Document, Node)>,
    },
    Image(Image),
    /// Anything else (attestations, charts, signatures), with the blobs that belong to it.
    Artefact {
        blobs: Vec<BlobRef>,
    },
}

/// An image for one platform.
#[derive(Debug)]
pub(super) struct Image {
    pub(super) document: Document,
    pub(super) config: Bytes,
    pub(super) platform: Option<Platform>,
    pub(super) layers: Vec<Layer>,
}

/// A layer as its manifest and configuration describe it.
#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) descriptor: Document,
    pub(super) blob: BlobRef,
    pub(super) diff_id: Digest,
    /// May not be distributed: it is fetched from elsewhere and stays as it is.
    pub(super) foreign: bool,
}

impl Node {
    /// Reads the tree under the source's root; `platforms` narrows it if it is not empty.
    pub(super) async fn load(source: &Source, platforms: &[Platform]) -> Result<Self, Failure> {
        let root = source.root().await?;
        let mut loader = Loader {
            source,
            platforms,
            manifests: 0,
            seen: Vec::new(),
        };
        let node = loader.node(root, 0, false).await?;
        let node = node.filter(|node| platforms.is_empty() || !node.images().is_empty());
        node.ok_or_else(|| {
            let wanted: Vec<_> = platforms.iter().map(ToString::to_string).collect();
            let line = format!(
                "no manifest for {} (there are: {})",
                wanted.join(", "),
                loader.seen.join(", ")
            );
            Failure::new(Code::Source, line)
        })
    }

    /// All images of the tree with their digests.
    pub(super) fn images(&self) -> Vec<(&Self, &Image)> {
        match &self.content {
            Content::Index { children, .. } => children.iter().flat_map(|(_, child)| child.images()).collect(),
            Content::Image(image) => vec![(self, image)],
            Content::Artefact { .. } => Vec::new(),
        }
    }
}

struct Loader<'a> {
    source: &'a Source,
    platforms: &'a [Platform],
    manifests: usize,
    /// Platforms that were passed by.
    seen: Vec<String>,
}

/// Whether an entry of an index is for a platform that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Yes,
    No,
    /// The entry does not say; its configuration will.
    Unknown,
}

impl Loader<'_> {
    /// Reads what `fetched` refers to; `None` if it turns out to be for a platform that is not wanted.
    async fn node(&mut self, fetched: Fetched, depth: usize, chosen: bool) -> Result<Option<Node>, Failure> {
        self.manifests += 1;
        if depth > MAX_DEPTH || self.manifests > MAX_MANIFESTS {
            let line = format!("more than {MAX_MANIFESTS} manifests, or indices nested deeper than {MAX_DEPTH}");
            return Err(Failure::new(Code::Runtime, line));
        }
        let Fetched {
            bytes,
            media_type,
            digest,
        } = fetched;
        let bad = |error: serde_json::Error| {
            Failure::new(
                Code::Runtime,
                format!("manifest {digest} cannot be understood: {error}"),
            )
        };
        let document = Document::parse(&bytes).map_err(bad)?;
        // The place's word for the type may be missing; the document's own, and at last its shape, decide.
        let own = document.find::<String>("mediaType").map_err(bad)?;
        let media_type = own.or(Some(media_type).filter(|kind| !kind.is_empty()));
        let media_type = match media_type {
            Some(kind) => kind,
            None if document.find::<Vec<Document>>("manifests").map_err(bad)?.is_some() => {
                super::document::OCI_INDEX.into()
            }
            None => OCI_MANIFEST.to_owned(),
        };
        let content = if is_index(&media_type) {
            Some(Box::pin(self.index(document, &digest, depth)).await?)
        } else if media_type.contains("manifest.v1+prettyjws")
            || document.find("schemaVersion").map_err(bad)? == Some(1)
        {
            let line = format!(
                "manifest {digest} has schema 1, which is not supported; push the image again with a newer tool"
            );
            return Err(Failure::new(Code::Runtime, line));
        } else {
            self.manifest(document, &digest, &media_type, chosen).await?
        };
        Ok(content.map(|content| Node {
            bytes,
            digest,
            media_type,
            content,
        }))
    }

    async fn index(&mut self, document: Document, digest: &Digest, depth: usize) -> Result<Content, Failure> {
        let bad = |error: serde_json::Error| {
            Failure::new(Code::Runtime, format!("index {digest} cannot be understood: {error}"))
        };
        let entries: Vec<Document> = document.find("manifests").map_err(bad)?.unwrap_or_default();
        let mut children = Vec::new();
        for (entry, wanted) in self.choose(entries) {
            let chosen = match wanted {
                Wanted::No => continue,
                Wanted::Yes => true,
                Wanted::Unknown => false,
            };
            let blob = BlobRef::from_descriptor(&entry).map_err(bad)?;
            let media_type: String = entry.find("mediaType").map_err(bad)?.unwrap_or_default();
            let bytes = self.source.manifest(&blob).await?;
            if bytes.len() as u64 != blob.size {
                let line = format!(
                    "manifest {} has {} bytes, index {digest} says {}",
                    blob.digest,
                    bytes.len(),
                    blob.size
                );
                return Err(Failure::new(Code::Mismatch, line));
            }
            let fetched = Fetched {
                bytes,
                media_type,
                digest: blob.digest,
            };
            let Some(node) = Box::pin(self.node(fetched, depth + 1, chosen)).await? else {
                continue;
            };
            if let Content::Index { children, .. } = &node.content
                && children.is_empty()
                && !self.platforms.is_empty()
            {
                continue;
            }
            children.push((entry, node));
        }
        Ok(Content::Index { document, children })
    }

    /// Looks at the entries of an index before anything of them is read.
    fn choose(&mut self, entries: Vec<Document>) -> Vec<(Document, Wanted)> {
        let wanted: Vec<_> = entries.iter().map(|entry| self.wants(entry)).collect();
        let kept = entries.iter().zip(&wanted).filter(|(_, wanted)| **wanted != Wanted::No);
        let kept: Vec<_> = kept
            .filter_map(|(entry, _)| entry.find::<String>("digest").ok().flatten())
            .collect();
        let decide = |(entry, wanted): (Document, Wanted)| {
            // An attestation goes with what it describes.
            let described = entry
                .annotation(REFERENCE_DIGEST)
                .filter(|_| !self.platforms.is_empty());
            let wanted = match described {
                Some(described) if kept.contains(&described) => Wanted::Yes,
                Some(_) => Wanted::No,
                None => wanted,
            };
            (entry, wanted)
        };
        entries.into_iter().zip(wanted).map(decide).collect()
    }

    fn wants(&mut self, entry: &Document) -> Wanted {
        if self.platforms.is_empty() {
            return Wanted::Yes;
        }
        if entry.annotation(REFERENCE_DIGEST).is_some() {
            return Wanted::No;
        }
        let platform = entry.find::<Document>("platform").ok().flatten();
        let Some(platform) = platform.as_ref().and_then(Platform::from_document) else {
            let media_type: String = entry.find("mediaType").ok().flatten().unwrap_or_default();
            let image = is_index(&media_type) || matches!(media_type.as_str(), OCI_MANIFEST | DOCKER_MANIFEST);
            return if image { Wanted::Unknown } else { Wanted::No };
        };
        if self.platforms.iter().any(|filter| filter.admits(&platform)) {
            return Wanted::Yes;
        }
        self.seen.push(platform.to_string());
        Wanted::No
    }

    async fn manifest(
        &mut self,
        document: Document,
        digest: &Digest,
        media_type: &str,
        chosen: bool,
    ) -> Result<Option<Content>, Failure> {
        let bad = |error| not_understood("manifest", digest, &error);
        let config: Option<Document> = document.find("config").map_err(bad)?;
        let layers: Vec<Document> = document.find("layers").map_err(bad)?.unwrap_or_default();
        if layers.len() > MAX_LAYERS {
            return Err(Failure::new(
                Code::Runtime,
                format!("manifest {digest} has more than {MAX_LAYERS} layers"),
            ));
        }
        if layers.iter().any(|layer| kind(layer).ends_with("+encrypted")) {
            let line = format!("manifest {digest} has encrypted layers; decrypt the image first");
            return Err(Failure::new(Code::Runtime, line));
        }
        let is_image = matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
            && config
                .as_ref()
                .is_some_and(|config| matches!(kind(config).as_str(), OCI_CONFIG | DOCKER_CONFIG))
            && layers.iter().all(|layer| is_layer(&kind(layer)));
        let Some(config) = config.as_ref().filter(|_| is_image) else {
            let blobs = document
                .find::<Vec<Document>>("blobs")
                .map_err(bad)?
                .unwrap_or_default();
            let all = config.iter().chain(&layers).chain(&blobs);
            let blobs = all
                .map(BlobRef::from_descriptor)
                .collect::<Result<_, _>>()
                .map_err(bad)?;
            return Ok(Some(Content::Artefact { blobs }));
        };
        let config = self
            .source
            .bytes(&BlobRef::from_descriptor(config).map_err(bad)?, MAX_CONFIG_BYTES)
            .await?;
        let bad = |error| not_understood("configuration of manifest", digest, &error);
        let parsed = Document::parse(&config).map_err(bad)?;
        let platform = Platform::from_document(&parsed);
        if !chosen && !self.admits(platform.as_ref()) {
            self.seen
                .push(platform.map_or_else(|| "unknown".to_owned(), |platform| platform.to_string()));
            return Ok(None);
        }
        let rootfs: Document = parsed.need("rootfs").map_err(bad)?;
        let diff_ids: Vec<String> = rootfs.find("diff_ids").map_err(bad)?.unwrap_or_default();
        if diff_ids.len() != layers.len() {
            let (layers, ids) = (layers.len(), diff_ids.len());
            let line = format!("manifest {digest} has {layers} layers, its configuration {ids} diff_ids");
            return Err(Failure::new(Code::Mismatch, line));
        }
        let layers = layers
            .into_iter()
            .zip(diff_ids)
            .map(|(descriptor, diff_id)| Layer::new(descriptor, &diff_id));
        let layers = layers.collect::<Result<_, _>>().map_err(bad)?;
        Ok(Some(Content::Image(Image {
            document,
            config,
            platform,
            layers,
        })))
    }

    fn admits(&self, platform: Option<&Platform>) -> bool {
        let admitted = |platform| self.platforms.iter().any(|filter| filter.admits(platform));
        self.platforms.is_empty() || platform.is_some_and(admitted)
    }
}

impl Layer {
    fn new(descriptor: Document, diff_id: &str) -> Result<Self, serde_json::Error> {
        let blob = BlobRef::from_descriptor(&descriptor)?;
        let diff_id = diff_id.parse().map_err(serde::de::Error::custom)?;
        let media_type = kind(&descriptor);
        let foreign = media_type.contains(".nondistributable.") || media_type.contains(".foreign.");
        Ok(Self {
            descriptor,
            blob,
            diff_id,
            foreign,
        })
    }
}

fn not_understood(what: &str, digest: &Digest, error: &serde_json::Error) -> Failure {
    Failure::new(Code::Runtime, format!("{what} {digest} cannot be understood: {error}"))
}

/// The media type of a descriptor.
fn kind(descriptor: &Document) -> String {
    descriptor
        .find::<String>("mediaType")
        .ok()
        .flatten()
        .unwrap_or_default()
}

/// Whether a media type is that of a file system layer.
fn is_layer(media_type: &str) -> bool {
    let (kind, _) = media_type.split_once('+').unwrap_or((media_type, ""));
    matches!(
        kind,
        "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.oci.image.layer.nondistributable.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.image.rootfs.diff.tar.gzip"
            | "application/vnd.docker.image.rootfs.diff.tar.zstd"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar"
            | "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"
    )
}
