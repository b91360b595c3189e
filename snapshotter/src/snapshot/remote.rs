//! containerd's remote snapshot protocol.
//!
//! A `Prepare` with the label `containerd.io/snapshot.ref` offers a layer before it is pulled. If the layer can be
//! mounted lazily, its snapshot is committed under the target's name at once and the answer is "already exists": then
//! containerd neither pulls nor unpacks it. Otherwise the `Prepare` goes on as an ordinary one.

use hullspeed_daemon::error::chain;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::decisions::{Fallback, Refused};
use super::labels;
use super::service::Service;
use super::{Error, Labels};
use crate::layer::{LayerMount, LayerOrigin, LayerRequest, NotLazy};
use crate::metrics::defs::{PrepareLabels, PrepareResult};

impl Service {
    /// Tries to make the lazy snapshot `target`. An error of [`Error::TargetExists`] is success; without an error the
    /// layer has to be unpacked, and the answer says why.
    pub(super) async fn offer(
        &self,
        key: &str,
        target: &str,
        parent: Option<&str>,
        labels: &Labels,
    ) -> Result<Fallback, Error> {
        let place = Place {
            target: target.to_owned(),
            parent: parent.map(str::to_owned),
        };
        let exists = {
            let place = place.clone();
            self.blocking(move |inner| {
                // A parent that is missing or not committed fails before anything is fetched.
                inner.store().ground(place.parent.as_deref())?;
                inner.store().find_target(&place.target, place.parent.as_deref())
            })
            .await?
        };
        if exists.is_some() {
            return Err(Error::TargetExists { target: place.target });
        }
        let request = match labels::layer_request(labels) {
            Ok(request) => request,
            Err(error) => {
                self.count(PrepareResult::fallback, error.reason());
                // Not a warning: an import or an image without annotations is nothing that went wrong.
                tracing::info!(key, snapshot = target, reason = error.reason(), error = %chain(&error),
                    "remote-snapshot-prepared" = "false", "layer is not offered for lazy use");
                return Ok(self.refused_as(target, None, Fallback::now(error.reason(), chain(&error))));
            }
        };
        match self.mount_and_commit(place, &request, labels).await {
            Ok(outcome) => {
                self.count(PrepareResult::lazy, "");
                self.inner.decisions.lazy(target);
                tracing::info!(key, snapshot = target, image = request.image, layer = %request.layer_digest,
                    toc = %outcome, "remote-snapshot-prepared" = "true", "layer is mounted lazily");
                Err(Error::TargetExists {
                    target: target.to_owned(),
                })
            }
            Err(Refusal::NotLazy(error)) => {
                self.count(PrepareResult::fallback, error.reason());
                let host = Some(error.host()).filter(|host| !host.is_empty());
                tracing::warn!(key, snapshot = target, image = request.image, layer = %request.layer_digest, host,
                    reason = error.reason(), error = %chain(&error), "remote-snapshot-prepared" = "false",
                    "layer cannot be mounted lazily and will be unpacked");
                Ok(self.refused_as(target, Some(&request), Fallback::from(&error)))
            }
            Err(Refusal::Failed(error)) => Err(error),
        }
    }

    async fn mount_and_commit(
        &self,
        place: Place,
        request: &LayerRequest,
        labels: &Labels,
    ) -> Result<estargz::digest::Digest, Refusal> {
        let mounted = self.mount_in_time(request).await?;
        let toc = mounted.toc_digest;
        let origin = LayerOrigin {
            toc_digest: toc,
            image: request.image.clone(),
            layer_digest: request.layer_digest,
        };
        let committed = self.commit_layer(place, origin, labels.clone()).await;
        match committed {
            Ok(()) => Ok(toc),
            Err(refusal) => {
                self.release_unused(&toc).await;
                match refusal {
                    // Somebody else was faster with the same layer.
                    Refusal::Failed(Error::TargetExists { .. }) => Ok(toc),
                    refusal => Err(refusal),
                }
            }
        }
    }

    async fn mount_in_time(&self, request: &LayerRequest) -> Result<LayerMount, NotLazy> {
        let waited = self.inner.mount_timeout;
        let (layers, wanted) = (Arc::clone(&self.inner.layers), request.clone());
        let mut mount = tokio::spawn(async move { layers.mount(wanted).await });
        match tokio::time::timeout(waited, &mut mount).await {
            Ok(mounted) => mounted.unwrap_or(Err(NotLazy::Refused {
                why: "the mount was interrupted",
            })),
            Err(_) => {
                self.release_when_mounted(mount);
                Err(NotLazy::Timeout {
                    image: request.image.clone(),
                    layer: request.layer_digest,
                    waited,
                })
            }
        }
    }

    /// A mount that comes too late is nobody's: no snapshot refers to it, so no removal would ever release it.
    ///
    /// Holds the service weakly, because the layers end such a mount only when they are stopped themselves.
    fn release_when_mounted(&self, mount: JoinHandle<Result<LayerMount, NotLazy>>) {
        let inner = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            if let Ok(Ok(mounted)) = mount.await
                && let Some(inner) = inner.upgrade()
            {
                Self { inner }.release_unused(&mounted.toc_digest).await;
            }
        });
    }

    async fn commit_layer(&self, place: Place, origin: LayerOrigin, mut labels: Labels) -> Result<(), Refusal> {
        let _lock = self.lock_layer(&origin.toc_digest).await;
        // Since it was mounted, the last snapshot of the same layer may have been removed and the layer released.
        let mounted = self.inner.layers.restore(origin.clone()).await?;
        labels.insert(labels::REMOTE.to_owned(), labels::REMOTE_VALUE.to_owned());
        self.blocking(move |inner| {
            let mut made = None;
            let parent = place.parent.as_deref();
            let created = inner
                .store()
                .create_remote(&place.target, parent, &labels, &origin, |id| {
                    inner.directories().make_link(id, &mounted.path)?;
                    made = Some(id);
                    Ok(())
                });
            inner.undo(made, created.is_err());
            created.map(drop)
        })
        .await?;
        Ok(())
    }

    /// Remembers a refusal.
    fn refused_as(&self, target: &str, request: Option<&LayerRequest>, fallback: Fallback) -> Fallback {
        self.inner.decisions.refused(Refused {
            snapshot: target.to_owned(),
            image: request.map(|request| request.image.clone()).unwrap_or_default(),
            manifest: request.and_then(|request| request.manifest_digest),
            layer: request.map(|request| request.layer_digest),
            fallback: fallback.clone(),
        });
        fallback
    }

    fn count(&self, result: PrepareResult, reason: &'static str) {
        self.inner
            .metrics
            .snapshot_prepare
            .get_or_create(&PrepareLabels { result, reason })
            .inc();
    }
}

/// Where a lazy layer's snapshot goes.
#[derive(Clone)]
struct Place {
    target: String,
    parent: Option<String>,
}

/// Why no lazy snapshot was made.
enum Refusal {
    NotLazy(NotLazy),
    Failed(Error),
}

impl From<NotLazy> for Refusal {
    fn from(error: NotLazy) -> Self {
        Self::NotLazy(error)
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}
