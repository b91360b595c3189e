//! The harness itself: what it measures is right, and nothing of it stays behind.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hullspeed_tests::cri::Pod;
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::proxy::{LinkOptions, Proxy};
use hullspeed_tests::release::Release;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::sweep::{RunNames, mounts_below};
use hullspeed_tests::{fixture, layout, pause, registry, requirements, sweep};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

/// A server that answers every request on every connection with `size` bytes.
async fn origin(size: usize) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = vec![0; 4096];
                while stream.read(&mut request).await.unwrap_or(0) > 0 {
                    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
                    stream.write_all(head.as_bytes()).await.unwrap();
                    stream.write_all(&vec![7; size]).await.unwrap();
                }
            });
        }
    });
    address
}

/// Status and number of body bytes that arrived.
async fn get(address: SocketAddr, path: &str) -> (Option<u16>, usize) {
    // A connection that is reset at once may be so before it is ours.
    let Ok(mut stream) = TcpStream::connect(address).await else {
        return (None, 0);
    };
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    if stream.write_all(request.as_bytes()).await.is_err() {
        return (None, 0);
    }
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let Some(end) = answer.windows(4).position(|window| window == b"\r\n\r\n") else {
        return (None, 0);
    };
    let status = std::str::from_utf8(&answer[9..12]).unwrap().parse().unwrap();
    (Some(status), answer.len() - end - 4)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_link_delays_caps_and_counts() {
    const SIZE: usize = 1 << 20;
    const RATE: u64 = 4 << 20;
    let delay = Duration::from_millis(20);
    let proxy = Proxy::start(
        origin(SIZE).await,
        LinkOptions {
            delay,
            bytes_per_second: Some(RATE),
        },
    )
    .await
    .unwrap();
    let start = Instant::now();
    // Two connections at once share the cap: 2 MiB at 4 MiB/s.
    let (a, b) = tokio::join!(get(proxy.address(), "/a"), get(proxy.address(), "/b"));
    let took = start.elapsed();
    assert_eq!((a, b), ((Some(200), SIZE), (Some(200), SIZE)));
    assert!(took > Duration::from_millis(450), "too fast for the cap: {took:?}");
    assert!(took < Duration::from_millis(1500), "far slower than the cap: {took:?}");
    let totals = proxy.totals();
    assert_eq!(totals.requests, 2);
    let bodies = 2 * SIZE as u64;
    assert!(
        totals.bytes_down > bodies && totals.bytes_down < bodies + 1024,
        "headers count, nothing else: {totals:?}"
    );
    let mut paths: Vec<_> = proxy
        .requests()
        .into_iter()
        .map(|record| (record.path, record.status, record.body_bytes))
        .collect();
    paths.sort();
    assert_eq!(
        paths,
        [("/a".into(), 200, SIZE as u64), ("/b".into(), 200, SIZE as u64)]
    );
    proxy.reset();
    let start = Instant::now();
    get(proxy.address(), "/tiny").await;
    assert!(start.elapsed() >= delay);
    assert_eq!(proxy.totals().requests, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn faults_hit_what_they_name() {
    const SIZE: usize = 100_000;
    let proxy = Proxy::start(origin(SIZE).await, LinkOptions::default()).await.unwrap();
    proxy.inject(FaultRule::get("/status", Fault::Status(403)));
    proxy.inject(FaultRule::get("/cut", Fault::Truncate(1000)));
    proxy.inject(FaultRule::get("/stall", Fault::Stall(1000)));
    assert_eq!(get(proxy.address(), "/status").await.0, Some(403));
    assert_eq!(get(proxy.address(), "/cut").await, (Some(200), 1000));
    let stalled = tokio::time::timeout(Duration::from_millis(300), get(proxy.address(), "/stall")).await;
    assert!(stalled.is_err(), "a stalled answer ended: {stalled:?}");
    assert_eq!(get(proxy.address(), "/fine").await, (Some(200), SIZE));
    proxy.set_dead(true);
    assert_eq!(get(proxy.address(), "/fine").await, (None, 0));
    proxy.heal();
    assert_eq!(get(proxy.address(), "/status").await, (Some(200), SIZE));
}

#[test]
fn the_fixture_is_reproducible() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let build = |directory: &Path| fixture::build(directory, b"program").unwrap();
    assert_eq!(build(a.path()), build(b.path()));
    let image = layout::LayoutImage::read(a.path(), fixture::TAG).unwrap();
    assert_eq!(image.layers().len(), 3);
}

#[test]
fn a_run_leaves_nothing_behind_and_a_killed_one_is_swept() {
    requirements::check().unwrap();
    let base = tempfile::tempdir().unwrap();
    let path = base.path().join("run");
    let run = RunDir::open(&path).unwrap();
    assert!(RunDir::open(&path).is_err(), "a second run took a directory in use");
    // A process that ignores SIGTERM, a mount, a bridge.
    let mut command = Command::new("sh");
    command.args(["-c", "trap '' TERM; sleep 1000 & wait; sleep 1000"]);
    let process = run.spawn("stubborn", command).unwrap();
    let pid = process.pid();
    let mount = run.directory("mount").unwrap();
    assert!(
        Command::new("mount")
            .args(["-t", "tmpfs", "tmpfs"])
            .arg(&mount)
            .status()
            .unwrap()
            .success()
    );
    let names = RunNames::new(run.path());
    assert!(
        Command::new("ip")
            .args(["link", "add", &names.bridge, "type", "bridge"])
            .status()
            .unwrap()
            .success()
    );
    let real = run.path().to_path_buf();
    // What a SIGKILL leaves: nothing is dropped.
    std::mem::forget(process);
    sweep::sweep(&real).unwrap();
    drop(run);
    assert!(mounts_below(&real).unwrap().is_empty());
    assert!(!Path::new("/sys/class/net").join(&names.bridge).exists());
    let state = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    assert!(state.is_empty() || state.contains(") Z "), "{pid} still runs: {state}");
    assert!(!real.exists());
    // And the directory can be used again at once.
    drop(RunDir::open(&path).unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_on_overlayfs_and_goes_without_trace() {
    a_pod_runs(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_runs_on_containerd_2_and_goes_without_trace() {
    a_pod_runs(Release::Two).await;
}

async fn a_pod_runs(release: Release) {
    requirements::check().unwrap();
    let run = RunDir::temporary().unwrap();
    let registry = registry::Registry::start(&run, &run.directory("storage").unwrap()).unwrap();
    let layout = run.path().join("pause-image");
    pause::build(&layout, run.path()).unwrap();
    registry
        .push(&format!("oci:{}:latest", layout.display()), "pause:latest")
        .unwrap();
    let network = hullspeed_tests::network::Network::create(&run).unwrap();
    let options = hullspeed_tests::containerd::ContainerdOptions {
        name: "containerd".into(),
        snapshotter: hullspeed_tests::containerd::SnapshotterChoice::Overlayfs,
        pause_image: format!("{}/pause:latest", registry.address()),
        release,
    };
    let mut containerd = hullspeed_tests::containerd::Containerd::start(&run, &network, &options)
        .await
        .unwrap();
    let mut cri = containerd.cri().await.unwrap();
    let version = cri.version().await.unwrap();
    let number = match release {
        Release::One => "1.6.",
        Release::Two => "2.",
    };
    let said = version.strip_prefix("containerd ").unwrap().trim_start_matches('v');
    assert!(said.starts_with(number), "{version}");
    cri.pull(&options.pause_image).await.unwrap();
    let pod = Pod::new("first", &run.directory("pods").unwrap(), &run.names().cgroup);
    let sandbox = cri.run_sandbox(&pod).await.unwrap();
    assert!(
        cri.sandbox_ip(&sandbox)
            .await
            .unwrap()
            .to_string()
            .starts_with("10.213.")
    );
    let container = cri
        .create_container(&sandbox, &pod, "main", &options.pause_image)
        .await
        .unwrap();
    cri.start_container(&container).await.unwrap();
    assert!(containerd.rootfs(&container).join("pause").is_file());
    // Not removed on purpose: the sweep has to cope with a live pod.
    let names = run.names().clone();
    containerd.stop().unwrap();
    drop((containerd, network, registry));
    drop(run);
    // Version 1 has a directory a controller, version 2 (or the unified part of both) one for all.
    let hierarchies = std::fs::read_dir("/sys/fs/cgroup")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    for hierarchy in hierarchies.chain(["/sys/fs/cgroup".into()]) {
        let left = hierarchy.join(&names.cgroup);
        assert!(!left.exists(), "{} is left", left.display());
    }
    assert!(!Path::new("/sys/class/net").join(&names.bridge).exists());
    let results = std::fs::read_dir("/var/lib/cni/results")
        .into_iter()
        .flatten()
        .flatten();
    assert_eq!(
        results
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&names.bridge))
            .count(),
        0
    );
}
