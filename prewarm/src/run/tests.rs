//! Start and stop of the whole daemon, without a containerd.

use std::os::fd::IntoRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

use hullspeed_proto::cri::v1::{ListPodSandboxRequest, RunPodSandboxRequest, UpdateRuntimeConfigRequest};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::*;
use crate::client::Client;
use crate::containerd::Containerd;

fn config(place: &Path) -> Config {
    let mut config = Config {
        root: place.join("root"),
        state: place.join("state"),
        socket: place.join("state/cri.sock"),
        control_socket: place.join("state/prewarm.sock"),
        ..Config::default()
    };
    config.containerd.address = place.join("none.sock");
    config.metrics.address = None;
    config
}

fn entries(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// A daemon that runs until the sender is used or dropped.
fn begun(config: &Config) -> (oneshot::Sender<()>, JoinHandle<Result<(), RunError>>) {
    let (stop, stopped) = oneshot::channel();
    let config = config.clone();
    let daemon = tokio::spawn(async move {
        let stopped = async { drop(stopped.await) };
        run(config, &Announced::default(), stopped).await
    });
    (stop, daemon)
}

#[tokio::test]
async fn the_daemon_serves_without_containerd_and_stops() {
    let place = tempfile::tempdir().unwrap();
    let config = config(place.path());
    let (stop, daemon) = begun(&config);
    let client = Client::at(&config.control_socket);
    let mut status = client.status().await;
    for _ in 0..100 {
        if status.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        status = client.status().await;
    }
    assert_eq!(status.unwrap().containerd_version, "");
    UnixStream::connect(&config.socket).unwrap();
    // A second daemon is refused, whichever of the two directories it shares.
    let mut second = config.clone();
    second.root = place.path().join("root2");
    let error = run(second, &Announced::default(), std::future::pending())
        .await
        .unwrap_err();
    assert_eq!(error.exit_code(), 75, "{error}");
    assert!(!place.path().join("root2").exists());
    let mut second = config.clone();
    second.state = place.path().join("state2");
    let error = run(second, &Announced::default(), std::future::pending())
        .await
        .unwrap_err();
    assert_eq!(error.exit_code(), 75, "{error}");

    stop.send(()).unwrap();
    daemon.await.unwrap().unwrap();
    assert!(!config.socket.exists() && !config.control_socket.exists());
    assert_eq!(entries(&config.root), ["lock", "mark"]);
}

#[tokio::test]
async fn before_containerd_was_asked_nothing_is_said_of_sandboxes() {
    let place = tempfile::tempdir().unwrap();
    let config = config(place.path());
    let (stop, daemon) = begun(&config);
    while !config.socket.exists() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut cri = Containerd::at(&config.socket).runtime();
    // It waits for containerd to come, but not for ever.
    let begun = std::time::Instant::now();
    let refused = cri
        .list_pod_sandbox(ListPodSandboxRequest::default())
        .await
        .unwrap_err();
    assert!(begun.elapsed() > Duration::from_secs(1));
    assert_eq!(refused.code(), tonic::Code::Unavailable);
    assert!(refused.message().contains("which sandboxes are pods'"), "{refused}");
    let mut hasty = tonic::Request::new(RunPodSandboxRequest::default());
    hasty.set_timeout(Duration::from_millis(200));
    let refused = cri.run_pod_sandbox(hasty).await.unwrap_err();
    assert!(
        matches!(refused.code(), tonic::Code::DeadlineExceeded | tonic::Code::Cancelled),
        "{refused}"
    );
    // What has nothing to do with sandboxes fares as containerd does.
    let begun = std::time::Instant::now();
    cri.update_runtime_config(UpdateRuntimeConfigRequest::default())
        .await
        .unwrap_err();
    assert!(begun.elapsed() < Duration::from_secs(1));
    stop.send(()).unwrap();
    daemon.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_damaged_mark_stops_the_start() {
    let place = tempfile::tempdir().unwrap();
    let config = config(place.path());
    std::fs::create_dir(&config.root).unwrap();
    std::fs::write(config.root.join("mark"), "x").unwrap();
    let error = run(config.clone(), &Announced::default(), std::future::ready(()))
        .await
        .unwrap_err();
    assert_eq!(error.exit_code(), 65, "{error}");
    assert!(!config.socket.exists());
}

#[tokio::test]
async fn what_is_no_listener_stops_the_start() {
    let place = tempfile::tempdir().unwrap();
    // Descriptor 3 of a test is something, but no listener, or nothing.
    let announced = Announced {
        process: Some(std::process::id().to_string()),
        count: Some("1".to_owned()),
        names: None,
    };
    let _some = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
    let error = run(config(place.path()), &announced, std::future::ready(()))
        .await
        .unwrap_err();
    assert_eq!(error.exit_code(), 73, "{error}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}

#[test]
fn the_unit_allows_what_an_adoption_does() {
    let unit = include_str!("../../../deploy/systemd/hullspeed-prewarm.service");
    let settings: Vec<(&str, &str)> = unit
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .collect();
    let words = |key: &str| -> Vec<&str> {
        let values = settings.iter().filter(|(name, _)| *name == key);
        values.flat_map(|(_, value)| value.split_whitespace()).collect()
    };
    // setns, pidfd_open, poll, sockets and files are in the group; the names of a UTS namespace are not.
    for call in ["@system-service", "sethostname", "setdomainname"] {
        assert!(words("SystemCallFilter").contains(&call), "{call}");
    }
    // Namespaces and their names; processes and files of others; sysctls of a network namespace.
    for capability in ["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_NET_ADMIN"] {
        assert!(words("CapabilityBoundingSet").contains(&capability), "{capability}");
    }
    for family in ["AF_UNIX", "AF_INET", "AF_INET6"] {
        assert!(words("RestrictAddressFamilies").contains(&family), "{family}");
    }
    // Each of these takes something away that adopting, or making the cgroup of hulls, needs.
    for key in [
        "PrivateTmp",
        "PrivateMounts",
        "PrivateNetwork",
        "PrivateUsers",
        "PrivatePIDs",
        "PrivateIPC",
        "ProtectSystem",
        "ProtectHome",
        "ProtectProc",
        "ProtectHostname",
        "ProtectKernelTunables",
        "ProtectControlGroups",
        "RestrictNamespaces",
        "ReadWritePaths",
        "User",
        "DynamicUser",
    ] {
        assert!(words(key).is_empty(), "{key}");
    }
}
