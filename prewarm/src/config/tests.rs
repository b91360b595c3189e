//! The configuration from its text: every key, every fault, and the documents that describe it.

use std::collections::BTreeSet;

use hullspeed_daemon::config::LogFormat;
use toml::Value;

use super::*;

fn parsed(text: &str) -> Result<Loaded<Config>, ConfigError> {
    hullspeed_daemon::config::parse::<ConfigFile>(Path::new("test.toml"), text, &Sources::default())
}

/// All keys of a file, with their sections.
fn keys(text: &str) -> BTreeSet<String> {
    let table: toml::Table = text.parse().unwrap();
    let mut keys = BTreeSet::new();
    for (key, value) in table {
        match value {
            Value::Table(section) => keys.extend(section.keys().map(|inner| format!("{key}.{inner}"))),
            _ => drop(keys.insert(key)),
        }
    }
    keys
}

/// The default, as a file in which every key stands gives it.
fn written_default() -> Loaded<Config> {
    let mut config = Config::default();
    config.metrics.explicit = true;
    Loaded {
        config,
        unknown: Vec::new(),
    }
}

#[test]
fn the_written_form_gives_the_same_configuration() {
    assert_eq!(parsed(&Config::default().to_toml()).unwrap(), written_default());
    assert_eq!(parsed("").unwrap().config, Config::default());
    let mut config = Config::default();
    config.warm.policy = None;
    config.metrics.explicit = true;
    config.metrics.address = None;
    config.pool.handlers = vec!["run\"c".to_owned(), String::new()];
    config.cni.verdict = CniVerdict::Deny;
    config.adoption.run_as = RunAs::Strict;
    assert_eq!(parsed(&config.to_toml()).unwrap().config, config);
}

const EVERY_KEY: &str = r#"
    root = "/r"
    state = "/t"
    socket = "/s/s.sock"
    control_socket = "/s/c.sock"
    stop_timeout = "3s"
    [log]
    level = "warn"
    format = "text"
    [metrics]
    address = ""
    [containerd]
    address = "/c.sock"
    [relay]
    max_connections = 5
    max_parallel = 101
    max_gathered = "33MiB"
    [pool]
    enabled = false
    handlers = ["kata", ""]
    min = 1
    max = 3
    max_memory = "17MiB"
    ip_headroom = 4
    demand_window = "6s"
    release_interval = "7s"
    refill_quiet = "0s"
    refill_deferral = "8s"
    refill_interval = "9ms"
    refill_parallel = 10
    creation_timeout = "11s"
    start_timeout = "12s"
    sweep_interval = "13s"
    cgroup = "hulls_1"
    allow_nri = true
    [cni]
    allow = ["mine"]
    override = "allow"
    [adoption]
    enabled = false
    privileged = false
    run_as = "strict"
    sysctls = false
    [events]
    supply = "off"
    [warm]
    policy = "/w.toml"
    snapshotter = "/n.sock"
    max_parallel = 14
    resolve_interval = "15s"
    credentials = false
"#;

#[test]
fn every_value_is_taken_over() {
    let config = parsed(EVERY_KEY).unwrap().config;
    let second = Duration::from_secs(1);
    let expected = Config {
        root: "/r".into(),
        state: "/t".into(),
        socket: "/s/s.sock".into(),
        control_socket: "/s/c.sock".into(),
        stop_timeout: 3 * second,
        log: LogConfig {
            level: "warn".to_owned(),
            format: LogFormat::Text,
        },
        metrics: MetricsConfig {
            address: None,
            explicit: true,
        },
        containerd: ContainerdConfig {
            address: "/c.sock".into(),
        },
        relay: RelayConfig {
            max_connections: 5,
            max_parallel: 101,
            max_gathered: ByteSize::mib(33),
        },
        pool: PoolConfig {
            enabled: false,
            handlers: vec!["kata".to_owned(), String::new()],
            min: 1,
            max: 3,
            max_memory: ByteSize::mib(17),
            ip_headroom: 4,
            demand_window: 6 * second,
            release_interval: 7 * second,
            refill_quiet: Duration::ZERO,
            refill_deferral: 8 * second,
            refill_interval: Duration::from_millis(9),
            refill_parallel: 10,
            creation_timeout: 11 * second,
            start_timeout: 12 * second,
            sweep_interval: 13 * second,
            cgroup: "hulls_1".to_owned(),
            allow_nri: true,
        },
        cni: CniConfig {
            allow: vec!["mine".to_owned()],
            verdict: CniVerdict::Allow,
        },
        adoption: AdoptionConfig {
            enabled: false,
            privileged: false,
            run_as: RunAs::Strict,
            sysctls: false,
        },
        events: EventsConfig { supply: Supply::Off },
        warm: WarmConfig {
            policy: Some("/w.toml".into()),
            snapshotter: "/n.sock".into(),
            max_parallel: 14,
            resolve_interval: 15 * second,
            credentials: false,
        },
    };
    assert_eq!(config, expected);
    assert_eq!(
        keys(EVERY_KEY),
        keys(&config.to_toml()),
        "a key is missing in this test"
    );
}

