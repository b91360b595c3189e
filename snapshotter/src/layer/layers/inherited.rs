//! What an earlier process left mounted: of layers that snapshots refer to it is gone on with when they are restored; the rest is here.
//!
//! Whoever reads of a mount that nobody serves waits for ever. So what cannot be restored is answered with errors, and what nobody wants
//! is taken down.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use estargz::digest::Digest;
use tokio::task::JoinHandle;

use super::{Shared, cache_error};
use crate::layer::cache::{LayerStore, Origin, Pin};
use crate::layer::mounts::kept::Descriptors;
use crate::layer::{LayerOrigin, NotLazy};

/// What an earlier process left, until all of it is somebody's.
pub(super) struct Inheritance {
    /// Layers of which something is kept: none is given up before it is known who wants it.
    pins: Mutex<HashMap<Digest, Pin>>,
    /// Layers that snapshots refer to, and what takes the others down.
    ending: Mutex<(Vec<Digest>, Option<JoinHandle<()>>)>,
}

impl Inheritance {
    pub(super) fn new(store: &LayerStore, descriptors: &Descriptors) -> Self {
        let is_left = |layer: &Digest| descriptors.with_layer(layer, |_| ()).is_some();
        let left = store.layers().into_iter().filter(is_left);
        Self {
            pins: Mutex::new(left.map(|layer| (layer, store.pin(&layer))).collect()),
            ending: Mutex::default(),
        }
    }

    fn unpin(&self, layer: &Digest) {
        // Every change is one removal.
        self.pins.lock().unwrap_or_else(PoisonError::into_inner).remove(layer);
    }

    fn left(&self) -> Vec<Digest> {
        let pins = self.pins.lock().unwrap_or_else(PoisonError::into_inner);
        pins.keys().copied().collect()
    }
}

impl Shared {
    /// Begins to take down what no snapshot refers to: `wanted` is what some does.
    pub(super) fn inherit(self: &Arc<Self>, wanted: Vec<Digest>) {
        let ending = self.clone().end_unwanted(wanted.clone());
        let task = self.tasks.spawn_on(ending, &self.runtime);
        let mut ending = self.inheritance.ending.lock().unwrap_or_else(PoisonError::into_inner);
        *ending = (wanted, Some(task));
    }

    /// Everything was restored that can be: who uses the rest gets errors from now on.
    pub(super) async fn inherited(self: &Arc<Self>) {
        let (wanted, task) = {
            let mut ending = self.inheritance.ending.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *ending)
        };
        if let Some(task) = task {
            // A panic there has been reported.
            let _ = task.await;
        }
        if self.stop.is_cancelled() {
            // The next process goes on.
            return;
        }
        let shared = self.clone();
        let settle = move || {
            let layers = shared.store.layers().into_iter().chain(wanted);
            let layers = layers.map(|layer| (layer, shared.store.mount_point(&layer)));
            shared.ways.settle(layers.collect());
        };
        // A panic there has been reported.
        let _ = tokio::task::spawn_blocking(settle).await;
    }

    /// Takes down what an earlier process left mounted and no snapshot refers to any more: nobody else would answer for it.
    async fn end_unwanted(self: Arc<Self>, wanted: Vec<Digest>) {
        for toc_digest in self.inheritance.left() {
            if self.stop.is_cancelled() {
                return;
            }
            if !wanted.contains(&toc_digest) {
                self.end_one(toc_digest).await;
            }
            // Of those that are wanted the snapshots take care.
            self.inheritance.unpin(&toc_digest);
        }
    }

    async fn end_one(self: &Arc<Self>, toc_digest: Digest) {
        self.end_if(toc_digest, || {
            self.ways.descriptors().with_layer(&toc_digest, |_| ()).is_some()
        })
        .await;
    }

    /// As [`Self::end_one`], of a layer of which nothing is kept.
    #[cfg(test)]
    pub(super) async fn end_for_test(self: Arc<Self>, toc_digest: Digest) {
        self.end_if(toc_digest, || true).await;
    }

    async fn end_if(self: &Arc<Self>, toc_digest: Digest, is_left: impl FnOnce() -> bool) {
        let slot = self.slot(&toc_digest);
        {
            // All the while: who comes for the layer finds it as it was left, or not mounted.
            let mut mounted = slot.mounted.lock().await;
            if mounted.is_none() && is_left() {
                let restored = match self.origin_of(toc_digest) {
                    Ok(origin) => self.restore_held(&slot, &mut mounted, &origin).await.map(drop),
                    Err(error) => Err(error),
                };
                if let Err(error) = restored {
                    tracing::warn!(toc = %toc_digest, error = &error as &dyn std::error::Error,
                        "what an earlier process left mounted, and nobody wants, cannot be served until it ends");
                }
                self.unmount_held(&toc_digest, &slot, &mut mounted).await;
            }
        }
        self.forget(&toc_digest, slot);
    }

    fn origin_of(&self, toc_digest: Digest) -> Result<LayerOrigin, NotLazy> {
        let Origin {
            image, layer_digest, ..
        } = self
            .store
            .origin(&toc_digest)
            .map_err(|error| cache_error(toc_digest, self.store.path(&toc_digest), error))?;
        Ok(LayerOrigin {
            toc_digest,
            image,
            layer_digest,
        })
    }
}
