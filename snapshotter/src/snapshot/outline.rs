//! Snapshots as far as they tell about images and layers, for whoever explains them.

use estargz::digest::Digest;

use super::decisions::{Counts, Fallback, Refused};
use super::service::Service;
use super::store::Found;
use super::{Error, Kind, labels};

/// Snapshots looked at in one go.
const PAGE: usize = 256;

/// Snapshots outlined at most: bounds the memory, and the time for an answer.
pub const MAX_OUTLINED: usize = 20_000;

/// A snapshot in short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outline {
    /// Key or name.
    pub name: String,
    /// Name of the parent.
    pub parent: Option<String>,
    /// State.
    pub kind: Kind,
    /// Reference of the image that it was made for.
    pub image: Option<String>,
    /// Digest of that image's manifest.
    pub manifest: Option<Digest>,
    /// Digest of the layer's blob.
    pub layer: Option<Digest>,
    /// Identity of the lazy layer that it is.
    pub lazy: Option<Digest>,
    /// Why it is none.
    pub fallback: Option<Fallback>,
}

impl From<Found> for Outline {
    fn from(found: Found) -> Self {
        let Found {
            info, layer, fallback, ..
        } = found;
        let told = labels::layer_request(&info.labels).ok();
        let image = told.as_ref().map(|told| told.image.clone());
        Self {
            name: info.name,
            parent: info.parent,
            kind: info.kind,
            image: image.or_else(|| layer.as_ref().map(|origin| origin.image.clone())),
            manifest: told.as_ref().and_then(|told| told.manifest_digest),
            layer: layer
                .as_ref()
                .map(|origin| origin.layer_digest)
                .or(told.map(|told| told.layer_digest)),
            lazy: layer.map(|origin| origin.toc_digest),
            fallback,
        }
    }
}

impl Service {
    /// All snapshots in short, the first [`MAX_OUTLINED`] of them.
    pub async fn outlines(&self) -> Result<Vec<Outline>, Error> {
        self.blocking(|inner| {
            let mut listing = inner.store().listing()?;
            let mut outlines = Vec::new();
            while let Some(page) = listing.page(PAGE)? {
                outlines.extend(page.into_iter().map(Outline::from));
                if outlines.len() >= MAX_OUTLINED {
                    tracing::warn!(MAX_OUTLINED, "there are more snapshots than are looked at for a report");
                    outlines.truncate(MAX_OUTLINED);
                    break;
                }
            }
            Ok(outlines)
        })
        .await
    }

    /// What was decided about layers since the start.
    pub fn decisions(&self) -> Counts {
        self.inner.decisions.counts()
    }

    /// The last layers that are not lazy, the oldest first.
    pub fn refused(&self) -> Vec<Refused> {
        self.inner.decisions.last()
    }
}