#[test]
fn all_faults_are_reported_at_once() {
    // Every value of another type than any key accepts.
    let wrong = EVERY_KEY.lines().map(|line| match line.split_once(" = ") {
        Some((key, _)) => format!("{key} = 1.5\n"),
        None => format!("{line}\n"),
    });
    let Err(ConfigError::Faults { faults, .. }) = parsed(&wrong.collect::<String>()) else {
        panic!("accepted")
    };
    let found: BTreeSet<_> = faults.iter().map(|fault| fault.key.clone()).collect();
    assert_eq!(found, keys(EVERY_KEY));
}

#[test]
fn values_out_of_bounds_are_faults() {
    for (text, key) in [
        ("root = \"relative\"", "root"),
        ("state = \"/a\\nb\"", "state"),
        ("socket = \"/run/containerd/containerd.sock\"", "socket"),
        ("socket = \"/run/hullspeed/prewarm.sock\"", "socket"),
        ("control_socket = \"/run/hullspeed/snapshotter.sock\"", "control_socket"),
        ("relay = 1", "relay"),
        ("relay.max_parallel = 99", "relay.max_parallel"),
        ("relay.max_gathered = \"31MiB\"", "relay.max_gathered"),
        ("pool.min = 11", "pool.min"),
        ("pool.max = 257", "pool.max"),
        ("pool.handlers = []", "pool.handlers"),
        ("pool.handlers = [\"a\", \"a\"]", "pool.handlers"),
        ("pool.handlers = [\"a b\"]", "pool.handlers"),
        ("pool.cgroup = \"a/../b\"", "pool.cgroup"),
        ("pool.cgroup = \"a-b\"", "pool.cgroup"),
        ("pool.cgroup = \"\"", "pool.cgroup"),
        ("pool.refill_quiet = \"2m\"", "pool.refill_quiet"),
        ("cni.allow = [\"../x\"]", "cni.allow"),
        ("cni.override = \"yes\"", "cni.override"),
        ("adoption.run_as = \"Strict\"", "adoption.run_as"),
        ("events.supply = \"on\"", "events.supply"),
        ("warm.policy = \"warm.toml\"", "warm.policy"),
    ] {
        let Err(ConfigError::Faults { faults, .. }) = parsed(text) else {
            panic!("accepted: {text}")
        };
        let found: Vec<_> = faults.iter().map(|fault| fault.key.as_str()).collect();
        assert_eq!(found, [key], "{text}");
    }
}

#[test]
fn the_documented_keys_and_defaults_are_the_real_ones() {
    let document = include_str!("../../../docs/prewarm-configuration.md");
    // Rows look like: | `pool.min` | `2` | … |
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `"));
    let documented = rows.map(|row| {
        let mut cells = row.split('`');
        let (key, default) = (cells.next().unwrap(), cells.nth(1).unwrap());
        format!("{key} = {default}\n")
    });
    let text = documented.collect::<String>();
    // Dotted keys before sections are the same document to TOML.
    assert_eq!(keys(&text), keys(&Config::default().to_toml()));
    assert_eq!(parsed(&text).unwrap(), written_default());
}

#[test]
fn the_sample_file_is_valid() {
    let sample = include_str!("../../../deploy/hullspeed/prewarm.toml");
    let loaded = parsed(sample).unwrap();
    assert_eq!((loaded.config, loaded.unknown), (Config::default(), Vec::new()));
    // Every key is in it, commented out with its default.
    let lines = sample.lines().map(|line| {
        let rest = line.strip_prefix('#').filter(|rest| !rest.starts_with(' '));
        format!("{}\n", rest.unwrap_or(line))
    });
    let uncommented = lines.collect::<String>();
    assert_eq!(parsed(&uncommented).unwrap(), written_default());
    assert_eq!(keys(&uncommented), keys(&Config::default().to_toml()));
}

#[test]
fn the_socket_unit_makes_the_default_socket() {
    let unit = include_str!("../../../deploy/systemd/hullspeed-prewarm.socket");
    let socket = format!("ListenStream={}", Config::default().socket.display());
    assert!(unit.lines().any(|line| line == socket));
    // The name under which the daemon looks for it.
    assert!(unit.lines().any(|line| line == "FileDescriptorName=cri"));
}
