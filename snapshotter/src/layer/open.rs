//! Opening a layer that is not in the cache: one request for the end of its blob, which holds footer and TOC, or for the TOC
//! alone where the manifest tells its place. Only a layer whose TOC is in another image costs more.
//!
//! The TOC's digest is compared before the TOC is parsed; everything taken from it afterwards is what the image's manifest
//! promised. What else the request brought is handed back, so that it need not be fetched again. [`reader`] asks the layer's
//! sources; one whose bytes are not the promised ones is not asked again as long as there are others.

pub(super) mod elsewhere;
mod form;
mod reader;

use std::sync::Arc;

use bytes::Bytes;
use estargz::digest::Digest;
use estargz::footer::MAX_FOOTER_SIZE;
use estargz::footer::zstd::Position;
use estargz::member::Compression;
use tokio::sync::OwnedSemaphorePermit;

use self::elsewhere::TocImages;
use self::reader::{Received, Sources, Undelivered};
use super::NotLazy;
use super::fetch::Engine;
use super::report::Failure;
use super::source::registry::host_of;
use super::source::{BlobSource, SourceError};

/// Share of the blob that the tail request covers, if nothing tells where the TOC begins: one in [`TAIL_SHARE`] bytes. A TOC costs
/// 60 to 100 compressed bytes per file; layers of Debian packages have about 5 KiB compressed per file.
const TAIL_SHARE: u64 = 48;
/// Least tail asked for; a layer of small files has a TOC of one in 60 of its bytes and more.
const MIN_TAIL: u64 = 128 << 10;
/// Longest tail asked for by guess. A second request for the rest of a larger TOC costs less than this does.
const MAX_TAIL: u64 = 4 << 20;
/// Longest tail asked for because the manifest says so; a longer TOC is asked for once the footer has confirmed where it is.
const MAX_TOLD_TAIL: u64 = 16 << 20;
/// Memory for a TOC, its parsed form and its index, for each of its compressed bytes; those compress to a tenth.
const UNFOLDED: u64 = 16;

/// Where to look for a layer's TOC.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    /// Digest of the blob.
    pub(super) layer: Digest,
    /// Digest of the TOC in the manifest.
    pub(super) toc: Digest,
    /// Where the manifest says that the TOC is.
    pub(super) position: Option<Position>,
    /// Where the manifest says that the TOC of an eStargz layer begins.
    pub(super) toc_offset: Option<u64>,
}

impl Expected {
    /// Length of the first request for a blob of `size` bytes: from the TOC on where that is told, and can be true.
    fn tail_length(&self, size: Option<u64>) -> u64 {
        let told = size.zip(self.toc_offset).and_then(|(size, offset)| {
            let length = size.checked_sub(offset)?.max(MAX_FOOTER_SIZE as u64);
            // Of a small blob all is worth the one request.
            (size > MIN_TAIL && length <= MAX_TOLD_TAIL).then_some(length)
        });
        told.unwrap_or_else(|| tail_length(size))
    }
}

/// A verified TOC and what came with it.
pub(super) struct OpenedBlob {
    /// The TOC in the form whose digest is the expected one.
    pub(super) toc: Vec<u8>,
    /// Where the part of the blob that holds files ends.
    pub(super) toc_offset: u64,
    /// How the blob's members are compressed.
    pub(super) compression: Compression,
    /// Size of the whole blob.
    pub(super) blob_size: u64,
    /// Bytes of the blob before the TOC that were received too, and where they begin.
    pub(super) leftover: (u64, Bytes),
    /// The request that failed last, where one did.
    pub(super) failure: Option<Failure>,
    /// The share of the memory for TOCs that this one has.
    _memory: Option<OwnedSemaphorePermit>,
}

/// Length of the first request for a blob of `size` bytes.
pub(super) fn tail_length(size: Option<u64>) -> u64 {
    let guess = size.map_or(MIN_TAIL * 2, |size| (size / TAIL_SHARE).clamp(MIN_TAIL, MAX_TAIL));
    size.map_or(guess, |size| guess.min(size))
}

