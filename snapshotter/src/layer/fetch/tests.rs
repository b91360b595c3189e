//! The engine against a source that fails in every way that a network can.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use proptest::prelude::*;
use tokio::runtime::Handle;

use super::*;
use crate::layer::fs::LayerFs;
use crate::layer::source::Priority;
use crate::layer::source::scripted::{Fault, Scripted};
use crate::layer::testing::{Packing, Sample, TestStore, assert_only_verified, noise, read_file, resolve};
use crate::metrics::Metrics;

mod streams;

struct Bench {
    _test: Arc<TestStore>,
    sample: Sample,
    source: Arc<Scripted>,
    fs: LayerFs,
    metrics: Metrics,
}

impl Bench {
    fn new(sample: Sample, prepare: impl FnOnce(Scripted) -> Scripted) -> Self {
        Self::with_options(sample, FetchOptions::default(), prepare)
    }

    fn with_options(sample: Sample, options: FetchOptions, prepare: impl FnOnce(Scripted) -> Scripted) -> Self {
        let engine = Engine::new(options, Metrics::unregistered(), Handle::current());
        Self::on_engine(&engine, sample, prepare)
    }

    /// One of several layers.
    fn on_engine(engine: &Arc<Engine>, sample: Sample, prepare: impl FnOnce(Scripted) -> Scripted) -> Self {
        let test = TestStore::new();
        let layer = Arc::new(sample.create(&test.store));
        let source = Arc::new(prepare(Scripted::new(sample.blob.clone())));
        let metrics = engine.metrics().clone();
        let names = LayerNames {
            image: "registry.test/image:1".to_owned(),
            layer_digest: sample.origin().layer_digest,
        };
        let fetch = LayerFetch::new(engine.clone(), layer, vec![Arc::new(source.clone())], names);
        Self {
            _test: test,
            sample,
            source,
            fs: LayerFs::new(fetch),
            metrics,
        }
    }

    async fn assert_file(&self, path: &str) {
        assert!(read_file(&self.fs, path).await == self.sample.files[path], "{path}");
    }

    /// No byte was asked for twice.
    fn assert_disjoint(&self) {
        let mut ranges: Vec<_> = self.source.requests().into_iter().map(|(range, _)| range).collect();
        ranges.sort_by_key(|range| range.start);
        for pair in ranges.windows(2) {
            assert!(pair[0].end <= pair[1].start, "{ranges:?}");
        }
    }

