//! What is on the node already is copied from there instead of being fetched.
//!
//! All of a layer once when it is mounted, before anything of it is fetched for nobody; and until that is over, what a reader waits for
//! and its neighbours first.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::layer::LayerFetch;
use crate::layer::cache::{StoreError, reuse};

/// Chunks looked for in one piece of work, and their bytes: between two of them others use the decompression threads.
const PIECE: u32 = 256;
const PIECE_BYTES: u64 = 4 << 20;
/// Chunks before and behind a reader's that are looked for with them, since they would be fetched with them; no more than so many
/// bytes, since the reader waits for it.
const BEFORE: u32 = 8;
const BEHIND: u32 = 128;
const NEAR_BYTES: u64 = 1 << 20;

impl LayerFetch {
    /// Takes over all that other layers of the node have of this one.
    pub(super) async fn reuse_all(self: &Arc<Self>) {
        // Otherwise what readers wait for is still looked for.
        if self.reuse_up_to(self.layer().index().chunk_count()).await {
            self.looked_around.store(true, Ordering::Release);
            self.group_done();
        }
    }

    /// Takes over what other layers of the node have of what begins before `until` in the blob.
    pub async fn reuse_before(self: &Arc<Self>, until: u64) {
        let index = self.layer().index();
        let members = (0..index.member_count()).map_while(|member| index.member(member));
        let before = members.take_while(|member| member.start < until);
        let end = before.map(|member| member.chunks.end).max();
        self.reuse_up_to(end.unwrap_or(0)).await;
    }

    /// Takes over what there is of the first chunks; whether all of them were looked for.
    async fn reuse_up_to(self: &Arc<Self>, end: u32) -> bool {
        let mut start = 0;
        while start < end {
            let piece = self.stretch(start..end, PIECE, PIECE_BYTES);
            start = piece.end;
            // All layers that are mounted together copy one piece after the other, so readers find a thread.
            let _turn = self.engine().copying().await;
            if !self.layer().has_room() || !self.reuse_of(piece).await {
                return false;
            }
        }
        true
    }

    /// The first of `chunks`: at least one, and not many.
    fn stretch(&self, chunks: Range<u32>, most: u32, bytes: u64) -> Range<u32> {
        let index = self.layer().index();
        let size = |chunk: u32| index.chunk(chunk).map_or(0, |chunk| u64::from(chunk.size));
        let (start, mut end, mut sum) = (chunks.start, chunks.start, 0);
        while end < chunks.end && end - start < most {
            sum += size(end);
            if end > start && sum > bytes {
                break;
            }
            end += 1;
        }
        start..end
    }

    /// Takes over what a reader waits for, if it has not been looked for yet.
    pub(super) async fn reuse_near(self: &Arc<Self>, chunks: &Range<u32>) {
        if self.looked_around.load(Ordering::Acquire) {
            return;
        }
        // First what it waits for: there may be room for no more.
        self.reuse_of(chunks.clone()).await;
        let (count, residency) = (self.layer().index().chunk_count(), self.layer().residency());
        if residency.contains_all(chunks.clone()) || !self.layer().has_room() {
            return;
        }
        let behind = chunks.end..chunks.end.saturating_add(BEHIND).min(count);
        let before = chunks.start.saturating_sub(BEFORE)..chunks.start;
        for near in [behind, before] {
            if !near.is_empty() {
                self.reuse_of(self.stretch(near, BEHIND, NEAR_BYTES)).await;
            }
        }
    }

    /// Whether it is of use to go on.
    async fn reuse_of(self: &Arc<Self>, chunks: Range<u32>) -> bool {
        let layer = self.layer().clone();
        let filled = self.engine().decode(move || reuse::fill(&layer, chunks)).await;
        match filled {
            Some(Ok(filled)) => {
                self.counts().reused(filled.bytes);
                true
            }
            Some(Err(StoreError::NoRoom { .. })) | None => false,
            Some(Err(error)) => {
                let dir = self.layer().dir().display();
                tracing::warn!(%dir, error = &error as &dyn std::error::Error, "cannot take over what other layers have");
                false
            }
        }
    }

    /// Makes a layer that was just mounted resident, as far as that is wanted: what is on the node first, then what its maker put
    /// first, then the rest.
    pub fn start_filling(self: &Arc<Self>, prefetch: bool) {
        let fetch = self.clone();
        self.engine().note_activity();
        self.looked_around.store(false, Ordering::Release);
        self.spawn(async move {
            fetch.reuse_all().await;
            if prefetch {
                fetch.start_prefetch();
            }
            fetch.start_background();
        });
    }
}
