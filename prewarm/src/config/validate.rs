//! From [`ConfigFile`] to [`Config`]: each struct is taken apart completely, so a new key cannot be forgotten here.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hullspeed_daemon::config::{Check, File, Override, Section};
use hullspeed_daemon::units::ByteSize;
use toml::Value;

use super::file::{AdoptionFile, CniFile, ConfigFile, ContainerdFile, EventsFile, PoolFile, RelayFile, WarmFile};
use super::{
    AdoptionConfig, CniConfig, CniVerdict, Config, ContainerdConfig, EventsConfig, PoolConfig, RelayConfig, RunAs,
    Supply, WarmConfig,
};

const fn seconds(least: u64, most: u64) -> (Duration, Duration) {
    (Duration::from_secs(least), Duration::from_secs(most))
}

const TIMEOUT: (Duration, Duration) = seconds(1, 600);
const PACE: (Duration, Duration) = seconds(0, 60);
const WINDOW: (Duration, Duration) = seconds(1, 86_400);

/// Handlers are a label of metrics, so there are not many.
const MAX_HANDLERS: usize = 16;

/// As containerd's table of handlers and Kubernetes' RuntimeClass have it.
const MAX_HANDLER_NAME: usize = 253;

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
            state,
            socket,
            control_socket,
            stop_timeout,
            log,
            metrics,
            containerd,
            relay,
            pool,
            cni,
            adoption,
            events,
            warm,
            unknown,
        } = self;
        let default = Config::default();
        check.note_unknown(unknown);
        let config = Config {
            root: directory(check, "root", root, default.root),
            state: directory(check, "state", state, default.state),
            socket: check.socket("socket", socket, default.socket),
            control_socket: check.socket("control_socket", control_socket, default.control_socket),
            stop_timeout: check.duration("stop_timeout", stop_timeout, default.stop_timeout, TIMEOUT),
            log: check.log(log, default.log),
            metrics: check.metrics(metrics, default.metrics),
            containerd: checked_containerd(check, containerd, default.containerd),
            relay: checked_relay(check, relay, default.relay),
            pool: checked_pool(check, pool, default.pool),
            cni: checked_cni(check, cni, default.cni),
            adoption: checked_adoption(check, adoption, default.adoption),
            events: checked_events(check, events, default.events),
            warm: checked_warm(check, warm, default.warm),
        };
        check_sockets(check, &config);
        config
    }
}

/// A relay that calls itself would go round for ever.
fn check_sockets(check: &mut Check, config: &Config) {
    check.leave();
    let others = [
        ("containerd.address", &config.containerd.address),
        ("warm.snapshotter", &config.warm.snapshotter),
        ("control_socket", &config.control_socket),
    ];
    let same = |path: &Path| others.iter().find(|(_, other)| other.as_path() == path);
    if let Some((other, path)) = same(&config.socket) {
        check.fault("socket", shown(path), format!("another socket than {other}"));
    }
    let control = &config.control_socket;
    if *control == config.containerd.address || *control == config.warm.snapshotter {
        let allowed = "a socket of its own".to_owned();
        check.fault("control_socket", shown(control), allowed);
    }
}

fn shown(path: &Path) -> String {
    Value::String(path.display().to_string()).to_string()
}

fn directory(check: &mut Check, key: &'static str, value: Option<Value>, default: PathBuf) -> PathBuf {
    check.text(key, value, "an absolute path", default, |text| {
        (Path::new(text).is_absolute() && !text.contains(char::is_control)).then(|| PathBuf::from(text))
    })
}

fn checked_containerd(
    check: &mut Check,
    section: Section<ContainerdFile>,
    default: ContainerdConfig,
) -> ContainerdConfig {
    let ContainerdFile { address, unknown } = check.enter("containerd", section);
    check.note_unknown(unknown);
    ContainerdConfig {
        address: check.socket("address", address, default.address),
    }
}

fn checked_relay(check: &mut Check, section: Section<RelayFile>, default: RelayConfig) -> RelayConfig {
    let RelayFile {
        max_connections,
        max_parallel,
        max_gathered,
        unknown,
    } = check.enter("relay", section);
    check.note_unknown(unknown);
    RelayConfig {
        max_connections: check.count("max_connections", max_connections, default.max_connections, 4..=4096),
        max_parallel: check.count("max_parallel", max_parallel, default.max_parallel, 100..=65_536),
        max_gathered: check.size(
            "max_gathered",
            max_gathered,
            default.max_gathered,
            (ByteSize::mib(32), ByteSize::mib(1024)),
        ),
    }
}

