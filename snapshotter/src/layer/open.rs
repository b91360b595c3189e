//! Opening a layer that is not in the cache: one request for the end of its blob, which holds footer and TOC, or for the TOC
//! alone where the manifest tells its place. Only a layer whose TOC is in another image costs more.
//!
//! The TOC's digest is compared before the TOC is parsed; everything taken from it afterwards is what the image's manifest
//! promised. What else the request brought is handed back, so that it need not be fetched again.

pub(super) mod elsewhere;
mod form;

use std::ops::Range;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use estargz::digest::Digest;
use estargz::footer::MAX_FOOTER_SIZE;
use estargz::footer::zstd::Position;
use estargz::member::Compression;
use futures_util::StreamExt;

use self::elsewhere::TocImages;
use super::NotLazy;
use super::source::{BlobSource, ByteStream, Priority, SourceError};
use crate::metrics::Metrics;
use crate::metrics::defs::{FetchLabels, KindLabels};

/// Share of the blob that the tail request covers, if nothing tells where the TOC begins: one in [`TAIL_SHARE`] bytes. A TOC costs
/// 60 to 100 compressed bytes per file; layers of Debian packages have about 5 KiB compressed per file.
const TAIL_SHARE: u64 = 48;
/// Least tail asked for; a layer of small files has a TOC of one in 60 of its bytes and more.
const MIN_TAIL: u64 = 128 << 10;
/// Longest tail asked for by guess. A second request for the rest of a larger TOC costs less than this does.
const MAX_TAIL: u64 = 4 << 20;
/// Attempts for each of the two requests.
const MAX_ATTEMPTS: u32 = 3;
/// Pause before the second attempt; doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// Where to look for a layer's TOC.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    /// Digest of the blob.
    pub(super) layer: Digest,
    /// Digest of the TOC in the manifest.
    pub(super) toc: Digest,
    /// Where the manifest says that the TOC is.
    pub(super) position: Option<Position>,
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
}

/// Length of the first request for a blob of `size` bytes.
pub(super) fn tail_length(size: Option<u64>) -> u64 {
    let guess = size.map_or(MIN_TAIL * 2, |size| (size / TAIL_SHARE).clamp(MIN_TAIL, MAX_TAIL));
    size.map_or(guess, |size| guess.min(size))
}

/// Reads footer and TOC of `source` and verifies the TOC; asks `elsewhere` for a TOC that is not in the blob.
pub(super) async fn open(
    source: &dyn BlobSource,
    image: &str,
    expected: Expected,
    elsewhere: &dyn TocImages,
    metrics: &Metrics,
    stall: Duration,
) -> Result<OpenedBlob, NotLazy> {
    let reader = TailReader { source, metrics, stall };
    let unreachable = |cause: SourceError| NotLazy::Registry {
        image: image.to_owned(),
        layer: expected.layer,
        cause: Box::new(cause),
    };
    let (footer, received) = match form::told(expected, source.size()) {
        Some((footer, toc, size)) => {
            let part = reader.with_toc(toc, size).await.map_err(unreachable)?;
            (
                footer,
                Received {
                    blob_size: size,
                    ..part
                },
            )
        }
        None => {
            let tail = reader.tail().await.map_err(unreachable)?;
            let footer = form::footer(&tail.bytes, tail.blob_size, expected.layer)?;
            (footer, tail)
        }
    };
    let Received {
        start,
        blob_size,
        bytes,
    } = received;
    let (compressed, leftover) = match footer.toc.clone() {
        Some(toc) => reader.member(toc, start, bytes).await.map_err(unreachable)?,
        None => {
            let toc = reader.elsewhere(elsewhere, image, expected).await?;
            (toc, (start, before(bytes, start, footer.toc_offset)))
        }
    };
    let compression = footer.kind.compression();
    Ok(OpenedBlob {
        toc: form::verified(compression, compressed, expected).await?,
        toc_offset: footer.toc_offset,
        compression,
        blob_size,
        leftover,
    })
}

/// What of `bytes`, which begin at `start` of the blob, lies before `end`.
fn before(mut bytes: Bytes, start: u64, end: u64) -> Bytes {
    bytes.truncate(usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX));
    bytes
}

struct TailReader<'a> {
    source: &'a dyn BlobSource,
    metrics: &'a Metrics,
    stall: Duration,
}

/// A part of the blob.
#[derive(Debug, Clone)]
enum Part {
    Range(Range<u64>),
    /// The last bytes of a blob whose size is not known.
    Tail(u64),
}

/// The end of a blob, received.
struct Received {
    start: u64,
    blob_size: u64,
    bytes: Bytes,
}

