//! A containerd of our own: root, state, socket, runc directory, CNI configuration and plugin directories all below the
//! run. The host's containerd, if there is one, is not touched.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cri::Cri;
use crate::network::Network;
use crate::process::Process;
use crate::release::Release;
use crate::run::RunDir;

mod config;

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
    /// Which containerd.
    pub release: Release,
}

/// A running containerd.
pub struct Containerd {
    process: Process,
    directory: PathBuf,
    snapshotter: String,
    release: Release,
}

impl Containerd {
    /// Starts containerd and waits until CRI is ready, network included.
    pub async fn start(run: &RunDir, network: &Network, options: &ContainerdOptions) -> Result<Self> {
        let directory = run.directory(&options.name)?;
        let config = directory.join("config.toml");
        fs::write(&config, config::text(run, network, &directory, options)?)
            .with_context(|| format!("cannot write {}", config.display()))?;
        let mut containerd = Self {
            process: spawn(run, &directory, options.release)?,
            directory,
            snapshotter: options.snapshotter.name().into(),
            release: options.release,
        };
        containerd.wait_ready().await?;
        Ok(containerd)
    }

    /// Stops it and starts it again on the same directories.
    pub async fn restart(&mut self, run: &RunDir) -> Result<()> {
        self.process.stop()?;
        self.start_again(run).await
    }

    /// Starts it again, after it was stopped or killed, on the same directories.
    pub async fn start_again(&mut self, run: &RunDir) -> Result<()> {
        self.process = spawn(run, &self.directory, self.release)?;
        self.wait_ready().await
    }

    /// Restarts it with every occurrence of a text in its configuration replaced.
    pub async fn restart_with(&mut self, run: &RunDir, from: &str, to: &str) -> Result<()> {
        self.process.stop()?;
        let path = self.directory.join("config.toml");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(text.contains(from), "{from:?} is not in {}", path.display());
        fs::write(&path, text.replace(from, to)).with_context(|| format!("cannot write {}", path.display()))?;
        self.start_again(run).await
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

    /// Which containerd it is.
    #[must_use]
    pub fn release(&self) -> Release {
        self.release
    }

    /// Everything of it: configuration, root, state, socket.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
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

/// Starts the program on the configuration file in `directory`.
fn spawn(run: &RunDir, directory: &Path, release: Release) -> Result<Process> {
    let name = directory.file_name().context("a containerd without a directory")?;
    let (program, path) = release.program()?;
    let mut command = Command::new(program);
    command
        .arg("--config")
        .arg(directory.join("config.toml"))
        .env("PATH", path);
    // Without it containerd asks systemd, which may not be there, for nothing.
    command.env_remove("NOTIFY_SOCKET");
    run.spawn(&name.to_string_lossy(), command)
}
