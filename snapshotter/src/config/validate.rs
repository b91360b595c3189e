//! From [`ConfigFile`] to [`Config`]: each struct is taken apart completely, so a new key cannot be forgotten here.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use toml::Value;

use super::file::{
    CacheFile, ConfigFile, FetchFile, FuseFile, LayersFile, LogFile, MetricsFile, RegistryFile, Section, Unknown,
};
use super::units::{self, ByteSize, display_duration};
use super::{
    CacheConfig, Config, Fault, FetchConfig, FuseConfig, LayersConfig, LogConfig, LogFormat, MetricsConfig,
    RegistryConfig,
};
use crate::snapshot::chain;
use crate::snapshot::service::usable_root;
use crate::telemetry;

/// A socket's path must fit `sockaddr_un`, with room for the temporary name it is bound under.
const MAX_SOCKET_PATH: usize = 90;

/// What came of a file: the configuration that its good values make, all faults, and all unknown keys.
pub(super) struct Outcome {
    pub(super) config: Config,
    pub(super) faults: Vec<Fault>,
    pub(super) unknown: Vec<String>,
}

pub(super) fn validate(file: ConfigFile) -> Outcome {
    let mut check = Check {
        section: "",
        faults: Vec::new(),
        unknown: Vec::new(),
    };
    let config = check.config(file);
    Outcome {
        config,
        faults: check.faults,
        unknown: check.unknown,
    }
}

/// Collects faults while values are converted.
struct Check {
    section: &'static str,
    faults: Vec<Fault>,
    unknown: Vec<String>,
}

impl Check {
    fn config(&mut self, file: ConfigFile) -> Config {
        let ConfigFile {
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
            unknown,
        } = file;
        let default = Config::default();
        self.note_unknown(unknown);
        Config {
            root: self.root(root, default.root),
            socket: self.socket(socket, default.socket),
            stop_timeout: self.duration("stop_timeout", stop_timeout, default.stop_timeout, SECONDS),
            log: self.log(log, default.log),
            metrics: self.metrics(metrics, default.metrics),
            layers: self.layers(layers, default.layers),
            registry: self.registry(registry, default.registry),
            fetch: self.fetch(fetch, default.fetch),
            cache: self.cache(cache, default.cache),
            fuse: self.fuse(fuse, default.fuse),
        }
    }

    fn log(&mut self, section: Section<LogFile>, default: LogConfig) -> LogConfig {
        let LogFile { level, format, unknown } = self.enter("log", section);
        self.note_unknown(unknown);
        LogConfig {
            level: self.level(level, default.level),
            format: self.format(format, default.format),
        }
    }

    fn metrics(&mut self, section: Section<MetricsFile>, default: MetricsConfig) -> MetricsConfig {
        let MetricsFile { address, unknown } = self.enter("metrics", section);
        self.note_unknown(unknown);
        let allowed = "an address such as \"127.0.0.1:9641\" or \"[::1]:0\", or \"\" for none";
        let explicit = address.is_some();
        let address = self.text("address", address, allowed, default.address, |text| match text {
            "" => Some(None),
            text => text.parse::<SocketAddr>().ok().map(Some),
        });
        MetricsConfig { address, explicit }
    }

    fn layers(&mut self, section: Section<LayersFile>, default: LayersConfig) -> LayersConfig {
        let LayersFile {
            lazy,
            mount_timeout,
            restore_parallelism,
            unknown,
        } = self.enter("layers", section);
        self.note_unknown(unknown);
        LayersConfig {
            lazy: self.switch("lazy", lazy, default.lazy),
            mount_timeout: self.duration("mount_timeout", mount_timeout, default.mount_timeout, SECONDS),
            restore_parallelism: self.count(
                "restore_parallelism",
                restore_parallelism,
                default.restore_parallelism,
                1..=64,
            ),
        }
    }

    fn registry(&mut self, section: Section<RegistryFile>, default: RegistryConfig) -> RegistryConfig {
        let RegistryFile {
            plain_http,
            ca_file,
            connect_timeout,
            stall_timeout,
            unknown,
        } = self.enter("registry", section);
        self.note_unknown(unknown);
        RegistryConfig {
            plain_http: self.hosts("plain_http", plain_http, default.plain_http),
            ca_file: self.ca_file(ca_file, default.ca_file),
            connect_timeout: self.duration("connect_timeout", connect_timeout, default.connect_timeout, SECONDS),
            stall_timeout: self.duration("stall_timeout", stall_timeout, default.stall_timeout, SECONDS),
        }
    }

