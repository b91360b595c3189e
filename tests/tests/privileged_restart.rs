//! A restart of the daemon loses nothing on disk and needs no network.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hullspeed_tests::scenario::{CONVERTED, Node, Scenario};
use hullspeed_tests::tree;

/// containerd dials a snapshotter that was gone again after a pause, of a few seconds at most.
const REDIAL_LIMIT: Duration = Duration::from_secs(15);

async fn names(node: &mut Node) -> BTreeSet<String> {
    let end = Instant::now() + REDIAL_LIMIT;
    loop {
        match node.snapshots.list().await {
            Ok(infos) => return infos.into_iter().map(|info| info.name).collect(),
            Err(error) if Instant::now() > end => panic!("{error:#}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn restart_keeps_everything(kill: bool) {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    node.cri.pull(&scenario.reference(CONVERTED)).await.unwrap();
    // Reading the whole tree makes everything resident; after a crash what was not yet checkpointed is fetched again.
    let before = node.tree(&scenario.run, "before", &scenario.converted).await.unwrap();
    let snapshots = names(&mut node).await;
    assert_eq!(snapshots.len(), scenario.converted.layers().len());
    let process = node.snapshotter().unwrap().process();
    if kill {
        process.kill().unwrap();
    } else {
        let status = process.stop().unwrap();
        assert!(
            status.success(),
            "a graceful stop ended with {status}:\n{}",
            process.log_tail()
        );
    }
    scenario.proxy.set_dead(!kill);
    node.snapshotter
        .as_mut()
        .unwrap()
        .start_again(&scenario.run)
        .await
        .unwrap();
    assert_eq!(names(&mut node).await, snapshots);
    let after = node.tree(&scenario.run, "after", &scenario.converted).await.unwrap();
    assert_eq!(tree::differences(&before, &after), None);
    scenario.proxy.heal();
    // And the whole life goes on: the image can be removed, and nothing of it stays mounted.
    node.cri.remove_everything().await.unwrap();
    assert_eq!(names(&mut node).await, BTreeSet::new());
}

/// With the registry gone: all content is resident.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_daemon_comes_back_without_the_registry() {
    restart_keeps_everything(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_comes_back() {
    restart_keeps_everything(true).await;
}

/// containerd may be restarted, too; the snapshots are found again.
#[tokio::test(flavor = "multi_thread")]
async fn containerd_restarts_beside_a_running_daemon() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    node.cri.pull(&scenario.reference(CONVERTED)).await.unwrap();
    let snapshots = names(&mut node).await;
    node.containerd.restart(&scenario.run).await.unwrap();
    node.cri = node.containerd.cri().await.unwrap();
    assert!(node.cri.image(&scenario.reference(CONVERTED)).await.unwrap().is_some());
    assert_eq!(names(&mut node).await, snapshots);
}
