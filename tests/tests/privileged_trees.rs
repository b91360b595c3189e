//! The root file system on Hullspeed equals the one on overlayfs, attribute for attribute.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use hullspeed_tests::cri::Pod;
use hullspeed_tests::demo_image::{self, DemoImage};
use hullspeed_tests::scenario::{CONVERTED, Node, Scenario};
use hullspeed_tests::tree::{self, Kind, Tree};
use hullspeed_tests::{fixture, probe};

#[tokio::test(flavor = "multi_thread")]
async fn the_fixture_looks_the_same_on_both() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut plain = scenario.plain_node().await.unwrap();
    plain.cri.pull(&scenario.plain_reference()).await.unwrap();
    let mut expected = plain.tree(&scenario.run, "plain", &scenario.plain).await.unwrap();
    let mut lazy = scenario.lazy_node("").await.unwrap();
    lazy.cri.pull(&scenario.reference(CONVERTED)).await.unwrap();
    lazy.check_lazy(&scenario.converted).unwrap();
    let mut seen = lazy.tree(&scenario.run, "lazy", &scenario.converted).await.unwrap();
    fixture::forget_implied_times(&mut expected);
    fixture::forget_implied_times(&mut seen);
    assert_eq!(tree::differences(&expected, &seen), None);
    // The comparison compares something: the fixture's oddities are there.
    let at = |path: &str| &seen[Path::new(path)];
    assert!(matches!(at(fixture::LARGE_FILE).kind, Kind::Regular(size, _) if size == fixture::LARGE_SIZE as u64));
    assert_eq!(at("special/disk").kind, Kind::BlockDevice(8, 17));
    assert_eq!(at("links/three").links, 3);
    assert_eq!(at("replaced").mode, 0o4755);
    assert!(
        at("attributes/capability")
            .xattrs
            .contains_key(&b"security.capability"[..])
    );
    assert!(!seen.contains_key(Path::new("gone")) && !seen.contains_key(Path::new("opaque/old")));
    assert!(
        !seen
            .keys()
            .any(|path| path.to_string_lossy().contains(".wh.") || path.ends_with("stargz.index.json"))
    );
}

/// The view of the image, and what a running container of it sees.
#[tokio::test(flavor = "multi_thread")]
async fn the_demo_image_looks_the_same_on_both() {
    let run = Scenario::prepare().unwrap();
    let image = DemoImage::cached(&run, &demo_image::shared_cache()).await.unwrap();
    let access = image.access.to_string_lossy().into_owned();
    let arguments = ["--prioritize", access.as_str()];
    let scenario = Scenario::with_image(run, &image.layout, demo_image::TAG, &arguments)
        .await
        .unwrap();
    let mut plain = scenario.plain_node().await.unwrap();
    plain.cri.pull(&scenario.plain_reference()).await.unwrap();
    let mut lazy = scenario.lazy_node("").await.unwrap();
    lazy.cri.pull(&scenario.reference(CONVERTED)).await.unwrap();
    lazy.check_lazy(&scenario.converted).unwrap();

    let mut expected = plain.tree(&scenario.run, "plain", &scenario.plain).await.unwrap();
    let mut seen = lazy.tree(&scenario.run, "lazy", &scenario.converted).await.unwrap();
    forget_root_time([&mut expected, &mut seen]);
    assert_eq!(tree::differences(&expected, &seen), None);
    assert!(expected.len() > 5000, "{} paths are no real image", expected.len());

    let plain_id = start(&scenario, &mut plain, &scenario.plain_reference(), "plain").await;
    let lazy_id = start(&scenario, &mut lazy, &scenario.reference(CONVERTED), "lazy").await;
    let mut expected = tree::read(&plain.containerd.rootfs(&plain_id)).unwrap();
    let mut seen = tree::read(&lazy.containerd.rootfs(&lazy_id)).unwrap();
    forget_root_time([&mut expected, &mut seen]);
    assert_eq!(tree::differences(&expected, &seen), None);
    let digest = |node: &mut Node, id: String| {
        let mut cri = node.cri.clone();
        async move {
            cri.exec(&id, &["sha256sum", "/usr/bin/python3.11", "/usr/bin/perl"])
                .await
                .unwrap()
                .stdout
        }
    };
    assert_eq!(digest(&mut plain, plain_id).await, digest(&mut lazy, lazy_id).await);
}

/// No layer has an entry for the root: its time is that of the unpacking, or of the container's start.
fn forget_root_time(trees: [&mut Tree; 2]) {
    for tree in trees {
        tree.get_mut(Path::new("")).unwrap().mtime = (0, 0);
    }
}

/// Runs the image as a pod until it answers; returns the container.
async fn start(scenario: &Scenario, node: &mut Node, reference: &str, name: &str) -> String {
    let pod = Pod::new(
        name,
        &scenario.run.directory("pods").unwrap(),
        &scenario.run.names().cgroup,
    );
    let sandbox = node.cri.run_sandbox(&pod).await.unwrap();
    let ip = node.cri.sandbox_ip(&sandbox).await.unwrap();
    let container = node
        .cri
        .create_container(&sandbox, &pod, "function", reference)
        .await
        .unwrap();
    node.cri.start_container(&container).await.unwrap();
    let address = SocketAddr::new(ip, demo_image::PORT);
    let body = probe::first_200(address, demo_image::PATH, Duration::from_secs(60))
        .await
        .unwrap();
    assert!(String::from_utf8_lossy(&body).contains("\"count\": 7"));
    container
}
