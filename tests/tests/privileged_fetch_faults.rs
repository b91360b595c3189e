//! Everything that a registry can do to its clients: the reader gets the right bytes or an error in time, nothing comes
//! twice, nothing wrong is kept, and the cause is told.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Duration;

use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::{LazyNode, Published, Source, check_all, read_all, stored};
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::proxy::record::sent_again;
use hullspeed_tests::proxy::{Carrier, LinkOptions};
use hullspeed_tests::scenario::Scenario;
use serde_json::Value;

/// Short limits, so that waiting for them takes no time; nothing is fetched but for readers.
const QUICK: &str = "[registry]\nstall_timeout = \"1s\"\n\n\
    [fetch]\nprefetch = false\nbackground = false\nread_deadline = \"4s\"\n";

/// Bytes of a chunk.
const CHUNK: &str = "262144";

/// What the reader gets while the fault lasts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    /// What is in the image.
    Right,
    /// An error, in time.
    Error,
}

struct Case {
    name: &'static str,
    fault: Fault,
    /// How many requests it hits.
    times: Option<u32>,
    outcome: Outcome,
    /// Whether bytes have to come a second time, because the first ones were no good.
    again: bool,
}

fn passing(name: &'static str, fault: Fault) -> Case {
    Case {
        name,
        fault,
        times: Some(1),
        outcome: Outcome::Right,
        again: false,
    }
}

fn lasting(name: &'static str, fault: Fault) -> Case {
    Case {
        times: None,
        outcome: Outcome::Error,
        ..passing(name, fault)
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
    let read = read_all(view.path(), &files()).await.unwrap();
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
    if case.outcome == Outcome::Error {
        check_told(&mut node, image, name).await;
    }
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

/// A line says for which image and layer what went wrong, and requests that failed are counted.
async fn check_told(node: &mut LazyNode, image: &Published, name: &str) {
    let (reference, layer) = (node.reference(image), image.layer(0).unwrap());
    let records = node.snapshotter.log_records().unwrap();
    let told = |record: &Value| {
        let loud = record["level"] == "WARN" || record["level"] == "ERROR";
        let cause = record["error"].as_str().is_some_and(|error| !error.is_empty());
        loud && cause && record["image"] == reference && record["layer"] == layer
    };
    assert!(
        records.iter().any(told),
        "{name}: no line tells the cause: {records:#?}"
    );
    let count = |text: &str| -> f64 {
        let lines = text
            .lines()
            .filter(|line| line.starts_with("hullspeed_fetch_requests_total{") && !line.contains("result=\"ok\""));
        lines
            .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
            .sum()
    };
    let verify = node
        .snapshotter
        .metric("hullspeed_verify_failures_total", &[])
        .await
        .unwrap();
    let failed = count(&node.snapshotter.metrics().await.unwrap());
    assert!(failed + verify > 0.0, "{name}: no metric counts it");
}

/// A registry that does wrong once is forgiven, and no byte comes twice for it.
#[tokio::test(flavor = "multi_thread")]
async fn passing_faults_do_not_reach_the_reader() {
    let (source, image) = source().await;
    let busy = |status| Fault::Busy { status, retry_after: 1 };
    for case in [
        passing("status-500", Fault::Status(500)),
        passing("status-503", Fault::Status(503)),
        passing("busy-429", busy(429)),
        passing("reset", Fault::Reset),
        passing("silent", Fault::Silent),
        passing("cut-at-once", Fault::Truncate(0)),
        passing("cut", Fault::Truncate(300_000)),
        passing("stall", Fault::Stall(300_000)),
        passing("slow", Fault::Slow(Duration::from_millis(300))),
        // What contradicts itself is not read to its end.
        Case {
            again: true,
            ..passing("short", Fault::Short(100_000))
        },
        Case {
            again: true,
            ..passing("misplaced", Fault::Misplaced(4096))
        },
        Case {
            again: true,
            ..passing("page", Fault::Status(200))
        },
    ] {
        read_under(&source, &image, &case).await;
    }
}

/// Registries that serve ranges in their own way are served from all the same.
#[tokio::test(flavor = "multi_thread")]
async fn ways_with_ranges_do_not_reach_the_reader() {
    let (source, image) = source().await;
    let always = |name, fault| Case {
        times: None,
        ..passing(name, fault)
    };
    let ignored = Case {
        // The whole blob comes, and what is before the range goes by.
        again: true,
        ..always("ignore-range", Fault::IgnoreRange)
    };
    for case in [ignored, always("single-range", Fault::SingleRange)] {
        read_under(&source, &image, &case).await;
    }
}

/// A registry that does not stop doing wrong gives the reader an error in time, and one that is well again what it wants.
#[tokio::test(flavor = "multi_thread")]
async fn lasting_faults_are_an_error_in_time() {
    let (source, image) = source().await;
    for case in [
        lasting("lasting-404", Fault::Status(404)),
        lasting("lasting-403", Fault::Status(403)),
        lasting("lasting-401", Fault::Status(401)),
        lasting("lasting-500", Fault::Status(500)),
        lasting("lasting-reset", Fault::Reset),
        lasting("lasting-silent", Fault::Silent),
        Case {
            again: true,
            ..lasting("lasting-page", Fault::Status(200))
        },
        Case {
            again: true,
            ..lasting("lasting-misplaced", Fault::Misplaced(4096))
        },
    ] {
        read_under(&source, &image, &case).await;
    }
}

/// Wrong bytes in the middle of the layer: what is around them is read, they are not.
#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_never_kept() {
    let (source, image) = source().await;
    let case = Case {
        again: true,
        ..lasting("wrong-bytes", Fault::Corrupt(1_000_000..1_000_100))
    };
    read_under(&source, &image, &case).await;
}

/// What passes while an image is mounted does not make its layers ordinary ones.
#[tokio::test(flavor = "multi_thread")]
async fn passing_faults_do_not_cost_laziness() {
    let (source, image) = source().await;
    for (name, fault) in [
        ("mount-503", Fault::Status(503)),
        ("mount-reset", Fault::Reset),
        ("mount-silent", Fault::Silent),
        ("mount-cut", Fault::Truncate(1000)),
        ("mount-stall", Fault::Stall(1000)),
        ("mount-short", Fault::Short(1000)),
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
    node.snapshots.remove(view).await.unwrap();
}
