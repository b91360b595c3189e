//! The whole daemon but for its layers, over a real socket: protocol order, faults, restart. Layers are scripted here,
//! because a registry that fails at the right moment cannot be had otherwise.
#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use estargz::digest::Digest;
use hullspeed_proto::containerd::services::snapshots::v1 as api;
use hullspeed_snapshotter::config::Config;
use hullspeed_snapshotter::layer::{LayerMount, LayerMounts, LayerOrigin, LayerRequest, NotLazy, Usage};
use hullspeed_snapshotter::run::{RunError, run};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Code;
use tonic::transport::Channel;

type Client = api::snapshots_client::SnapshotsClient<Channel>;

/// Layers that are plain directories, with a log of calls and switches for faults.
#[derive(Clone)]
struct Scripted {
    root: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    calls: Vec<String>,
    mounted: BTreeMap<Digest, PathBuf>,
    refuse_mount: bool,
    refuse_restore: bool,
    hang: bool,
    shut_down: bool,
}

impl Scripted {
    fn new(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            state: Arc::default(),
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    fn put(&self, toc: Digest) -> LayerMount {
        let path = self.root.join("layers").join(toc.hex()).join("mnt");
        std::fs::create_dir_all(&path).unwrap();
        std::fs::write(path.join("file"), toc.to_string()).unwrap();
        self.with(|state| state.mounted.insert(toc, path.clone()));
        LayerMount { toc_digest: toc, path }
    }

    fn calls(&self, name: &str) -> usize {
        self.with(|state| state.calls.iter().filter(|call| call.starts_with(name)).count())
    }
}

#[async_trait]
impl LayerMounts for Scripted {
    async fn mount(&self, request: LayerRequest) -> Result<LayerMount, NotLazy> {
        let layer = request.layer_digest;
        let (refuse, hang) = self.with(|state| {
            state.calls.push(format!("mount {layer}"));
            (state.refuse_mount, state.hang)
        });
        if hang {
            while self.with(|state| state.hang) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        match request.toc_digest {
            Some(toc) if !refuse => Ok(self.put(toc)),
            _ => Err(NotLazy::NoTocDigest { layer }),
        }
    }

    async fn restore(&self, origin: LayerOrigin) -> Result<LayerMount, NotLazy> {
        let refuse = self.with(|state| {
            state.calls.push(format!("restore {}", origin.toc_digest));
            state.refuse_restore
        });
        if refuse {
            return Err(NotLazy::NotCached {
                toc: origin.toc_digest,
                path: self.root.clone(),
            });
        }
        Ok(self.put(origin.toc_digest))
    }

    async fn release(&self, toc_digest: &Digest) {
        self.with(|state| {
            state.calls.push(format!("release {toc_digest}"));
            state.mounted.remove(toc_digest);
        });
    }

    fn usage(&self, _: &Digest) -> Usage {
        Usage { bytes: 4096, inodes: 3 }
    }

    async fn shutdown(&self) {
        self.with(|state| state.shut_down = true);
    }
}

struct Daemon {
    client: Client,
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), RunError>>,
}

impl Daemon {
    async fn start(place: &Path, layers: &Scripted) -> Self {
        let (root, socket) = (place.join("root"), place.join("s.sock"));
        let mut config = Config {
            root,
            socket,
            ..Config::default()
        };
        config.metrics.address = None;
        config.layers.mount_timeout = Duration::from_millis(300);
        // Nothing here needs FUSE; the check for it is only made with lazy layers.
        config.layers.lazy = false;
        let socket = config.socket.clone();
        let layers = layers.clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let make = async move |_, _, _| Ok(Arc::new(layers) as Arc<dyn LayerMounts>);
        let task = tokio::spawn(run(config, make, async move { drop(stopped.await) }));
        for _ in 0..200 {
            if let Ok(client) = Client::connect(format!("unix:{}", socket.display())).await {
                return Self { client, stop, task };
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("no answer: {:?}", task.await);
    }

    async fn stop(self) {
        drop(self.client);
        self.stop.send(()).unwrap();
        self.task.await.unwrap().unwrap();
    }
}

fn digest(n: u8) -> Digest {
    Digest::from_bytes([n; 32])
}

/// The labels that CRI passes for layer `n` with `target`.
fn lazy_labels(target: &str, n: u8) -> HashMap<String, String> {
    HashMap::from([
        ("containerd.io/snapshot.ref".to_owned(), target.to_owned()),
        (
            "containerd.io/snapshot/cri.image-ref".to_owned(),
            "registry/image:1".to_owned(),
        ),
        (
            "containerd.io/snapshot/cri.layer-digest".to_owned(),
            digest(100 + n).to_string(),
        ),
        (
            "containerd.io/snapshot/stargz/toc.digest".to_owned(),
            digest(n).to_string(),
        ),
    ])
}

async fn prepare(
    client: &mut Client,
    key: &str,
    parent: &str,
    labels: HashMap<String, String>,
) -> Result<Vec<String>, Code> {
    let snapshotter = String::new();
    let request = api::PrepareSnapshotRequest {
        snapshotter,
        key: key.to_owned(),
        parent: parent.to_owned(),
        labels,
    };
    let answer = client.prepare(request).await.map_err(|status| status.code())?;
    Ok(answer
        .into_inner()
        .mounts
        .into_iter()
        .flat_map(|mount| mount.options)
        .collect())
}

async fn list(client: &mut Client, filter: &str) -> Vec<api::Info> {
    let request = api::ListSnapshotsRequest {
        snapshotter: String::new(),
        filters: vec![filter.to_owned()],
    };
    let mut stream = client.list(request).await.unwrap().into_inner();
    let mut infos = Vec::new();
    while let Some(batch) = stream.message().await.unwrap() {
        infos.extend(batch.info);
    }
    infos
}

async fn remove(client: &mut Client, key: &str) -> Result<(), Code> {
    let request = api::RemoveSnapshotRequest {
        snapshotter: String::new(),
        key: key.to_owned(),
    };
    client.remove(request).await.map(drop).map_err(|status| status.code())
}

async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..300 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{what}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lazy_layer_is_committed_used_restored_and_released() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    let layers = Scripted::new(&root);
    let mut daemon = Daemon::start(place.path(), &layers).await;
    let client = &mut daemon.client;
    assert_eq!(
        prepare(client, "k1", "", lazy_labels("c1", 1)).await,
        Err(Code::AlreadyExists)
    );
    assert_eq!(
        prepare(client, "k2", "c1", lazy_labels("c2", 2)).await,
        Err(Code::AlreadyExists)
    );
    // The same again needs no mount.
    assert_eq!(
        prepare(client, "k3", "c1", lazy_labels("c2", 2)).await,
        Err(Code::AlreadyExists)
    );
    assert_eq!(layers.calls("mount"), 2);
    // containerd looks for it in this way.
    let found = list(client, "labels.\"containerd.io/snapshot.ref\"==c2,parent==\"c1\"").await;
    assert_eq!(
        (found.len(), found[0].name.as_str(), found[0].kind),
        (1, "c2", api::Kind::Committed as i32)
    );
    assert_eq!(found[0].labels["containerd.io/snapshot/remote"], "remote snapshot");
    let options = prepare(client, "box", "c2", HashMap::new()).await.unwrap();
    let lower = options
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))
        .unwrap();
    for (path, n) in lower.split(':').zip([2, 1]) {
        assert_eq!(
            std::fs::read_to_string(Path::new(path).join("file")).unwrap(),
            digest(n).to_string()
        );
    }
    let usage = api::UsageRequest {
        snapshotter: String::new(),
        key: "c2".to_owned(),
    };
    assert_eq!(
        client.usage(usage).await.unwrap().into_inner(),
        api::UsageResponse { size: 4096, inodes: 3 }
    );
    daemon.stop().await;
    assert!(layers.with(|state| state.shut_down), "layers are shut down");
    assert!(!place.path().join("s.sock").exists());

