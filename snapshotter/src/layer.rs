//! Lazily mounted layers: what the snapshots service asks of them.
//!
//! [`LayerMounts`] is the seam between [`crate::snapshot`], which knows chains of snapshots and never a registry, and
//! the mounts of layers, which know blobs and never a snapshot. A layer is identified by its TOC digest.

pub mod cache;
pub mod fault;
pub mod fetch;
pub mod fs;
pub mod fuse;
mod image;
pub mod layers;
pub mod mounts;
pub mod native;
mod open;
pub mod platform;
pub mod readers;
pub mod report;
pub mod source;
mod sys;
#[cfg(test)]
pub(crate) mod testing;

use std::path::PathBuf;

use async_trait::async_trait;
use estargz::digest::Digest;
use layers::inspector::Inspector;
use layers::warming::Warmer;

/// An error of whichever part refused to serve a layer lazily.
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// A layer that containerd is about to pull, as its labels describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerRequest {
    /// Reference of the image, as given to the pull.
    pub image: String,
    /// Digest of the image's manifest, where the client told it.
    pub manifest_digest: Option<Digest>,
    /// Digest of the layer's compressed blob.
    pub layer_digest: Digest,
    /// Digest of the layer's TOC from the manifest's annotation, where there is one.
    pub toc_digest: Option<Digest>,
    /// The image's layers from this one upwards (this one may be among them); never complete for certain, because a
    /// label holds at most 4096 bytes.
    pub siblings: Vec<Digest>,
}

/// What has to be remembered about a lazily mounted layer to mount it again without a network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerOrigin {
    /// Identity of the layer.
    pub toc_digest: Digest,
    /// Reference of the image it was first mounted for.
    pub image: String,
    /// Digest of the layer's compressed blob.
    pub layer_digest: Digest,
}

/// A mounted layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerMount {
    /// Identity of the layer.
    pub toc_digest: Digest,
    /// Directory where the layer's root is; absolute, and stable for as long as the layer is not released.
    pub path: PathBuf,
}

/// Disk usage of a layer or a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes allocated on disk.
    pub bytes: u64,
    /// Inodes used.
    pub inodes: u64,
}

/// Why a layer is not served lazily; containerd then unpacks it as an ordinary overlay snapshot.
#[derive(Debug, thiserror::Error)]
pub enum NotLazy {
    /// The configuration switches lazy layers off.
    #[error("lazy layers are switched off in the configuration")]
    Disabled,
    /// Without a digest of the TOC nothing read from the layer could be verified.
    #[error("layer {layer} carries no TOC digest annotation, so nothing read from it could be verified")]
    NoTocDigest {
        /// Digest of the layer's blob.
        layer: Digest,
    },
    /// The blob has no eStargz footer.
    #[error("layer {layer} is not eStargz")]
    NotEstargz {
        /// Digest of the layer's blob.
        layer: Digest,
        /// What the footer lacked.
        #[source]
        cause: Cause,
    },
    /// A format that is recognised and not supported, as a future form of zstd:chunked.
    #[error("layer {layer} is {what}, which is not supported")]
    Unsupported {
        /// Digest of the layer's blob.
        layer: Digest,
        /// The format's name.
        what: String,
    },
    /// The TOC in the blob is not the one that the manifest promises.
    #[error("the TOC of layer {layer} has digest {found}, but the manifest promises {expected}")]
    TocMismatch {
        /// Digest of the layer's blob.
        layer: Digest,
        /// Digest in the manifest's annotation.
        expected: Digest,
        /// Digest of the TOC found.
        found: Digest,
    },
    /// The TOC is right and asks for more than is served lazily. containers/storage writes each run of zeros as one chunk, however
    /// long it is; a chunk has to be verified as a whole, in memory.
    #[error("layer {layer} is beyond what is served lazily")]
    TooLarge {
        /// Digest of the layer's blob.
        layer: Digest,
        /// Which limit, and what is beyond it.
        #[source]
        cause: Cause,
    },
    /// The TOC has the right digest and cannot be used.
    #[error("the TOC of layer {layer} cannot be used")]
    TocInvalid {
        /// Digest of the layer's blob.
        layer: Digest,
        /// What is wrong with it.
        #[source]
        cause: Cause,
    },
    /// The registry did not deliver footer and TOC.
    #[error("the registry did not deliver the TOC of layer {layer} of {image}")]
    Registry {
        /// Reference of the image.
        image: String,
        /// Digest of the layer's blob.
        layer: Digest,
        /// The host that failed last; empty where none was asked.
        host: String,
        /// The registry client's error.
        #[source]
        cause: Cause,
    },
    /// The TOC is in another image, which did not deliver it.
    #[error("the TOC of layer {layer} of {image} is in another image, which did not deliver it")]
    TocImage {
        /// Reference of the image.
        image: String,
        /// Digest of the layer's blob.
        layer: Digest,
        /// The host that failed last; empty where none was asked.
        host: String,
        /// Which image it should be in, and what was wrong with it.
        #[source]
        cause: Cause,
    },
    /// The layer was not ready within `layers.mount_timeout`.
    #[error("layer {layer} of {image} was not mounted within {waited:?}")]
    Timeout {
        /// Reference of the image.
        image: String,
        /// Digest of the layer's blob.
        layer: Digest,
        /// How long it was waited for.
        waited: std::time::Duration,
    },
    /// The layer's files in the cache cannot be read or written.
    #[error("the cache at {} cannot be used", path.display())]
    CacheIo {
        /// File or directory concerned.
        path: PathBuf,
        /// The failure.
        #[source]
        cause: Cause,
    },
    /// Nothing about the layer is in the cache (a restore, which may not use the network).
    #[error("layer with TOC {toc} is not in the cache at {}", path.display())]
    NotCached {
        /// Identity of the layer.
        toc: Digest,
        /// Directory where it was looked for.
        path: PathBuf,
    },
    /// The filesystem could not be mounted.
    #[error("cannot mount a layer at {}", path.display())]
    Mount {
        /// Mount point.
        path: PathBuf,
        /// The failure.
        #[source]
        cause: Cause,
    },
    /// A limit on layers mounted at once is reached, or the daemon is stopping.
    #[error("no more layers are mounted: {why}")]
    Refused {
        /// Which limit, or that the daemon stops.
        why: &'static str,
    },
}

