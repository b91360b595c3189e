//! What is fetched before it is asked for, and faults of several sources.

use super::*;
use crate::layer::source::BlobSource;

fn large_file(bytes: usize) -> Sample {
    let packing = Packing {
        chunk: 256 << 10,
        ..Packing::default()
    };
    Sample::new(vec![("large".to_owned(), noise(7, bytes))], packing)
}

/// Waits, without a limit of its own, until something holds.
async fn until(holds: impl Fn() -> bool) {
    while !holds() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_file_is_fetched_ahead_of_its_reader_in_several_requests_and_no_further_than_its_end() {
    let mut files = vec![("large".to_owned(), noise(7, 24 << 20))];
    files.extend((0..20).map(|n| (format!("other{n}"), noise(n + 99, 300 << 10))));
    let packing = Packing {
        chunk: 256 << 10,
        ..Packing::default()
    };
    let sample = Sample::new(files, packing);
    let bench = Arc::new(Bench::new(sample, |source| source.held().with_pieces_of(64 << 10)));
    // The first window, and nothing of what comes after it.
    bench.source.release(9);
    let ino = resolve(&bench.fs, "large");
    bench.fs.read(ino, 0, 4096, 0).await.unwrap();
    assert_eq!(bench.source.requests().len(), 1);
    let reader = tokio::spawn({
        let bench = bench.clone();
        async move { bench.assert_file("large").await }
    });
    // The second miss makes a sequence of it: more requests are on their way, and not a byte of them has come.
    until(|| bench.source.requests().len() >= 4).await;
    bench.source.release(10_000);
    reader.await.unwrap();
    bench.settle().await;
    bench.assert_disjoint();
    let index = bench.fs.fetch().layer().index();
    let last = index.inode(ino).unwrap().chunks.end - 1;
    let end = index.member(index.chunk(last).unwrap().member).unwrap().end;
    let requests = bench.source.requests();
    assert!(requests.iter().all(|(range, _)| range.end <= end), "{requests:?}");
    assert!(requests.iter().all(|(_, priority)| *priority == Priority::Demand));
    assert_only_verified(bench.fs.fetch().layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn who_reads_a_file_from_its_beginning_in_large_pieces_is_read_ahead_of_at_once_and_in_order() {
    let packing = Packing {
        chunk: 4 << 20,
        ..Packing::default()
    };
    let sample = Sample::new(vec![("large".to_owned(), noise(7, 24 << 20))], packing);
    let bench = Arc::new(Bench::new(sample, |source| source.held().with_pieces_of(64 << 10)));
    let ino = resolve(&bench.fs, "large");
    let reader = tokio::spawn({
        let bench = bench.clone();
        async move { bench.fs.read(ino, 0, 128 << 10, 0).await }
    });
    until(|| bench.source.requests().len() == 1).await;
    // As long as most of the first chunk is to come, the second would be in its way.
    bench.source.release(10);
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(bench.source.requests().len(), 1);
    bench.source.release(10);
    until(|| bench.source.requests().len() == 2).await;
    bench.source.release(10_000);
    assert_eq!(reader.await.unwrap().unwrap().len(), 128 << 10);
    bench.settle().await;
    // Who does not go on is not fetched for any further.
    assert_eq!(bench.source.requests().len(), 2);
    bench.assert_file("large").await;
    bench.assert_disjoint();
    let requests = bench.source.requests();
    assert_eq!(requests.len(), 6);
    assert!(
        requests.windows(2).all(|two| two[0].0.end <= two[1].0.start),
        "{requests:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_who_stops_is_not_fetched_for_without_end() {
    let bench = Bench::new(large_file(40 << 20), |source| source);
    let ino = resolve(&bench.fs, "large");
    for offset in (0..2 << 20).step_by(128 << 10) {
        bench.fs.read(ino, offset, 128 << 10, 0).await.unwrap();
    }
    bench.settle().await;
    let fetched: u64 = bench
        .source
        .requests()
        .iter()
        .map(|(range, _)| range.end - range.start)
        .sum();
    assert!((4 << 20..13 << 20).contains(&fetched), "{fetched}");
}

#[tokio::test(flavor = "multi_thread")]
async fn scattered_reads_of_a_small_layer_take_a_few_requests() {
    let bench = Bench::new(Sample::uniform(2_000, 4_750, Packing::default()), |source| source);
    let paths: Vec<String> = bench.sample.files.keys().cloned().collect();
    // In an order that is none, spread over the whole layer.
    for number in 0..106 {
        bench.assert_file(&paths[number * 1_009 % paths.len()]).await;
    }
    bench.settle().await;
    assert!(bench.source.requests().len() <= 14, "{:?}", bench.source.requests());
    bench.assert_disjoint();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_layer_is_completed_in_order_and_large_requests() {
    let bench = Bench::new(Sample::uniform(60, 200_000, Packing::default()), |source| source);
    bench.assert_file("dir2/file0030").await;
    bench.settle().await;
    let before = bench.source.requests();
    let had: u64 = before.iter().map(|(range, _)| range.end - range.start).sum();
    let fetch = bench.fs.fetch();
    let missing = bench.sample.member_bytes(fetch.layer()) - had;
    fetch.start_background();
    fetch.start_background();
    until(|| fetch.tally().background == BackgroundState::Complete).await;
    bench.settle().await;
    assert!(fetch.layer().residency().is_complete() && !fetch.layer().is_dirty());
    let made: Vec<_> = bench.source.requests().split_off(before.len());
    assert!(
        made.iter().all(|(_, priority)| *priority == Priority::Background),
        "{made:?}"
    );
    assert!(made.windows(2).all(|two| two[0].0.end <= two[1].0.start), "{made:?}");
    let bytes: u64 = made.iter().map(|(range, _)| range.end - range.start).sum();
    assert!(bytes * 100 <= missing * 105, "{bytes} for {missing}");
    assert!(made.len() as u64 <= bytes.div_ceil(1 << 20), "{made:?}");
    let tally = fetch.tally();
    assert_eq!(
        (tally.requests.background, tally.bytes.background),
        (made.len() as u64, bytes)
    );
    assert_eq!(bench.metrics.background_layers.get(), 0);
    assert_only_verified(fetch.layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn completion_waits_for_readers_and_its_holes_are_joined_where_that_costs_little() {
    let options = FetchOptions {
        read_around: 1,
        ..FetchOptions::default()
    };
    let bench = Bench::with_options(Sample::uniform(200, 20_000, Packing::default()), options, |source| {
        source
    });
    for path in ["dir1/file0050", "dir2/file0100", "dir3/file0150"] {
        bench.assert_file(path).await;
    }
    bench.settle().await;
    let (fetch, before) = (bench.fs.fetch(), bench.source.requests().len());
    assert_eq!(before, 3);
    let reader = fetch.enter(&demand(), &flight::Urgency::default()).await;
    fetch.start_background();
    tokio::time::sleep(2 * gate::LONGEST_PAUSE).await;
    assert_eq!(bench.source.requests().len(), before);
    assert_eq!(fetch.tally().background, BackgroundState::Waiting);
    drop(reader);
    until(|| fetch.tally().background == BackgroundState::Complete).await;
    // 4 MB with three small islands: one request.
    assert!(
        bench.source.requests().len() <= before + 2,
        "{:?}",
        bench.source.requests()
    );
    assert_only_verified(fetch.layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn completion_of_a_layer_with_a_wrong_chunk_brings_the_rest_and_ends() {
    let bench = Bench::new(Sample::uniform(30, 100_000, Packing::default()), |source| source);
    bench.source.corrupt(bench.middle_of("dir3/file0010"), u32::MAX);
    let fetch = bench.fs.fetch();
    fetch.start_background();
    until(|| fetch.tally().background == BackgroundState::GaveUp).await;
    let index = fetch.layer().index();
    // A file of 100 000 bytes has two chunks.
    assert_eq!(fetch.layer().residency().count(), index.chunk_count() - 1);
    let tally = fetch.tally();
    assert!(tally.verify_failures > 0);
    assert_eq!(tally.last_failure.unwrap().reason, "corrupt");
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_one_source_does_the_other_gives_the_right_bytes_and_none_twice() {
    let options = || FetchOptions {
        read_around: 1 << 20,
        stall_timeout: Duration::from_millis(200),
        ..FetchOptions::default()
    };
    for fault in [
        Fault::Transient,
        Fault::Permanent,
        Fault::Busy(60_000),
        Fault::CutAfter(0),
        Fault::CutAfter(70_001),
        Fault::EndAfter(70_001),
        Fault::StallAfter(0),
        Fault::StallAfter(100_000),
    ] {
        let bench = Bench::with_options(Sample::uniform(9, 50_000, Packing::default()), options(), |source| {
            source
        });
        let mirror = Arc::new(Scripted::new(bench.sample.blob.clone()).at("mirror.test"));
        let names = LayerNames {
            image: "registry.test/image:1".to_owned(),
            layer_digest: bench.sample.origin().layer_digest,
        };
        let source = Arc::new(mirror.clone()) as Arc<dyn BlobSource>;
        bench.fs.fetch().prefer_sources(vec![source], names);
        mirror.script([fault]);
        for path in bench.sample.files.keys() {
            bench.assert_file(path).await;
        }
        bench.settle().await;
        let (asked, rest) = (mirror.requests(), bench.source.requests());
        assert_eq!((asked.len(), rest.len()), (1, 1), "{fault:?}");
        assert_eq!(asked[0].0.end, rest[0].0.end, "{fault:?}");
        let came = rest[0].0.start - asked[0].0.start;
        let expected = match fault {
            Fault::CutAfter(bytes) | Fault::EndAfter(bytes) | Fault::StallAfter(bytes) => bytes as u64,
            Fault::None | Fault::Transient | Fault::Permanent | Fault::Busy(_) => 0,
        };
        assert_eq!(came, expected, "{fault:?}");
        assert_eq!(bench.metrics.fetch_failovers.get(), 1, "{fault:?}");
        assert_only_verified(bench.fs.fetch().layer());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_in_time_gets_the_bytes_of_a_source_that_comes_back_and_readers_after_the_deadline_an_error() {
    let options = FetchOptions {
        read_deadline: Duration::from_secs(30),
        ..small_windows()
    };
    let bench = Arc::new(Bench::with_options(
        Sample::uniform(3, 5_000, Packing::default()),
        options,
        |source| source,
    ));
    bench.source.refuse(true);
    let reader = tokio::spawn({
        let bench = bench.clone();
        async move { bench.assert_file("zeros").await }
    });
    until(|| bench.source.requests().len() >= 4).await;
    bench.source.refuse(false);
    reader.await.unwrap();
    // A source that asks for patience is not asked before.
    bench.source.script([Fault::Busy(1_500)]);
    let began = std::time::Instant::now();
    bench.assert_file("dir1/file0001").await;
    assert!(began.elapsed() >= Duration::from_millis(1_500));
    bench.settle().await;
    assert_only_verified(bench.fs.fetch().layer());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_on_its_way_to_the_range_does_not_stand_still() {
    let options = FetchOptions {
        stall_timeout: Duration::from_millis(400),
        ..FetchOptions::default()
    };
    let bench = Bench::with_options(Sample::uniform(10, 20_000, Packing::default()), options, |source| {
        source.that_ignores_ranges().that_skips_for(Duration::from_millis(1500))
    });
    bench.assert_file("dir0/file0000").await;
    assert_eq!(bench.source.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_warm_is_one_request_to_a_server_that_ignores_ranges() {
    let bench = Bench::new(Sample::uniform(60, 200_000, Packing::default()), |source| {
        source.that_ignores_ranges()
    });
    bench.fs.fetch().warm(u64::MAX).await.unwrap();
    assert_eq!(bench.source.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_ignores_ranges_is_asked_once_for_all_that_is_missing() {
    let bench = Bench::new(Sample::uniform(60, 200_000, Packing::default()), |source| {
        source.that_ignores_ranges()
    });
    for path in bench.sample.files.keys().rev() {
        bench.assert_file(path).await;
    }
    bench.settle().await;
    assert_eq!(bench.source.requests().len(), 1);
    assert_only_verified(bench.fs.fetch().layer());
}