    // After a restart everything is mounted again, orphans are swept, a lost link is made again.
    std::fs::create_dir_all(root.join("snapshots/77/fs")).unwrap();
    std::fs::remove_dir_all(root.join("snapshots/1")).unwrap();
    let layers = Scripted::new(&root);
    let mut daemon = Daemon::start(place.path(), &layers).await;
    let client = &mut daemon.client;
    eventually("layers are not restored", || {
        layers.with(|state| state.mounted.len()) == 2
    })
    .await;
    eventually("orphan stays", || !root.join("snapshots/77").exists()).await;
    eventually("link is not repaired", || root.join("snapshots/1/fs/file").exists()).await;
    assert_eq!(layers.calls("mount"), 0, "a restart uses no network");

    assert_eq!(remove(client, "c2").await, Err(Code::FailedPrecondition));
    for key in ["box", "c2", "c1"] {
        remove(client, key).await.unwrap();
    }
    eventually("layers are not released", || {
        layers.with(|state| state.mounted.is_empty())
    })
    .await;
    eventually("directories stay", || {
        std::fs::read_dir(root.join("snapshots")).unwrap().count() == 0
    })
    .await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_shared_by_two_chains_is_released_with_the_last() {
    let place = tempfile::tempdir().unwrap();
    let layers = Scripted::new(&place.path().join("root"));
    let mut daemon = Daemon::start(place.path(), &layers).await;
    let client = &mut daemon.client;
    // Two ordinary parents, as two namespaces have them.
    for parent in ["p1", "p2"] {
        prepare(client, "tmp", "", HashMap::new()).await.unwrap();
        let (name, key) = (parent.to_owned(), "tmp".to_owned());
        client
            .commit(api::CommitSnapshotRequest {
                name,
                key,
                ..Default::default()
            })
            .await
            .unwrap();
        assert_eq!(
            prepare(client, "k", parent, lazy_labels("c", 1)).await,
            Err(Code::AlreadyExists)
        );
        let filter = format!("labels.\"containerd.io/snapshot.ref\"==c,parent=={parent}");
        assert_eq!(list(client, &filter).await.len(), 1, "a target exists once per parent");
    }
    let names: Vec<_> = list(client, "labels.\"containerd.io/snapshot/remote\"").await;
    assert_eq!(names.len(), 2);
    remove(client, &names[0].name).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert_eq!(layers.calls("release"), 0);
    remove(client, &names[1].name).await.unwrap();
    eventually("layer is not released", || layers.calls("release") == 1).await;
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_lazy_becomes_an_ordinary_snapshot() {
    let place = tempfile::tempdir().unwrap();
    let layers = Scripted::new(&place.path().join("root"));
    let mut daemon = Daemon::start(place.path(), &layers).await;
    let client = &mut daemon.client;
    // No labels about the image: the layers are not even asked.
    let only_target = HashMap::from([("containerd.io/snapshot.ref".to_owned(), "t".to_owned())]);
    assert_eq!(prepare(client, "a", "", only_target).await.unwrap(), ["rw", "rbind"]);
    let mut malformed = lazy_labels("t", 1);
    malformed.insert(
        "containerd.io/snapshot/cri.layer-digest".to_owned(),
        "../../etc".to_owned(),
    );
    assert_eq!(prepare(client, "b", "", malformed).await.unwrap(), ["rw", "rbind"]);
    assert_eq!(layers.calls("mount"), 0);
    layers.with(|state| state.refuse_mount = true);
    assert_eq!(
        prepare(client, "c", "", lazy_labels("t", 1)).await.unwrap(),
        ["rw", "rbind"]
    );
    layers.with(|state| (state.refuse_mount, state.hang) = (false, true));
    assert_eq!(
        prepare(client, "d", "", lazy_labels("t", 1)).await.unwrap(),
        ["rw", "rbind"],
        "a mount that hangs"
    );
    // It ends after all; no snapshot refers to the layer, so it must not stay mounted.
    assert_eq!(layers.calls("release"), 0);
    layers.with(|state| state.hang = false);
    eventually("the late mount is released", || layers.calls("release") == 1).await;
    // A missing parent fails before any layer is asked.
    let asked = layers.calls("mount");
    assert_eq!(
        prepare(client, "e", "nosuch", lazy_labels("t", 1)).await,
        Err(Code::NotFound)
    );
    assert_eq!(layers.calls("mount"), asked);
    assert_eq!(list(client, "kind==active").await.len(), 4);
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn concurrent_prepares_of_one_target_all_succeed_with_one_snapshot() {
    let place = tempfile::tempdir().unwrap();
    let layers = Scripted::new(&place.path().join("root"));
    let mut daemon = Daemon::start(place.path(), &layers).await;
    let tasks: Vec<_> = (0..16)
        .map(|n| {
            let mut client = daemon.client.clone();
            tokio::spawn(async move { prepare(&mut client, &format!("k{n}"), "", lazy_labels("c", 1)).await })
        })
        .collect();
    for task in tasks {
        assert_eq!(task.await.unwrap(), Err(Code::AlreadyExists));
    }
    assert_eq!(list(&mut daemon.client, "").await.len(), 1);
    assert!(
        layers.with(|state| state.mounted.contains_key(&digest(1))),
        "losers must not release the layer"
    );
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_cannot_be_restored_fails_its_users_until_it_can() {
    let place = tempfile::tempdir().unwrap();
    let root = place.path().join("root");
    let layers = Scripted::new(&root);
    let mut daemon = Daemon::start(place.path(), &layers).await;
    assert_eq!(
        prepare(&mut daemon.client, "k", "", lazy_labels("c", 1)).await,
        Err(Code::AlreadyExists)
    );
    prepare(&mut daemon.client, "other", "", HashMap::new()).await.unwrap();
    daemon.stop().await;

    let layers = Scripted::new(&root);
    layers.with(|state| state.refuse_restore = true);
    let mut daemon = Daemon::start(place.path(), &layers).await;
    let client = &mut daemon.client;
    eventually("no restore is tried", || layers.calls("restore") > 0).await;
    assert_eq!(
        prepare(client, "box", "c", HashMap::new()).await,
        Err(Code::Unavailable)
    );
    let mounts = |key: &str| api::MountsRequest {
        snapshotter: String::new(),
        key: key.to_owned(),
    };
    client.mounts(mounts("other")).await.expect("the rest works");
    layers.with(|state| state.refuse_restore = false);
    prepare(client, "box", "c", HashMap::new()).await.unwrap();
    client.mounts(mounts("box")).await.unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_have_their_codes() {
    let place = tempfile::tempdir().unwrap();
    let layers = Scripted::new(&place.path().join("root"));
    let mut daemon = Daemon::start(place.path(), &layers).await;
    let client = &mut daemon.client;
    assert_eq!(
        prepare(client, "", "", HashMap::new()).await,
        Err(Code::InvalidArgument)
    );
    assert_eq!(
        prepare(client, &"k".repeat(5000), "", HashMap::new()).await,
        Err(Code::InvalidArgument)
    );
    let long = HashMap::from([("k".to_owned(), "v".repeat(4096))]);
    assert_eq!(prepare(client, "k", "", long).await, Err(Code::InvalidArgument));
    let list = api::ListSnapshotsRequest {
        snapshotter: String::new(),
        filters: vec!["name=".to_owned()],
    };
    assert_eq!(client.list(list).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(
        client
            .update(api::UpdateSnapshotRequest::default())
            .await
            .unwrap_err()
            .code(),
        Code::InvalidArgument
    );
    prepare(client, "k", "", HashMap::new()).await.unwrap();
    let info = api::Info {
        name: "k".to_owned(),
        parent: "p".to_owned(),
        ..Default::default()
    };
    let update_mask = Some(prost_types::FieldMask {
        paths: vec!["parent".to_owned()],
    });
    let update = api::UpdateSnapshotRequest {
        snapshotter: String::new(),
        info: Some(info),
        update_mask,
    };
    assert_eq!(client.update(update).await.unwrap_err().code(), Code::InvalidArgument);
    client.cleanup(api::CleanupRequest::default()).await.unwrap();
    daemon.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_listing_comes_whole() {
    let place = tempfile::tempdir().unwrap();
    let layers = Scripted::new(&place.path().join("root"));
    let mut daemon = Daemon::start(place.path(), &layers).await;
    for n in 0..205 {
        prepare(&mut daemon.client, &format!("k{n}"), "", HashMap::new())
            .await
            .unwrap();
    }
    assert_eq!(list(&mut daemon.client, "kind==active").await.len(), 205);
    assert_eq!(list(&mut daemon.client, "name==k204").await.len(), 1);
    daemon.stop().await;
}
