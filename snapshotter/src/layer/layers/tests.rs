//! Layers on real FUSE mounts, from a real registry. Needs root, `/dev/fuse` and docker-registry.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use estargz::toc::{EntryType, TOC_DIGEST_ANNOTATION, TocEntry, encode_xattr};
use hullspeed_registry::{Client, Reference, Upload, Version};
use rustix::mount::{MountFlags, mount};

use super::*;
use crate::config::MountChoice;
use crate::layer::mounts::Kind;
use crate::layer::mounts::kept::Descriptors;
use crate::layer::source::registry::registry_digest;
use crate::layer::testing::{Packing, Sample, noise};
use crate::metrics::defs::{FetchLabels, KindLabels};
use crate::metrics::defs::{MountLabels, SourceLabels};

/// A docker-registry of its own.
pub(super) struct Registry {
    process: Child,
    address: SocketAddr,
    _storage: tempfile::TempDir,
}

impl Registry {
    pub(super) fn start() -> Self {
        let storage = tempfile::tempdir().unwrap();
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .unwrap()
            .local_addr()
            .unwrap();
        let config = storage.path().join("config.yml");
        // JSON is YAML.
        let text = serde_json::json!({
            "version": 0.1,
            "log": {"level": "error", "accesslog": {"disabled": true}},
            "storage": {"filesystem": {"rootdirectory": storage.path().join("blobs")}},
            "http": {"addr": address.to_string()},
        });
        std::fs::write(&config, text.to_string()).unwrap();
        let mut command = Command::new("docker-registry");
        command
            .arg("serve")
            .arg(&config)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let process = command.spawn().expect("docker-registry is installed");
        let registry = Self {
            process,
            address,
            _storage: storage,
        };
        for _ in 0..1000 {
            if TcpStream::connect(address).is_ok() {
                return registry;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("docker-registry does not listen on {address}");
    }

    pub(super) fn image(&self) -> String {
        format!("{}/image:1", self.address)
    }

    /// Pushes layers and a manifest that names them; the manifest's digest.
    pub(super) async fn push(&self, layers: &[Sample]) -> Digest {
        let client = Client::new(ClientOptions::default()).unwrap();
        let image = Reference::parse(&self.image()).unwrap();
        let mut descriptors = Vec::new();
        for layer in layers {
            let digest = layer.origin().layer_digest;
            push_blob(&client, &image, &layer.blob).await;
            descriptors.push(serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": digest,
                "size": layer.blob.len(),
                "annotations": {TOC_DIGEST_ANNOTATION: layer.toc_digest},
            }));
        }
        let config = bytes::Bytes::from_static(b"{}");
        push_blob(&client, &image, &config).await;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({
            "schemaVersion": 2,
            "mediaType": kind,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": Digest::of(&config), "size": 2},
            "layers": descriptors,
        });
        let manifest = bytes::Bytes::from(serde_json::to_vec(&manifest).unwrap());
        let digest = Digest::of(&manifest);
        client
            .put_manifest(&image, &Version::Tag("1".to_owned()), manifest, kind)
            .await
            .unwrap();
        digest
    }
}