    fn fetch(&mut self, section: Section<FetchFile>, default: FetchConfig) -> FetchConfig {
        let FetchFile {
            max_requests,
            read_around,
            max_range,
            prefetch,
            unknown,
        } = self.enter("fetch", section);
        self.note_unknown(unknown);
        let fetch = FetchConfig {
            max_requests: self.count("max_requests", max_requests, default.max_requests, 1..=256),
            read_around: self.size("read_around", read_around, default.read_around, (4, KIB), (64, MIB)),
            max_range: self.size("max_range", max_range, default.max_range, (64, KIB), (256, MIB)),
            prefetch: self.switch("prefetch", prefetch, default.prefetch),
        };
        if fetch.read_around > fetch.max_range {
            let allowed = format!("at most fetch.max_range, which is {}", fetch.max_range);
            self.fault("read_around", fetch.read_around.to_string(), allowed);
        }
        fetch
    }

    fn cache(&mut self, section: Section<CacheFile>, default: CacheConfig) -> CacheConfig {
        let CacheFile {
            checkpoint_interval,
            unknown,
        } = self.enter("cache", section);
        self.note_unknown(unknown);
        let interval = self.duration(
            "checkpoint_interval",
            checkpoint_interval,
            default.checkpoint_interval,
            CHECKPOINT,
        );
        CacheConfig {
            checkpoint_interval: interval,
        }
    }

    fn fuse(&mut self, section: Section<FuseFile>, default: FuseConfig) -> FuseConfig {
        let FuseFile {
            workers,
            max_background,
            read_ahead,
            unknown,
        } = self.enter("fuse", section);
        self.note_unknown(unknown);
        FuseConfig {
            workers: self.count("workers", workers, default.workers, 1..=64),
            max_background: self.count("max_background", max_background, default.max_background, 1..=1024),
            read_ahead: self.size("read_ahead", read_ahead, default.read_ahead, (4, KIB), (16, MIB)),
        }
    }

    fn root(&mut self, value: Option<Value>, default: PathBuf) -> PathBuf {
        let allowed = "an absolute path without : , \\ \" or a line break";
        self.text("root", value, allowed, default, |text| {
            usable_root(Path::new(text)).then(|| PathBuf::from(text))
        })
    }

    fn socket(&mut self, value: Option<Value>, default: PathBuf) -> PathBuf {
        self.text(
            "socket",
            value,
            "an absolute path of at most 90 bytes",
            default,
            |text| {
                let usable = Path::new(text).is_absolute() && text.len() <= MAX_SOCKET_PATH && !text.ends_with('/');
                usable.then(|| PathBuf::from(text))
            },
        )
    }

    fn level(&mut self, value: Option<Value>, default: String) -> String {
        let allowed = "error, warn, info, debug, trace, off, or a list such as info,hullspeed_snapshotter=debug";
        self.text("level", value, allowed, default, |text| {
            (!text.is_empty() && telemetry::parse_level(text).is_ok()).then(|| text.to_owned())
        })
    }

    fn format(&mut self, value: Option<Value>, default: LogFormat) -> LogFormat {
        self.text("format", value, "\"json\" or \"text\"", default, |text| {
            LogFormat::from_str(text, false).ok()
        })
    }

    fn hosts(&mut self, key: &'static str, value: Option<Value>, default: Vec<String>) -> Vec<String> {
        let Some(value) = value else { return default };
        let host = |value: &Value| {
            let text = value.as_str()?;
            (!text.is_empty() && !text.contains(['/', '@']) && !text.contains(char::is_whitespace))
                .then(|| text.to_owned())
        };
        match value.as_array().and_then(|hosts| hosts.iter().map(host).collect()) {
            Some(hosts) => hosts,
            None => {
                self.fault(
                    key,
                    value.to_string(),
                    "a list of hosts such as [\"registry.local:5000\"]".to_owned(),
                );
                default
            }
        }
    }

