//! The whole examination, on a node where nothing is there.

use hullspeed_daemon::doctor::Level;

use super::*;

#[tokio::test]
async fn a_node_without_anything_is_broken_and_every_line_says_what_to_do() {
    let place = tempfile::tempdir().unwrap();
    let mut config = Config {
        root: place.path().join("root"),
        state: place.path().join("state"),
        socket: place.path().join("cri.sock"),
        control_socket: place.path().join("control.sock"),
        ..Config::default()
    };
    config.containerd.address = place.path().join("containerd.sock");
    config.warm.snapshotter = place.path().join("snapshotter.sock");
    let places = Places {
        proc: place.path().join("proc"),
        kubelet: place.path().join("kubelet"),
        ..Places::default()
    };
    let report = examine(&config, &places).await;
    let level = |check: &str| {
        let found = report.findings.iter().find(|finding| finding.check == check);
        found.map(|finding| finding.level)
    };
    assert_eq!(level("containerd"), Some(Level::Fail));
    for check in ["socket", "daemon", "snapshotter", "kubelet"] {
        assert_eq!(level(check), Some(Level::Warn), "{check}");
    }
    assert_eq!(level("journal"), Some(Level::Ok));
    assert!(report.is_broken());
    let wrong = report.findings.iter().filter(|finding| finding.level != Level::Ok);
    assert!(wrong.clone().all(|finding| finding.advice.is_some()));
    let text = report.to_text();
    assert_eq!(text.lines().count(), report.findings.len() + wrong.count());
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["findings"][0]["check"], "rights");
    // It changes nothing.
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);
}