async fn push_blob(client: &Client, image: &Reference, blob: &bytes::Bytes) {
    let digest = registry_digest(&Digest::of(blob));
    client
        .push_blob(image, &digest, blob.len() as u64, Upload::Bytes(blob.clone()), None)
        .await
        .unwrap();
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub(super) fn config(root: &Path) -> Config {
    let mut config = Config {
        root: root.to_owned(),
        ..Config::default()
    };
    config.registry.stall_timeout = Duration::from_secs(5);
    config.fetch.read_deadline = Duration::from_secs(5);
    // What is not read stays away, where a test says nothing else.
    config.fetch.background = false;
    // What else is on this machine's disk is not these tests' concern.
    config.cache.min_free = crate::layer::cache::limits::Amount::NONE;
    config
}

pub(super) fn layers(root: &Path) -> (Layers, Metrics) {
    layers_mounted_by(root, MountChoice::Auto)
}

/// Without a descriptor store, natively is for complete layers.
pub(super) fn layers_mounted_by(root: &Path, mount: MountChoice) -> (Layers, Metrics) {
    let (mut config, metrics) = (config(root), Metrics::unregistered());
    config.layers.mount = mount;
    let layers = Layers::new(&config, metrics.clone(), Descriptors::default(), Handle::current());
    (layers.unwrap(), metrics)
}

/// Layers that are mounted, in whichever way.
fn mounted(metrics: &Metrics) -> i64 {
    mounted_by(metrics, Kind::Erofs) + mounted_by(metrics, Kind::Fuse)
}

fn mounted_by(metrics: &Metrics, kind: Kind) -> i64 {
    let labels = MountLabels { mount: kind.name() };
    metrics.layers_mounted.get_or_create_owned(&labels).get()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_complete_files_are_read_by_the_kernel_itself() {
    let sample = Sample::uniform(20, 50_000, Packing::default());
    let registry = Registry::start();
    let manifest = registry.push(std::slice::from_ref(&sample)).await;
    let dir = tempfile::tempdir().unwrap();
    let read_through_us = async |passthrough: bool| {
        let (mut config, metrics) = (config(dir.path()), Metrics::unregistered());
        (config.layers.mount, config.fuse.passthrough) = (MountChoice::Fuse, passthrough);
        let layers = Layers::new(&config, metrics.clone(), Descriptors::default(), Handle::current()).unwrap();
        let path = layers
            .mount(request(&registry, &sample, Some(manifest)))
            .await
            .unwrap()
            .path;
        assert!(blocking(move || contents(&path)).await == sample.files);
        let usage = layers.usage(&sample.toc_digest);
        layers.shutdown().await;
        let from = |source| metrics.read_bytes.get_or_create(&SourceLabels { source }).get();
        (from("cache") + from("registry"), usage)
    };
    let content: usize = sample.files.values().map(Vec::len).sum();
    let (read, usage) = read_through_us(false).await;
    assert!(read >= content as u64, "{read}");
    let (read, direct) = read_through_us(true).await;
    assert_eq!(read, 0);
    // The image, and nothing else.
    assert_eq!(direct.inodes, usage.inodes + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_layer_that_becomes_complete_is_mounted_natively_for_those_who_come_later() {
    let sample = Sample::uniform(20, 50_000, Packing::default());
    let registry = Registry::start();
    let manifest = registry.push(std::slice::from_ref(&sample)).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, metrics) = layers(dir.path());
    let request = request(&registry, &sample, Some(manifest));
    let path = layers.mount(request).await.unwrap().path;
    assert_eq!(mounted_by(&metrics, Kind::Fuse), 1);
    let early = {
        let path = path.clone();
        blocking(move || std::fs::File::open(path).unwrap()).await
    };
    let by_fuse = |file: &std::fs::File| rustix::fs::fstatfs(file).unwrap().f_type == 0x6573_5546;
    assert!(by_fuse(&early));
    let read = async || {
        let path = path.clone();
        blocking(move || contents(&path)).await
    };
    assert!(read().await == sample.files);
    let cached = layers.shared.store.load(&sample.toc_digest).unwrap().unwrap();
    assert!(cached.residency().is_complete());
    let natively = async || {
        while mounted_by(&metrics, Kind::Erofs) == 0 {
            layers.shared.checkpoint_all().await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), natively()).await.unwrap();
    assert_eq!(mounted_by(&metrics, Kind::Fuse), 0);
    // Who was there before goes on.
    let late = std::fs::File::open(&path).unwrap();
    assert!(by_fuse(&early) && !by_fuse(&late));
    assert!(read().await == sample.files);
    drop((early, late, cached));
    layers.release(&sample.toc_digest).await;
    assert_eq!(mounted(&metrics), 0);
    assert_eq!(
        std::fs::read_dir(&path).unwrap().count(),
        0,
        "something is mounted still"
    );
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_who_comes_for_a_layer_while_what_is_left_of_it_is_taken_down_has_it_mounted() {
    let sample = Sample::uniform(20, 50_000, Packing::default());
    let registry = Registry::start();
    let manifest = registry.push(std::slice::from_ref(&sample)).await;
    let dir = tempfile::tempdir().unwrap();
    let (first, _) = layers(dir.path());
    let request = request(&registry, &sample, Some(manifest));
    first.mount(request.clone()).await.unwrap();
    first.shutdown().await;
    for _ in 0..8 {
        let (layers, metrics) = layers(dir.path());
        let shared = &layers.shared;
        // It is taken down as somebody does who has found something of it that is kept.
        let slot = shared.slot(&sample.toc_digest);
        let ending = tokio::spawn(shared.clone().end_for_test(sample.toc_digest));
        while slot.mounted.try_lock().is_ok() && !ending.is_finished() {
            tokio::task::yield_now().await;
        }
        let path = layers.mount(request.clone()).await.unwrap().path;
        ending.await.unwrap();
        assert_eq!(mounted(&metrics), 1);
        assert!(is_mount_point(&path));
        assert!(blocking(move || contents(&path)).await == sample.files);
        layers.shutdown().await;
    }
}

pub(super) fn request(registry: &Registry, layer: &Sample, manifest: Option<Digest>) -> LayerRequest {
    LayerRequest {
        image: registry.image(),
        manifest_digest: manifest,
        layer_digest: layer.origin().layer_digest,
        toc_digest: Some(layer.toc_digest),
        siblings: Vec::new(),
    }
}

pub(super) fn toc_requests(metrics: &Metrics) -> u64 {
    metrics
        .fetch_requests
        .get_or_create(&FetchLabels {
            kind: "toc",
            result: "ok",
        })
        .get()
}

fn origin(registry: &Registry, layer: &Sample) -> LayerOrigin {
    LayerOrigin {
        toc_digest: layer.toc_digest,
        image: registry.image(),
        layer_digest: layer.origin().layer_digest,
    }
}

pub(super) fn is_mount_point(path: &Path) -> bool {
    std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap()
        .contains(&format!(" {} ", path.display()))
}

/// All regular files below `root`.
pub(super) fn contents(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type().unwrap())).unwrap();
            if kind.is_dir() {
                directories.push(path);
            } else if kind.is_file() {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
                files.insert(name, std::fs::read(&path).unwrap());
            }
        }
    }
    files
}

