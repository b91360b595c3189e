//! Our CRI relay with its pool of hulls, started as an operator would: the binary with a configuration file.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};

use crate::cri::Cri;
use crate::metrics::Metrics;
use crate::process::{self, Process};
use crate::programs;
use crate::run::RunDir;

/// Name of the binary.
pub const PROGRAM: &str = "hullspeed-prewarm";

/// Names the step of an adoption at which a debug build kills itself.
pub const FAULT_VARIABLE: &str = "HULLSPEED_FAULT_POINT";

const START_LIMIT: Duration = Duration::from_secs(20);

/// A pool may wait some seconds for a pod's start to end before it refills.
const FILL_LIMIT: Duration = Duration::from_secs(60);

const POLL: Duration = Duration::from_millis(10);

/// Tests do not wait for quiet.
const AT_ONCE: &str = "refill_quiet = \"0s\"\nrefill_interval = \"0s\"\n";

/// What to start.
#[derive(Debug, Clone)]
pub struct PrewarmOptions {
    /// Directory name below the run.
    pub name: String,
    /// containerd's socket.
    pub containerd: PathBuf,
    /// Hulls to keep ready, no more and no fewer; 0 turns the pool off. Without it the pool has its default bounds.
    pub hulls: Option<u32>,
    /// Whether the pool is refilled as it is by default, when starts are over, and not at once.
    pub as_shipped: bool,
    /// How much it says.
    pub log_level: &'static str,
    /// Appended to the configuration file, whose last section is `[pool]`.
    pub extra: String,
}

impl PrewarmOptions {
    /// A relay for this containerd.
    #[must_use]
    pub fn new(containerd: PathBuf, hulls: Option<u32>) -> Self {
        Self {
            name: "prewarm".into(),
            containerd,
            hulls,
            as_shipped: false,
            log_level: "info",
            extra: String::new(),
        }
    }
}

/// A running relay.
pub struct Prewarm {
    process: Process,
    directory: PathBuf,
    metrics: Metrics,
}

impl Prewarm {
    /// Starts it and waits until it takes connections; hulls may not be there yet.
    pub fn start(run: &RunDir, options: &PrewarmOptions) -> Result<Self> {
        let directory = run.directory(&options.name)?;
        let metrics = Metrics::reserve()?;
        let config = directory.join("prewarm.toml");
        let text = config_text(run, &directory, metrics.address(), options);
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        let mut prewarm = Self {
            process: run.spawn(&options.name, command(&config, None)?)?,
            directory,
            metrics,
        };
        prewarm.wait_ready()?;
        Ok(prewarm)
    }

    /// Starts it again, after it was stopped or killed, on the same directories; maybe to be killed at a step.
    pub fn start_again(&mut self, run: &RunDir, fault: Option<&str>) -> Result<()> {
        let name = self.directory.file_name().context("a relay without a directory")?;
        self.process = run.spawn(&name.to_string_lossy(), command(&self.config(), fault)?)?;
        self.wait_ready()
    }

    fn wait_ready(&mut self) -> Result<()> {
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

    /// A new CRI connection through it.
    pub async fn cri(&self) -> Result<Cri> {
        Cri::connect(&self.socket()).await
    }

    /// Waits until `count` hulls are ready.
    pub async fn wait_for_hulls(&mut self, count: u32) -> Result<()> {
        let end = Instant::now() + FILL_LIMIT;
        loop {
            self.process.check_running()?;
            let ready = self.metric("hullspeed_pool_hulls", &["state=\"ready\""]).await?;
            if ready >= f64::from(count) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!(
                    "{ready} hulls are ready after {FILL_LIMIT:?}, {count} are wanted; the log ends:\n{}",
                    self.process.log_tail()
                );
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// RunPodSandbox calls that ended with this result (`hit`, `miss`, `ineligible`, …).
    pub async fn requests(&self, result: &str) -> Result<u64> {
        let label = format!("result=\"{result}\"");
        let sum = self.metric("hullspeed_sandbox_requests_total", &[&label]).await?;
        // An empty sum is -0.
        format!("{:.0}", sum.abs()).parse().context("a count that is none")
    }

    /// See [`Metrics::sum`].
    pub async fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        self.metrics.sum(name, labels).await
    }

    /// Its metrics.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        self.metrics
    }

    /// Runs a subcommand (`status`, `pool`, `drain`, `doctor`) on its configuration; returns what it printed.
    pub fn control(&self, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(programs::find(PROGRAM)?);
        command.args(arguments).arg("--config").arg(self.config());
        Ok(String::from_utf8_lossy(&process::output(&mut command)?).into_owned())
    }

    /// The configuration file.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.directory.join("prewarm.toml")
    }

    /// The CRI socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("cri.sock")
    }

    /// The process, for its log and for signals.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Waits until a fault point has killed it.
    pub fn wait_killed(&mut self) -> Result<()> {
        let status = self.process.wait(START_LIMIT)?;
        ensure!(
            std::os::unix::process::ExitStatusExt::signal(&status) == Some(9),
            "{PROGRAM} ended with {status}; its log ends:\n{}",
            self.process.log_tail()
        );
        Ok(())
    }
}

fn command(config: &Path, fault: Option<&str>) -> Result<Command> {
    let mut command = Command::new(programs::find(PROGRAM)?);
    command.arg("serve").arg("--config").arg(config);
    command
        .env_remove("NOTIFY_SOCKET")
        .env_remove("LISTEN_FDS")
        .env_remove("RUST_LOG");
    match fault {
        Some(point) => command.env(FAULT_VARIABLE, point),
        None => command.env_remove(FAULT_VARIABLE),
    };
    Ok(command)
}

fn config_text(run: &RunDir, directory: &Path, metrics: SocketAddr, options: &PrewarmOptions) -> String {
    let quoted = |path: &Path| serde_json::Value::from(path.to_string_lossy()).to_string();
    let at = |name: &str| quoted(&directory.join(name));
    let size = options.hulls.map_or_else(String::new, |hulls| {
        format!(
            "enabled = {}\nmin = {hulls}\nmax = {}\nmax_memory = \"4GiB\"\n",
            hulls > 0,
            hulls.max(1)
        )
    });
    format!(
        r#"root = {root}
state = {state}
socket = {socket}
control_socket = {control}

[containerd]
address = {containerd}

[metrics]
address = "{metrics}"

[log]
level = "{level}"
format = "json"

[pool]
cgroup = "{cgroup}"
{size}{refill}{extra}"#,
        root = at("root"),
        state = at("state"),
        socket = at("cri.sock"),
        control = at("prewarm.sock"),
        containerd = quoted(&options.containerd),
        level = options.log_level,
        cgroup = run.names().hull_cgroup,
        refill = if options.as_shipped { "" } else { AT_ONCE },
        extra = options.extra,
    )
}