    /// Waits until nothing is under way, nor the checkpoint that a complete layer gets.
    async fn settle(&self) {
        let layer = self.fs.fetch().layer();
        while !self.fs.fetch().flights().is_empty() || (layer.residency().is_complete() && layer.is_dirty()) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    async fn errno(&self, path: &str) -> i32 {
        self.fs
            .read(resolve(&self.fs, path), 0, 4096, 0)
            .await
            .map(|bytes| bytes.len())
            .unwrap_err()
            .errno()
    }

    /// Blob offset in the middle of a file's first member.
    fn middle_of(&self, path: &str) -> u64 {
        let index = self.fs.fetch().layer().index();
        let chunk = index.inode(resolve(&self.fs, path)).unwrap().chunks.start;
        let member = index.member(index.chunk(chunk).unwrap().member).unwrap();
        member.start.midpoint(member.end)
    }
}

fn small_windows() -> FetchOptions {
    FetchOptions {
        read_around: 1,
        max_range: 1 << 20,
        stall_timeout: Duration::from_millis(200),
        ..FetchOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_of_readers_costs_one_request_and_no_byte_twice() {
    let bench = Arc::new(Bench::new(Sample::uniform(40, 20_000, Packing::default()), |source| {
        source.held()
    }));
    let readers: Vec<_> = (0..64)
        .map(|n| {
            let bench = bench.clone();
            tokio::spawn(async move { bench.assert_file(&format!("dir{}/file{:04}", n % 3, n % 3)).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(bench.source.requests().len(), 1);
    bench.source.release(10_000);
    for reader in readers {
        reader.await.unwrap();
    }
    for path in bench.sample.files.keys() {
        bench.assert_file(path).await;
    }
    bench.settle().await;
    bench.assert_disjoint();
    assert_only_verified(bench.fs.fetch().layer());
    assert!(bench.fs.fetch().layer().residency().is_complete());
    let layer = bench.fs.fetch().layer();
    let fetched: u64 = bench
        .source
        .requests()
        .iter()
        .map(|(range, _)| range.end - range.start)
        .sum();
    assert!(fetched <= bench.sample.member_bytes(layer), "{fetched}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_wakes_when_its_chunk_is_there_and_not_when_the_body_ends() {
    let sample = Sample::uniform(20, 20_000, Packing::default());
    let bench = Bench::new(sample, |source| source.held().with_pieces_of(21_000));
    // The first member of 20 000 bytes of noise is a little longer compressed, so it is whole with the second piece.
    bench.source.release(2);
    tokio::time::timeout(Duration::from_secs(20), bench.assert_file("dir0/file0000"))
        .await
        .unwrap();
    assert_eq!(bench.source.requests().len(), 1);
    let (range, _) = bench.source.requests()[0].clone();
    assert!(range.end - range.start > 300_000, "the request reads around: {range:?}");
    assert!(!bench.fs.fetch().flights().is_empty(), "the rest is still on its way");
    // A reader that goes away takes nothing with it: the rest arrives and is kept.
    bench.source.release(1000);
    bench.settle().await;
    bench.assert_file("dir3/file0010").await;
    assert_eq!(bench.source.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_reader_does_not_stop_the_fetch() {
    let bench = Bench::new(Sample::uniform(3, 20_000, Packing::default()), |source| source.held());
    let reading = tokio::time::timeout(Duration::from_millis(50), bench.assert_file("dir0/file0000"));
    assert!(reading.await.is_err());
    bench.source.release(1000);
    bench.settle().await;
    assert!(bench.fs.fetch().layer().residency().is_complete());
    assert_eq!(bench.source.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_body_goes_on_where_it_broke() {
    let bench = Bench::with_options(
        Sample::uniform(9, 50_000, Packing::default()),
        small_windows_wide(),
        |source| source,
    );
    bench.source.script([
        Fault::CutAfter(70_001),
        Fault::EndAfter(60_000),
        Fault::StallAfter(30_000),
        Fault::Transient,
    ]);
    for path in bench.sample.files.keys() {
        bench.assert_file(path).await;
    }
    bench.settle().await;
    let mut position = 0;
    for (number, (range, _)) in bench.source.requests().into_iter().enumerate() {
        let start = [0, 70_001, 130_001, 160_001, 160_001]
            .get(number)
            .map(|offset| offset + bench.source.requests()[0].0.start);
        assert_eq!(Some(range.start), start.or(Some(position)));
        position = range.end;
    }
    // Only the stall was given up without a word of the source's own.
    assert_eq!(bench.source.distrusted(), 1);
    assert_only_verified(bench.fs.fetch().layer());
}

fn small_windows_wide() -> FetchOptions {
    FetchOptions {
        read_around: 1 << 20,
        ..small_windows()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_never_delivers_is_given_up_at_the_deadline_and_one_that_refuses_at_once() {
    let options = FetchOptions {
        read_deadline: Duration::from_millis(700),
        ..small_windows()
    };
    let bench = Bench::with_options(Sample::uniform(3, 5_000, Packing::default()), options, |source| source);
    bench.source.script([Fault::Permanent]);
    assert_eq!(bench.errno("zeros").await, libc::EIO);
    assert_eq!(bench.source.requests().len(), 1);
    bench.source.refuse(true);
    let began = std::time::Instant::now();
    assert_eq!(bench.errno("zeros").await, libc::EIO);
    assert!(began.elapsed() >= Duration::from_millis(700), "not before the deadline");
    let tally = bench.fs.fetch().tally();
    let failure = tally.last_failure.unwrap();
    assert_eq!((failure.host.as_str(), failure.reason), ("registry.test", "transient"));
    assert_eq!(tally.demand_reads_stalled, 2);
    bench.source.refuse(false);
    // A host that failed is not asked at once, and a read that follows one that failed does not wait for it.
    let read = async || {
        let ino = resolve(&bench.fs, "zeros");
        bench.fs.read(ino, 0, 1, 0).await.is_ok()
    };
    let recovered = async { while !read().await {} };
    tokio::time::timeout(Duration::from_secs(30), recovered).await.unwrap();
    bench.assert_file("zeros").await;
    bench.settle().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_asked_for_once_more_and_then_are_an_error_for_their_readers_only() {
    let bench = Arc::new(Bench::new(Sample::uniform(9, 30_000, Packing::default()), |source| {
        source.held()
    }));
    let (once, twice) = ("dir1/file0001", "dir2/file0002");
    bench.source.corrupt(bench.middle_of(once), 1);
    bench.source.corrupt(bench.middle_of(twice), 2);
    let unlucky = tokio::spawn({
        let bench = bench.clone();
        async move { bench.errno(twice).await }
    });
    while bench.source.requests().is_empty() {
        tokio::task::yield_now().await;
    }
    bench.source.release(1_000);
    bench.assert_file(once).await;
    assert_eq!(unlucky.await.unwrap(), libc::EIO);
    bench.settle().await;
    // One for all, one more for each of the two.
    assert_eq!(bench.source.requests().len(), 3);
    assert_eq!(bench.metrics.verify_failures.get(), 3);
    assert_only_verified(bench.fs.fetch().layer());
    for path in bench.sample.files.keys().filter(|path| *path != twice) {
        bench.assert_file(path).await;
    }
    assert_eq!(bench.source.requests().len(), 3);
    // The source has come to its senses.
    bench.assert_file(twice).await;
    bench.settle().await;
    assert_only_verified(bench.fs.fetch().layer());
}

/// Another image that has the layer, and is asked first.
fn other_image(bench: &Bench, number: u32) -> Arc<Scripted> {
    let host = format!("private{number}.test");
    let source = Arc::new(Scripted::new(bench.sample.blob.clone()).at(&host));
    let names = LayerNames {
        image: format!("{host}/image:1"),
        layer_digest: bench.sample.origin().layer_digest,
    };
    bench.fs.fetch().prefer_sources(vec![Arc::new(source.clone())], names);
    source
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_fails_takes_the_layer_from_no_other_image() {
    let options = FetchOptions {
        read_around: 1,
        ..FetchOptions::default()
    };
    let bench = Bench::with_options(Sample::uniform(6, 50_000, Packing::default()), options, |source| source);
    let refusing = other_image(&bench, 1);
    refusing.script([Fault::Permanent]);
    bench.assert_file("dir0/file0000").await;
    assert_eq!((refusing.requests().len(), bench.source.requests().len()), (1, 1));
    // What delivered is asked first from now on.
    bench.assert_file("dir1/file0001").await;
    assert_eq!((refusing.requests().len(), bench.source.requests().len()), (1, 2));
    // The last pull is asked first again; its body breaks, and the rest comes from the next at once.
    let broken = other_image(&bench, 2);
    broken.script([Fault::CutAfter(20_001)]);
    bench.assert_file("dir2/file0002").await;
    let rest = bench.source.requests().pop().unwrap().0;
    let asked: Vec<_> = broken.requests().into_iter().map(|(range, _)| range).collect();
    assert_eq!(asked, std::slice::from_ref(&(rest.start - 20_001..rest.end)));
    // One that may come back stays first and is left alone meanwhile.
    let dead = other_image(&bench, 3);
    dead.script([Fault::Busy(60_000)]);
    let others = || broken.requests().len() + bench.source.requests().len();
    bench.assert_file("dir3/file0003").await;
    assert_eq!((dead.requests().len(), others()), (1, 5));
    bench.assert_file("dir4/file0004").await;
    assert_eq!((dead.requests().len(), others()), (1, 6));
    assert_eq!(bench.fs.fetch().tally().requests.demand, 8);
    bench.settle().await;
    assert_only_verified(bench.fs.fetch().layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_of_one_source_are_asked_of_another() {
    let options = FetchOptions {
        read_around: 1,
        ..FetchOptions::default()
    };
    let bench = Bench::with_options(Sample::uniform(6, 50_000, Packing::default()), options, |source| source);
    let wrong = other_image(&bench, 1);
    for path in ["dir0/file0000", "dir1/file0001"] {
        wrong.corrupt(bench.middle_of(path), u32::MAX);
        bench.assert_file(path).await;
        bench.settle().await;
    }
    assert_eq!((wrong.requests().len(), bench.source.requests().len()), (1, 2));
    assert_eq!(bench.metrics.verify_failures.get(), 1);
    assert_eq!((wrong.distrusted(), bench.source.distrusted()), (1, 0));
    assert_only_verified(bench.fs.fetch().layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_member_of_several_chunks_the_right_ones_are_kept() {
    let packing = Packing {
        chunk: 10_000,
        per_member: 4,
        prioritized: None,
    };
    let sample = Sample::uniform(9, 30_000, packing);
    let mut toc: serde_json::Value = serde_json::from_slice(&sample.toc_json).unwrap();
    // The TOC promises another second chunk of the first file than the blob holds.
    toc["entries"][1]["chunkDigest"] = estargz::digest::Digest::of(b"other").to_string().into();
    let toc_json = serde_json::to_vec(&toc).unwrap();
    let toc_digest = estargz::digest::Digest::of(&toc_json);
    let bench = Bench::new(
        Sample {
            toc_json,
            toc_digest,
            ..sample
        },
        |source| source,
    );
    let ino = resolve(&bench.fs, "dir0/file0000");
    let expected = &bench.sample.files["dir0/file0000"];
    assert_eq!(bench.fs.read(ino, 0, 10_000, 0).await.unwrap(), expected[..10_000]);
    assert_eq!(bench.fs.read(ino, 20_000, 10_000, 0).await.unwrap(), expected[20_000..]);
    assert_eq!(
        bench
            .fs
            .read(ino, 15_000, 1, 0)
            .await
            .map(|bytes| bytes.len())
            .unwrap_err()
            .errno(),
        libc::EIO
    );
    bench.assert_file("dir1/file0001").await;
    bench.settle().await;
    assert_only_verified(bench.fs.fetch().layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_is_known_and_who_does_not_is_no_reader() {
    let bench = Bench::new(Sample::uniform(3, 20_000, Packing::default()), |source| source);
    let ino = resolve(&bench.fs, "dir0/file0000");
    let own = i32::try_from(std::process::id()).unwrap();
    for _ in 0..3 {
        bench.fs.read(ino, 0, 1000, own).await.unwrap();
    }
    let readers = bench.fs.fetch().readers();
    let end = std::time::Instant::now() + Duration::from_secs(20);
    while readers.report().is_empty() {
        assert!(std::time::Instant::now() < end, "nobody has waited");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let report = readers.report().remove(0);
    assert_eq!((report.waits.reads, report.waits.bytes), (1, 1000));
    assert!(!report.reader.command.is_empty() && report.waits.waited > Duration::ZERO);
}

#[tokio::test(flavor = "multi_thread")]
async fn prefetch_brings_the_prioritized_files_and_nothing_else() {
    let packing = Packing {
        prioritized: Some(15),
        ..Packing::default()
    };
    let options = FetchOptions {
        prefetch_range: 100_000,
        ..FetchOptions::default()
    };
    let bench = Bench::with_options(Sample::uniform(30, 20_000, packing), options, |source| source);
    bench.fs.fetch().start_prefetch();
    let index = bench.fs.fetch().layer().index();
    let landmark = index.prefetch_end().unwrap();
    let hot: Vec<u32> = (0..index.chunk_count())
        .filter(|&id| index.member(index.chunk(id).unwrap().member).unwrap().start < landmark)
        .collect();
    let done = async {
        while !hot.iter().all(|&id| bench.fs.fetch().layer().residency().contains(id)) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), done).await.unwrap();
    bench.settle().await;
    assert_eq!(hot.len(), 15);
    assert_eq!(bench.fs.fetch().layer().residency().count(), 15);
    let requests = bench.source.requests();
    assert!(
        requests.len() > 2
            && requests
                .iter()
                .all(|(range, priority)| range.end <= landmark && *priority == Priority::Prefetch)
    );
    // In order, but for the two that are under way at once.
    assert!(
        requests.windows(3).all(|three| three[0].0.start < three[2].0.start),
        "{requests:?}"
    );
    bench.assert_disjoint();
    bench.assert_file("dir0/file0000").await;
    assert_eq!(bench.source.requests().len(), requests.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_does_not_answer_leaves_the_others_their_slots() {
    let options = FetchOptions {
        max_requests: 4,
        ..small_windows_patient()
    };
    let engine = Engine::new(options, Metrics::unregistered(), Handle::current());
    let sample = || Sample::uniform(9, 20_000, Packing::default());
    let silent = Arc::new(Bench::on_engine(&engine, sample(), Scripted::held));
    let readers: Vec<_> = (0..7)
        .map(|n| {
            let silent = silent.clone();
            tokio::spawn(async move { silent.assert_file(&format!("dir{n}/file{n:04}")).await })
        })
        .collect();
    while silent.fs.fetch().flights().len() < readers.len() {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(50)).await;
    let other = Bench::on_engine(&engine, sample(), |source| source);
    tokio::time::timeout(Duration::from_secs(20), other.assert_file("dir0/file0000"))
        .await
        .unwrap();
    // Half of the slots, and those that were lent since.
    assert!(silent.source.requests().len() >= 2);
    silent.source.release(1_000);
    for reader in readers {
        reader.await.unwrap();
    }
}

/// Each member is a request of its own, and none is given up.
fn small_windows_patient() -> FetchOptions {
    FetchOptions {
        max_range: 1,
        stall_timeout: Duration::from_secs(600),
        ..small_windows()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_of_many_pieces_starts_a_few_at_a_time() {
    let packing = Packing {
        chunk: 1_000,
        ..Packing::default()
    };
    let sample = Sample::uniform(1, 100_000, packing);
    let bench = Arc::new(Bench::with_options(sample, small_windows_patient(), Scripted::held));
    let ino = resolve(&bench.fs, "dir0/file0000");
    let reader = tokio::spawn({
        let bench = bench.clone();
        // Shorter than what tells that more will be read.
        async move { bench.fs.read(ino, 0, 100_000, 0).await }
    });
    while bench.fs.fetch().flights().is_empty() {
        tokio::task::yield_now().await;
    }
    assert_eq!(bench.fs.fetch().flights().len(), demand::MAX_GROUPS);
    bench.source.release(1_000);
    let read = reader.await.unwrap().unwrap();
    assert!(read == bench.sample.files["dir0/file0000"]);
    assert_eq!(bench.source.requests().len(), 100);
}

fn demand() -> gate::Lane {
    gate::Lane::Demand(sequence::Sequence::default())
}

/// A request of the bench's first member that breaks after `bytes`, up to where it has to pause.
async fn broken_download(bench: &Bench, bytes: usize) -> (download::Download, bytes::BytesMut) {
    let fetch = bench.fs.fetch();
    let urgency = flight::Urgency::default();
    let slot = fetch.enter(&demand(), &urgency).await;
    let whom = download::Whom::AnyBut(Vec::new());
    bench.source.script([Fault::CutAfter(bytes)]);
    let mut download = download::Download::new(fetch.clone(), whom, 0..30_000, demand(), urgency, slot);
    let mut buffer = bytes::BytesMut::new();
    while let download::Step::Piece(piece) = download.next().await.unwrap() {
        buffer.extend_from_slice(&piece);
    }
    assert_eq!(buffer.len(), bytes);
    (download, buffer)
}

#[tokio::test]
async fn a_request_that_pauses_holds_neither_its_slot_nor_memory_for_nothing() {
    let options = FetchOptions {
        max_requests: 2,
        ..FetchOptions::default()
    };
    let bench = Bench::with_options(Sample::uniform(3, 20_000, Packing::default()), options, |source| source);
    let (fetch, urgency) = (bench.fs.fetch(), flight::Urgency::default());
    let engine = fetch.engine();
    let (mut download, mut buffer) = broken_download(&bench, 0).await;
    // The layer's only slot is free.
    assert!(fetch.enter(&demand(), &urgency).now_or_never().is_some());
    let mut memory = engine.reserve(u64::MAX).await;
    let mut pause = Box::pin(group::pause(engine, &mut download, &mut memory, &mut buffer, 0));
    assert!(pause.as_mut().now_or_never().is_none());
    assert!(engine.try_reserve(u64::MAX).is_some());
    pause.await;
    assert!(fetch.enter(&demand(), &urgency).now_or_never().is_none());
    assert!(matches!(download.next().await, Ok(download::Step::Piece(_))));
    assert_eq!(bench.source.requests().len(), 2);
}

#[tokio::test]
async fn a_request_that_pauses_keeps_what_came_until_the_memory_is_wanted() {
    let bench = Bench::new(Sample::uniform(3, 20_000, Packing::default()), |source| source);
    let engine = bench.fs.fetch().engine();
    for wanted in [false, true] {
        let (mut download, mut buffer) = broken_download(&bench, 20_000).await;
        let mut memory = engine.reserve(u64::MAX).await;
        let mut waiting = Box::pin(engine.reserve(1));
        if wanted {
            assert!(waiting.as_mut().now_or_never().is_none());
        }
        group::pause(engine, &mut download, &mut memory, &mut buffer, 7).await;
        assert_eq!(memory.is_none(), wanted);
        assert_eq!(waiting.now_or_never().is_some(), wanted);
        assert!(download.next().await.is_ok());
        let rest = bench.source.requests().pop().unwrap().0;
        let (start, kept) = if wanted { (7, 0) } else { (20_000, 20_000) };
        assert_eq!((rest.start, buffer.len()), (start, kept));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn closing_a_layer_ends_its_fetches_and_tells_its_readers() {
    let bench = Arc::new(Bench::new(Sample::uniform(3, 20_000, Packing::default()), |source| {
        source.held()
    }));
    let reader = tokio::spawn({
        let bench = bench.clone();
        async move { bench.errno("zeros").await }
    });
    tokio::time::sleep(Duration::from_millis(50)).await;
    bench.fs.fetch().close().await;
    let errno = tokio::time::timeout(Duration::from_secs(20), reader)
        .await
        .unwrap()
        .unwrap();
    assert_eq!(errno, libc::EIO);
    assert!(bench.fs.fetch().flights().is_empty());
}

#[derive(Debug, Clone)]
struct Case {
    files: Vec<(String, Vec<u8>)>,
    packing: Packing,
    reads: Vec<(prop::sample::Index, u64, u32)>,
    faults: Vec<Fault>,
    piece: usize,
    window: u64,
    /// Requests at once, and memory for what they bring.
    limits: (usize, u64),
}

fn case() -> impl Strategy<Value = Case> {
    let fault = prop_oneof![
        4 => Just(Fault::None),
        1 => Just(Fault::Transient),
        1 => (0usize..60_000).prop_map(Fault::CutAfter),
        1 => (0usize..60_000).prop_map(Fault::EndAfter),
    ];
    let sizes = prop::collection::vec(prop_oneof![Just(0usize), 1usize..200, 1usize..90_000], 1..25);
    let packing = (1usize..20_000, 1usize..6, prop::option::of(0usize..5));
    let reads = prop::collection::vec((any::<prop::sample::Index>(), 0u64..100_000, 1u32..140_000), 1..40);
    (
        sizes,
        packing,
        reads,
        prop::collection::vec(fault, 0..6),
        1usize..40_000,
        1u64..200_000,
        (2usize..6, prop_oneof![Just(128u64 << 20), 1u64..300_000]),
    )
        .prop_map(
            |(sizes, (chunk, per_member, prioritized), reads, faults, piece, window, limits)| {
                let name = |n: usize| format!("d{}/s{}/f{n}", n % 3, n % 2);
                let files: Vec<_> = sizes
                    .iter()
                    .enumerate()
                    .map(|(n, &size)| (name(n), noise(n as u64 + 99, size)))
                    .collect();
                let prioritized = prioritized.filter(|&count| count <= files.len());
                Case {
                    files,
                    packing: Packing {
                        chunk,
                        per_member,
                        prioritized,
                    },
                    reads,
                    faults,
                    piece,
                    window,
                    limits,
                }
            },
        )
}

async fn reads_equal_the_model(case: Case) {
    let options = FetchOptions {
        read_around: case.window,
        max_range: case.window * 4,
        max_requests: case.limits.0,
        memory: case.limits.1,
        ..FetchOptions::default()
    };
    let bench = Bench::with_options(Sample::new(case.files, case.packing), options, |source| {
        source.with_pieces_of(case.piece)
    });
    bench.source.script(case.faults);
    let bench = Arc::new(bench);
    if case.packing.prioritized.is_some() {
        bench.fs.fetch().start_prefetch();
    }
    let paths: Vec<String> = bench.sample.files.keys().cloned().collect();
    let mut readers = tokio::task::JoinSet::new();
    for (pick, offset, size) in case.reads {
        let (bench, path) = (bench.clone(), pick.get(&paths).clone());
        readers.spawn(async move {
            let bytes = bench.fs.read(resolve(&bench.fs, &path), offset, size, 0).await.unwrap();
            let content = &bench.sample.files[&path];
            let start = usize::try_from(offset).unwrap().min(content.len());
            let end = (start + size as usize).min(content.len());
            assert!(bytes == content[start..end], "{path} {offset}+{size}");
        });
    }
    while let Some(done) = readers.join_next().await {
        done.unwrap();
    }
    for path in &paths {
        bench.assert_file(path).await;
    }
    bench.settle().await;
    assert_only_verified(bench.fs.fetch().layer());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_reads_of_random_layers_through_random_faults_equal_the_model(case in case()) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(reads_equal_the_model(case));
    }

    #[test]
    fn plans_hold_what_is_wanted_and_nothing_that_is_not_free(
        sizes in prop::collection::vec(1usize..30_000, 1..60),
        taken in prop::collection::btree_set(0u32..60, 0..20),
        picks in prop::collection::btree_set(0u32..60, 1..10),
        window in 1u64..200_000,
    ) {
        let files = sizes.iter().enumerate().map(|(n, &size)| (format!("f{n}"), noise(n as u64, size))).collect();
        let test = TestStore::new();
        let layer = Sample::new(files, Packing::default()).create(&test.store);
        let index = layer.index();
        let wanted: Vec<u32> = picks.into_iter().filter(|member| *member < index.member_count() && !taken.contains(member)).collect();
        let reach = plan::Reach { window, max: window * 2 };
        let groups = plan::groups(index, &wanted, |member| !taken.contains(&member), reach);
        let mut owners: BTreeMap<u32, usize> = BTreeMap::new();
        for group in &groups {
            let range = plan::blob_range(index, group);
            prop_assert!(group.len() == 1 || range.end - range.start <= reach.max);
            for member in group.clone() {
                prop_assert!(!taken.contains(&member));
                *owners.entry(member).or_default() += 1;
            }
        }
        prop_assert!(owners.values().all(|&count| count == 1));
        prop_assert!(wanted.iter().all(|member| owners.contains_key(member)));
        prop_assert!(groups.len() <= wanted.len());
    }
}

fn short_streams() -> FetchOptions {
    FetchOptions {
        prefetch_range: 100_000,
        stall_timeout: Duration::from_secs(20),
        ..FetchOptions::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn warming_goes_on_where_it_was_stopped_and_asks_for_nothing_that_is_there() {
    let bench = Bench::with_options(
        Sample::uniform(60, 20_000, Packing::default()),
        short_streams(),
        |source| source.held(),
    );
    let fetch = bench.fs.fetch().clone();
    let begun = tokio::spawn({
        let fetch = fetch.clone();
        async move { fetch.warm(u64::MAX).await }
    });
    bench.source.release(20);
    while fetch.layer().residency().count() < 5 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    begun.abort();
    assert!(begun.await.is_err());
    bench.settle().await;
    let had = fetch.extent(u64::MAX);
    assert!(0 < had.resident && had.resident < had.wanted, "{had:?}");
    let index = fetch.layer().index();
    let missing = (0..index.member_count())
        .find(|&member| fetch.is_missing(member))
        .unwrap();
    let (first_missing, before) = (index.member(missing).unwrap().start, bench.source.requests().len());

    bench.source.release(100_000);
    fetch.warm(u64::MAX).await.unwrap();
    let now = fetch.extent(u64::MAX);
    assert_eq!((now.resident, now.wanted), (had.wanted, had.wanted));
    let content: usize = bench.sample.files.values().map(Vec::len).sum();
    assert_eq!(now.wanted, content as u64);
    let requests = bench.source.requests();
    assert!(
        requests.iter().all(|(_, priority)| *priority == Priority::Warm),
        "{requests:?}"
    );
    let later = &requests[before..];
    assert!(later.iter().all(|(range, _)| range.start >= first_missing), "{later:?}");
    // Two are under way at a time.
    assert!(
        later.windows(3).all(|three| three[0].0.start < three[2].0.start),
        "{later:?}"
    );
    fetch.warm(u64::MAX).await.unwrap();
    assert_eq!(bench.source.requests().len(), requests.len());
    assert_only_verified(fetch.layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn warming_ends_at_a_source_that_gives_nothing_and_passes_a_wrong_chunk() {
    let sample = || Sample::uniform(60, 20_000, Packing::default());
    let bench = Bench::with_options(sample(), short_streams(), |source| source);
    bench.source.script([Fault::Permanent; 4]);
    let failure = bench.fs.fetch().warm(u64::MAX).await.unwrap_err();
    assert_eq!(failure.reason(), "source");
    assert!(bench.source.requests().len() <= 4, "{:?}", bench.source.requests());

    let bench = Bench::with_options(sample(), short_streams(), |source| source);
    let fetch = bench.fs.fetch();
    bench.source.corrupt(bench.middle_of("dir3/file0010"), u32::MAX);
    assert_eq!(fetch.warm(u64::MAX).await.unwrap_err().reason(), "corrupt");
    let extent = fetch.extent(u64::MAX);
    assert_eq!(extent.wanted - extent.resident, 20_000);
    fetch.close().await;
    assert_eq!(fetch.warm(u64::MAX).await.unwrap_err().reason(), "stopped");
}