impl TailReader<'_> {
    /// The end of the blob.
    async fn tail(&self) -> Result<Received, SourceError> {
        let size = self.source.size();
        let length = tail_length(size);
        match size {
            Some(0) => Ok(Received {
                start: 0,
                blob_size: 0,
                bytes: Bytes::new(),
            }),
            Some(size) => {
                let received = self.receive(Part::Range(size - length..size)).await?;
                Ok(Received {
                    blob_size: size,
                    ..received
                })
            }
            None => self.receive(Part::Tail(length)).await,
        }
    }

    /// The TOC, whose place is known, and as much before it as would come with a tail.
    async fn with_toc(&self, toc: Range<u64>, size: u64) -> Result<Received, SourceError> {
        let start = toc.start.min(size.saturating_sub(tail_length(Some(size))));
        self.receive(Part::Range(start..toc.end)).await
    }

    /// The TOC that another image has.
    async fn elsewhere(&self, images: &dyn TocImages, image: &str, expected: Expected) -> Result<Bytes, NotLazy> {
        let failed = |cause: SourceError| NotLazy::TocImage {
            image: image.to_owned(),
            layer: expected.layer,
            cause: Box::new(cause),
        };
        let source = images.find(image, &expected.layer).await.map_err(failed)?;
        let size = source.size().unwrap_or(0);
        form::bounded(&(0..size), expected.layer)?;
        let reader = TailReader {
            source: &*source,
            metrics: self.metrics,
            stall: self.stall,
        };
        let received = reader.receive(Part::Range(0..size)).await.map_err(failed)?;
        Ok(received.bytes)
    }

    /// The TOC member, from the tail as far as it is there, and what the tail holds before it.
    async fn member(&self, toc: Range<u64>, start: u64, mut tail: Bytes) -> Result<(Bytes, (u64, Bytes)), SourceError> {
        let to_len = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        if toc.start >= start {
            let before = tail.split_to(to_len(toc.start - start).min(tail.len()));
            tail.truncate(to_len(toc.end - toc.start));
            return Ok((tail, (start, before)));
        }
        let missing = self.receive(Part::Range(toc.start..start.min(toc.end))).await?;
        let mut member = BytesMut::from(&missing.bytes[..]);
        member.extend_from_slice(&tail[..to_len(toc.end.saturating_sub(start)).min(tail.len())]);
        Ok((member.freeze(), (toc.start, Bytes::new())))
    }

    /// Asks for a part, several times if need be.
    async fn receive(&self, part: Part) -> Result<Received, SourceError> {
        let mut attempt = 1;
        loop {
            let result = self.ask(part.clone()).await;
            let label = result.as_ref().map_or_else(SourceError::class, |_| "ok");
            self.metrics
                .fetch_requests
                .get_or_create(&FetchLabels {
                    kind: "toc",
                    result: label,
                })
                .inc();
            match result {
                Err(error) if error.is_transient() && attempt < MAX_ATTEMPTS => {
                    tracing::debug!(%error, attempt, "asking for the TOC again");
                    tokio::time::sleep(FIRST_PAUSE * 2u32.pow(attempt - 1)).await;
                    attempt += 1;
                }
                result => return result,
            }
        }
    }

    async fn ask(&self, part: Part) -> Result<Received, SourceError> {
        match part {
            Part::Range(range) => {
                let body = self.in_time(self.source.read(range.clone(), Priority::Demand)).await?;
                let bytes = self.collect(body, range.end - range.start).await?;
                Ok(Received {
                    start: range.start,
                    blob_size: range.end,
                    bytes,
                })
            }
            Part::Tail(length) => {
                let tail = self.in_time(self.source.read_tail(length)).await?;
                // A source that gives more than was asked for would be read without a bound.
                let bytes = self
                    .collect(tail.body, tail.blob_size.saturating_sub(tail.start).min(length))
                    .await?;
                Ok(Received {
                    start: tail.start,
                    blob_size: tail.blob_size,
                    bytes,
                })
            }
        }
    }

    async fn in_time<T>(&self, ask: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
        match tokio::time::timeout(self.stall, ask).await {
            Ok(result) => result,
            Err(_) => Err(SourceError::transient(format!("no answer within {:?}", self.stall))),
        }
    }

    async fn collect(&self, mut body: ByteStream, length: u64) -> Result<Bytes, SourceError> {
        let mut bytes = BytesMut::new();
        while (bytes.len() as u64) < length {
            let next = async {
                body.next()
                    .await
                    .unwrap_or_else(|| Err(SourceError::transient("the body ended early")))
            };
            let piece = self.in_time(next).await?;
            self.metrics
                .fetch_bytes
                .get_or_create(&KindLabels { kind: "toc" })
                .inc_by(piece.len() as u64);
            bytes.extend_from_slice(&piece);
        }
        bytes.truncate(usize::try_from(length).unwrap_or(usize::MAX));
        Ok(bytes.freeze())
    }
}

const _: () = assert!(MIN_TAIL > MAX_FOOTER_SIZE as u64, "the first request holds the footer");

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use async_trait::async_trait;
    use estargz::footer::FooterKind;
    use proptest::prelude::*;

    use super::*;
    use crate::layer::source::scripted::{Fault, Scripted};
    use crate::layer::testing::{Packing, Sample};

    const STALL: Duration = Duration::from_millis(300);

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
        async fn find(&self, image: &str, _layer: &Digest) -> Result<Arc<dyn BlobSource>, SourceError> {
            assert_eq!(image, "registry.test/image:1");
            match &self.0 {
                Some(source) => Ok(Arc::new(source.clone())),
                None => Err(SourceError::transient("there is none")),
            }
        }
    }

    async fn opened(source: &Arc<Scripted>, sample: &Sample) -> Result<OpenedBlob, NotLazy> {
        opened_with(source, sample, None, &Elsewhere(None)).await
    }

    async fn opened_with(
        source: &Arc<Scripted>,
        sample: &Sample,
        position: Option<Position>,
        elsewhere: &Elsewhere,
    ) -> Result<OpenedBlob, NotLazy> {
        let expected = Expected {
            layer: Digest::of(&sample.blob),
            toc: sample.toc_digest,
            position,
        };
        let (image, metrics) = ("registry.test/image:1", Metrics::unregistered());
        open(source, image, expected, elsewhere, &metrics, STALL).await
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
        source.script([Fault::Permanent]);
        assert!(matches!(opened(&source, &sample).await, Err(NotLazy::Registry { .. })));
        source.script([Fault::EndAfter(10); 3]);
        assert!(matches!(opened(&source, &sample).await, Err(NotLazy::Registry { .. })));
        source.corrupt(sample.toc_offset + 40, 1);
        let error = opened(&source, &sample).await.err().unwrap();
        assert!(
            matches!(error, NotLazy::TocInvalid { .. } | NotLazy::TocMismatch { .. }),
            "{error}"
        );
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
