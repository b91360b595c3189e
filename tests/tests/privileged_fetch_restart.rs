//! What is on the node is used without the registry, and what a killed daemon had made durable is not fetched again.

use std::fs;
use std::time::{Duration, Instant, SystemTime};

use hullspeed_tests::content::ContentFile;
use hullspeed_tests::cri::Pod;
use hullspeed_tests::lazy::{Source, check_all, stored};
use hullspeed_tests::proxy::record::{RequestRecord, sent_again};
use hullspeed_tests::proxy::{Carrier, LinkOptions};
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use hullspeed_tests::tree;

/// Nothing is fetched but for readers; what they got is made durable soon.
const CHECKPOINTS: &str = "[fetch]\nprefetch = false\nbackground = false\n\n[cache]\ncheckpoint_interval = \"100ms\"\n";

/// The longest wait for a checkpoint.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_fetches_only_the_rest() {
    let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap();
    // Far more than is read ahead of two files.
    let files: Vec<_> = (0..24)
        .map(|number| ContentFile::new(format!("file-{number:02}"), 2 << 20))
        .collect();
    let image = source.publish("image", std::slice::from_ref(&files), &[]).unwrap();
    let mut node = source.node("node", CHECKPOINTS).await.unwrap();
    node.mount(&image).await.unwrap();
    let cache = node.cache(&image, 0).unwrap();
    source.proxy.reset();
    let view = node.view(&image, "before").await.unwrap();
    check_all(view.path(), &files[..2]).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    let read = SystemTime::now();
    let end = Instant::now() + CHECKPOINT_LIMIT;
    // Nothing is read any more, so one checkpoint after that has everything.
    while fs::metadata(cache.join("resident"))
        .and_then(|file| file.modified())
        .ok()
        < Some(read)
    {
        if Instant::now() > end {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        // A checkpoint of everything may have been made before the look at the clock.
        if read.elapsed().is_ok_and(|since| since > Duration::from_secs(2)) {
            break;
        }
    }
    let before = stored(&cache, &files).unwrap();
    assert!(
        before.right >= 2 && before.absent > 0 && before.wrong == 0,
        "{before:?}"
    );
    node.snapshotter.process().kill().unwrap();
    node.start_again(&source.run).await.unwrap();

    // What is there is read without the registry.
    source.proxy.set_carrier(Carrier::Refusing);
    let view = node.view(&image, "offline").await.unwrap();
    check_all(view.path(), &files[..2]).await.unwrap();
    source.proxy.set_carrier(Carrier::Up);

    // And the rest is fetched, nothing else.
    check_all(view.path(), &files).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    let records: Vec<RequestRecord> = source.proxy.requests();
    assert_eq!(sent_again(&records), 0, "{records:#?}");
}

/// Containers of an image whose files are here start although nobody answers, before and after a restart of the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn containers_start_without_the_registry() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    let reference = scenario.reference(CONVERTED);
    node.cri.pull(&reference).await.unwrap();
    let before = node.tree(&scenario.run, "before", &scenario.converted).await.unwrap();
    let logs = scenario.run.directory("pods").unwrap();
    let cgroup = scenario.run.names().cgroup.clone();
    // It brings the pause image.
    let first = node.cri.run_sandbox(&Pod::new("first", &logs, &cgroup)).await.unwrap();
    node.cri.remove_sandbox(&first).await.unwrap();
    scenario.proxy.set_carrier(Carrier::Refusing);
    for name in ["kept", "restarted"] {
        if name == "restarted" {
            let process = node.snapshotter().unwrap().process();
            process.stop().unwrap();
            let snapshotter = node.snapshotter.as_mut().unwrap();
            snapshotter.start_again(&scenario.run).await.unwrap();
            wait_for_snapshots(&mut node.snapshots).await;
        }
        let pod = Pod::new(name, &logs, &cgroup);
        let sandbox = node.cri.run_sandbox(&pod).await.unwrap();
        let container = node
            .cri
            .create_container(&sandbox, &pod, "main", &reference)
            .await
            .unwrap();
        node.cri.start_container(&container).await.unwrap();
        node.cri.remove_container(&container).await.unwrap();
        node.cri.remove_sandbox(&sandbox).await.unwrap();
        let after = node.tree(&scenario.run, name, &scenario.converted).await.unwrap();
        assert_eq!(tree::differences(&before, &after), None, "{name}");
    }
}

/// containerd dials a snapshotter that was gone again after a pause.
async fn wait_for_snapshots(snapshots: &mut hullspeed_tests::snapshots::Snapshots) {
    let end = Instant::now() + Duration::from_secs(15);
    while let Err(error) = snapshots.list().await {
        assert!(Instant::now() < end, "{error:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
