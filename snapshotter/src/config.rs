//! The daemon's configuration, checked.
//!
//! A file is read into [`file::ConfigFile`], which accepts anything that is TOML, and turned into [`Config`], whose
//! values are all usable; every fault of the file is reported at once. `docs/configuration.md` describes each key, and
//! a test holds its defaults against [`Config::default`].

use std::path::{Path, PathBuf};
use std::time::Duration;

use hullspeed_daemon::config::written::{self, list, path, text, time};
use hullspeed_daemon::config::{ConfigError, Loaded, LogConfig, MetricsConfig, Sources};
use hullspeed_daemon::units::ByteSize;

use crate::layer::cache::limits::Amount;
use file::ConfigFile;

mod file;
#[cfg(test)]
mod tests;
mod validate;

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

/// `[layers]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayersConfig {
    /// Whether layers are mounted lazily at all; when not, every layer becomes an ordinary overlay snapshot.
    pub lazy: bool,
    /// How lazy layers are mounted.
    pub mount: MountChoice,
    /// How long containerd's request waits for a layer to be mounted before the layer is unpacked instead.
    pub mount_timeout: Duration,
    /// How many layers are mounted again at the same time after a start.
    pub restore_parallelism: usize,
}

/// `layers.mount`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MountChoice {
    /// Natively where the self-test passes, by FUSE elsewhere.
    #[default]
    Auto,
    /// Natively, or not at all: the daemon does not start where the self-test fails.
    Erofs,
    /// By FUSE.
    Fuse,
}

impl MountChoice {
    /// All of them.
    const ALL: [Self; 3] = [Self::Auto, Self::Erofs, Self::Fuse];

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Erofs => "erofs",
            Self::Fuse => "fuse",
        }
    }

    fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|choice| choice.name() == name)
    }
}

/// `[registry]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RegistryConfig {
    /// containerd's `certs.d`; it need not exist.
    pub hosts_directory: Option<PathBuf>,
    /// Hosts (`host` or `host:port`) spoken to by http; loopback hosts are without being listed.
    pub plain_http: Vec<String>,
    /// PEM file with certificates trusted besides the system's.
    pub ca_file: Option<PathBuf>,
    /// File of logins, which only its owner may read.
    pub credentials_file: Option<PathBuf>,
    /// Docker's `config.json`; without it the places that the environment names.
    pub docker_config: Option<PathBuf>,
    /// The kubelet's `CredentialProviderConfig`: a file, or a directory of files.
    pub credential_provider_config: Option<PathBuf>,
    /// The directory of the programs that it names.
    pub credential_provider_bin_dir: Option<PathBuf>,
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
    /// How long a read waits for a registry before it fails.
    pub read_deadline: Duration,
    /// Whether the rest of a mounted layer is fetched when nobody else wants the network.
    pub background: bool,
    /// Bytes per second that this may take, all layers together; 0 for no cap.
    pub background_bandwidth: ByteSize,
    /// How long after the mount it begins.
    pub background_delay: Duration,
    /// How long after that it gives way to readers.
    pub background_deadline: Duration,
}

/// `[cache]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheConfig {
    /// How often the map of resident chunks is made durable.
    pub checkpoint_interval: Duration,
    /// What all layers together may take on disk; nothing for no limit.
    pub quota: Amount,
    /// What is left free on the filesystem as long as there are layers that nobody uses.
    pub min_free: Amount,
}

/// `[fuse]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuseConfig {
    /// Threads that read requests of one mount.
    pub workers: usize,
    /// Requests that the kernel may have outstanding in the background (read-ahead) per mount.
    pub max_background: u16,
    /// Whether the kernel reads files by itself that are complete when they are first opened.
    pub passthrough: bool,
    /// The kernel's read-ahead per mount.
    pub read_ahead: ByteSize,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/hullspeed"),
            socket: PathBuf::from("/run/hullspeed/snapshotter.sock"),
            stop_timeout: Duration::from_secs(10),
            log: LogConfig::default(),
            metrics: MetricsConfig::at_port(9641),
            layers: LayersConfig {
                lazy: true,
                mount: MountChoice::Auto,
                mount_timeout: Duration::from_secs(30),
                restore_parallelism: 8,
            },
            registry: RegistryConfig {
                hosts_directory: Some(PathBuf::from("/etc/containerd/certs.d")),
                plain_http: Vec::new(),
                ca_file: None,
                credentials_file: None,
                docker_config: None,
                credential_provider_config: None,
                credential_provider_bin_dir: None,
                connect_timeout: Duration::from_secs(10),
                stall_timeout: Duration::from_secs(20),
            },
            fetch: FetchConfig {
                max_requests: 16,
                read_around: ByteSize::kib(512),
                max_range: ByteSize::mib(8),
                prefetch: true,
                read_deadline: Duration::from_secs(60),
                background: true,
                background_bandwidth: ByteSize::kib(0),
                background_delay: Duration::ZERO,
                background_deadline: Duration::from_secs(3600),
            },
            cache: CacheConfig {
                checkpoint_interval: Duration::from_secs(5),
                quota: Amount::NONE,
                min_free: Amount::Percent(5),
            },
            fuse: FuseConfig {
                workers: 4,
                max_background: 64,
                passthrough: true,
                read_ahead: ByteSize::kib(512),
            },
        }
    }
}

