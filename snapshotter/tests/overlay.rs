//! Real mounts of the service's answers: content through 128 layers, links to layers, deletion, removal. As root.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use hullspeed_snapshotter::metrics::Metrics;
use hullspeed_snapshotter::snapshot::mounts::Mount;
use hullspeed_snapshotter::snapshot::no_layers::NoLayers;
use hullspeed_snapshotter::snapshot::{Labels, Service, ServiceOptions};

/// A mount that ends with its owner.
struct Mounted(PathBuf);

impl Mounted {
    /// Mounts from within the snapshots directory where the options would not fit into a page, as containerd does.
    fn new(mounts: &[Mount], at: &Path) -> Self {
        let [mount] = mounts else { panic!("{mounts:?}") };
        fs::create_dir_all(at).unwrap();
        let mut options = mount.options.join(",");
        let common = options
            .split_once("lowerdir=")
            .map(|(_, rest)| rest.split_once("snapshots/").unwrap().0.to_owned());
        let directory = PathBuf::from(common.unwrap_or_default()).join("snapshots");
        let mut command = Command::new("mount");
        if options.len() > 4000 {
            options = options.replace(&format!("{}/", directory.display()), "");
            command.current_dir(&directory);
        }
        assert!(
            options.len() < 4096,
            "128 layers must fit into a page: {}",
            options.len()
        );
        let done = command
            .args(["-t", mount.kind, "-o", &options, &mount.source])
            .arg(at)
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{mount:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        Self(at.to_owned())
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn open(root: &Path) -> Service {
    let options = ServiceOptions {
        root: root.to_owned(),
        layers: Arc::new(NoLayers),
        metrics: Metrics::unregistered(),
        mount_timeout: Duration::from_secs(1),
        restore_parallelism: 1,
    };
    Service::open(options).unwrap()
}

#[tokio::test]
async fn privileged_128_layers_mount_and_show_the_right_content() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    fs::create_dir(&root).unwrap();
    let service = open(&root);
    let at = place.path().join("mnt");
    let mut parent = None;
    for n in 0..128 {
        let key = format!("layer {n}");
        let mounts = service
            .prepare(key.clone(), parent.clone(), Labels::new())
            .await
            .unwrap();
        let mounted = Mounted::new(&mounts, &at);
        if n > 0 {
            assert_eq!(fs::read_to_string(at.join("same")).unwrap(), (n - 1).to_string());
            fs::remove_file(at.join(format!("only {}", n - 1))).unwrap();
        }
        fs::write(at.join("same"), n.to_string()).unwrap();
        fs::write(at.join(format!("only {n}")), "").unwrap();
        fs::write(at.join(format!("kept {n}")), "").unwrap();
        drop(mounted);
        let name = format!("committed {n}");
        service.commit(name.clone(), key, None, Labels::new()).await.unwrap();
        parent = Some(name);
    }
    let mounts = service.view("view".to_owned(), parent, Labels::new()).await.unwrap();
    let mounted = Mounted::new(&mounts, &at);
    assert_eq!(fs::read_to_string(at.join("same")).unwrap(), "127");
    assert_eq!(fs::read_dir(&at).unwrap().count(), 130, "128 kept, the last only, same");
    assert!(fs::write(at.join("new"), "").is_err(), "a view is read-only");
    drop(mounted);
    service.remove("view".to_owned()).await.unwrap();
    service.shutdown(Duration::from_secs(5)).await;
    assert_eq!(fs::read_dir(root.join("snapshots")).unwrap().count(), 128);
}

#[tokio::test]
async fn a_stopped_service_refuses_and_a_new_one_finds_everything() {
    let place = tempfile::tempdir().unwrap();
    let service = open(place.path());
    service.prepare("a".to_owned(), None, Labels::new()).await.unwrap();
    service.shutdown(Duration::from_secs(1)).await;
    service.prepare("b".to_owned(), None, Labels::new()).await.unwrap_err();
    drop(service);
    let service = open(place.path());
    service.mounts("a".to_owned()).await.unwrap();
    service.stat("b".to_owned()).await.unwrap_err();
}