impl NotLazy {
    /// Stable, short name of the reason; the `reason` label of the metrics and of log lines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Disabled => "disabled",
            Self::NoTocDigest { .. } => "no_toc_digest",
            Self::NotEstargz { .. } => "not_estargz",
            Self::Unsupported { .. } => "unsupported",
            Self::TocMismatch { .. } => "toc_mismatch",
            Self::TooLarge { .. } => "too_large",
            Self::TocInvalid { .. } => "toc_invalid",
            Self::Registry { .. } => "registry",
            Self::TocImage { .. } => "toc_image",
            Self::Timeout { .. } => "timeout",
            Self::CacheIo { .. } => "cache_io",
            Self::NotCached { .. } => "not_cached",
            Self::Mount { .. } => "mount",
            Self::Refused { .. } => "refused",
        }
    }

    /// The host that failed last, where a registry is the reason; otherwise empty.
    pub fn host(&self) -> &str {
        match self {
            Self::Registry { host, .. } | Self::TocImage { host, .. } => host,
            Self::Disabled
            | Self::NoTocDigest { .. }
            | Self::NotEstargz { .. }
            | Self::Unsupported { .. }
            | Self::TocMismatch { .. }
            | Self::TooLarge { .. }
            | Self::TocInvalid { .. }
            | Self::Timeout { .. }
            | Self::CacheIo { .. }
            | Self::NotCached { .. }
            | Self::Mount { .. }
            | Self::Refused { .. } => "",
        }
    }

    /// Whether the image is the reason, so that asking again is of no use.
    pub fn is_lasting(&self) -> bool {
        match self {
            Self::Disabled
            | Self::NoTocDigest { .. }
            | Self::NotEstargz { .. }
            | Self::Unsupported { .. }
            | Self::TocMismatch { .. }
            | Self::TooLarge { .. }
            | Self::TocInvalid { .. } => true,
            Self::Registry { .. }
            | Self::TocImage { .. }
            | Self::Timeout { .. }
            | Self::CacheIo { .. }
            | Self::NotCached { .. }
            | Self::Mount { .. }
            | Self::Refused { .. } => false,
        }
    }
}

/// Mounts of layers, shared by all snapshots that use them.
///
/// Calls come concurrently, also for the same layer. Dropping the future of [`mount`](Self::mount) must leave no half
/// mounted layer behind.
#[async_trait]
pub trait LayerMounts: Send + Sync + 'static {
    /// Makes the layer mountable and mounted: single-flight per TOC digest; also resolves the image's other layers
    /// ahead. May use the network.
    async fn mount(&self, request: LayerRequest) -> Result<LayerMount, NotLazy>;

    /// Mounts a layer again from what is on disk, without a network; an already mounted layer is fine.
    async fn restore(&self, origin: LayerOrigin) -> Result<LayerMount, NotLazy>;

    /// No snapshot uses the layer any more: unmounts it; the cache stays. A layer that is not mounted is fine.
    async fn release(&self, toc_digest: &Digest);

    /// All layers that snapshots refer to, told once after the start and before they are restored. Until then none is given up to
    /// make room; from then on those that are not among them, and not mounted since, may be.
    fn in_use(&self, _layers: &[Digest]) {}

    /// All layers were restored that could be.
    async fn restored(&self) {}

    /// Bytes on disk and inodes of a layer; zero for one that is unknown.
    fn usage(&self, toc_digest: &Digest) -> Usage;

    /// What warms images, and takes the logins that are handed over; none where no layer is lazy.
    fn warmer(&self) -> Option<Warmer> {
        None
    }

    /// What looks at layers and their cache for operators; none where no layer is lazy.
    fn inspector(&self) -> Option<Inspector> {
        None
    }

    /// Unmounts and persists everything; called once, after the last request has been answered.
    async fn shutdown(&self);
}
