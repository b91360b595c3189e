//! After a start: lazy layers are mounted again from disk, and what a crash left over is swept.
//!
//! The service answers while this runs; a request that needs a layer mounts it itself. Nothing here is fatal: what
//! cannot be mounted now is tried again when a snapshot of it is used.

use std::collections::HashMap;
use std::time::Duration;

use estargz::digest::Digest;
use futures_util::{StreamExt, stream};
use hullspeed_daemon::error::chain;

use super::service::Service;
use super::{Error, Kind};
use crate::layer::{LayerMount, LayerOrigin, NotLazy};
use crate::metrics::defs::ResultLabels;

/// Snapshots looked at in one go.
const PAGE: usize = 256;
/// Pause before the layers are read again where they cannot be read, at first; it doubles.
const FIRST_RETRY: Duration = Duration::from_secs(1);
/// And at most.
const LAST_RETRY: Duration = Duration::from_secs(60);

/// What a restore came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Restored {
    /// Layers mounted.
    pub mounted: usize,
    /// Layers that could not be mounted.
    pub failed: usize,
}

impl Service {
    /// Mounts all layers that snapshots refer to, several at once, then sweeps orphaned directories. Goes on until it is known which
    /// they are.
    pub async fn restore(&self) -> Restored {
        let uses = self.layer_uses().await;
        self.inner.layers.in_use(&uses.keys().copied().collect::<Vec<_>>());
        let results = stream::iter(uses.into_values())
            .map(|layer| async move { self.restore_use(layer).await })
            .buffer_unordered(self.inner.restore_parallelism)
            .collect::<Vec<_>>()
            .await;
        self.inner.layers.restored().await;
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

    /// What snapshots refer to, as soon as it can be read: until it is known no layer is given up.
    async fn layer_uses(&self) -> HashMap<Digest, LayerUse> {
        let mut wait = FIRST_RETRY;
        loop {
            let uses = self
                .blocking(|inner| layer_uses(inner.store(), inner.directories()))
                .await;
            match uses {
                Ok(uses) => return uses,
                Err(error) => {
                    tracing::error!(error = %chain(&error), retry_in = ?wait, "the layers to mount again cannot be read");
                }
            }
            tokio::time::sleep(wait).await;
            wait = wait.saturating_mul(2).min(LAST_RETRY);
        }
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::metrics::Metrics;
    use crate::snapshot::Labels;
    use crate::snapshot::no_layers::NoLayers;
    use crate::snapshot::service::ServiceOptions;

    fn service(root: &std::path::Path) -> Service {
        Service::open(ServiceOptions {
            root: root.to_owned(),
            layers: Arc::new(NoLayers),
            metrics: Metrics::unregistered(),
            mount_timeout: Duration::from_secs(1),
            restore_parallelism: 1,
        })
        .unwrap()
    }

    #[tokio::test]
    async fn layers_that_cannot_be_read_at_the_start_are_read_later() {
        let root = tempfile::tempdir().unwrap();
        let service = service(root.path());
        service.inner.store().put_for_test("bad", Some(b"no record"));
        let restoring = tokio::spawn({
            let service = service.clone();
            async move { service.restore().await }
        });
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert!(!restoring.is_finished());
        service.inner.store().put_for_test("bad", None);
        assert_eq!(restoring.await.unwrap(), Restored::default());
    }

    #[tokio::test]
    async fn the_directory_of_a_snapshot_that_is_there_is_not_undone() {
        let root = tempfile::tempdir().unwrap();
        let service = service(root.path());
        service.prepare("key".to_owned(), None, Labels::new()).await.unwrap();
        let id = service.inner.store().find("key").unwrap().id;
        let place = service.inner.directories().snapshot(id);
        service.inner.undo(Some(id), true);
        assert!(place.is_dir());
        service.inner.store().remove("key").unwrap();
        service.inner.undo(Some(id), false);
        service.inner.undo(None, true);
        assert!(place.is_dir());
        service.inner.undo(Some(id), true);
        assert!(!place.exists());
    }
}
