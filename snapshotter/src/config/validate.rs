//! From [`ConfigFile`] to [`Config`]: each struct is taken apart completely, so a new key cannot be forgotten here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hullspeed_daemon::config::{Check, File, Override, Section};
use hullspeed_daemon::error::chain;
use hullspeed_daemon::units::ByteSize;
use toml::Value;

use super::file::{CacheFile, ConfigFile, FetchFile, FuseFile, LayersFile, RegistryFile};
use super::{CacheConfig, Config, FetchConfig, FuseConfig, LayersConfig, MountChoice, RegistryConfig};
use crate::snapshot::service::usable_root;

impl File for ConfigFile {
    type Config = Config;

    fn set(&mut self, key: Override, value: Value) {
        match key {
            Override::Root => self.root = Some(value),
            Override::Socket => self.socket = Some(value),
            Override::LogLevel | Override::LogFormat => self.log.set(key, value),
        }
    }

    fn check(self, check: &mut Check) -> Config {
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
            unknown,
        } = self;
        let default = Config::default();
        check.note_unknown(unknown);
        Config {
            root: checked_root(check, root, default.root),
            socket: check.socket("socket", socket, default.socket),
            stop_timeout: check.duration("stop_timeout", stop_timeout, default.stop_timeout, SECONDS),
            log: check.log(log, default.log),
            metrics: check.metrics(metrics, default.metrics),
            layers: checked_layers(check, layers, default.layers),
            registry: checked_registry(check, registry, default.registry),
            fetch: checked_fetch(check, fetch, default.fetch),
            cache: checked_cache(check, cache, default.cache),
            fuse: checked_fuse(check, fuse, default.fuse),
        }
    }
}

/// The values of `layers.mount`.
const MOUNTS: &str = "\"auto\", \"erofs\" or \"fuse\"";

fn checked_layers(check: &mut Check, section: Section<LayersFile>, default: LayersConfig) -> LayersConfig {
    let LayersFile {
        lazy,
        mount,
        mount_timeout,
        restore_parallelism,
        unknown,
    } = check.enter("layers", section);
    check.note_unknown(unknown);
    LayersConfig {
        lazy: check.switch("lazy", lazy, default.lazy),
        mount: check.text("mount", mount, MOUNTS, default.mount, MountChoice::named),
        mount_timeout: check.duration("mount_timeout", mount_timeout, default.mount_timeout, SECONDS),
        restore_parallelism: check.count(
            "restore_parallelism",
            restore_parallelism,
            default.restore_parallelism,
            1..=64,
        ),
    }
}

fn checked_registry(check: &mut Check, section: Section<RegistryFile>, default: RegistryConfig) -> RegistryConfig {
    let RegistryFile {
        hosts_directory,
        plain_http,
        ca_file,
        credentials_file,
        docker_config,
        credential_provider_config,
        credential_provider_bin_dir,
        connect_timeout,
        stall_timeout,
        unknown,
    } = check.enter("registry", section);
    check.note_unknown(unknown);
    let registry = RegistryConfig {
        hosts_directory: checked_hosts_directory(check, hosts_directory, default.hosts_directory),
        plain_http: check.texts("plain_http", plain_http, HOSTS, default.plain_http, is_host),
        ca_file: checked_ca_file(check, ca_file, default.ca_file),
        credentials_file: checked_credentials_file(check, credentials_file, default.credentials_file),
        docker_config: optional_path(check, "docker_config", docker_config, FILE, default.docker_config),
        credential_provider_config: optional_path(
            check,
            "credential_provider_config",
            credential_provider_config,
            FILE,
            default.credential_provider_config,
        ),
        credential_provider_bin_dir: optional_path(
            check,
            "credential_provider_bin_dir",
            credential_provider_bin_dir,
            DIRECTORY,
            default.credential_provider_bin_dir,
        ),
        connect_timeout: check.duration("connect_timeout", connect_timeout, default.connect_timeout, SECONDS),
        stall_timeout: check.duration("stall_timeout", stall_timeout, default.stall_timeout, SECONDS),
    };
    check_providers(check, &registry);
    registry
}

/// Either both or none, and the configuration must be one: it shows at the start and not at the first pull.
fn check_providers(check: &mut Check, registry: &RegistryConfig) {
    let (key, shown, allowed) = match (
        &registry.credential_provider_config,
        &registry.credential_provider_bin_dir,
    ) {
        (None, None) => return,
        (Some(config), Some(programs)) => {
            let Err(error) = hullspeed_registry::Providers::new(config, programs).check() else {
                return;
            };
            let allowed = format!("a CredentialProviderConfig of the kubelet's ({})", chain(&error));
            ("credential_provider_config", quoted(config), allowed)
        }
        (Some(config), None) => (
            "credential_provider_config",
            quoted(config),
            "set together with registry.credential_provider_bin_dir".to_owned(),
        ),
        (None, Some(programs)) => (
            "credential_provider_bin_dir",
            quoted(programs),
            "set together with registry.credential_provider_config".to_owned(),
        ),
    };
    check.fault(key, shown, allowed);
}

fn checked_hosts_directory(check: &mut Check, value: Option<Value>, default: Option<PathBuf>) -> Option<PathBuf> {
    let path = optional_path(check, "hosts_directory", value, DIRECTORY, default)?;
    if path.exists() && !path.is_dir() {
        check.fault(
            "hosts_directory",
            quoted(&path),
            format!("{DIRECTORY} (not a directory)"),
        );
    }
    Some(path)
}