fn checked_pool(check: &mut Check, section: Section<PoolFile>, default: PoolConfig) -> PoolConfig {
    let PoolFile {
        enabled,
        handlers,
        min,
        max,
        max_memory,
        ip_headroom,
        demand_window,
        release_interval,
        refill_quiet,
        refill_deferral,
        refill_interval,
        refill_parallel,
        creation_timeout,
        start_timeout,
        sweep_interval,
        cgroup,
        allow_nri,
        unknown,
    } = check.enter("pool", section);
    check.note_unknown(unknown);
    let memory = (ByteSize::mib(16), ByteSize::mib(65_536));
    let parallel = check.count("refill_parallel", refill_parallel, default.refill_parallel, 1..=16);
    let pool = PoolConfig {
        enabled: check.switch("enabled", enabled, default.enabled),
        handlers: checked_handlers(check, handlers, default.handlers),
        min: check.count("min", min, default.min, 0..=256),
        max: check.count("max", max, default.max, 1..=256),
        max_memory: check.size("max_memory", max_memory, default.max_memory, memory),
        ip_headroom: check.count("ip_headroom", ip_headroom, default.ip_headroom, 0..=65_536),
        demand_window: check.duration("demand_window", demand_window, default.demand_window, WINDOW),
        release_interval: check.duration("release_interval", release_interval, default.release_interval, WINDOW),
        refill_quiet: check.duration("refill_quiet", refill_quiet, default.refill_quiet, PACE),
        refill_deferral: check.duration("refill_deferral", refill_deferral, default.refill_deferral, TIMEOUT),
        refill_interval: check.duration("refill_interval", refill_interval, default.refill_interval, PACE),
        refill_parallel: parallel,
        creation_timeout: check.duration("creation_timeout", creation_timeout, default.creation_timeout, TIMEOUT),
        start_timeout: check.duration("start_timeout", start_timeout, default.start_timeout, TIMEOUT),
        sweep_interval: check.duration("sweep_interval", sweep_interval, default.sweep_interval, WINDOW),
        cgroup: checked_cgroup(check, cgroup, default.cgroup),
        allow_nri: check.switch("allow_nri", allow_nri, default.allow_nri),
    };
    if pool.min > pool.max {
        let allowed = format!("at most pool.max, which is {}", pool.max);
        check.fault("min", pool.min.to_string(), allowed);
    }
    pool
}

fn checked_handlers(check: &mut Check, value: Option<Value>, default: Vec<String>) -> Vec<String> {
    let allowed = "a list of runtime handlers such as [\"\", \"runc\"]; \"\" is containerd's default";
    let handlers = check.texts("handlers", value, allowed, default, |name| {
        name.len() <= MAX_HANDLER_NAME && !name.contains(|c: char| c.is_control() || c.is_whitespace())
    });
    let mut distinct = handlers.clone();
    distinct.sort_unstable();
    distinct.dedup();
    if handlers.is_empty() || handlers.len() > MAX_HANDLERS || distinct.len() < handlers.len() {
        let allowed = format!("1 to {MAX_HANDLERS} different handlers; pool.enabled = false switches all pools off");
        check.fault("handlers", format!("{handlers:?}"), allowed);
    }
    handlers
}

/// One component of a path: the parent's parent is the root, and systemd reads `-` in a slice's name as a level.
fn checked_cgroup(check: &mut Check, value: Option<Value>, default: String) -> String {
    let allowed = "a name of at most 64 letters, digits and underscores";
    check.text("cgroup", value, allowed, default, |text| {
        let plain = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        (plain && (1..=64).contains(&text.len())).then(|| text.to_owned())
    })
}

fn checked_cni(check: &mut Check, section: Section<CniFile>, default: CniConfig) -> CniConfig {
    let CniFile {
        allow,
        r#override,
        unknown,
    } = check.enter("cni", section);
    check.note_unknown(unknown);
    let types = "a list of types of CNI plugins such as [\"my-bridge\"]";
    let verdicts = "\"auto\", \"allow\" or \"deny\"";
    CniConfig {
        allow: check.texts("allow", allow, types, default.allow, |name| {
            // As a file in containerd's directory of plugins.
            !name.is_empty() && name.len() <= 255 && !name.contains(|c: char| c == '/' || c.is_control())
        }),
        verdict: check.text("override", r#override, verdicts, default.verdict, |text| match text {
            "auto" => Some(CniVerdict::Auto),
            "allow" => Some(CniVerdict::Allow),
            "deny" => Some(CniVerdict::Deny),
            _ => None,
        }),
    }
}

fn checked_adoption(check: &mut Check, section: Section<AdoptionFile>, default: AdoptionConfig) -> AdoptionConfig {
    let AdoptionFile {
        enabled,
        privileged,
        run_as,
        sysctls,
        unknown,
    } = check.enter("adoption", section);
    check.note_unknown(unknown);
    let choices = "\"eligible\" or \"strict\"";
    AdoptionConfig {
        enabled: check.switch("enabled", enabled, default.enabled),
        privileged: check.switch("privileged", privileged, default.privileged),
        run_as: check.text("run_as", run_as, choices, default.run_as, |text| match text {
            "eligible" => Some(RunAs::Eligible),
            "strict" => Some(RunAs::Strict),
            _ => None,
        }),
        sysctls: check.switch("sysctls", sysctls, default.sysctls),
    }
}

fn checked_events(check: &mut Check, section: Section<EventsFile>, default: EventsConfig) -> EventsConfig {
    let EventsFile { supply, unknown } = check.enter("events", section);
    check.note_unknown(unknown);
    EventsConfig {
        supply: check.text(
            "supply",
            supply,
            "\"auto\" or \"off\"",
            default.supply,
            |text| match text {
                "auto" => Some(Supply::Auto),
                "off" => Some(Supply::Off),
                _ => None,
            },
        ),
    }
}

fn checked_warm(check: &mut Check, section: Section<WarmFile>, default: WarmConfig) -> WarmConfig {
    let WarmFile {
        policy,
        snapshotter,
        max_parallel,
        resolve_interval,
        credentials,
        unknown,
    } = check.enter("warm", section);
    check.note_unknown(unknown);
    let file = "the absolute path of a file, or \"\" for none";
    WarmConfig {
        policy: check.text("policy", policy, file, default.policy, |text| match text {
            "" => Some(None),
            text => Path::new(text).is_absolute().then(|| Some(PathBuf::from(text))),
        }),
        snapshotter: check.socket("snapshotter", snapshotter, default.snapshotter),
        max_parallel: check.count("max_parallel", max_parallel, default.max_parallel, 1..=16),
        resolve_interval: check.duration("resolve_interval", resolve_interval, default.resolve_interval, WINDOW),
        credentials: check.switch("credentials", credentials, default.credentials),
    }
}