/// Reads footer and TOC from whichever of `sources` has the promised ones, and verifies the TOC; asks `elsewhere` for one that is
/// not in the blob.
pub(super) async fn open(
    engine: &Engine,
    sources: Vec<Arc<dyn BlobSource>>,
    image: &str,
    expected: Expected,
    elsewhere: &dyn TocImages,
) -> Result<OpenedBlob, NotLazy> {
    engine.note_activity();
    let mut sources = Sources::new(engine, sources, image, expected.layer);
    let result = loop {
        match open_once(engine, &mut sources, image, expected, elsewhere).await {
            Err(error) if is_content(&error) && sources.rule_out_deliverers(&error) => {}
            result => break result,
        }
    };
    engine.note_opened(expected.toc, sources.requests(), sources.bytes());
    result.map(|opened| OpenedBlob {
        failure: sources.take_failure(),
        ..opened
    })
}

/// Whether other bytes would help.
fn is_content(error: &NotLazy) -> bool {
    matches!(
        error,
        NotLazy::NotEstargz { .. }
            | NotLazy::Unsupported { .. }
            | NotLazy::TocMismatch { .. }
            | NotLazy::TocInvalid { .. }
    )
}

async fn open_once(
    engine: &Engine,
    sources: &mut Sources<'_>,
    image: &str,
    expected: Expected,
    elsewhere: &dyn TocImages,
) -> Result<OpenedBlob, NotLazy> {
    let unreachable = |Undelivered { host, cause }| NotLazy::Registry {
        image: image.to_owned(),
        layer: expected.layer,
        host,
        cause: Box::new(cause),
    };
    let (footer, received) = match form::told(expected, sources.size()) {
        Some((footer, toc, blob_size)) => {
            let start = toc.start.min(blob_size.saturating_sub(tail_length(Some(blob_size))));
            let part = sources.receive(start..toc.end, None).await.map_err(unreachable)?;
            (footer, Received { blob_size, ..part })
        }
        None => {
            let tail = sources
                .tail(|size| expected.tail_length(size))
                .await
                .map_err(unreachable)?;
            let footer = form::footer(&tail.bytes, tail.blob_size, expected.layer)?;
            (footer, tail)
        }
    };
    let Received {
        start,
        blob_size,
        bytes,
    } = received;
    let Some(toc) = footer.toc.clone() else {
        let (toc, memory) = external(engine, sources, image, expected, elsewhere).await?;
        return Ok(OpenedBlob {
            toc,
            toc_offset: footer.toc_offset,
            compression: footer.kind.compression(),
            blob_size,
            leftover: (start, before(bytes, start, footer.toc_offset)),
            failure: None,
            _memory: memory,
        });
    };
    // What waits here holds a tail and no more.
    let memory = engine
        .reserve_opening((toc.end - toc.start).saturating_mul(UNFOLDED))
        .await;
    let compressed = sources.rest(toc, start, bytes).await;
    let (compressed, leftover) = compressed.map_err(unreachable)?;
    let compression = footer.kind.compression();
    Ok(OpenedBlob {
        toc: form::verified(compression, compressed, expected).await?,
        toc_offset: footer.toc_offset,
        compression,
        blob_size,
        leftover,
        failure: None,
        _memory: memory,
    })
}

