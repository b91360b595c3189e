//! A containerd of our own: root, state, socket, runc directory, CNI configuration and plugin directories all below the
//! run. The host's containerd, if there is one, is not touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::cri::Cri;
use crate::network::{CNI_PLUGINS, Network};
use crate::process::Process;
use crate::run::RunDir;

const START_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// Which snapshotter CRI uses.
#[derive(Debug, Clone)]
pub enum SnapshotterChoice {
    /// containerd's own.
    Overlayfs,
    /// A proxy plugin.
    Proxy {
        /// The plugin's name.
        name: String,
        /// Its socket.
        address: PathBuf,
        /// Its root directory, for image statistics.
        root: PathBuf,
    },
}

impl SnapshotterChoice {
    /// The snapshotter's name.
    #[must_use]
    pub fn name(&self) -> &str {
        match self {
            Self::Overlayfs => "overlayfs",
            Self::Proxy { name, .. } => name,
        }
    }
}

/// What to start.
#[derive(Debug, Clone)]
pub struct ContainerdOptions {
    /// Directory name below the run.
    pub name: String,
    /// CRI's snapshotter.
    pub snapshotter: SnapshotterChoice,
    /// CRI's `sandbox_image`.
    pub pause_image: String,
}

/// A running containerd.
pub struct Containerd {
    process: Process,
    directory: PathBuf,
    snapshotter: String,
}

impl Containerd {
    /// Starts containerd and waits until CRI is ready, network included.
    pub async fn start(run: &RunDir, network: &Network, options: &ContainerdOptions) -> Result<Self> {
        let directory = run.directory(&options.name)?;
        let config = directory.join("config.toml");
        fs::write(&config, config_text(run, network, &directory, options)?)
            .with_context(|| format!("cannot write {}", config.display()))?;
        let mut command = Command::new("containerd");
        // Without it containerd asks systemd, which may not be there, for nothing.
        command.arg("--config").arg(&config).env_remove("NOTIFY_SOCKET");
        let process = run.spawn(&options.name, command)?;
        let mut containerd = Self {
            process,
            directory,
            snapshotter: options.snapshotter.name().into(),
        };
        containerd.wait_ready().await?;
        Ok(containerd)
    }

    /// Stops it and starts it again on the same directories.
    pub async fn restart(&mut self, run: &RunDir) -> Result<()> {
        self.process.stop()?;
        let name = self
            .directory
            .file_name()
            .context("a containerd without a directory")?
            .to_string_lossy()
            .into_owned();
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(self.directory.join("config.toml"))
            .env_remove("NOTIFY_SOCKET");
        self.process = run.spawn(&name, command)?;
        self.wait_ready().await
    }

    async fn wait_ready(&mut self) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        loop {
            let not_ready = match self.cri().await {
                Ok(mut cri) => match cri.not_ready().await {
                    Ok(None) => return Ok(()),
                    Ok(Some(reason)) => reason,
                    Err(error) => format!("{error:#}"),
                },
                Err(error) => format!("{error:#}"),
            };
            self.process.check_running()?;
            if Instant::now() > end {
                bail!(
                    "containerd is not ready after {START_LIMIT:?}: {not_ready}; its log ends:\n{}",
                    self.process.log_tail()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// A new CRI connection.
    pub async fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket()).await
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("containerd.sock")
    }

    /// Its persistent directory.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// Name of CRI's snapshotter.
    #[must_use]
    pub fn snapshotter(&self) -> &str {
        &self.snapshotter
    }

    /// Whether the content store holds this blob (`sha256:…`).
    #[must_use]
    pub fn has_blob(&self, digest: &str) -> bool {
        let name = digest.strip_prefix("sha256:").unwrap_or(digest);
        self.root()
            .join("io.containerd.content.v1.content/blobs/sha256")
            .join(name)
            .exists()
    }

    /// The mounted root file system of a started CRI container.
    #[must_use]
    pub fn rootfs(&self, container_id: &str) -> PathBuf {
        self.directory
            .join("state/io.containerd.runtime.v2.task/k8s.io")
            .join(container_id)
            .join("rootfs")
    }

    /// The process, for its log and for signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Stops the daemon; shims go on, as in production, until the run is swept.
    pub fn stop(&mut self) -> Result<()> {
        self.process.stop().map(|_| ())
    }
}

/// A TOML basic string: the escapes of JSON are a subset of TOML's.
fn quoted(value: impl AsRef<Path>) -> String {
    serde_json::Value::from(value.as_ref().to_string_lossy()).to_string()
}

fn config_text(run: &RunDir, network: &Network, directory: &Path, options: &ContainerdOptions) -> Result<String> {
    let at = |name: &str| quoted(directory.join(name));
    let certificates = run.directory("certs.d")?;
    let proxy = match &options.snapshotter {
        SnapshotterChoice::Overlayfs => String::new(),
        SnapshotterChoice::Proxy { name, address, root } => format!(
            "\n[proxy_plugins.{name}]\n  type = \"snapshot\"\n  address = {}\n  [proxy_plugins.{name}.exports]\n    root = {}\n",
            quoted(address),
            quoted(root),
        ),
    };
    Ok(format!(
        r#"version = 2
root = {root}
state = {state}
disabled_plugins = ["io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.tracing.processor.v1.otlp",
  "io.containerd.internal.v1.tracing"]

[grpc]
  address = {socket}

[ttrpc]
  address = {ttrpc}

[plugins."io.containerd.internal.v1.opt"]
  path = {opt}

[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  # The development machines lack CAP_SYS_RESOURCE, so no process may lower its OOM score.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  disable_tcp_service = true

  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = {plugins}
    conf_dir = {conf_dir}

  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = {certificates}

  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "{snapshotter}"
    disable_snapshot_annotations = false
    default_runtime_name = "runc"

    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"

      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        Root = {runc}
{proxy}"#,
        root = at("root"),
        state = at("state"),
        socket = at("containerd.sock"),
        ttrpc = at("containerd.sock.ttrpc"),
        opt = at("opt"),
        runc = at("runc"),
        pause = options.pause_image,
        plugins = quoted(CNI_PLUGINS),
        conf_dir = quoted(network.conf_dir()),
        certificates = quoted(certificates),
        snapshotter = options.snapshotter.name(),
    ))
}