/// Reads the configuration.
pub fn load(sources: &Sources) -> Result<Loaded<Config>, ConfigError> {
    hullspeed_daemon::config::load::<ConfigFile>(Path::new(DEFAULT_PATH), sources)
}

impl Config {
    /// The configuration as a file that would give the same one.
    pub fn to_toml(&self) -> String {
        let Self {
            root,
            socket,
            stop_timeout,
            log,
            metrics,
            layers,
            registry,
            fetch,
            cache,
            fuse,
        } = self;
        let LayersConfig {
            lazy,
            mount,
            mount_timeout,
            restore_parallelism,
        } = layers;
        let RegistryConfig {
            hosts_directory,
            plain_http,
            ca_file,
            credentials_file,
            docker_config,
            credential_provider_config,
            credential_provider_bin_dir,
            connect_timeout,
            stall_timeout,
        } = registry;
        let FetchConfig {
            max_requests,
            read_around,
            max_range,
            prefetch,
            read_deadline,
            background,
            background_bandwidth,
            background_delay,
            background_deadline,
        } = fetch;
        let CacheConfig {
            checkpoint_interval,
            quota,
            min_free,
        } = cache;
        let FuseConfig {
            workers,
            max_background,
            passthrough,
            read_ahead,
        } = fuse;
        let maybe = |file: &Option<PathBuf>| path(file.as_deref().unwrap_or(Path::new("")));
        let lines = [
            format!("root = {}", path(root)),
            format!("socket = {}", path(socket)),
            format!("stop_timeout = {}", time(*stop_timeout)),
            written::log(log),
            written::metrics(metrics),
            "\n[layers]".to_owned(),
            format!("lazy = {lazy}"),
            format!("mount = {}", text(&mount.name())),
            format!("mount_timeout = {}", time(*mount_timeout)),
            format!("restore_parallelism = {restore_parallelism}"),
            "\n[registry]".to_owned(),
            format!("hosts_directory = {}", maybe(hosts_directory)),
            format!("plain_http = {}", list(plain_http)),
            format!("ca_file = {}", maybe(ca_file)),
            format!("credentials_file = {}", maybe(credentials_file)),
            format!("docker_config = {}", maybe(docker_config)),
            format!("credential_provider_config = {}", maybe(credential_provider_config)),
            format!("credential_provider_bin_dir = {}", maybe(credential_provider_bin_dir)),
            format!("connect_timeout = {}", time(*connect_timeout)),
            format!("stall_timeout = {}", time(*stall_timeout)),
            "\n[fetch]".to_owned(),
            format!("max_requests = {max_requests}"),
            format!("read_around = {}", text(read_around)),
            format!("max_range = {}", text(max_range)),
            format!("prefetch = {prefetch}"),
            format!("read_deadline = {}", time(*read_deadline)),
            format!("background = {background}"),
            format!("background_bandwidth = {}", text(background_bandwidth)),
            format!("background_delay = {}", time(*background_delay)),
            format!("background_deadline = {}", time(*background_deadline)),
            "\n[cache]".to_owned(),
            format!("checkpoint_interval = {}", time(*checkpoint_interval)),
            format!("quota = {}", text(quota)),
            format!("min_free = {}", text(min_free)),
            "\n[fuse]".to_owned(),
            format!("workers = {workers}"),
            format!("max_background = {max_background}"),
            format!("passthrough = {passthrough}"),
            format!("read_ahead = {}", text(read_ahead)),
        ];
        lines.join("\n") + "\n"
    }
}
