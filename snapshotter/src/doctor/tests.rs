//! The whole examination, on a node where nothing is there.

use std::fs;

use hullspeed_daemon::doctor::Level;

use super::*;

#[tokio::test]
async fn a_node_without_anything_is_broken_and_every_line_says_what_to_do() {
    let place = tempfile::tempdir().unwrap();
    let mut config = Config {
        root: place.path().join("root"),
        socket: place.path().join("snapshotter.sock"),
        ..Config::default()
    };
    config.metrics.address = None;
    let places = Places {
        proc: place.path().join("proc"),
        fuse: place.path().join("fuse"),
        containerd: place.path().join("containerd.sock"),
        containerd_config: place.path().join("config.toml"),
    };
    let report = examine(&config, &places).await;
    let level = |check: &str| {
        let found = report.findings.iter().find(|finding| finding.check == check);
        found.map(|finding| finding.level)
    };
    for check in ["fuse", "containerd"] {
        assert_eq!(level(check), Some(Level::Fail), "{check}");
    }
    for check in ["socket", "groups"] {
        assert_eq!(level(check), Some(Level::Warn), "{check}");
    }
    for check in ["kernel", "erofs", "fanotify", "filesystem", "room"] {
        assert!(level(check).is_some(), "{check}");
    }
    // Nobody was there to be asked.
    for check in ["daemon", "mounts", "self-test", "store", "plugin", "cri"] {
        assert_eq!(level(check), None, "{check}");
    }
    assert!(report.is_broken());
    let wrong = report.findings.iter().filter(|finding| finding.level != Level::Ok);
    assert!(wrong.clone().all(|finding| finding.advice.is_some()));
    assert_eq!(report.to_text().lines().count(), report.findings.len() + wrong.count());
    // It changes nothing.
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn where_no_layer_is_to_be_mounted_natively_nothing_is_tried() {
    let place = tempfile::tempdir().unwrap();
    let mut config = Config {
        root: place.path().to_owned(),
        ..Config::default()
    };
    let places = Places::with_containerd(Path::new("/nonesuch"));
    let checks = |config: &Config| {
        let mut report = Report::default();
        events::examine(config, &places, &mut report);
        report.findings.iter().map(|finding| finding.check).collect::<Vec<_>>()
    };
    assert_eq!(checks(&config), ["fanotify", "groups"]);
    config.layers.mount = crate::config::MountChoice::Fuse;
    assert_eq!(checks(&config), ["fanotify"]);
}
