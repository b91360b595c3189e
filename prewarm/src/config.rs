//! The daemon's configuration, checked.
//!
//! A file is read into [`file::ConfigFile`], which accepts anything that is TOML, and turned into [`Config`], whose
//! values are all usable; every fault of the file is reported at once. `docs/prewarm-configuration.md` describes each
//! key, and a test holds its defaults against [`Config::default`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use hullspeed_daemon::config::{ConfigError, Loaded, LogConfig, MetricsConfig, Sources};
use hullspeed_daemon::units::ByteSize;

use file::ConfigFile;

mod file;
#[cfg(test)]
mod tests;
mod validate;
mod written;

/// Where the configuration is read from when `--config` is not given; it may be absent.
pub const DEFAULT_PATH: &str = "/etc/hullspeed/prewarm.toml";

/// Port of the metrics on the loopback interface.
const METRICS_PORT: u16 = 9642;

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Directory of what outlives a boot: the mark of this node's hulls.
    pub root: PathBuf,
    /// Directory of what must not outlive a boot: the journal of adoptions. On a tmpfs.
    pub state: PathBuf,
    /// Unix socket of the relay, for the kubelet.
    pub socket: PathBuf,
    /// Unix socket of the daemon's own API.
    pub control_socket: PathBuf,
    /// How long a stop waits for calls in progress.
    pub stop_timeout: Duration,
    /// Log lines.
    pub log: LogConfig,
    /// The metrics endpoint.
    pub metrics: MetricsConfig,
    /// The way to containerd.
    pub containerd: ContainerdConfig,
    /// The relay's bounds.
    pub relay: RelayConfig,
    /// The pool of hulls.
    pub pool: PoolConfig,
    /// Which networks hulls may be made with.
    pub cni: CniConfig,
    /// Which pods may have a hull.
    pub adoption: AdoptionConfig,
    /// Container events.
    pub events: EventsConfig,
    /// Image warming and credentials.
    pub warm: WarmConfig,
}

/// `[containerd]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerdConfig {
    /// containerd's Unix socket.
    pub address: PathBuf,
}

/// `[relay]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RelayConfig {
    /// Connections of clients at once.
    pub max_connections: usize,
    /// Calls under way of one connection.
    pub max_parallel: u32,
    /// Memory for large gathered requests, and as much again for large gathered answers.
    pub max_gathered: ByteSize,
}

/// `[pool]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolConfig {
    /// Whether hulls are made at all.
    pub enabled: bool,
    /// Runtime handlers with a pool, as pods name them; the empty name is containerd's default.
    pub handlers: Vec<String>,
    /// Ready hulls of each handler when nothing happens.
    pub min: usize,
    /// Most hulls of each handler.
    pub max: usize,
    /// Memory of all hulls together.
    pub max_memory: ByteSize,
    /// Addresses of the pod network that are left to ordinary pods.
    pub ip_headroom: u64,
    /// How long demand is remembered.
    pub demand_window: Duration,
    /// Time between releases of surplus hulls.
    pub release_interval: Duration,
    /// How long after a pod's start no hull is made.
    pub refill_quiet: Duration,
    /// Longest wait for that quiet.
    pub refill_deferral: Duration,
    /// Least time between the beginnings of two creations.
    pub refill_interval: Duration,
    /// Hulls made at once.
    pub refill_parallel: usize,
    /// Limit on one creation.
    pub creation_timeout: Duration,
    /// Longest time that a pod's start counts as under way.
    pub start_timeout: Duration,
    /// Time between searches for sandboxes that nobody knows.
    pub sweep_interval: Duration,
    /// Cgroup of hulls, without the ending `.slice`.
    pub cgroup: String,
    /// Keep hulls although NRI plugins are there.
    pub allow_nri: bool,
}

/// `[cni]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CniConfig {
    /// Plugin types that the operator vouches for.
    pub allow: Vec<String>,
    /// Whether the plugins decide.
    pub verdict: CniVerdict,
}

/// `cni.override`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CniVerdict {
    /// The plugins decide.
    Auto,
    /// Every network is allowed.
    Allow,
    /// No network is: the pool is off.
    Deny,
}

/// `[adoption]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdoptionConfig {
    /// Whether pods get hulls. Without it none are made, and pods adopted before are shown as what they are.
    pub enabled: bool,
    /// Whether privileged pods may have one, where SELinux is off.
    pub privileged: bool,
    /// Pods that want users or groups, or that have no seccomp profile.
    pub run_as: RunAs,
    /// Whether pods with sysctls of Kubernetes' safe set may have one.
    pub sysctls: bool,
}

/// `adoption.run_as`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RunAs {
    /// They may have a hull: only the pause process differs.
    Eligible,
    /// They may not.
    Strict,
}

/// `[events]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventsConfig {
    /// Whether events are supplied for a containerd without them.
    pub supply: Supply,
}

/// `events.supply`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Supply {
    /// Where containerd has none.
    Auto,
    /// Never.
    Off,
}

/// `[warm]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmConfig {
    /// File that lists the images to warm; none switches warming off. It may be absent, and is read when it changes.
    pub policy: Option<PathBuf>,
    /// The snapshotter's Unix socket.
    pub snapshotter: PathBuf,
    /// Images warmed at once.
    pub max_parallel: usize,
    /// How often a tag is resolved again.
    pub resolve_interval: Duration,
    /// Whether credentials of pulls are handed to the snapshotter.
    pub credentials: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/hullspeed/prewarm".into(),
            state: "/run/hullspeed".into(),
            socket: "/run/hullspeed/cri.sock".into(),
            control_socket: "/run/hullspeed/prewarm.sock".into(),
            stop_timeout: Duration::from_secs(10),
            log: LogConfig::default(),
            metrics: MetricsConfig::at_port(METRICS_PORT),
            containerd: ContainerdConfig {
                address: "/run/containerd/containerd.sock".into(),
            },
            relay: RelayConfig {
                max_connections: 512,
                max_parallel: 1024,
                max_gathered: ByteSize::mib(64),
            },
            pool: PoolConfig::default(),
            cni: CniConfig {
                allow: Vec::new(),
                verdict: CniVerdict::Auto,
            },
            adoption: AdoptionConfig {
                enabled: true,
                privileged: true,
                run_as: RunAs::Eligible,
                sysctls: true,
            },
            events: EventsConfig { supply: Supply::Auto },
            warm: WarmConfig {
                policy: Some("/etc/hullspeed/warm.toml".into()),
                snapshotter: "/run/hullspeed/snapshotter.sock".into(),
                max_parallel: 2,
                resolve_interval: Duration::from_secs(600),
                credentials: true,
            },
        }
    }
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self {
            enabled: true,
            handlers: vec![String::new()],
            min: 2,
            max: 10,
            max_memory: ByteSize::mib(256),
            ip_headroom: 8,
            demand_window: Duration::from_secs(600),
            release_interval: Duration::from_secs(30),
            refill_quiet: Duration::from_secs(1),
            refill_deferral: Duration::from_secs(5),
            refill_interval: Duration::from_millis(50),
            refill_parallel: 1,
            creation_timeout: Duration::from_secs(60),
            start_timeout: Duration::from_secs(10),
            sweep_interval: Duration::from_secs(300),
            cgroup: "hullspeed".to_owned(),
            allow_nri: false,
        }
    }
}

/// Reads the configuration.
pub fn load(sources: &Sources) -> Result<Loaded<Config>, ConfigError> {
    hullspeed_daemon::config::load::<ConfigFile>(Path::new(DEFAULT_PATH), sources)
}
