//! Images for the tests, made from nothing, and the programs that the tests run.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use estargz::digest::Digest;
use serde_json::{Value, json};

pub const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
pub const TAR: &str = "application/vnd.oci.image.layer.v1.tar";
pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
pub const TOC: &str = "containerd.io/snapshot/stargz/toc.digest";

/// An OCI layout under construction.
pub struct Layout {
    pub dir: PathBuf,
    entries: Vec<Value>,
}

/// A layer blob with what documents say of it.
#[derive(Clone)]
pub struct LayerBlob {
    pub descriptor: Value,
    pub diff_id: String,
}

impl Layout {
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self {
            dir: dir.to_owned(),
            entries: Vec::new(),
        }
    }

    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    pub fn layer(&self, media_type: &str, tar: &[u8]) -> LayerBlob {
        let bytes = match media_type {
            ZSTD => zstd::encode_all(tar, 3).unwrap(),
            TAR => tar.to_vec(),
            _ => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
                gzip.write_all(tar).unwrap();
                gzip.finish().unwrap()
            }
        };
        let mut descriptor = self.blob(media_type, &bytes);
        descriptor["annotations"] = json!({"kept": "yes"});
        LayerBlob {
            descriptor,
            diff_id: Digest::of(tar).to_string(),
        }
    }

    /// Writes config and manifest of an image and returns the manifest's descriptor.
    pub fn image(&self, docker: bool, architecture: &str, layers: &[LayerBlob]) -> Value {
        let diff_ids: Vec<_> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let diff_ids = serde_json::to_string(&diff_ids).unwrap();
        // Odd on purpose: members nobody knows, numbers with a spelling, empty layers in the history.
        let config = format!(
            r#"{{"os":"linux","zz":{{"b":1.50,"a":[1e3]}},"architecture":"{architecture}","rootfs":{{"type":"layers","diff_ids":{diff_ids},"extra":1}},"config":{{"Env":["A=\u00e9"]}},"history":[{{"created_by":"x"}},{{"created_by":"y","empty_layer":true}}]}}"#
        );
        let (manifest_type, config_type) = if docker {
            (DOCKER_MANIFEST, DOCKER_CONFIG)
        } else {
            (MANIFEST, CONFIG)
        };
        let descriptors: Vec<_> = layers.iter().map(|layer| &layer.descriptor).collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": manifest_type, "unknown": {"x": [1, 2]},
            "config": self.blob(config_type, config.as_bytes()), "layers": descriptors,
            "annotations": {"of.the": "manifest"},
        });
        self.blob(manifest_type, manifest.to_string().as_bytes())
    }

    pub fn tag(&mut self, name: &str, mut descriptor: Value) {
        descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        self.entries.push(descriptor);
        let index = json!({"schemaVersion": 2, "manifests": self.entries});
        fs::write(self.dir.join("index.json"), index.to_string()).unwrap();
    }
}

/// A tar stream of files.
pub fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1_600_000_000);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    tar.into_inner().unwrap()
}

/// Bytes that do not compress.
pub fn noise(size: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..size.div_ceil(8)).flat_map(|_| next()).take(size).collect()
}

