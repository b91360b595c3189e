//! What can be told of a layer: how much of it is resident, and what it has cost. Plain values, taken at one moment; who asks for
//! them, [`super::layers`] answers.

use std::time::{Duration, SystemTime};

use estargz::digest::Digest;
use estargz::index::LayerIndex;

use super::cache::Residency;
use super::readers::ReaderReport;

/// A layer of the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerReport {
    /// Identity of the layer.
    pub toc_digest: Digest,
    /// Whether it is mounted.
    pub mounted: bool,
    /// How: `erofs` or `fuse`; none where it is not, or its mount cannot be looked at now.
    pub mount: Option<&'static str>,
    /// How containers have it mounted that were started before it was mounted so.
    pub former_mount: Option<&'static str>,
    /// Whether the kernel serves it alone: nobody is asked any more.
    pub kernel_alone: bool,
    /// How much of it there is.
    pub residence: Residence,
    /// What it has cost since it was opened; none of a layer that nobody has open.
    pub cost: Option<Cost>,
    /// Who has waited for it since it was opened, those first that have waited longest.
    pub readers: Vec<ReaderReport>,
}

/// How much of a layer is in the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Residence {
    /// Chunks of the layer.
    pub chunks: u32,
    /// How many are resident.
    pub resident: u32,
    /// The same in bytes; none of a layer that nobody has open.
    pub content: Option<Content>,
    /// Size of the compressed blob.
    pub blob_bytes: u64,
    /// Bytes allocated on disk.
    pub disk_bytes: u64,
}

/// How much of a layer's content is in the cache.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Content {
    /// Unpacked bytes of all files.
    pub bytes: u64,
    /// Those that are resident.
    pub resident: u64,
    /// Compressed bytes of which nothing is resident: they were never needed.
    pub saved: u64,
}

impl Residence {
    /// Whether nothing is missing.
    pub fn is_complete(&self) -> bool {
        self.resident >= self.chunks
    }

    /// What `residency` says of the layer with this index. Looks at every chunk.
    pub(super) fn measured<B: AsRef<[u8]>>(index: &LayerIndex<B>, residency: &Residency, disk_bytes: u64) -> Self {
        let mut content = Content::default();
        for member in (0..index.member_count()).map_while(|member| index.member(member)) {
            let mut untouched = true;
            for chunk in member.chunks {
                let size = index.chunk(chunk).map_or(0, |chunk| u64::from(chunk.size));
                content.bytes += size;
                if residency.contains(chunk) {
                    content.resident += size;
                    untouched = false;
                }
            }
            if untouched {
                content.saved += member.end.saturating_sub(member.start);
            }
        }
        Self {
            chunks: index.chunk_count(),
            resident: residency.count(),
            content: Some(content),
            blob_bytes: index.blob_size(),
            disk_bytes,
        }
    }
}

/// What a layer has cost since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cost {
    /// Reads that waited for the network.
    pub stalls: u64,
    /// How long they did in all.
    pub stall_time: Duration,
    /// The longest of them.
    pub longest_stall: Duration,
    /// What was asked of registries.
    pub fetched: Vec<Fetched>,
    /// Bytes of content copied from other layers.
    pub reused: u64,
    /// Chunks that came with wrong bytes.
    pub verify_failures: u64,
    /// The last fetch that failed.
    pub last_failure: Option<Failure>,
    /// What the completion in the background does.
    pub background: &'static str,
    /// In the order in which they are asked.
    pub hosts: Vec<HostReport>,
}

impl Cost {
    /// Bytes received from registries.
    pub fn bytes_fetched(&self) -> u64 {
        self.fetched
            .iter()
            .map(|fetched| fetched.bytes)
            .fold(0, u64::saturating_add)
    }
}

/// What was asked of registries for one purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetched {
    /// The purpose, as metrics name it.
    pub kind: &'static str,
    /// Requests.
    pub requests: u64,
    /// Bytes received.
    pub bytes: u64,
}

/// Something that went wrong with a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// When.
    pub at: SystemTime,
    /// Short and stable.
    pub reason: String,
    /// The error with its causes.
    pub what: String,
    /// The host that was asked last; empty where none was.
    pub host: String,
    /// The image; empty where it is not known.
    pub image: String,
    /// Digest of the blob, where it is known.
    pub layer: Option<Digest>,
}

/// A host that layers are fetched from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct HostReport {
    /// As the image reference or hosts.toml names it.
    pub host: String,
    /// Requests that failed since the last one that did not.
    pub failures_in_a_row: u32,
    /// Time until it is asked again as if nothing had happened; none where it is well.
    pub retry_in: Option<Duration>,
}

/// How layers are mounted, and why so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountReport {
    /// Which layers are mounted as EROFS: all (`erofs`), complete ones (`erofs_when_complete`), none (`fuse`).
    pub chosen: &'static str,
    /// Why, for a person.
    pub reason: String,
    /// What was tried before that was decided, in order.
    pub steps: Vec<ProbeStep>,
    /// Where descriptors are kept while no daemon runs.
    pub store: Option<StoreReport>,
}

/// One step of the self-test.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ProbeStep {
    /// Short and stable.
    pub name: &'static str,
    /// Whether it is as native mounts need it.
    pub ok: bool,
    /// What was found, for a person.
    pub detail: String,
}

/// The descriptor store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StoreReport {
    /// The most descriptors that it keeps.
    pub capacity: usize,
    /// Those that it keeps, as far as is known.
    pub kept: usize,
}
