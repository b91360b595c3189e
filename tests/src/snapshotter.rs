//! Our own snapshotter daemon, started as an operator would: the binary with a configuration file.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::containerd::SnapshotterChoice;
use crate::daemon::Daemon;
use crate::metrics::Metrics;
use crate::programs;
use crate::run::RunDir;
use crate::way::Way;

/// Name of the binary, and of the proxy plugin (without the prefix).
pub const PROGRAM: &str = "hullspeed-snapshotter";

/// Name of the snapshotter in containerd's configuration.
pub const PLUGIN: &str = "hullspeed";

/// Variable that names a point at which a test build is killed, or a file with its name.
const FAULT_VARIABLE: &str = "HULLSPEED_FAULT_POINT";

const START_LIMIT: Duration = Duration::from_secs(20);
/// How many lines of its log an error shows.
const LOG_LINES: usize = 60;

const POLL: Duration = Duration::from_millis(10);

/// A running daemon.
pub struct Snapshotter {
    process: Daemon,
    directory: PathBuf,
    metrics: Metrics,
    way: Way,
}

impl Snapshotter {
    /// Starts a daemon on `<run>/<name>` that mounts on the way of this run; `extra` is appended to its configuration,
    /// whose last section is `[log]`.
    pub async fn start(run: &RunDir, name: &str, extra: &str) -> Result<Self> {
        let way = Way::of_this_run()?;
        Self::start_with(run, name, extra, way, way.needs_keeper()).await
    }

    /// As [`Self::start`], under a keeper on either way: mounts go on where the daemon is killed.
    pub async fn start_kept(run: &RunDir, name: &str, extra: &str) -> Result<Self> {
        Self::start_with(run, name, extra, Way::of_this_run()?, true).await
    }

    /// As [`Self::start`], on a way that the caller names, with or without a keeper.
    pub async fn start_with(run: &RunDir, name: &str, extra: &str, way: Way, kept: bool) -> Result<Self> {
        let directory = run.directory(name)?;
        let metrics = Metrics::reserve()?;
        let config = directory.join("snapshotter.toml");
        let text = way.configure(&(config_text(&directory, metrics.address()) + extra))?;
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let command = command(&config)?;
        let process = if kept {
            Daemon::start_kept(run, name, &command)?
        } else {
            Daemon::start(run, name, command)?
        };
        let mut snapshotter = Self {
            process,
            directory,
            metrics,
            way,
        };
        snapshotter.wait_ready()?;
        Ok(snapshotter)
    }

    /// Starts it again, after it was stopped or killed, on the same directory.
    pub async fn start_again(&mut self, run: &RunDir) -> Result<()> {
        let name = self
            .directory
            .file_name()
            .context("a snapshotter without a directory")?
            .to_string_lossy()
            .into_owned();
        let command = command(&self.config())?;
        self.process.start_again(run, &name, command)?;
        self.wait_ready()
    }

    /// Waits until it answers.
    pub fn wait_ready(&mut self) -> Result<()> {
        let end = Instant::now() + START_LIMIT;
        // A socket file may be left by a killed daemon; only a connection tells.
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            self.process.check_running()?;
            if Instant::now() > end {
                bail!(
                    "{PROGRAM} is not ready after {START_LIMIT:?}; its log ends:\n{}",
                    self.process.log_tail()
                );
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// The configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.directory.join("snapshotter.toml")
    }

    /// Has the daemon killed where it passes a point next: `name`, or `name:3` for the third time. The next daemon lives.
    pub fn arm(&self, point: &str) -> Result<()> {
        let file = fault_file(&self.config());
        // Renamed, so that nobody reads half a name.
        let temporary = file.with_extension("new");
        fs::write(&temporary, point)
            .and_then(|()| fs::rename(&temporary, &file))
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// Whether what [`Self::arm`] was told has still to happen.
    #[must_use]
    pub fn is_armed(&self) -> bool {
        fault_file(&self.config()).exists()
    }

    /// The socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("snapshotter.sock")
    }

    /// How it mounts layers.
    #[must_use]
    pub fn way(&self) -> Way {
        self.way
    }

    /// Fails if a lazy layer is mounted otherwise than this daemon should.
    pub fn check_way(&mut self) -> Result<()> {
        let wanted = self.way.file_system();
        for (target, kind) in crate::sweep::mounts_of_kind(&self.root().join("layers"))? {
            ensure!(
                kind == wanted,
                "{} is mounted by {kind} and not by {wanted}; log:\n{}",
                target.display(),
                self.process.log_tail()
            );
        }
        Ok(())
    }

    /// Everything that it keeps.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.directory.join("root")
    }

    /// A layer's cache directory, by TOC digest (`sha256:…`).
    #[must_use]
    pub fn layer(&self, toc_digest: &str) -> PathBuf {
        self.root()
            .join("layers")
            .join(toc_digest.strip_prefix("sha256:").unwrap_or(toc_digest))
    }

    /// As containerd's configuration names it.
    #[must_use]
    pub fn choice(&self) -> SnapshotterChoice {
        SnapshotterChoice::Proxy {
            name: PLUGIN.into(),
            address: self.socket(),
            root: self.root(),
        }
    }

    /// The text of `/metrics`.
    pub async fn metrics(&self) -> Result<String> {
        self.metrics.text().await
    }

    /// See [`Metrics::sum`].
    pub async fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        self.metrics.sum(name, labels).await
    }

    /// The records of its log so far; lines that are not JSON are left out.
    pub fn log_records(&self) -> Result<Vec<serde_json::Value>> {
        let text = self.process.log_text()?;
        Ok(text
            .lines()
            .filter_map(|line| serde_json::from_str(line).ok())
            .collect())
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_end(&self) -> String {
        let text = self.process.log_text().unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }

    /// The process, for its log and for signals.
    pub fn process(&mut self) -> &mut Daemon {
        &mut self.process
    }
}

/// The command that starts the daemon on a configuration file.
pub fn command(config: &Path) -> Result<Command> {
    let mut command = Command::new(programs::find(PROGRAM)?);
    command
        .arg("--config")
        .arg(config)
        .env(FAULT_VARIABLE, fault_file(config))
        .env_remove("NOTIFY_SOCKET")
        .env_remove("RUST_LOG");
    Ok(command)
}

/// Where the daemon with this configuration finds the point at which it is to be killed.
fn fault_file(config: &Path) -> PathBuf {
    config.with_extension("fault")
}

fn config_text(directory: &Path, metrics: SocketAddr) -> String {
    let at = |name: &str| serde_json::Value::from(directory.join(name).to_string_lossy()).to_string();
    format!(
        "root = {}\nsocket = {}\n\n[metrics]\naddress = \"{metrics}\"\n\n[log]\nformat = \"json\"\n",
        at("root"),
        at("snapshotter.sock"),
    )
}
