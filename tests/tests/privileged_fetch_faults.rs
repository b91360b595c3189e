//! Everything that a registry can do to its clients: the reader gets the right bytes or an error in time, nothing comes
//! twice, nothing wrong is kept, and the cause is told.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::{LazyNode, Published, Source, check_all, read_all, stored};
use hullspeed_tests::operator;
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::proxy::record::sent_again;
use hullspeed_tests::proxy::{Carrier, LinkOptions};
use hullspeed_tests::scenario::Scenario;
use serde_json::{Value, json};

/// Short limits, so that waiting for them takes no time; nothing is fetched but for readers. What is made good at once is told in
/// lines that are not for every day.
const QUICK: &str = "level = \"debug\"\n\n[registry]\nstall_timeout = \"1s\"\n\n\
    [fetch]\nprefetch = false\nbackground = false\nread_deadline = \"4s\"\n";

/// Bytes of a chunk.
const CHUNK: &str = "262144";

/// Where a body breaks off: within the first chunk, since a native mount may ask for no more than one.
const CUT: u64 = 200_000;

/// What the reader gets while the fault lasts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// What is in the image.
    Right,
    /// An error, in time.
    Error,
}

/// What an operator has to be told of a fault.
#[derive(Clone, Copy)]
enum Told {
    /// A failure, in these words.
    Failure(&'static str),
    /// Nothing failed; readers waited.
    Wait,
    /// Nothing failed; the registry's way costs more than others.
    Way,
    /// All is as it should be.
    Nothing,
}

struct Case {
    name: &'static str,
    fault: Fault,
    told: Told,
    /// How many requests it hits.
    times: Option<u32>,
    outcome: Outcome,
    /// How many files are read meanwhile.
    reads: usize,
    /// Whether bytes have to come a second time, because the first ones were no good.
    again: bool,
}

fn passing(name: &'static str, fault: Fault, cause: &'static str) -> Case {
    Case {
        name,
        fault,
        told: Told::Failure(cause),
        times: Some(1),
        outcome: Outcome::Right,
        reads: usize::MAX,
        again: false,
    }
}

fn lasting(name: &'static str, fault: Fault, cause: &'static str) -> Case {
    Case {
        times: None,
        outcome: Outcome::Error,
        ..passing(name, fault, cause)
    }
}

fn files() -> Vec<ContentFile> {
    let large = ContentFile::new("large", 3 << 20);
    std::iter::once(large).chain(small_files("small", 60, 3000)).collect()
}

async fn source() -> (Source, Published) {
    let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap();
    let image = source.publish("image", &[files()], &["--chunk-size", CHUNK]).unwrap();
    (source, image)
}

/// One image, mounted by a fresh daemon, read while the fault is there and again when it is gone.
async fn read_under(source: &Source, image: &Published, case: &Case) {
    let name = case.name;
    let mut node = source.node(name, QUICK).await.unwrap();
    node.mount(image).await.unwrap();
    let view = node.view(image, "view").await.unwrap();
    let digest = image.layer(0).unwrap();
    let rule = FaultRule::get(digest, case.fault.clone());
    source.proxy.reset();
    source.proxy.inject(FaultRule {
        times: case.times,
        ..rule
    });
    let mut wanted = files();
    wanted.truncate(case.reads);
    let read = read_all(view.path(), &wanted).await.unwrap();
    let failed = check_read(name, &read);
    assert_eq!(
        failed > 0,
        case.outcome == Outcome::Error,
        "{name}: {failed} files failed"
    );
    let records = source.proxy.requests();
    assert!(
        records.iter().any(|record| record.faulted),
        "{name}: no request was hit"
    );
    let twice = sent_again(&records);
    assert!(
        case.again || twice == 0,
        "{name}: {twice} bytes came twice: {records:#?}"
    );
    let kept = stored(&node.cache(image, 0).unwrap(), &files()).unwrap();
    assert_eq!(kept.wrong, 0, "{name}: {kept:?}");
    check_told(&mut node, image, name, case.told).await;
    source.proxy.heal();
    let healed = check_all(view.path(), &files()).await;
    healed.unwrap_or_else(|error| panic!("{name}: {error:#}"));
    let kept = stored(&node.cache(image, 0).unwrap(), &files()).unwrap();
    assert_eq!((kept.wrong, kept.absent), (0, 0), "{name}: {kept:?}");
    node.snapshots.remove(view).await.unwrap();
}

/// Every file is right or failed with EIO; how many failed.
fn check_read(name: &str, read: &[std::io::Result<Vec<u8>>]) -> usize {
    let mut failed = 0;
    for (file, read) in files().iter().zip(read) {
        match read {
            Ok(content) => assert!(*content == file.content(), "{name}: {} is read wrongly", file.path),
            Err(error) => {
                let expected = Some(rustix::io::Errno::IO.raw_os_error());
                assert_eq!(error.raw_os_error(), expected, "{name}: {}: {error}", file.path);
                failed += 1;
            }
        }
    }
    failed
}

/// Log, metrics and `explain` tell what happened to which layer of which image, at which host.
async fn check_told(node: &mut LazyNode, image: &Published, name: &str, told: Told) {
    let host = node.host().to_string();
    let layer = explained(node, image);
    let failure = &layer["cost"]["last_failure"];
    let metrics = node.snapshotter.metrics().await.unwrap();
    let (lines, failed) = (lines_of(node, image), failed_requests(&metrics));
    match told {
        Told::Failure(cause) => {
            let of_cause = |record: &&Value| record["error"].as_str().is_some_and(|error| error.contains(cause));
            assert!(
                lines.iter().any(|record| of_cause(&record)),
                "{name}: no line tells the cause: {lines:#?}"
            );
            let wrong = counted(&metrics, "hullspeed_verify_failures_total");
            assert!(failed + wrong > 0.0, "{name}: no metric counts it:\n{metrics}");
            assert_eq!(failure["host"], host, "{name}: {layer:#}");
            let what = failure["what"].as_str().unwrap_or_default();
            assert!(what.contains(cause), "{name}: {layer:#}");
            let known = failure["reason"].as_str().is_some_and(|reason| !reason.is_empty());
            assert!(known && failure["at_unix_ms"].as_u64() > Some(0), "{name}: {layer:#}");
        }
        Told::Wait => {
            // Most of the delay: the answer may have been asked for ahead of its reader.
            let longest = layer["cost"]["longest_stall_ms"].as_u64();
            assert!(longest >= Some(100), "{name}: {layer:#}");
            let waited = counted(&metrics, "hullspeed_read_stall_seconds_sum");
            assert!(waited >= 0.1, "{name}: readers waited {waited} s");
        }
        Told::Way => {
            assert_eq!(lines.len(), 1, "{name}: it is told once: {lines:#?}");
            assert_eq!(counted(&metrics, "hullspeed_fetch_ranges_ignored_total"), 1.0, "{name}");
        }
        Told::Nothing => assert!(lines.is_empty(), "{name}: {lines:#?}"),
    }
    if !matches!(told, Told::Failure(_)) {
        assert!(failure.is_null() && failed == 0.0, "{name}: {layer:#}");
    }
}

/// What `explain` says of the image's only layer.
fn explained(node: &LazyNode, image: &Published) -> Value {
    let found = operator::explained(&node.snapshotter.config(), &node.reference(image)).unwrap();
    assert_eq!(found["layers"].as_array().unwrap().len(), 1, "{found:#}");
    assert_eq!(found["layers"][0]["digest"], image.layer(0).unwrap(), "{found:#}");
    found["layers"][0].clone()
}

/// Lines that name the image, its layer and the host.
fn lines_of(node: &LazyNode, image: &Published) -> Vec<Value> {
    let (reference, layer, host) = (node.reference(image), image.layer(0).unwrap(), node.host().to_string());
    let mut records = node.snapshotter.log_records().unwrap();
    records.retain(|record| record["image"] == reference && record["layer"] == layer && record["host"] == host);
    records
}

/// Requests that failed, for whatever.
fn failed_requests(metrics: &str) -> f64 {
    let requests = metrics
        .lines()
        .filter(|line| line.starts_with("hullspeed_fetch_requests_total{"));
    let failed = requests.filter(|line| !line.contains("result=\"ok\""));
    failed.filter_map(value).sum()
}

fn counted(metrics: &str, name: &str) -> f64 {
    let lines = metrics
        .lines()
        .filter(|line| line.split(['{', ' ']).next() == Some(name));
    lines.filter_map(value).sum()
}

fn value(line: &str) -> Option<f64> {
    line.rsplit(' ').next()?.parse().ok()
}

/// A registry that does wrong once is forgiven, and no byte comes twice for it.
#[tokio::test(flavor = "multi_thread")]
async fn passing_faults_do_not_reach_the_reader() {
    let (source, image) = source().await;
    let busy = |status| Fault::Busy { status, retry_after: 1 };
    for case in [
        passing("status-500", Fault::Status(500), "status 500"),
        passing("status-503", Fault::Status(503), "status 503"),
        passing("busy-429", busy(429), "too many requests"),
        passing("reset", Fault::Reset, "no connection"),
        passing("silent", Fault::Silent, "no progress"),
        passing("cut-at-once", Fault::Truncate(0), "connection broke"),
        passing("cut", Fault::Truncate(CUT), "connection broke"),
        passing("stall", Fault::Stall(CUT), "no progress"),
        Case {
            told: Told::Wait,
            ..passing("slow", Fault::Slow(Duration::from_millis(300)), "")
        },
        // What contradicts itself is not read to its end.
        Case {
            again: true,
            ..passing("short", Fault::Short(100_000), "range")
        },
        Case {
            again: true,
            ..passing("misplaced", Fault::Misplaced(4096), "range")
        },
        Case {
            again: true,
            ..passing("page", Fault::Status(200), "range")
        },
    ] {
        read_under(&source, &image, &case).await;
    }
}

/// Registries that serve ranges in their own way are served from all the same.
#[tokio::test(flavor = "multi_thread")]
async fn ways_with_ranges_do_not_reach_the_reader() {
    let (source, image) = source().await;
    let always = |name, fault, told| Case {
        times: None,
        told,
        ..passing(name, fault, "")
    };
    let ignored = Case {
        // The whole blob comes, and what is before the range goes by.
        again: true,
        ..always("ignore-range", Fault::IgnoreRange, Told::Way)
    };
    for case in [ignored, always("single-range", Fault::SingleRange, Told::Nothing)] {
        read_under(&source, &image, &case).await;
    }
}

/// A registry that does not stop doing wrong gives the reader an error in time, and one that is well again what it wants.
#[tokio::test(flavor = "multi_thread")]
async fn lasting_faults_are_an_error_in_time() {
    let (source, image) = source().await;
    for case in [
        lasting("lasting-404", Fault::Status(404), "not found"),
        lasting("lasting-403", Fault::Status(403), "access denied"),
        lasting("lasting-401", Fault::Status(401), "wants a login"),
        lasting("lasting-500", Fault::Status(500), "status 500"),
        lasting("lasting-reset", Fault::Reset, "no connection"),
        lasting("lasting-silent", Fault::Silent, "no progress"),
        Case {
            again: true,
            ..lasting("lasting-page", Fault::Status(200), "range")
        },
        Case {
            again: true,
            ..lasting("lasting-misplaced", Fault::Misplaced(4096), "range")
        },
    ] {
        // A read waits as long as it may.
        read_under(&source, &image, &Case { reads: 1, ..case }).await;
    }
}

/// Wrong bytes in the middle of the layer: what is around them is read, they are not.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_never_kept() {
    let (source, image) = source().await;
    let case = Case {
        again: true,
        ..lasting("wrong-bytes", Fault::Corrupt(1_000_000..1_000_100), "wrong bytes")
    };
    read_under(&source, &image, &case).await;
}

