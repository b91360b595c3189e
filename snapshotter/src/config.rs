//! The daemon's configuration, checked.
//!
//! A file is read into [`file::ConfigFile`], which accepts anything that is TOML, and turned into [`Config`], whose
//! values are all usable; every fault of the file is reported at once. `docs/configuration.md` describes each key, and
//! a test holds its defaults against [`Config::default`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use units::ByteSize;

pub mod units;

/// Where the configuration is read from when `--config` is not given; it may be absent.
pub const DEFAULT_PATH: &str = "/etc/hullspeed/snapshotter.toml";

/// The whole configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Directory of everything the daemon keeps: metadata, snapshots, layers.
    pub root: PathBuf,
    /// Unix socket of the snapshots service.
    pub socket: PathBuf,
    /// How long a stop waits for requests in progress.
    pub stop_timeout: Duration,
    /// Log lines.
    pub log: LogConfig,
    /// The metrics endpoint.
    pub metrics: MetricsConfig,
    /// Mounts of lazy layers.
    pub layers: LayersConfig,
    /// The way to registries.
    pub registry: RegistryConfig,
    /// What is read from registries, and how much of it at once.
    pub fetch: FetchConfig,
    /// The layer cache on disk.
    pub cache: CacheConfig,
    /// FUSE mounts.
    pub fuse: FuseConfig,
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// A level, or a filter in the syntax of `RUST_LOG`.
    pub level: String,
    /// Form of the lines.
    pub format: LogFormat,
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

/// `[metrics]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Address of `/metrics` and `/healthz`; none switches them off.
    pub address: Option<SocketAddr>,
}

/// `[layers]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayersConfig {
    /// Whether layers are mounted lazily at all; when not, every layer becomes an ordinary overlay snapshot.
    pub lazy: bool,
    /// How long containerd's request waits for a layer to be mounted before the layer is unpacked instead.
    pub mount_timeout: Duration,
    /// How many layers are mounted again at the same time after a start.
    pub restore_parallelism: usize,
}

/// `[registry]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryConfig {
    /// Hosts (`host` or `host:port`) spoken to by http; loopback hosts are without being listed.
    pub plain_http: Vec<String>,
    /// PEM file with certificates trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// Limit on connecting, including TLS.
    pub connect_timeout: Duration,
    /// Limit on the time in which no byte of an answer arrives.
    pub stall_timeout: Duration,
}

/// `[fetch]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchConfig {
    /// Requests to registries under way at once, for the whole daemon.
    pub max_requests: usize,
    /// Least length of a range fetched for a read.
    pub read_around: ByteSize,
    /// Longest range fetched by one request.
    pub max_range: ByteSize,
    /// Whether a layer's prioritized files are fetched as soon as it is mounted.
    pub prefetch: bool,
}

/// `[cache]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// How often the map of resident chunks is made durable.
    pub checkpoint_interval: Duration,
}

/// `[fuse]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseConfig {
    /// Threads that read requests of one mount.
    pub workers: usize,
    /// Requests that the kernel may have outstanding in the background (read-ahead) per mount.
    pub max_background: u16,
    /// The kernel's read-ahead per mount.
    pub read_ahead: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/hullspeed"),
            socket: PathBuf::from("/run/hullspeed/snapshotter.sock"),
            stop_timeout: Duration::from_secs(10),
            log: LogConfig {
                level: "info".to_owned(),
                format: LogFormat::Json,
            },
            metrics: MetricsConfig {
                address: Some(SocketAddr::from(([127, 0, 0, 1], 9641))),
            },
            layers: LayersConfig {
                lazy: true,
                mount_timeout: Duration::from_secs(30),
                restore_parallelism: 8,
            },
            registry: RegistryConfig {
                plain_http: Vec::new(),
                ca_file: None,
                connect_timeout: Duration::from_secs(10),
                stall_timeout: Duration::from_secs(20),
            },
            fetch: FetchConfig {
                max_requests: 16,
                read_around: ByteSize::kib(512),
                max_range: ByteSize::mib(8),
                prefetch: true,
            },
            cache: CacheConfig {
                checkpoint_interval: Duration::from_secs(5),
            },
            fuse: FuseConfig {
                workers: 4,
                max_background: 64,
                read_ahead: ByteSize::kib(512),
            },
        }
    }
}