/// The TOC that another image has, from whichever of its sources has the promised one; requests count as those for the layer.
async fn external(
    engine: &Engine,
    layer: &mut Sources<'_>,
    image: &str,
    expected: Expected,
    elsewhere: &dyn TocImages,
) -> Result<(Vec<u8>, Option<OwnedSemaphorePermit>), NotLazy> {
    let failed = |host: String, cause: SourceError| NotLazy::TocImage {
        image: image.to_owned(),
        layer: expected.layer,
        host,
        cause: Box::new(cause),
    };
    let found = elsewhere.find(image, &expected.layer).await;
    let found = found.map_err(|cause| failed(host_of(&cause).unwrap_or_default().to_owned(), cause))?;
    let mut sources = Sources::new(engine, found, image, expected.layer);
    let size = sources.size().unwrap_or(0);
    form::bounded(&(0..size), expected.layer)?;
    let memory = engine.reserve_opening(size.saturating_mul(UNFOLDED)).await;
    let result = loop {
        let received = match sources.receive(0..size, None).await {
            Ok(received) => received,
            Err(Undelivered { host, cause }) => break Err(failed(host, cause)),
        };
        match form::verified(Compression::Gzip, received.bytes, expected).await {
            Err(error) if sources.rule_out_deliverers(&error) => {}
            result => break result,
        }
    };
    layer.charge(&mut sources);
    Ok((result?, memory))
}

/// What of `bytes`, which begin at `start` of the blob, lies before `end`.
fn before(mut bytes: Bytes, start: u64, end: u64) -> Bytes {
    bytes.truncate(usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX));
    bytes
}