/// A layout with one image of every kind: index, two platforms, shared layers, all compressions, an attestation.
/// With `docker` the index and one platform are in Docker's form, which skopeo does not take from a layout.
pub fn multi_platform(dir: &Path, docker: bool) -> Layout {
    let list = if docker { DOCKER_LIST } else { INDEX };
    let docker_layer = if docker { DOCKER_LAYER } else { GZIP };
    let mut layout = Layout::new(dir);
    let shared = layout.layer(GZIP, &tar(&[("bin/tool", &noise(200_000, 1)), ("etc/conf", b"conf")]));
    let zstd = layout.layer(ZSTD, &tar(&[("lib/z", &noise(50_000, 2))]));
    let plain = layout.layer(TAR, &tar(&[("lib/plain", b"plain")]));
    let arm = layout.layer(docker_layer, &tar(&[("lib/arm", &noise(70_000, 3))]));
    let mut docker_shared = shared.clone();
    docker_shared.descriptor["mediaType"] = json!(docker_layer);
    let mut amd64 = layout.image(false, "amd64", &[shared, zstd, plain]);
    let mut arm64 = layout.image(docker, "arm64", &[docker_shared, arm]);
    let statement = layout.blob("application/vnd.in-toto+json", b"{\"statement\":1}");
    let config = layout.blob(
        CONFIG,
        br#"{"architecture":"unknown","os":"unknown","rootfs":{"type":"layers","diff_ids":[]}}"#,
    );
    let attestation = json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [statement]});
    let mut attestation = layout.blob(MANIFEST, attestation.to_string().as_bytes());
    attestation["platform"] = json!({"os": "unknown", "architecture": "unknown"});
    attestation["annotations"] = json!({
        "vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": amd64["digest"],
    });
    amd64["platform"] = json!({"os": "linux", "architecture": "amd64"});
    amd64["annotations"] = json!({"of.the": "entry"});
    arm64["platform"] = json!({"os": "linux", "architecture": "arm64", "variant": "v8"});
    let index = json!({"schemaVersion": 2, "mediaType": list, "manifests": [attestation, amd64, arm64]});
    let index = layout.blob(list, index.to_string().as_bytes());
    layout.tag("multi", index);
    layout
}

/// The command with an environment that holds no one's credentials.
pub fn estargz(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_estargz"));
    command.args(arguments).env("HOME", "/nonexistent").stdin(Stdio::null());
    for name in [
        "DOCKER_CONFIG",
        "DOCKER_AUTH_CONFIG",
        "REGISTRY_AUTH_FILE",
        "XDG_RUNTIME_DIR",
        "RUST_LOG",
    ] {
        command.env_remove(name);
    }
    command
}

pub fn run(arguments: &[&str]) -> Output {
    estargz(arguments).output().unwrap()
}

/// Runs the command, which must succeed, and returns what it printed.
pub fn good(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// Runs the command, which must fail with `code` and one line that says all of `wanted`.
pub fn bad(arguments: &[&str], code: i32, wanted: &[&str]) {
    let output = run(arguments);
    let line = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{arguments:?}: {line}");
    assert_eq!(line.lines().count(), 1, "{arguments:?}: {line}");
    for text in wanted {
        assert!(line.contains(text), "{arguments:?}: {text:?} is not in {line}");
    }
}

/// stdout of another tool.
pub fn tool(program: &str, arguments: &[&str]) -> Vec<u8> {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    output.stdout
}

/// A blob of a layout as JSON.
pub fn read_json(dir: &Path, digest: &str) -> Value {
    serde_json::from_slice(&read_blob(dir, digest)).unwrap()
}

pub fn read_blob(dir: &Path, digest: &str) -> Vec<u8> {
    let bytes = fs::read(dir.join("blobs").join(digest.replace(':', "/"))).unwrap();
    assert_eq!(Digest::of(&bytes).to_string(), digest);
    bytes
}

/// Every file below `dir` with its content, hidden ones too.
pub fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(tree(&path));
            files.insert(path, Vec::new());
        } else {
            files.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    files
}

/// Debian's docker-registry on a free port, with user `hull` and password `pw` if asked.
pub struct Registry {
    pub host: String,
    child: Child,
    _dir: tempfile::TempDir,
}

impl Registry {
    pub fn start(with_login: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let root = dir.path().display();
        let auth = if with_login {
            let line = "hull:$2b$05$aaaaaaaaaaaaaaaaaaaaaOscpG3LiIv8VbJ.Xo.NYfhRB9T5lwoHC\n";
            fs::write(dir.path().join("htpasswd"), line).unwrap();
            format!("auth: {{htpasswd: {{realm: test, path: {root}/htpasswd}}}}\n")
        } else {
            String::new()
        };
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\n{auth}storage: {{filesystem: {{rootdirectory: {root}/data}}}}\nhttp: {{addr: \"{address}\"}}\n"
        );
        let path = dir.path().join("config.yml");
        fs::write(&path, config).unwrap();
        let mut command = Command::new("docker-registry");
        let child = command
            .arg("serve")
            .arg(&path)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(address).is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Self {
            host: address.to_string(),
            child,
            _dir: dir,
        }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