fn checked_credentials_file(check: &mut Check, value: Option<Value>, default: Option<PathBuf>) -> Option<PathBuf> {
    let path = optional_path(check, "credentials_file", value, FILE, default)?;
    if let Err(error) = hullspeed_registry::check_credentials_file(&path) {
        check.fault("credentials_file", quoted(&path), format!("{FILE} ({})", chain(&error)));
    }
    Some(path)
}

fn optional_path(
    check: &mut Check,
    key: &'static str,
    value: Option<Value>,
    allowed: &str,
    default: Option<PathBuf>,
) -> Option<PathBuf> {
    check.text(key, value, allowed, default, |text| match text {
        "" => Some(None),
        text => Path::new(text).is_absolute().then(|| Some(PathBuf::from(text))),
    })
}

fn quoted(path: &Path) -> String {
    Value::String(path.display().to_string()).to_string()
}

fn is_host(text: &str) -> bool {
    !text.is_empty() && !text.contains(['/', '@']) && !text.contains(char::is_whitespace)
}

fn checked_fetch(check: &mut Check, section: Section<FetchFile>, default: FetchConfig) -> FetchConfig {
    let FetchFile {
        max_requests,
        read_around,
        max_range,
        prefetch,
        read_deadline,
        background,
        background_bandwidth,
        background_delay,
        background_deadline,
        unknown,
    } = check.enter("fetch", section);
    check.note_unknown(unknown);
    let fetch = FetchConfig {
        max_requests: check.count("max_requests", max_requests, default.max_requests, 1..=256),
        read_around: check.size(
            "read_around",
            read_around,
            default.read_around,
            (ByteSize::kib(4), ByteSize::mib(64)),
        ),
        max_range: check.size(
            "max_range",
            max_range,
            default.max_range,
            (ByteSize::kib(64), ByteSize::mib(256)),
        ),
        prefetch: check.switch("prefetch", prefetch, default.prefetch),
        read_deadline: check.duration("read_deadline", read_deadline, default.read_deadline, SECONDS),
        background: check.switch("background", background, default.background),
        background_bandwidth: check.size(
            "background_bandwidth",
            background_bandwidth,
            default.background_bandwidth,
            (ByteSize::kib(0), ByteSize::mib(1 << 20)),
        ),
        background_delay: check.duration("background_delay", background_delay, default.background_delay, DELAY),
        background_deadline: check.duration(
            "background_deadline",
            background_deadline,
            default.background_deadline,
            DEADLINE,
        ),
    };
    if fetch.read_around > fetch.max_range {
        let allowed = format!("at most fetch.max_range, which is {}", fetch.max_range);
        check.fault("read_around", fetch.read_around.to_string(), allowed);
    }
    fetch
}

fn checked_cache(check: &mut Check, section: Section<CacheFile>, default: CacheConfig) -> CacheConfig {
    let CacheFile {
        checkpoint_interval,
        quota,
        min_free,
        unknown,
    } = check.enter("cache", section);
    check.note_unknown(unknown);
    let interval = check.duration(
        "checkpoint_interval",
        checkpoint_interval,
        default.checkpoint_interval,
        CHECKPOINT,
    );
    CacheConfig {
        checkpoint_interval: interval,
        quota: check.text("quota", quota, AMOUNTS, default.quota, |text| text.parse().ok()),
        min_free: check.text("min_free", min_free, AMOUNTS, default.min_free, |text| {
            text.parse().ok()
        }),
    }
}

fn checked_fuse(check: &mut Check, section: Section<FuseFile>, default: FuseConfig) -> FuseConfig {
    let FuseFile {
        workers,
        max_background,
        passthrough,
        read_ahead,
        unknown,
    } = check.enter("fuse", section);
    check.note_unknown(unknown);
    FuseConfig {
        workers: check.count("workers", workers, default.workers, 1..=64),
        max_background: check.count("max_background", max_background, default.max_background, 1..=1024),
        passthrough: check.switch("passthrough", passthrough, default.passthrough),
        read_ahead: check.size(
            "read_ahead",
            read_ahead,
            default.read_ahead,
            (ByteSize::kib(4), ByteSize::mib(16)),
        ),
    }
}

fn checked_root(check: &mut Check, value: Option<Value>, default: PathBuf) -> PathBuf {
    let allowed = "an absolute path without : , \\ \" or a line break";
    check.text("root", value, allowed, default, |text| {
        usable_root(Path::new(text)).then(|| PathBuf::from(text))
    })
}

/// The file is read here, so that one that is missing or no PEM shows at the start and not at the first pull.
fn checked_ca_file(check: &mut Check, value: Option<Value>, default: Option<PathBuf>) -> Option<PathBuf> {
    let allowed = "the absolute path of a PEM file of certificates, or \"\" for none";
    let path = optional_path(check, "ca_file", value, allowed, default)?;
    if let Err(error) = hullspeed_registry::check_ca_file(&path) {
        // The error's own text says only that setting up a client failed.
        let reason = chain(error.fault());
        check.fault("ca_file", quoted(&path), format!("{allowed} ({reason})"));
    }
    Some(path)
}

const FILE: &str = "the absolute path of a file, or \"\" for none";
const DIRECTORY: &str = "the absolute path of a directory, or \"\" for none";
const AMOUNTS: &str = "a size such as \"20GiB\", or a share of the filesystem such as \"40%\"";
const HOSTS: &str = "a list of hosts such as [\"registry.local:5000\"]";
const SECONDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(600));
const DELAY: (Duration, Duration) = (Duration::ZERO, Duration::from_secs(24 * 3600));
const DEADLINE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30 * 24 * 3600));
const CHECKPOINT: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(600));