/// What passes while an image is mounted does not make its layers ordinary ones.
#[tokio::test(flavor = "multi_thread")]
async fn passing_faults_do_not_cost_laziness() {
    let (source, image) = source().await;
    for (name, fault, cause) in [
        ("mount-503", Fault::Status(503), "status 503"),
        ("mount-reset", Fault::Reset, "no connection"),
        ("mount-silent", Fault::Silent, "no progress"),
        ("mount-cut", Fault::Truncate(1000), "connection broke"),
        ("mount-stall", Fault::Stall(1000), "no progress"),
        ("mount-short", Fault::Short(1000), "range"),
    ] {
        let mut node = source.node(name, QUICK).await.unwrap();
        source.proxy.reset();
        source
            .proxy
            .inject(FaultRule::get(image.layer(0).unwrap(), fault).times(1));
        let mounted = node.mount(&image).await;
        mounted.unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let records = source.proxy.requests();
        assert!(
            records.iter().any(|record| record.faulted),
            "{name}: no request was hit"
        );
        check_told(&mut node, &image, name, Told::Failure(cause)).await;
        source.proxy.heal();
    }
}

/// A registry that refuses for good while an image is mounted costs laziness, and who refused is known.
#[tokio::test(flavor = "multi_thread")]
async fn refusals_of_a_mount_name_the_host_and_the_cause() {
    let (source, image) = source().await;
    for (status, cause) in [(401, "wants a login"), (403, "access denied"), (404, "not found")] {
        let name = format!("refused-{status}");
        let mut node = source.node(&name, QUICK).await.unwrap();
        let rule = FaultRule::get(image.layer(0).unwrap(), Fault::Status(status));
        source.proxy.inject(rule);
        node.mount(&image).await.unwrap_err();
        let host = node.host().to_string();
        let layer = explained(&node, &image);
        assert_eq!(
            (&layer["reason"], &layer["host"]),
            (&json!("registry"), &json!(host)),
            "{name}: {layer:#}"
        );
        assert!(layer["error"].as_str().unwrap().contains(cause), "{name}: {layer:#}");
        let lines = lines_of(&node, &image);
        let told = |record: &Value| {
            record["level"] == "WARN" && record["error"].as_str().is_some_and(|error| error.contains(cause))
        };
        assert!(
            lines.iter().filter(|record| told(record)).count() >= 2,
            "{name}: {lines:#?}"
        );
        let metrics = node.snapshotter.metrics().await.unwrap();
        assert!(failed_requests(&metrics) > 0.0, "{name}:\n{metrics}");
        // What a person reads names it too, and what went wrong on the whole node.
        let table = operator::said(&node.snapshotter.config(), &["explain", &node.reference(&image)]).unwrap();
        assert!(
            table.out.contains(&format!("({host})")) && table.out.contains(cause),
            "{name}: {table:?}"
        );
        let status = operator::answer(&node.snapshotter.config(), &["status"]).unwrap();
        assert_eq!(status["failures"][0]["host"], host, "{name}: {status:#}");
        source.proxy.heal();
    }
}

/// The registry goes away and comes back: refused connections, then reset ones.
#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_is_away_for_a_while_is_waited_for() {
    let (source, image) = source().await;
    let mut node = source.node("away", QUICK).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    source.proxy.set_carrier(Carrier::Refusing);
    let all = files();
    let reading = read_all(view.path(), &all);
    let returning = async {
        tokio::time::sleep(Duration::from_millis(500)).await;
        source.proxy.set_carrier(Carrier::Resetting);
        tokio::time::sleep(Duration::from_millis(500)).await;
        source.proxy.set_carrier(Carrier::Up);
    };
    let (read, ()) = tokio::join!(reading, returning);
    assert_eq!(check_read("away", &read.unwrap()), 0);
    check_told(&mut node, &image, "away", Told::Failure("no connection")).await;
    node.snapshots.remove(view).await.unwrap();
}