const _: () = assert!(MIN_TAIL > MAX_FOOTER_SIZE as u64, "the first request holds the footer");

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use async_trait::async_trait;
    use estargz::footer::FooterKind;
    use proptest::prelude::*;
    use tokio::runtime::Handle;

    use super::*;
    use crate::layer::fetch::FetchOptions;
    use crate::layer::source::scripted::{Fault, Scripted};
    use crate::layer::testing::{Packing, Sample};
    use crate::metrics::Metrics;

    fn engine() -> Arc<Engine> {
        let options = FetchOptions {
            stall_timeout: Duration::from_millis(300),
            ..FetchOptions::default()
        };
        Engine::new(options, Metrics::unregistered(), Handle::current())
    }

    #[test]
    fn the_tail_is_bounded_and_never_longer_than_the_blob() {
        for (size, length) in [
            (Some(0), 0),
            (Some(100), 100),
            (Some(MIN_TAIL), MIN_TAIL),
            (Some(9_500_000), 9_500_000 / TAIL_SHARE),
            (Some(48 << 20), 1 << 20),
            (Some(u64::MAX), MAX_TAIL),
            (None, 2 * MIN_TAIL),
        ] {
            assert_eq!(
                tail_length(size),
                length.max(size.map_or(0, |size| size.min(MIN_TAIL))),
                "{size:?}"
            );
        }
    }

    /// TOC images that have one TOC, or none.
    struct Elsewhere(Option<Arc<Scripted>>);

    #[async_trait]
    impl TocImages for Elsewhere {
        async fn find(&self, image: &str, _layer: &Digest) -> Result<Vec<Arc<dyn BlobSource>>, SourceError> {
            assert_eq!(image, "registry.test/image:1");
            match &self.0 {
                Some(source) => Ok(vec![Arc::new(source.clone())]),
                None => Err(SourceError::transient("there is none")),
            }
        }
    }

    async fn opened(source: &Arc<Scripted>, sample: &Sample) -> Result<OpenedBlob, NotLazy> {
        opened_from(&[source], sample).await
    }

    async fn opened_from(sources: &[&Arc<Scripted>], sample: &Sample) -> Result<OpenedBlob, NotLazy> {
        opened_as(sources, sample, None, &Elsewhere(None)).await
    }

    async fn opened_with(
        source: &Arc<Scripted>,
        sample: &Sample,
        position: Option<Position>,
        elsewhere: &Elsewhere,
    ) -> Result<OpenedBlob, NotLazy> {
        opened_as(&[source], sample, position, elsewhere).await
    }

    async fn opened_told(source: &Arc<Scripted>, sample: &Sample, toc_offset: u64) -> Result<OpenedBlob, NotLazy> {
        let expected = Expected {
            toc_offset: Some(toc_offset),
            ..expected(sample)
        };
        let sources: Vec<Arc<dyn BlobSource>> = vec![Arc::new(source.clone())];
        open(&engine(), sources, "registry.test/image:1", expected, &Elsewhere(None)).await
    }

    fn expected(sample: &Sample) -> Expected {
        Expected {
            layer: Digest::of(&sample.blob),
            toc: sample.toc_digest,
            position: None,
            toc_offset: None,
        }
    }

    async fn opened_as(
        sources: &[&Arc<Scripted>],
        sample: &Sample,
        position: Option<Position>,
        elsewhere: &Elsewhere,
    ) -> Result<OpenedBlob, NotLazy> {
        let expected = Expected {
            position,
            ..expected(sample)
        };
        let source = |source: &&Arc<Scripted>| Arc::new(Arc::clone(source)) as Arc<dyn BlobSource>;
        let sources = sources.iter().map(source).collect();
        open(&engine(), sources, "registry.test/image:1", expected, elsewhere).await
    }

    #[tokio::test]
    async fn where_the_manifest_tells_the_tocs_offset_no_more_is_asked_for_and_a_wrong_one_costs_a_request() {
        let sample = Sample::uniform(400, 5_000, Packing::default());
        let size = sample.blob.len() as u64;
        assert!(size - sample.toc_offset < MIN_TAIL && size > 2 * MIN_TAIL);
        for (told, requests) in [
            (sample.toc_offset, 1),
            (sample.toc_offset - 1_000, 1),
            (sample.toc_offset + 1, 2),
            (size, 2),
            (size + 1, 1),
            (u64::MAX, 1),
        ] {
            let source = Arc::new(Scripted::new(sample.blob.clone()));
            let opened = opened_told(&source, &sample, told).await.unwrap();
            assert!(opened.toc == sample.toc_json && opened.blob_size == size, "{told}");
            let made = source.requests();
            assert_eq!(made.len(), requests, "{told}: {made:?}");
            if told <= sample.toc_offset {
                assert_eq!(made[0].0, told..size);
            }
        }
    }

    fn zstd(count: usize, length: usize) -> Sample {
        Sample::of_form(FooterKind::ZstdChunked, count, length, Packing::default())
    }

    /// What the manifest of a zstd:chunked sample says about its TOC.
    fn position(sample: &Sample) -> Position {
        let (offset, length) = (sample.toc_offset + 8, sample.compressed_toc.len());
        Position::parse(&format!("{offset}:{length}:0:1")).unwrap()
    }

    #[tokio::test]
    async fn a_toc_in_a_zstd_frame_is_known_by_its_document_or_by_its_frame() {
        for sample in [zstd(60, 30_000), zstd(60, 30_000).named_by_frame()] {
            let source = Arc::new(Scripted::new(sample.blob.clone()));
            let opened = opened(&source, &sample).await.unwrap();
            assert!(opened.toc == sample.toc_json);
            assert_eq!(
                (opened.toc_offset, opened.blob_size, opened.compression),
                (sample.toc_offset, sample.blob.len() as u64, Compression::Zstd)
            );
            assert_eq!(source.requests().len(), 1);
            let (start, bytes) = opened.leftover;
            assert!(bytes == sample.blob[usize::try_from(start).unwrap()..][..bytes.len()]);
        }
    }

    #[tokio::test]
    async fn a_toc_whose_place_the_manifest_tells_costs_one_request_however_long_it_is() {
        let sample = zstd(6_000, 20);
        let source = Arc::new(Scripted::new(sample.blob.clone()));
        let told = Some(position(&sample));
        let opened = opened_with(&source, &sample, told, &Elsewhere(None)).await.unwrap();
        assert!(opened.toc == sample.toc_json && opened.toc_offset == sample.toc_offset);
        let toc = sample.toc_offset + 8..sample.toc_offset + 8 + sample.compressed_toc.len() as u64;
        assert!(toc.end - toc.start > tail_length(Some(sample.blob.len() as u64)));
        assert_eq!(
            source
                .requests()
                .iter()
                .map(|request| request.0.clone())
                .collect::<Vec<_>>(),
            [toc]
        );
        // A place outside the blob tells nothing; a wrong one in it gives another TOC.
        let beyond = Position::parse("99999999999:5:5:1").ok();
        let opened = opened_with(&source, &sample, beyond, &Elsewhere(None)).await.unwrap();
        assert!(opened.toc == sample.toc_json);
        let wrong = Position::parse("8:100:100:1").ok();
        let error = opened_with(&source, &sample, wrong, &Elsewhere(None))
            .await
            .err()
            .unwrap();
        assert_eq!(error.reason(), "toc_invalid");
    }

    #[tokio::test]
    async fn a_toc_in_another_image_is_taken_if_it_is_the_promised_one() {
        let sample = Sample::of_form(FooterKind::ExternalToc, 60, 30_000, Packing::default());
        let source = Arc::new(Scripted::new(sample.blob.clone()));
        let other = Sample::uniform(2, 10, Packing::default());
        let toc = |bytes: &Bytes| Elsewhere(Some(Arc::new(Scripted::new(bytes.clone()))));
        let opened = opened_with(&source, &sample, None, &toc(&sample.compressed_toc))
            .await
            .unwrap();
        assert!(opened.toc == sample.toc_json && opened.compression == Compression::Gzip);
        assert_eq!(opened.toc_offset, sample.blob.len() as u64 - 46);
        let (start, bytes) = opened.leftover;
        assert_eq!(start + bytes.len() as u64, sample.toc_offset);
        assert_eq!(source.requests().len(), 1);
        for (elsewhere, reason) in [
            (toc(&other.compressed_toc), "toc_mismatch"),
            (toc(&other.blob.slice(10..60)), "toc_invalid"),
            (Elsewhere(None), "toc_image"),
        ] {
            let error = opened_with(&source, &sample, None, &elsewhere).await.err().unwrap();
            assert_eq!(error.reason(), reason, "{error}");
        }
    }

    #[tokio::test]
    async fn footer_and_toc_come_in_one_request_and_what_else_came_is_handed_back() {
        let sample = Sample::uniform(60, 30_000, Packing::default());
        for known in [true, false] {
            let source = Scripted::new(sample.blob.clone());
            let source = Arc::new(if known { source } else { source.of_unknown_size() });
            let opened = opened(&source, &sample).await.unwrap();
            assert!(opened.toc == sample.toc_json);
            assert_eq!(
                (opened.toc_offset, opened.blob_size),
                (sample.toc_offset, sample.blob.len() as u64)
            );
            assert_eq!(source.requests().len(), 1);
            let (start, bytes) = opened.leftover;
            assert!(bytes.len() > 50_000 && start + bytes.len() as u64 == sample.toc_offset);
            assert!(bytes == sample.blob[usize::try_from(start).unwrap()..][..bytes.len()]);
        }
    }

    #[tokio::test]
    async fn a_toc_that_is_longer_than_the_tail_costs_one_more_request_for_exactly_the_rest() {
        let sample = Sample::uniform(6_000, 1, Packing::default());
        let source = Arc::new(Scripted::new(sample.blob.clone()));
        let opened = opened(&source, &sample).await.unwrap();
        assert!(opened.toc == sample.toc_json && opened.leftover.1.is_empty());
        let requests = source.requests();
        assert_eq!(requests.len(), 2);
        assert_eq!(requests[1].0, sample.toc_offset..requests[0].0.start);
    }

    #[tokio::test]
    async fn a_passing_failure_is_asked_again_and_a_lasting_one_is_reported() {
        let sample = Sample::uniform(3, 100, Packing::default());
        let source = Arc::new(Scripted::new(sample.blob.clone()));
        source.script([Fault::CutAfter(100), Fault::StallAfter(10)]);
        opened(&source, &sample).await.unwrap();
        assert_eq!(source.requests().len(), 3);
        let asked: Vec<_> = source.requests().into_iter().map(|(range, _)| range.start).collect();
        assert_eq!(
            [asked[1] - asked[0], asked[2] - asked[0]],
            [100, 110],
            "what came is kept"
        );
        source.script([Fault::Permanent]);
        assert!(matches!(opened(&source, &sample).await, Err(NotLazy::Registry { .. })));
        source.script([Fault::EndAfter(10); 9]);
        assert!(matches!(opened(&source, &sample).await, Err(NotLazy::Registry { .. })));
        let source = Arc::new(Scripted::new(sample.blob.clone()));
        source.corrupt(sample.toc_offset + 40, 1);
        let error = opened(&source, &sample).await.err().unwrap();
        assert!(
            matches!(error, NotLazy::TocInvalid { .. } | NotLazy::TocMismatch { .. }),
            "{error}"
        );
    }

    #[tokio::test]
    async fn any_source_that_has_the_promised_toc_will_do() {
        let sample = Sample::uniform(60, 3_000, Packing::default());
        let source = |host: &str| Arc::new(Scripted::new(sample.blob.clone()).at(host));
        let (mirror, registry) = (source("mirror.test"), source("registry.test"));
        for fault in [
            Fault::Permanent,
            Fault::Transient,
            Fault::Busy(60_000),
            Fault::StallAfter(1_000),
        ] {
            mirror.script([fault]);
            let before = registry.requests().len();
            let opened = opened_from(&[&mirror, &registry], &sample).await.unwrap();
            assert!(opened.toc == sample.toc_json, "{fault:?}");
            assert_eq!(registry.requests().len(), before + 1, "{fault:?}");
        }
        // Each time asked once, and the registry at once after it.
        assert_eq!(mirror.requests().len(), 4);
        // What came before the stall was not asked for again.
        let (asked, rest) = (mirror.requests().pop().unwrap().0, registry.requests().pop().unwrap().0);
        assert_eq!(rest, asked.start + 1_000..asked.end);
        mirror.corrupt(sample.toc_offset + 40, u32::MAX);
        let opened = opened_from(&[&mirror, &registry], &sample).await.unwrap();
        assert!(opened.toc == sample.toc_json);
        registry.corrupt(sample.toc_offset + 41, u32::MAX);
        assert!(is_content(
            &opened_from(&[&mirror, &registry], &sample).await.err().unwrap()
        ));
    }

    proptest! {
        /// Whatever the end of a blob holds, the answer is the promised TOC or a reason.
        #[test]
        fn a_hostile_end_of_the_blob_is_refused(
            cut in 0usize..2_000,
            flips in prop::collection::vec((0usize..2_500, 1u8..), 0..6),
            known in any::<bool>(),
            form in prop::sample::select(vec![FooterKind::Gzip, FooterKind::ZstdChunked, FooterKind::ExternalToc]),
        ) {
            let sample = Sample::of_form(form, 5, 300, Packing::default());
            let mut blob = sample.blob.to_vec();
            blob.truncate(blob.len() - cut.min(blob.len() - 1));
            for (back, flip) in flips {
                if let Some(at) = blob.len().checked_sub(back + 1) {
                    blob[at] ^= flip;
                }
            }
            let source = Scripted::new(blob.into());
            let source = Arc::new(if known { source } else { source.of_unknown_size() });
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            match runtime.block_on(opened(&source, &sample)) {
                Ok(opened) => prop_assert!(opened.toc == sample.toc_json),
                Err(error) => {
                    let reasons = ["toc_mismatch", "toc_invalid", "not_estargz", "unsupported", "toc_image"];
                    prop_assert!(reasons.contains(&error.reason()), "{error}");
                }
            }
            prop_assert!(source.requests().len() <= 2);
        }
    }
}
