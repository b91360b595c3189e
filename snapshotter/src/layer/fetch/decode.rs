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
            failure = Some(worse(failure, error));
        }
    }
    failure.map_or(Ok(()), Err)
}

/// What is told of two failures: the disk's before the source's, and that there is no room for what nobody waits for last.
fn worse(known: Option<FetchError>, error: FetchError) -> FetchError {
    let is_no_room = |error: &FetchError| matches!(error, FetchError::Store(StoreError::NoRoom { .. }));
    let is_disk = matches!(error, FetchError::Store(_)) && !is_no_room(&error);
    match known {
        Some(known) if is_no_room(&error) || !(is_disk || is_no_room(&known)) => known,
        _ => error,
    }
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

#[cfg(test)]
mod tests {
    use estargz::footer::FooterKind;

    use super::*;
    use crate::layer::testing::{Packing, Sample, TestStore, assert_only_verified};

    const PACKED: Packing = Packing {
        chunk: 20_000,
        per_member: 3,
        prioritized: None,
    };

    fn compressed(sample: &Sample, layer: &CachedLayer, member: u32) -> Vec<u8> {
        let range = plan::member_range(layer.index(), member);
        sample.blob[usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()].to_vec()
    }

    #[test]
    fn members_of_both_compressions_become_resident_whatever_the_index_takes_them_for() {
        let metrics = Metrics::unregistered();
        for form in [FooterKind::Gzip, FooterKind::ZstdChunked, FooterKind::ExternalToc] {
            for told in [Compression::Gzip, Compression::Zstd] {
                let (test, sample) = (TestStore::new(), Sample::of_form(form, 4, 50_000, PACKED));
                let mut origin = sample.origin();
                origin.compression = told;
                let Ok(layer) = test.store.create(&sample.toc_digest, &sample.toc_json, &origin) else {
                    // Zeros in so few bytes cannot be gzip.
                    assert!(form == FooterKind::ZstdChunked && told == Compression::Gzip);
                    continue;
                };
                for member in 0..layer.index().member_count() {
                    store_member(&layer, &metrics, member, &compressed(&sample, &layer, member)).unwrap();
                }
                assert!(layer.residency().is_complete());
                assert_only_verified(&layer);
            }
        }
        assert_eq!(metrics.verify_failures.get(), 0);
    }

    #[test]
    fn that_there_is_no_room_for_nobody_hides_no_other_failure() {
        let disk = |chunk| {
            let (path, source) = ("data".into(), std::io::Error::from_raw_os_error(libc::ENOSPC));
            FetchError::Store(StoreError::Write { chunk, path, source })
        };
        let no_room = |chunk| FetchError::Store(StoreError::NoRoom { chunk });
        let wrong = |chunk| FetchError::Corrupt {
            chunk,
            reason: Corruption::Inflate(Arc::new(MemberError::Short { have: 0, want: 1 })),
        };
        let told = |errors: Vec<FetchError>| {
            let told = errors.into_iter().fold(None, |known, error| Some(worse(known, error)));
            format!("{:?}", told.unwrap())
        };
        let is = |error: FetchError| format!("{error:?}");
        assert_eq!(told(vec![disk(0), no_room(1)]), is(disk(0)));
        assert_eq!(told(vec![no_room(0), disk(1), no_room(2)]), is(disk(1)));
        assert_eq!(told(vec![wrong(0), no_room(1)]), is(wrong(0)));
        assert_eq!(told(vec![no_room(0), wrong(1)]), is(wrong(1)));
        assert_eq!(told(vec![wrong(0), disk(1), wrong(2)]), is(disk(1)));
        assert_eq!(told(vec![no_room(0), no_room(1)]), is(no_room(0)));
    }

    #[test]
    fn of_a_damaged_zstd_member_nothing_wrong_is_kept_and_the_error_says_what_it_is() {
        let metrics = Metrics::unregistered();
        let (test, sample) = (
            TestStore::new(),
            Sample::of_form(FooterKind::ZstdChunked, 4, 50_000, PACKED),
        );
        let layer = sample.create(&test.store);
        let whole = compressed(&sample, &layer, 0);
        let mut flipped = whole.clone();
        flipped[whole.len() / 2] ^= 0x20;
        for bytes in [&whole[..whole.len() / 2], &flipped, &b"no frame"[..], &[]] {
            let error = store_member(&layer, &metrics, 0, bytes).unwrap_err();
            assert!(matches!(error, FetchError::Corrupt { .. }), "{error}");
            assert_only_verified(&layer);
        }
        store_member(&layer, &metrics, 0, &whole).unwrap();
    }
}
