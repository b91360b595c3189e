//! From compressed members to resident chunks.
//!
//! Runs on the decompression threads. Chunks of one member are judged one by one: a wrong chunk keeps no right one out.

use std::sync::Arc;

use estargz::member::{Compression, MemberError, unfold};

use super::error::{Corruption, FetchError};
use super::plan;
use crate::layer::cache::{CachedLayer, StoreError};
use crate::metrics::Metrics;

/// Stores every chunk of `member` that `compressed` holds and that is not resident; the first failure if there was one.
pub(super) fn store_member(
    layer: &CachedLayer,
    metrics: &Metrics,
    member: u32,
    compressed: &[u8],
) -> Result<(), FetchError> {
    let Some(entry) = layer.index().member(member) else {
        return Ok(());
    };
    let missing: Vec<u32> = entry
        .chunks
        .filter(|&chunk| !layer.residency().contains(chunk))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let want = usize::try_from(plan::unfolded_size(layer.index(), member)).unwrap_or(usize::MAX);
    let mut bytes = Vec::new();
    // The index says what the layer was when it was opened first. Another image can name the same TOC for a blob that is
    // compressed otherwise; the digests decide which bytes are right, and a wrong one must not spoil the layer for the other.
    let compression = Compression::of(compressed).unwrap_or(layer.index().compression());
    let unfolded = match unfold(compression, compressed, want, &mut bytes) {
        // The chunks before the end may be right.
        Err(short @ MemberError::Short { have, .. }) => {
            unfold(compression, compressed, have, &mut bytes).and(Err(short))
        }
        other => other,
    };
    if unfolded.is_err() && !matches!(unfolded, Err(MemberError::Short { .. })) {
        bytes.clear();
    }
    let shortage = unfolded.err().map(Arc::new);
    let mut failure = None;
    for chunk in missing {
        let result = store_chunk(layer, metrics, chunk, &bytes, shortage.as_ref());
        if let Err(error) = result {
            let worse = matches!(error, FetchError::Store(_));
            if failure.is_none() || worse {
                failure = Some(error);
            }
        }
    }
    failure.map_or(Ok(()), Err)
}

/// Stores the members that lie wholly in `bytes`, which begin at `start` of the blob; wrong ones are left to be fetched.
pub(in crate::layer) fn ingest(layer: &CachedLayer, metrics: &Metrics, start: u64, bytes: &[u8]) {
    let end = start + bytes.len() as u64;
    let count = layer.index().member_count();
    // Members are sorted, so those wanted are at the end.
    for member in (0..count).rev() {
        let range = plan::member_range(layer.index(), member);
        if range.start < start {
            break;
        }
        let (Ok(from), Ok(to)) = (usize::try_from(range.start - start), usize::try_from(range.end - start)) else {
            continue;
        };
        if range.end > end {
            continue;
        }
        if let Some(compressed) = bytes.get(from..to)
            && let Err(error) = store_member(layer, metrics, member, compressed)
        {
            tracing::warn!(dir = %layer.dir().display(), member, error = &error as &dyn std::error::Error, "cannot keep what came with the TOC");
        }
    }
}

fn store_chunk(
    layer: &CachedLayer,
    metrics: &Metrics,
    chunk: u32,
    unfolded: &[u8],
    shortage: Option<&Arc<MemberError>>,
) -> Result<(), FetchError> {
    let corrupt = |reason| {
        metrics.verify_failures.inc();
        FetchError::Corrupt { chunk, reason }
    };
    let Some(entry) = layer.index().chunk(chunk) else {
        return Err(FetchError::Store(StoreError::NoChunk { chunk }));
    };
    let start = usize::try_from(entry.inner_offset).unwrap_or(usize::MAX);
    let bytes = unfolded.get(start..).and_then(|rest| rest.get(..entry.size as usize));
    let Some(bytes) = bytes else {
        let reason = shortage.cloned().unwrap_or_else(|| {
            Arc::new(MemberError::Short {
                have: unfolded.len(),
                want: start,
            })
        });
        return Err(corrupt(Corruption::Inflate(reason)));
    };
    match layer.store(chunk, bytes) {
        Ok(_) => Ok(()),
        Err(error @ StoreError::Digest { .. }) => Err(corrupt(Corruption::Digest(error))),
        // Nobody waits for it.
        Err(error @ StoreError::NoRoom { .. }) => Err(FetchError::Store(error)),
        Err(error) => {
            metrics.cache_write_errors.inc();
            Err(FetchError::Store(error))
        }
    }
}
