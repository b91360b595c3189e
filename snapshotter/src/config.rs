//! The daemon's configuration, checked.
//!
//! A file is read into [`file::ConfigFile`], which accepts anything that is TOML, and turned into [`Config`], whose
//! values are all usable; every fault of the file is reported at once. `docs/configuration.md` describes each key, and
//! a test holds its defaults against [`Config::default`].

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Value;

use file::ConfigFile;
use units::{ByteSize, display_duration};

mod file;
#[cfg(test)]
mod tests;
pub mod units;
mod validate;

/// Where the configuration is read from when `--config` is not given; it may be absent.
pub const DEFAULT_PATH: &str = "/etc/hullspeed/snapshotter.toml";

/// Longest file accepted.
const MAX_FILE_BYTES: u64 = 1 << 20;

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
    /// The address was asked for; a default one that is taken is done without.
    pub explicit: bool,
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
                explicit: false,
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

/// A value that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// The key, with its section.
    pub key: String,
    /// The value, as written.
    pub value: String,
    /// What would be accepted.
    pub allowed: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {} must be {}", self.key, self.value, self.allowed)
    }
}

/// A place in a text, as editors count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// From 1.
    pub line: usize,
    /// Character in the line, from 1.
    pub column: usize,
}

impl Place {
    /// The place of a byte of `text`.
    fn of(text: &str, byte: usize) -> Self {
        // A fault at the end may lie behind the last character.
        let before = &text[..text.floor_char_boundary(byte)];
        let last = before.rsplit('\n').next().unwrap_or_default();
        Self {
            line: before.matches('\n').count() + 1,
            column: last.chars().count() + 1,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, ":{}:{}", self.line, self.column)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is longer than any configuration.
    #[error("{} has more than {MAX_FILE_BYTES} bytes", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
    },
    /// The file is not TOML.
    #[error("{}{place}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where in it.
        place: Place,
        /// What is wrong there, in one line.
        reason: String,
    },
    /// Values that cannot be used, all of them.
    #[error("{}", list(path, faults))]
    Faults {
        /// The file.
        path: PathBuf,
        /// Every fault.
        faults: Vec<Fault>,
    },
}

/// One line per fault.
fn list(path: &Path, faults: &[Fault]) -> String {
    let lines: Vec<_> = faults
        .iter()
        .map(|fault| format!("{}: {fault}", path.display()))
        .collect();
    lines.join("\n")
}

/// Where the configuration comes from, as the command line has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sources {
    /// File that must exist; without it the default one is read if it exists.
    pub file: Option<PathBuf>,
    /// Keys with a value that replaces the file's: `root`, `socket`, `log.level`, `log.format`.
    pub overrides: Vec<(Override, String)>,
    /// Whether an unknown key is a fault.
    pub strict: bool,
}

/// A key that the command line can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Override {
    /// `root`
    Root,
    /// `socket`
    Socket,
    /// `log.level`
    LogLevel,
    /// `log.format`
    LogFormat,
}

/// A configuration and what was odd about its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Keys of the file that mean nothing, with the file they are in.
    pub unknown: Vec<String>,
}

/// Reads the configuration.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
    let path = sources.file.as_deref().unwrap_or(Path::new(DEFAULT_PATH));
    let text = match read(path) {
        Err(ConfigError::Read { source, .. }) if sources.file.is_none() && source.kind() == io::ErrorKind::NotFound => {
            String::new()
        }
        read => read?,
    };
    parse(path, &text, sources)
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    let length = file
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if u64::try_from(length).unwrap_or(u64::MAX) > MAX_FILE_BYTES {
        return Err(ConfigError::TooLong { path: path.to_owned() });
    }
    Ok(text)
}

fn parse(path: &Path, text: &str, sources: &Sources) -> Result<Loaded, ConfigError> {
    let mut file: ConfigFile = toml::from_str(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        place: Place::of(text, error.span().map_or(0, |span| span.start)),
        // What was expected follows on a line of its own.
        reason: error.message().lines().collect::<Vec<_>>().join(", "),
    })?;
    for (key, value) in &sources.overrides {
        file.set(*key, Value::String(value.clone()));
    }
    let validate::Outcome {
        config,
        mut faults,
        unknown,
    } = validate::validate(file);
    if sources.strict {
        let fault = |key: &String| Fault {
            key: key.clone(),
            value: "(set)".to_owned(),
            allowed: "left out: there is no such key".to_owned(),
        };
        faults.extend(unknown.iter().map(fault));
    }
    if !faults.is_empty() {
        return Err(ConfigError::Faults {
            path: path.to_owned(),
            faults,
        });
    }
    Ok(Loaded { config, unknown })
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
        let LogConfig { level, format } = log;
        let MetricsConfig { address, explicit: _ } = metrics;
        let LayersConfig {
            lazy,
            mount_timeout,
            restore_parallelism,
        } = layers;
        let RegistryConfig {
            plain_http,
            ca_file,
            connect_timeout,
            stall_timeout,
        } = registry;
        let FetchConfig {
            max_requests,
            read_around,
            max_range,
            prefetch,
        } = fetch;
        let CacheConfig { checkpoint_interval } = cache;
        let FuseConfig {
            workers,
            max_background,
            read_ahead,
        } = fuse;
        let text = |text: &dyn fmt::Display| Value::String(text.to_string()).to_string();
        let time = |time: &Duration| text(&display_duration(*time));
        let path = |path: &Path| text(&path.display());
        let hosts = Value::Array(plain_http.iter().cloned().map(Value::String).collect());
        let format = match format {
            LogFormat::Json => "json",
            LogFormat::Text => "text",
        };
        let lines = [
            format!("root = {}", path(root)),
            format!("socket = {}", path(socket)),
            format!("stop_timeout = {}", time(stop_timeout)),
            "\n[log]".to_owned(),
            format!("level = {}", text(level)),
            format!("format = {}", text(&format)),
            "\n[metrics]".to_owned(),
            format!(
                "address = {}",
                text(&address.map(|a| a.to_string()).unwrap_or_default())
            ),
            "\n[layers]".to_owned(),
            format!("lazy = {lazy}"),
            format!("mount_timeout = {}", time(mount_timeout)),
            format!("restore_parallelism = {restore_parallelism}"),
            "\n[registry]".to_owned(),
            format!("plain_http = {hosts}"),
            format!("ca_file = {}", path(ca_file.as_deref().unwrap_or(Path::new("")))),
            format!("connect_timeout = {}", time(connect_timeout)),
            format!("stall_timeout = {}", time(stall_timeout)),
            "\n[fetch]".to_owned(),
            format!("max_requests = {max_requests}"),
            format!("read_around = {}", text(read_around)),
            format!("max_range = {}", text(max_range)),
            format!("prefetch = {prefetch}"),
            "\n[cache]".to_owned(),
            format!("checkpoint_interval = {}", time(checkpoint_interval)),
            "\n[fuse]".to_owned(),
            format!("workers = {workers}"),
            format!("max_background = {max_background}"),
            format!("read_ahead = {}", text(read_ahead)),
        ];
        lines.join("\n") + "\n"
    }
}