    /// The file is read here, so that one that is missing or no PEM shows at the start and not at the first pull.
    fn ca_file(&mut self, value: Option<Value>, default: Option<PathBuf>) -> Option<PathBuf> {
        let allowed = "the absolute path of a PEM file of certificates, or \"\" for none";
        let path = self.text("ca_file", value, allowed, default, |text| match text {
            "" => Some(None),
            text => Path::new(text).is_absolute().then(|| Some(PathBuf::from(text))),
        })?;
        if let Err(error) = hullspeed_registry::check_ca_file(&path) {
            // The error's own text says only that setting up a client failed.
            let reason = chain(error.fault());
            let shown = Value::String(path.display().to_string()).to_string();
            self.fault("ca_file", shown, format!("{allowed} ({reason})"));
        }
        Some(path)
    }

    fn switch(&mut self, key: &'static str, value: Option<Value>, default: bool) -> bool {
        self.value(key, value, "true or false".to_owned(), default, |value| value.as_bool())
    }

    fn count<T: TryFrom<i64> + PartialOrd + std::fmt::Display>(
        &mut self,
        key: &'static str,
        value: Option<Value>,
        default: T,
        range: RangeInclusive<T>,
    ) -> T {
        let allowed = format!("a whole number from {} to {}", range.start(), range.end());
        self.value(key, value, allowed, default, |value| {
            T::try_from(value.as_integer()?)
                .ok()
                .filter(|number| range.contains(number))
        })
    }

    fn duration(
        &mut self,
        key: &'static str,
        value: Option<Value>,
        default: Duration,
        (least, most): (Duration, Duration),
    ) -> Duration {
        let allowed = format!(
            "a time from \"{}\" to \"{}\"",
            display_duration(least),
            display_duration(most)
        );
        self.text(key, value, &allowed, default, |text| {
            units::duration(text).ok().filter(|time| (least..=most).contains(time))
        })
    }

    fn size(
        &mut self,
        key: &'static str,
        value: Option<Value>,
        default: ByteSize,
        least: (u32, fn(u32) -> ByteSize),
        most: (u32, fn(u32) -> ByteSize),
    ) -> ByteSize {
        let (least, most) = (least.1(least.0), most.1(most.0));
        let allowed = format!("a size from \"{least}\" to \"{most}\"");
        self.text(key, value, &allowed, default, |text| {
            text.parse().ok().filter(|size| (least..=most).contains(size))
        })
    }

    fn text<T>(
        &mut self,
        key: &'static str,
        value: Option<Value>,
        allowed: &str,
        default: T,
        convert: impl FnOnce(&str) -> Option<T>,
    ) -> T {
        self.value(key, value, allowed.to_owned(), default, |value| {
            value.as_str().and_then(convert)
        })
    }

    fn value<T>(
        &mut self,
        key: &'static str,
        value: Option<Value>,
        allowed: String,
        default: T,
        convert: impl FnOnce(&Value) -> Option<T>,
    ) -> T {
        let Some(value) = value else { return default };
        convert(&value).unwrap_or_else(|| {
            self.fault(key, value.to_string(), allowed);
            default
        })
    }

    /// Takes the keys of a section; faults from now on are in it.
    fn enter<T: Default>(&mut self, name: &'static str, section: Section<T>) -> T {
        self.section = "";
        let keys = match section {
            Section::Table(keys) => keys,
            Section::Other(value) => {
                self.fault(name, value.to_string(), format!("a section, written [{name}]"));
                T::default()
            }
        };
        self.section = name;
        keys
    }

    fn path(&self, key: &str) -> String {
        if self.section.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.section)
        }
    }

    fn fault(&mut self, key: &str, value: String, allowed: String) {
        let key = self.path(key);
        self.faults.push(Fault {
            key,
            value: one_line(&value).take(200).collect(),
            allowed: one_line(&allowed).collect(),
        });
    }

    fn note_unknown(&mut self, unknown: Unknown) {
        let section = self.section;
        self.unknown.extend(unknown.into_keys().map(|key| {
            if section.is_empty() {
                key
            } else {
                format!("{section}.{key}")
            }
        }));
    }
}

/// A fault is one line, whatever a value or a path has in it.
fn one_line(text: &str) -> impl Iterator<Item = char> {
    text.chars().map(|c| if c.is_control() { ' ' } else { c })
}

const SECONDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
const CHECKPOINT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(600));
const KIB: fn(u32) -> ByteSize = ByteSize::kib;
const MIB: fn(u32) -> ByteSize = ByteSize::mib;
