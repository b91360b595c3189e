//! After a start: lazy layers are mounted again from disk, and what a crash left over is swept.
//!
//! The service answers while this runs; a request that needs a layer mounts it itself. Nothing here is fatal: what
//! cannot be mounted now is tried again when a snapshot of it is used.

use hullspeed_daemon::error::chain;
use std::collections::HashMap;

use estargz::digest::Digest;
use futures_util::{StreamExt, stream};

use super::service::Service;
use super::{Error, Kind};
use crate::layer::{LayerMount, LayerOrigin, NotLazy};
use crate::metrics::defs::ResultLabels;

/// Snapshots looked at in one go.
const PAGE: usize = 256;

/// What a restore came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// Layers mounted.
    pub mounted: usize,
    /// Layers that could not be mounted.
    pub failed: usize,
}

impl Service {
    /// Mounts all layers that snapshots refer to, several at once, then sweeps orphaned directories.
    pub async fn restore(&self) -> Restored {
        let uses = self
            .blocking(|inner| layer_uses(inner.store(), inner.directories()))
            .await;
        let uses = match uses {
            Ok(uses) => {
                self.inner.layers.in_use(&uses.keys().copied().collect::<Vec<_>>());
                uses
            }
            Err(error) => {
                tracing::error!(error = %chain(&error), "the layers to mount again cannot be read");
                HashMap::new()
            }
        };
        let results = stream::iter(uses.into_values())
            .map(|layer| async move { self.restore_use(layer).await })
            .buffer_unordered(self.inner.restore_parallelism)
            .collect::<Vec<_>>()
            .await;
        let mounted = results.iter().filter(|mounted| **mounted).count();
        let restored = Restored {
            mounted,
            failed: results.len() - mounted,
        };
        tracing::info!(
            mounted = restored.mounted,
            failed = restored.failed,
            "lazy layers are mounted again"
        );
        if let Err(error) = self.cleanup().await {
            tracing::warn!(error = %chain(&error), "orphaned directories are not swept");
        }
        restored
    }

    async fn restore_use(&self, layer: LayerUse) -> bool {
        let LayerUse { origin, unlinked } = layer;
        let toc = origin.toc_digest;
        let (image, layer) = (origin.image.clone(), origin.layer_digest);
        let count = |result| {
            self.inner
                .metrics
                .mounts_restored
                .get_or_create(&ResultLabels { result })
                .inc()
        };
        match self.restore_layer(origin).await {
            Ok(Ok(mounted)) => {
                count("ok");
                self.link_again(unlinked, mounted).await;
                true
            }
            Ok(Err(error)) => {
                count(error.reason());
                tracing::error!(%toc, image, %layer, reason = error.reason(), error = %chain(&error),
                    "a lazy layer cannot be mounted again; it is tried again when it is used");
                false
            }
            Err(error) => {
                count("store");
                tracing::error!(%toc, image, %layer, error = %chain(&error), "a lazy layer cannot be looked up");
                false
            }
        }
    }

    /// Mounts one layer from disk unless it is mounted.
    pub(super) async fn restore_layer(&self, origin: LayerOrigin) -> Result<Result<LayerMount, NotLazy>, Error> {
        let _lock = self.lock_layer(&origin.toc_digest).await;
        let toc = origin.toc_digest;
        if self
            .blocking(move |inner| inner.store().first_user(&toc))
            .await?
            .is_none()
        {
            // Its last snapshot was removed meanwhile; a mount would never be released.
            self.inner.layers.release(&toc).await;
            return Ok(Err(NotLazy::Refused {
                why: "its last snapshot is removed",
            }));
        }
        Ok(self.inner.layers.restore(origin).await)
    }

    /// Makes links to layers that a crash of the machine lost.
    async fn link_again(&self, unlinked: Vec<u64>, mounted: LayerMount) {
        let linked = self.blocking(move |inner| {
            for id in unlinked {
                inner.directories().remove_path(&inner.directories().snapshot(id))?;
                inner.directories().make_link(id, &mounted.path)?;
            }
            Ok(())
        });
        if let Err(error) = linked.await {
            tracing::error!(error = %chain(&error), "the link to a lazy layer cannot be made again");
        }
    }
}

/// A layer with those of its snapshots that lack their link.
struct LayerUse {
    origin: LayerOrigin,
    unlinked: Vec<u64>,
}

fn layer_uses(
    store: &super::store::Store,
    directories: &super::directories::Directories,
) -> Result<HashMap<Digest, LayerUse>, Error> {
    let mut uses = HashMap::new();
    let mut listing = store.listing()?;
    while let Some(page) = listing.page(PAGE)? {
        for found in page {
            let has_content = directories.has_content(found.id);
            match found.layer {
                Some(origin) => {
                    let layer = uses.entry(origin.toc_digest).or_insert_with(|| LayerUse {
                        origin,
                        unlinked: Vec::new(),
                    });
                    layer.unlinked.extend((!has_content).then_some(found.id));
                }
                None if !has_content => tracing::error!(
                    snapshot = found.info.name,
                    kind = found.info.kind.name(),
                    id = found.id,
                    "the directory of a snapshot is missing; remove the snapshot{}",
                    if found.info.kind == Kind::Committed {
                        " and pull its image again"
                    } else {
                        ""
                    }
                ),
                None => {}
            }
        }
    }
    Ok(uses)
}
