//! The configuration from its text: every key, every fault, and the documents that describe it.

use std::collections::BTreeSet;

use hullspeed_daemon::config::{LogFormat, Override};
use toml::Value;

use super::*;

fn parse(path: &Path, text: &str, sources: &Sources) -> Result<Loaded<Config>, ConfigError> {
    hullspeed_daemon::config::parse::<ConfigFile>(path, text, sources)
}

/// A file that can be `registry.ca_file`.
const CA_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/ca.pem");

fn parsed(text: &str) -> Result<Loaded<Config>, ConfigError> {
    parse(Path::new("test.toml"), text, &Sources::default())
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

#[test]
fn the_written_form_gives_the_same_configuration() {
    let text = Config::default().to_toml();
    let mut loaded = parsed(&text).unwrap();
    assert!(loaded.config.metrics.explicit);
    loaded.config.metrics.explicit = false;
    assert_eq!(
        loaded,
        Loaded {
            config: Config::default(),
            unknown: Vec::new()
        }
    );
    assert_eq!(parsed("").unwrap().config, Config::default());
}

/// Files that can be `registry.credentials_file` and `registry.credential_provider_config`, and the program that the latter names.
fn files_of_logins(place: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    let logins = place.join("logins.toml");
    std::fs::write(&logins, "[login.'r.io']\nusername = 'u'\npassword = 'p'\n").unwrap();
    std::fs::set_permissions(&logins, std::fs::Permissions::from_mode(0o600)).unwrap();
    let providers = "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: helper\n  \
                     matchImages: ['*.io']\n  defaultCacheDuration: 1h\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n";
    std::fs::write(place.join("providers.yaml"), providers).unwrap();
    std::fs::write(place.join("helper"), "").unwrap();
}

#[test]
fn every_value_is_taken_over() {
    let text = r#"
        root = "/r"
        socket = "/s/s.sock"
        stop_timeout = "3s"
        [log]
        level = "warn,hullspeed_snapshotter=debug"
        format = "text"
        [metrics]
        address = ""
        [layers]
        lazy = false
        mount = "fuse"
        mount_timeout = "1m"
        restore_parallelism = 2
        [registry]
        hosts_directory = "/certs.d"
        plain_http = ["registry.local:5000"]
        ca_file = "CA_FILE"
        credentials_file = "PLACE/logins.toml"
        docker_config = "/config.json"
        credential_provider_config = "PLACE/providers.yaml"
        credential_provider_bin_dir = "PLACE"
        connect_timeout = "4s"
        stall_timeout = "5s"
        [fetch]
        max_requests = 3
        read_around = "1MiB"
        max_range = "2MiB"
        prefetch = false
        read_deadline = "9s"
        background = false
        background_bandwidth = "3MiB"
        background_delay = "4s"
        background_deadline = "2h"
        [cache]
        checkpoint_interval = "250ms"
        quota = "30GiB"
        min_free = "12%"
        [fuse]
        workers = 1
        max_background = 12
        passthrough = false
        read_ahead = "128KiB"
    "#
    .replace("CA_FILE", CA_FILE);
    let place = tempfile::tempdir().unwrap();
    files_of_logins(place.path());
    let text = text.replace("PLACE", place.path().to_str().unwrap());
    let config = parsed(&text).unwrap().config;
    let Config {
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
    } = config.clone();
    assert_eq!((root, socket), (PathBuf::from("/r"), PathBuf::from("/s/s.sock")));
    assert_eq!(stop_timeout, Duration::from_secs(3));
    assert_eq!(log.level, "warn,hullspeed_snapshotter=debug");
    assert_eq!(
        (log.format, metrics.address, layers.lazy),
        (LogFormat::Text, None, false)
    );
    assert_eq!(layers.mount, MountChoice::Fuse);
    assert_eq!(
        (layers.mount_timeout, layers.restore_parallelism),
        (Duration::from_secs(60), 2)
    );
    assert_eq!(
        (registry.plain_http, registry.ca_file),
        (vec!["registry.local:5000".to_owned()], Some(CA_FILE.into()))
    );
    assert_eq!(
        (registry.hosts_directory, registry.docker_config),
        (Some("/certs.d".into()), Some("/config.json".into()))
    );
    assert_eq!(registry.credentials_file, Some(place.path().join("logins.toml")));
    assert_eq!(
        (
            registry.credential_provider_config,
            registry.credential_provider_bin_dir
        ),
        (Some(place.path().join("providers.yaml")), Some(place.path().to_owned()))
    );
    assert_eq!(
        (registry.connect_timeout, registry.stall_timeout),
        (Duration::from_secs(4), Duration::from_secs(5))
    );
    assert_eq!(
        (fetch.max_requests, fetch.read_around, fetch.max_range),
        (3, ByteSize::mib(1), ByteSize::mib(2))
    );
    assert!(!fetch.prefetch && !fetch.background);
    assert_eq!(
        (fetch.read_deadline, fetch.background_bandwidth),
        (Duration::from_secs(9), ByteSize::mib(3))
    );
    assert_eq!(
        (fetch.background_delay, fetch.background_deadline),
        (Duration::from_secs(4), Duration::from_secs(7200))
    );
    assert_eq!(cache.checkpoint_interval, Duration::from_millis(250));
    assert_eq!(
        (cache.quota.to_string(), cache.min_free.to_string()),
        ("30GiB".to_owned(), "12%".to_owned())
    );
    assert_eq!(
        (fuse.workers, fuse.max_background, fuse.read_ahead),
        (1, 12, ByteSize::kib(128))
    );
    assert!(!fuse.passthrough);
    assert_eq!(keys(&text), keys(&config.to_toml()), "a key is missing in this test");
}

#[test]
fn all_faults_are_reported_at_once() {
    let text = r#"
        root = "relative"
        socket = 5
        stop_timeout = "10"
        cache = "big"
        [log]
        level = "loud=very=much"
        format = "xml"
        [metrics]
        address = "localhost"
        [layers]
        lazy = "yes"
        mount = "kernel"
        mount_timeout = "0s"
        restore_parallelism = 0
        [registry]
        plain_http = "host"
        ca_file = "ca.pem"
        [fetch]
        max_requests = -1
        read_around = "16MiB"
        max_range = "1MiB"
        [fuse]
        workers = 1000000000000
        max_background = 1.5
        read_ahead = "64"
    "#;
    let Err(ConfigError::Faults { faults, .. }) = parsed(text) else {
        panic!("accepted")
    };
    let found: BTreeSet<_> = faults.iter().map(|fault| fault.key.as_str()).collect();
    let expected = [
        "cache",
        "fetch.max_requests",
        "fetch.read_around",
        "fuse.max_background",
        "fuse.read_ahead",
        "fuse.workers",
        "layers.lazy",
        "layers.mount",
        "layers.mount_timeout",
        "layers.restore_parallelism",
        "log.format",
        "log.level",
        "metrics.address",
        "registry.ca_file",
        "registry.plain_http",
        "root",
        "socket",
        "stop_timeout",
    ];
    assert_eq!(found, BTreeSet::from(expected));
    let text = parsed(text).unwrap_err().to_string();
    assert_eq!(text.lines().count(), expected.len());
    assert!(
        text.contains("test.toml: layers.mount_timeout = \"0s\" must be a time from \"1s\" to \"10m\""),
        "{text}"
    );
    assert!(
        text.contains("test.toml: fuse.workers = 1000000000000 must be a whole number from 1 to 64"),
        "{text}"
    );
}

#[test]
fn a_file_of_authorities_that_cannot_be_used_is_a_fault_among_the_others() {
    let place = tempfile::tempdir().unwrap();
    let garbage = place.path().join("garbage");
    std::fs::write(&garbage, "not PEM").unwrap();
    let missing = place.path().join("missing\\n");
    for (path, why) in [
        (garbage.to_str().unwrap(), "no certificate"),
        (missing.to_str().unwrap(), "No such file"),
        (place.path().to_str().unwrap(), "not a regular file"),
    ] {
        let text = format!("root = \"relative\"\n[registry]\nca_file = \"{path}\"\n");
        let said = parsed(&text).unwrap_err().to_string();
        let lines: Vec<_> = said.lines().collect();
        assert_eq!(lines.len(), 2, "{said}");
        let place = place.path().to_str().unwrap();
        assert!(lines[1].starts_with("test.toml: registry.ca_file = "), "{said}");
        assert!(lines[1].contains(place) && lines[1].contains(why), "{said}");
    }
}

#[test]
fn files_of_logins_that_cannot_be_used_are_faults() {
    use std::os::unix::fs::PermissionsExt as _;
    let place = tempfile::tempdir().unwrap();
    files_of_logins(place.path());
    let path = |name: &str| place.path().join(name).display().to_string();
    let said = |key: &str, value: &str, more: &str| {
        let text = format!("[registry]\n{key} = \"{value}\"\n{more}");
        let said = parsed(&text).unwrap_err().to_string();
        assert!(
            said.lines().count() == 1 && said.contains(&format!("registry.{key} = ")),
            "{said}"
        );
        said
    };
    let open = std::fs::Permissions::from_mode(0o644);
    std::fs::set_permissions(path("logins.toml"), open).unwrap();
    assert!(said("credentials_file", &path("logins.toml"), "").contains("0600"));
    assert!(said("credentials_file", &path("absent"), "").contains("No such file"));
    said("credentials_file", "relative", "");
    said("docker_config", "relative", "");
    assert!(said("hosts_directory", &path("helper"), "").contains("not a directory"));
    let config = path("providers.yaml");
    assert!(said("credential_provider_config", &config, "").contains("registry.credential_provider_bin_dir"));
    assert!(said("credential_provider_bin_dir", "/bin", "").contains("registry.credential_provider_config"));
    let elsewhere = "credential_provider_bin_dir = \"/nonexistent\"\n";
    assert!(said("credential_provider_config", &config, elsewhere).contains("helper is not in /nonexistent"));
    let elsewhere = format!("credential_provider_bin_dir = \"{}\"\n", place.path().display());
    assert!(said("credential_provider_config", &path("logins.toml"), &elsewhere).contains("CredentialProviderConfig"));
}

#[test]
fn unknown_keys_are_named_and_refused_only_when_strict() {
    let text = "rot = 1\n[fuse]\nworker = 2\n[fuze]\nx = 1\n";
    assert_eq!(parsed(text).unwrap().unknown, ["fuze", "rot", "fuse.worker"]);
    let strict = Sources {
        strict: true,
        ..Sources::default()
    };
    let Err(ConfigError::Faults { faults, .. }) = parse(Path::new("t"), text, &strict) else {
        panic!("accepted")
    };
    assert_eq!(faults.len(), 3);
}

#[test]
fn the_command_line_overrides_the_file_and_is_checked_alike() {
    let overrides = vec![
        (Override::Root, "/other".to_owned()),
        (Override::LogFormat, "text".to_owned()),
    ];
    let sources = Sources {
        overrides,
        ..Sources::default()
    };
    let loaded = parse(Path::new("t"), "root = \"bad\"\n[log]\nlevel = \"warn\"", &sources).unwrap();
    assert_eq!(loaded.config.root, Path::new("/other"));
    assert_eq!(
        loaded.config.log,
        LogConfig {
            level: "warn".to_owned(),
            format: LogFormat::Text
        }
    );
    let sources = Sources {
        overrides: vec![(Override::Root, "a:b".to_owned())],
        ..Sources::default()
    };
    assert!(matches!(
        parse(Path::new("t"), "", &sources),
        Err(ConfigError::Faults { .. })
    ));
}

#[test]
fn the_documented_keys_and_defaults_are_the_real_ones() {
    let document = include_str!("../../../docs/configuration.md");
    // Rows look like: | `fuse.workers` | `4` | … |
    let mut documented = Vec::new();
    for row in document.lines().filter_map(|line| line.strip_prefix("| `")) {
        let mut cells = row.split('`');
        let (key, default) = (cells.next().unwrap(), cells.nth(1).unwrap());
        documented.push(format!("{key} = {default}"));
    }
    let text = documented.join("\n");
    assert_eq!(
        documented
            .iter()
            .map(|line| line.split(' ').next().unwrap().to_owned())
            .collect::<BTreeSet<_>>(),
        keys(&Config::default().to_toml())
    );
    // Dotted keys before sections are the same document to TOML.
    let mut loaded = parsed(&text).unwrap();
    loaded.config.metrics.explicit = false;
    assert_eq!(loaded.config, Config::default());
}

#[test]
fn the_sample_file_is_valid() {
    let sample = include_str!("../../../deploy/hullspeed/snapshotter.toml");
    let loaded = parsed(sample).unwrap();
    assert!(loaded.unknown.is_empty());
    // Every key is in it, commented out with its default.
    let uncommented: String = sample
        .lines()
        .map(|line| {
            line.strip_prefix('#')
                .filter(|rest| !rest.starts_with(' '))
                .unwrap_or(line)
        })
        .map(|line| format!("{line}\n"))
        .collect();
    let mut loaded = parsed(&uncommented).unwrap();
    loaded.config.metrics.explicit = false;
    assert_eq!(
        loaded,
        Loaded {
            config: Config::default(),
            unknown: Vec::new()
        }
    );
    assert_eq!(keys(&uncommented), keys(&Config::default().to_toml()));
}