/// Names of all files below `root`.
pub(super) fn names(root: &Path) -> Vec<std::path::PathBuf> {
    let (mut found, mut directories) = (Vec::new(), vec![root.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let entry = entry.unwrap();
            // Asked for its size as `find -ls` does.
            let is_directory = entry.metadata().unwrap().is_dir();
            if is_directory {
                directories.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found
}

/// Touching a mount blocks, so it is done away from the threads that serve it.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    tokio::task::spawn_blocking(work).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_an_image_is_opened_with_one_request_per_layer_and_read_through_fuse() {
    let registry = Registry::start();
    let dir = tempfile::tempdir().unwrap();
    let samples = [
        Sample::uniform(
            60,
            30_000,
            Packing {
                prioritized: Some(4),
                ..Packing::default()
            },
        ),
        Sample::uniform(
            9,
            700_000,
            Packing {
                chunk: 100_000,
                ..Packing::default()
            },
        ),
        Sample::uniform(
            30,
            9_000,
            Packing {
                chunk: 5_000,
                per_member: 4,
                prioritized: None,
            },
        ),
    ];
    let manifest = registry.push(&samples).await;
    let (layers, metrics) = layers(dir.path());
    let mut paths = Vec::new();
    for sample in &samples {
        let mount = layers.mount(request(&registry, sample, Some(manifest))).await.unwrap();
        assert_eq!(
            mount.path,
            dir.path().join("layers").join(sample.toc_digest.hex()).join("mnt")
        );
        paths.push(mount.path);
    }
    assert_eq!(toc_requests(&metrics), 3);
    assert_eq!(mounted(&metrics), 3);
    for (sample, path) in samples.iter().zip(&paths) {
        let path = path.clone();
        let found = blocking(move || contents(&path)).await;
        assert!(found == sample.files);
        let usage = layers.usage(&sample.toc_digest);
        let content: usize = sample.files.values().map(Vec::len).sum();
        assert!(
            usage.bytes >= content as u64 && (6..=7).contains(&usage.inodes),
            "{usage:?}"
        );
    }
    assert_eq!(metrics.verify_failures.get(), 0);
    layers.release(&samples[0].toc_digest).await;
    layers.release(&samples[0].toc_digest).await;
    assert!(!is_mount_point(&paths[0]) && is_mount_point(&paths[1]));
    layers.shutdown().await;
    assert!(!is_mount_point(&paths[1]));
    assert_eq!(mounted(&metrics), 0);
    assert!(matches!(
        layers.mount(request(&registry, &samples[0], None)).await,
        Err(NotLazy::Refused { .. })
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_restart_needs_no_registry_and_clears_what_a_killed_predecessor_left() {
    let registry = Registry::start();
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::uniform(
        4,
        3_000_000,
        Packing {
            chunk: 500_000,
            ..Packing::default()
        },
    );
    let manifest = registry.push(std::slice::from_ref(&sample)).await;
    let (first, _) = layers(dir.path());
    let path = first
        .mount(request(&registry, &sample, Some(manifest)))
        .await
        .unwrap()
        .path;
    let read = |name: &str| {
        let path = path.join(name);
        blocking(move || std::fs::read(path))
    };
    assert!(read("zeros").await.unwrap() == sample.files["zeros"]);
    first.shutdown().await;
    let origin = origin(&registry, &sample);
    drop(registry);
    for _ in 0..2 {
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), None).unwrap();
    }
    let (second, metrics) = layers(dir.path());
    assert_eq!(second.restore(origin.clone()).await.unwrap().path, path);
    assert_eq!(second.restore(origin.clone()).await.unwrap().path, path);
    assert!(read("zeros").await.unwrap() == sample.files["zeros"]);
    assert_eq!(toc_requests(&metrics), 0);
    let missing = read("dir0/file0000").await.unwrap_err();
    assert_eq!(missing.raw_os_error(), Some(libc::EIO));
    let unknown = LayerOrigin {
        toc_digest: Digest::of(b"unknown"),
        ..origin
    };
    assert!(matches!(second.restore(unknown).await, Err(NotLazy::NotCached { .. })));
    second.shutdown().await;
    assert!(!is_mount_point(&path));
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_everything_that_a_tree_can_hold_comes_through_fuse() {
    let mut entries = Vec::new();
    let mut add = |name: &str, kind: EntryType, change: &dyn Fn(&mut TocEntry)| {
        let mut entry = TocEntry::new(name, kind);
        entry.mode = 0o755;
        entry.mod_time = "2020-02-29T12:34:56Z".to_owned();
        change(&mut entry);
        entries.push(entry);
    };
    add("etc/", EntryType::Dir, &|entry| {
        (entry.uid, entry.gid, entry.mode) = (7, 8, 0o1777)
    });
    add("etc/link", EntryType::Symlink, &|entry| {
        entry.link_name = "../bin/su".to_owned()
    });
    add("bin/hard", EntryType::Hardlink, &|entry| {
        entry.link_name = "bin/su".to_owned()
    });
    add("dev/sda", EntryType::Block, &|entry| {
        (entry.dev_major, entry.dev_minor) = (259, 300)
    });
    add("dev/fifo", EntryType::Fifo, &|_| {});
    add("etc/.wh.gone", EntryType::Reg, &|_| {});
    add("opaque/.wh..wh..opq", EntryType::Reg, &|_| {});
    add("caps/", EntryType::Dir, &|entry| {
        entry.xattrs = BTreeMap::from([
            ("user.note".to_owned(), encode_xattr(b"a\0b")),
            ("user.empty".to_owned(), encode_xattr(b"")),
        ]);
    });
    let files = vec![
        ("bin/su".to_owned(), noise(1, 10_000)),
        ("empty".to_owned(), Vec::new()),
    ];
    let many = (0..3_000).map(|n| (format!("many/{n:04}-{}", "x".repeat(100)), vec![b'x']));
    let sample = Sample::with_entries(files.into_iter().chain(many).collect(), Packing::default(), entries);
    let registry = Registry::start();
    registry.push(std::slice::from_ref(&sample)).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, metrics) = layers_mounted_by(dir.path(), MountChoice::Fuse);
    // Without the manifest's digest, so also without the blob's size.
    let root = layers.mount(request(&registry, &sample, None)).await.unwrap().path;
    assert_eq!(toc_requests(&metrics), 1);
    blocking(move || assert_tree(&root, &sample)).await;
    layers.shutdown().await;
}

fn assert_tree(root: &Path, sample: &Sample) {
    let stat = |name: &str| root.join(name).symlink_metadata().unwrap();
    let etc = stat("etc");
    assert_eq!(
        (etc.mode(), etc.uid(), etc.gid(), etc.mtime()),
        (libc::S_IFDIR | 0o1777, 7, 8, 1_582_979_696)
    );
    assert_eq!(root.join("etc/link").read_link().unwrap(), Path::new("../bin/su"));
    assert_eq!(
        (stat("bin/su").nlink(), stat("bin/su").ino()),
        (2, stat("bin/hard").ino())
    );
    assert_eq!(stat("bin/su").blocks(), 10_000u64.div_ceil(512));
    assert_eq!(
        (stat("dev/sda").mode() & libc::S_IFMT, stat("dev/sda").rdev()),
        (libc::S_IFBLK, libc::makedev(259, 300))
    );
    assert_eq!(stat("dev/fifo").mode() & libc::S_IFMT, libc::S_IFIFO);
    assert_eq!(
        (stat("etc/gone").mode() & libc::S_IFMT, stat("etc/gone").rdev()),
        (libc::S_IFCHR, 0)
    );
    assert!(!root.join("etc/.wh.gone").exists() && !root.join("nothing/there").exists());
    let xattr = |name: &str, attribute: &str| {
        let mut value = [0; 100];
        let length = rustix::fs::getxattr(root.join(name), attribute, &mut value[..]);
        length.map(|length| value[..length].to_vec())
    };
    assert_eq!(xattr("opaque", "trusted.overlay.opaque").unwrap(), b"y");
    assert_eq!(xattr("caps", "user.note").unwrap(), b"a\0b");
    assert_eq!(xattr("caps", "user.empty").unwrap(), b"");
    assert_eq!(xattr("caps", "user.none").unwrap_err(), rustix::io::Errno::NODATA);
    let mut names = [0; 100];
    let length = rustix::fs::listxattr(root.join("caps"), &mut names[..]).unwrap();
    assert_eq!(&names[..length], b"user.empty\0user.note\0");
    assert!(
        contents(root)
            .iter()
            .filter(|(name, _)| name.as_str() != "bin/hard")
            .eq(&sample.files)
    );
    let many: Vec<_> = std::fs::read_dir(root.join("many"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert!(many.len() == 3_000 && many.is_sorted());
    let statistics = rustix::fs::statvfs(root).unwrap();
    assert!(statistics.f_files >= 3_010 && statistics.f_blocks >= 3_003 && statistics.f_bavail == 0);
    let refused = std::fs::write(root.join("new"), b"").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    let file = std::fs::File::open(root.join("bin/su")).unwrap();
    let mut buffer = [0; 100];
    assert_eq!(file.read_at(&mut buffer, 9_950).unwrap(), 50);
    assert_eq!(file.read_at(&mut buffer, 20_000).unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_what_is_not_to_be_served_is_refused_with_its_reason_and_leaves_nothing() {
    let registry = Registry::start();
    let dir = tempfile::tempdir().unwrap();
    let sample = Sample::uniform(3, 1_000, Packing::default());
    let plain = Sample {
        blob: noise(5, 300_000).into(),
        ..Sample::uniform(3, 1_000, Packing::default())
    };
    let manifest = registry.push(&[sample, plain]).await;
    let sample = Sample::uniform(3, 1_000, Packing::default());
    let plain = Sample {
        blob: noise(5, 300_000).into(),
        ..Sample::uniform(3, 1_000, Packing::default())
    };
    let (layers, metrics) = layers(dir.path());
    let good = request(&registry, &sample, Some(manifest));
    let reason = async |request: LayerRequest| layers.mount(request).await.unwrap_err().reason();
    assert_eq!(
        reason(LayerRequest {
            toc_digest: None,
            manifest_digest: None,
            ..good.clone()
        })
        .await,
        "no_toc_digest"
    );
    assert_eq!(toc_requests(&metrics), 0);
    assert_eq!(
        reason(LayerRequest {
            toc_digest: Some(Digest::of(b"x")),
            manifest_digest: None,
            ..good.clone()
        })
        .await,
        "toc_mismatch"
    );
    let unmarked = LayerRequest {
        toc_digest: Some(Digest::of(b"y")),
        manifest_digest: None,
        ..request(&registry, &plain, None)
    };
    assert_eq!(reason(unmarked).await, "not_estargz");
    let absent = LayerRequest {
        layer_digest: Digest::of(b"x"),
        manifest_digest: None,
        ..good.clone()
    };
    assert_eq!(reason(absent).await, "registry");
    assert_eq!(
        reason(LayerRequest {
            image: "NO/reference".to_owned(),
            ..good.clone()
        })
        .await,
        "registry"
    );
    assert_eq!(std::fs::read_dir(dir.path().join("layers")).unwrap().count(), 0);
    // Many at once are one mount and one request.
    let mounts = (0..8).map(|_| layers.mount(good.clone()));
    let mounts: Vec<_> = futures_util::future::join_all(mounts).await;
    let paths: Vec<_> = mounts.into_iter().map(|mount| mount.unwrap().path).collect();
    assert!(paths.iter().all(|path| *path == paths[0]));
    assert_eq!(mounted(&metrics), 1);
    layers.shutdown().await;
}

#[test]
fn every_key_of_the_registry_section_reaches_the_client() {
    let registry = RegistryConfig {
        hosts_directory: Some(PathBuf::from("/certs.d")),
        plain_http: vec!["registry.local:5000".to_owned()],
        ca_file: Some(PathBuf::from("/ca.pem")),
        credentials_file: Some(PathBuf::from("/logins.toml")),
        docker_config: Some(PathBuf::from("/config.json")),
        credential_provider_config: Some(PathBuf::from("/providers.yaml")),
        credential_provider_bin_dir: Some(PathBuf::from("/bin")),
        connect_timeout: Duration::from_secs(3),
        stall_timeout: Duration::from_secs(4),
    };
    let ClientOptions {
        plain_http,
        hosts_directory,
        credentials,
        ca_file,
        connect_timeout,
        idle_timeout,
        retry,
    } = client_options(
        &Config {
            registry: registry.clone(),
            ..Config::default()
        },
        HandedOver::default(),
    );
    assert_eq!((plain_http, ca_file), (registry.plain_http, registry.ca_file));
    assert_eq!(hosts_directory, registry.hosts_directory);
    assert_eq!(
        format!("{credentials:?}"),
        r#"["/logins.toml", "/config.json", "the credential providers of /providers.yaml"]"#
    );
    assert_eq!(
        (connect_timeout, idle_timeout),
        (registry.connect_timeout, registry.stall_timeout)
    );
    assert_eq!(retry.attempts, REGISTRY_ATTEMPTS);
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_the_second_of_two_images_fetches_only_what_is_new() {
    let registry = Registry::start();
    let dir = tempfile::tempdir().unwrap();
    let images = [90, 100].map(|count| Sample::uniform(count, 60_000, Packing::default()));
    let manifest = registry.push(&images).await;
    let (layers, metrics) = layers(dir.path());
    let mut fetched = Vec::new();
    for image in &images {
        let path = layers
            .mount(request(&registry, image, Some(manifest)))
            .await
            .unwrap()
            .path;
        let found = blocking(move || contents(&path)).await;
        assert!(found == image.files);
        let of = |kind| metrics.fetch_bytes.get_or_create(&KindLabels { kind }).get();
        fetched.push(["demand", "prefetch", "warm", "background"].map(of).iter().sum::<u64>());
    }
    let (first, second) = (fetched[0], fetched[1] - fetched[0]);
    assert!(first >= 90 * 60_000, "{first}");
    let ratio = second as f64 / images[1].blob.len() as f64;
    assert!(ratio <= 0.12, "{second} of {} bytes", images[1].blob.len());
    assert!(metrics.cache_reused_bytes.get() >= 90 * 60_000);
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_full_disk_is_an_error_for_the_reader_and_passes() {
    let registry = Registry::start();
    let disk = SmallDisk::new(c"size=2m");
    let sample = Sample::uniform(
        4,
        900_000,
        Packing {
            chunk: 300_000,
            ..Packing::default()
        },
    );
    let manifest = registry.push(std::slice::from_ref(&sample)).await;
    // Room for the table of contents and not for one chunk.
    let ballast = disk.path().join("ballast");
    std::fs::write(&ballast, vec![1; (2 << 20) - (200 << 10)]).unwrap();
    let (layers, metrics) = layers(disk.path());
    let path = layers
        .mount(request(&registry, &sample, Some(manifest)))
        .await
        .unwrap()
        .path;
    let file = path.join("dir0/file0000");
    let error = blocking(move || std::fs::read(file).unwrap_err().raw_os_error()).await;
    assert_eq!(error, Some(libc::ENOSPC));
    assert!(metrics.cache_write_errors.get() > 0);
    // There is room for half of it: the rest comes and goes.
    std::fs::remove_file(ballast).unwrap();
    let found = blocking(move || contents(&path)).await;
    assert!(found == sample.files);
    layers.shutdown().await;
}

/// A tmpfs on a directory of its own, gone at the end however the test ends.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(size: &CStr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        mount("tmpfs", directory.path(), "tmpfs", MountFlags::empty(), Some(size)).unwrap();
        Self(directory)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Detached, because after a failure the layer's mount and files in it may still be there.
        let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
    }
}
