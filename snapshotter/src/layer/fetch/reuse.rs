//! Chunks that another layer of the node has are taken from there before they are asked of a registry.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use super::flight::Claim;
use super::layer::LayerFetch;
use super::plan;
use crate::layer::cache::reuse;

/// Chunks looked at in one go when a whole layer is gone through.
const STEP: u32 = 256;

impl LayerFetch {
    /// Takes over all that other layers have.
    pub(super) async fn reuse_all(&self) {
        let count = self.layer().index().chunk_count();
        for start in (0..count).step_by(STEP as usize) {
            let chunks = start..count.min(start.saturating_add(STEP));
            if !self.layer().residency().contains_all(chunks.clone()) && !self.reuse(vec![chunks]).await {
                return;
            }
        }
    }

    /// Takes over what other layers have of `chunks`; false if going on is of no use.
    async fn reuse(&self, chunks: Vec<Range<u32>>) -> bool {
        let layer = self.layer().clone();
        // As many at once as there are requests: whoever asks has a slot, or is one of the two that complete layers.
        let filled = tokio::task::spawn_blocking(move || {
            let mut bytes = 0;
            for chunks in chunks {
                bytes += reuse::fill(&layer, chunks)?.bytes;
            }
            Ok::<_, crate::layer::cache::StoreError>(bytes)
        });
        match filled.await {
            Ok(Ok(bytes)) => {
                self.counts().reused(bytes);
                true
            }
            Ok(Err(error)) => {
                tracing::debug!(dir = %self.layer().dir().display(), %error, "cannot take chunks from other layers");
                false
            }
            Err(_) => false,
        }
    }

    /// Settles the claims of what other layers have; the others, each run of them for one request.
    pub(super) async fn without_reused(self: &Arc<Self>, claims: VecDeque<Claim>) -> Vec<VecDeque<Claim>> {
        let index = self.layer().index();
        let mut chunks: Vec<Range<u32>> = Vec::new();
        for member in claims.iter().filter_map(|claim| index.member(claim.member())) {
            match chunks.last_mut() {
                Some(last) if last.end == member.chunks.start => last.end = member.chunks.end,
                _ => chunks.push(member.chunks),
            }
        }
        self.reuse(chunks).await;
        let mut runs: Vec<VecDeque<Claim>> = Vec::new();
        let mut dropped = true;
        let mut end = 0;
        for claim in claims {
            let range = plan::member_range(index, claim.member());
            if !self.is_missing(claim.member()) {
                dropped = true;
                claim.settle(Ok(()));
                continue;
            }
            match runs.last_mut() {
                Some(run) if !dropped || plan::is_near(end, range.start) => run.push_back(claim),
                _ => runs.push(VecDeque::from([claim])),
            }
            dropped = false;
            end = range.end;
        }
        runs
    }
}
