//! What `doctor` says of nodes that are well and of such that are not, and who is found to have waited, with a real containerd.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hullspeed_tests::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use hullspeed_tests::fixture::{LARGE_FILE, LARGE_SIZE};
use hullspeed_tests::operator::{self, Said};
use hullspeed_tests::release::Release;
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use hullspeed_tests::snapshotter::{PLUGIN, Snapshotter};
use hullspeed_tests::way::Way;
use serde_json::Value;

/// What the doctor finds, and its exit code.
fn examined(config: &Path, containerd: &Path) -> (i32, Vec<Value>) {
    let containerd = containerd.to_str().unwrap();
    let Said { code, out, error } = operator::said(config, &["doctor", "--json", "--containerd", containerd]).unwrap();
    assert_eq!((out.lines().count(), error.as_str()), (1, ""), "{out}{error}");
    let report: Value = serde_json::from_str(&out).unwrap();
    (code, report["findings"].as_array().unwrap().clone())
}

fn level<'a>(findings: &'a [Value], check: &str) -> &'a str {
    let found = findings.iter().find(|finding| finding["check"] == check);
    found.map_or("-", |finding| finding["level"].as_str().unwrap())
}

fn all_ok(findings: &[Value], checks: &[&str]) {
    for check in checks {
        assert_eq!(level(findings, check), "ok", "{check}: {findings:#?}");
    }
}

async fn start(scenario: &Scenario, release: Release, name: &str, snapshotter: SnapshotterChoice) -> Containerd {
    let options = ContainerdOptions {
        name: name.into(),
        snapshotter,
        pause_image: format!("{}/pause:latest", scenario.registry.address()),
        release,
    };
    Containerd::start(&scenario.run, &scenario.network, &options)
        .await
        .unwrap()
}

async fn examines(release: Release) {
    let scenario = Scenario::fixture().await.unwrap();
    let mut snapshotter = Snapshotter::start(&scenario.run, "snapshotter", "").await.unwrap();
    let (config, choice) = (snapshotter.config(), snapshotter.choice());

    // A containerd that has never heard of it.
    let mut plain = start(&scenario, release, "plain", SnapshotterChoice::Overlayfs).await;
    let (code, findings) = examined(&config, &plain.socket());
    assert_eq!((code, level(&findings, "plugin")), (1, "fail"), "{findings:#?}");
    assert_eq!(level(&findings, "cri"), "warn", "{findings:#?}");
    plain.stop().unwrap();
    let (code, findings) = examined(&config, &plain.socket());
    assert_eq!((code, level(&findings, "containerd")), (1, "fail"), "{findings:#?}");

    // One that has it, by whatever name.
    let mut containerd = start(&scenario, release, "lazy", choice).await;
    let (code, findings) = examined(&config, &containerd.socket());
    let well = [
        "rights",
        "capability",
        "kernel",
        "fuse",
        "erofs",
        "fanotify",
        "filesystem",
        "socket",
        "daemon",
        "mounts",
        "metrics",
        "plugin",
        "containerd",
        "cri",
        "annotations",
    ];
    all_ok(&findings, &well);
    assert_eq!(code, 0, "{findings:#?}");
    let way = Way::of_this_run().unwrap();
    if way.needs_keeper() {
        all_ok(&findings, &["self-test", "store"]);
    } else {
        assert_eq!(level(&findings, "self-test"), "-", "the configuration says how");
    }

    // It is told nothing of images; and then it is used for none.
    let telling = "disable_snapshot_annotations = false";
    containerd
        .restart_with(&scenario.run, telling, "disable_snapshot_annotations = true")
        .await
        .unwrap();
    let (code, findings) = examined(&config, &containerd.socket());
    assert_eq!((code, level(&findings, "annotations")), (0, "warn"), "{findings:#?}");
    let used = format!("snapshotter = \"{PLUGIN}\"");
    containerd
        .restart_with(&scenario.run, &used, "snapshotter = \"overlayfs\"")
        .await
        .unwrap();
    let (code, findings) = examined(&config, &containerd.socket());
    assert_eq!((code, level(&findings, "cri")), (0, "warn"), "{findings:#?}");
    all_ok(&findings, &["plugin"]);

    // The daemon is gone: containerd is as it was, and what only the daemon knows is not told.
    snapshotter.process().stop().unwrap();
    let (_, findings) = examined(&config, &containerd.socket());
    assert_eq!(level(&findings, "daemon"), "-", "{findings:#?}");
    assert_eq!(level(&findings, "mounts"), "-", "{findings:#?}");
    all_ok(&findings, &["plugin", "fanotify"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_examined() {
    examines(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_containerd_2_is_examined() {
    examines(Release::Two).await;
}

/// Where control groups can be made: the one hierarchy, or one of several.
fn hierarchy() -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    if root.join("cgroup.controllers").exists() {
        root.to_owned()
    } else {
        root.join("pids")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_is_told_with_pod_container_and_command() {
    const UID: &str = "0b5e6d4c-1111-2222-3333-444455556666";
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario
        .lazy_node("[fetch]\nprefetch = false\nbackground = false\n")
        .await
        .unwrap();
    let config = node.snapshotter().unwrap().config();
    let image = scenario.reference(CONVERTED);
    node.cri.pull(&image).await.unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    let container = "5e".repeat(32);
    let group = hierarchy()
        .join(&scenario.run.names().cgroup)
        .join("kubepods/burstable");
    let group = group.join(format!("pod{UID}")).join(&container);
    fs::create_dir_all(&group).unwrap();
    let script = format!("echo $$ > {}/cgroup.procs && exec cat {LARGE_FILE}", group.display());
    let mut command = Command::new("sh");
    command.args(["-c", &script]).current_dir(view.path());
    let read = tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap();
    assert_eq!(
        read.stdout.len(),
        LARGE_SIZE,
        "{}",
        String::from_utf8_lossy(&read.stderr)
    );

    let end = Instant::now() + Duration::from_secs(20);
    let (layer, reader) = loop {
        let explained = operator::explained(&config, &image).unwrap();
        let layers = explained["layers"].as_array().unwrap();
        let with_reader = layers.iter().find_map(|layer| {
            let readers = layer["readers"].as_array().unwrap();
            let reader = readers.iter().find(|reader| reader["command"] == "cat")?;
            Some((layer.clone(), reader.clone()))
        });
        if let Some(found) = with_reader {
            break found;
        }
        assert!(Instant::now() < end, "nobody has waited: {explained:#}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(
        (&reader["pod"], &reader["container"]),
        (&UID.into(), &container.as_str().into()),
        "{reader:#}"
    );
    for key in ["reads", "bytes", "last_unix_ms"] {
        assert!(reader[key].as_u64().unwrap() > 0, "{key}: {reader:#}");
    }
    let way = Way::of_this_run().unwrap();
    assert_eq!(
        (&layer["mount"], &layer["kernel_alone"]),
        (&way.name().into(), &false.into()),
        "{layer:#}"
    );
    let Said { out, .. } = operator::said(&config, &["explain", &image]).unwrap();
    for word in [UID, &container[..12], "cat", way.name()] {
        assert!(out.contains(word), "{word} is missing:\n{out}");
    }
    let status = operator::answer(&config, &["status"]).unwrap();
    assert_eq!(status["mount"], way.name(), "{status:#}");
    node.snapshots.remove(view).await.unwrap();
}
