//! The list of what is in the cache, read from disk.

use std::time::SystemTime;

use estargz::digest::Digest;

use super::Inspector;
use crate::layer::report::{LayerReport, Residence};

/// Layers listed at most: bounds the memory, and the time for an answer.
const MAX_SURVEYED: usize = 20_000;

/// A layer of the cache, as its files tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Survey {
    /// Identity of the layer.
    pub toc: Digest,
    /// Digest of its blob.
    pub layer: Digest,
    /// The image it was first fetched for.
    pub image: String,
    /// Size of its blob.
    pub blob_bytes: u64,
    /// Bytes allocated on disk.
    pub disk_bytes: u64,
    /// When it was opened or closed last.
    pub last_used: Option<SystemTime>,
}

impl Inspector {
    /// All layers in order of their digests. One whose files cannot be read is left out: it is opened anew when it is needed.
    pub async fn survey(&self) -> Vec<Survey> {
        let shared = self.shared.clone();
        let survey = move || {
            let mut layers = shared.store.layers();
            layers.truncate(MAX_SURVEYED);
            layers.sort_unstable_by_key(|toc| *toc.as_bytes());
            let describe = |toc: Digest| {
                let origin = shared.store.origin(&toc).ok()?;
                Some(Survey {
                    toc,
                    layer: origin.layer_digest,
                    image: origin.image,
                    blob_bytes: origin.blob_size,
                    disk_bytes: shared.store.usage(&toc).bytes,
                    last_used: shared.store.last_used(&toc),
                })
            };
            layers.into_iter().filter_map(describe).collect()
        };
        // A panic would be a defect, and is no reason to answer nothing else.
        tokio::task::spawn_blocking(survey).await.unwrap_or_default()
    }

    /// What can be told of a layer that nobody has open.
    pub fn closed(&self, survey: &Survey) -> LayerReport {
        let (chunks, resident) = self.shared.store.peek(&survey.toc).unwrap_or_default();
        LayerReport {
            toc_digest: survey.toc,
            mounted: false,
            mount: None,
            former_mount: None,
            kernel_alone: false,
            residence: Residence {
                chunks,
                resident,
                content: None,
                blob_bytes: survey.blob_bytes,
                disk_bytes: survey.disk_bytes,
            },
            cost: None,
            readers: Vec::new(),
        }
    }
}
