//! Layers with `layers.lazy = false`: none is lazy, so the daemon is an ordinary overlay snapshotter.

use async_trait::async_trait;
use estargz::digest::Digest;

use crate::layer::{LayerMount, LayerMounts, LayerOrigin, LayerRequest, NotLazy, Usage};

/// Refuses every layer.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoLayers;

#[async_trait]
impl LayerMounts for NoLayers {
    async fn mount(&self, _: LayerRequest) -> Result<LayerMount, NotLazy> {
        Err(NotLazy::Disabled)
    }

    async fn restore(&self, _: LayerOrigin) -> Result<LayerMount, NotLazy> {
        Err(NotLazy::Disabled)
    }

    async fn release(&self, _: &Digest) {}

    fn usage(&self, _: &Digest) -> Usage {
        Usage::default()
    }

    async fn shutdown(&self) {}
}
