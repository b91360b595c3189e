//! Reading a configuration file, with a small one of its own.

use std::path::Path;

use serde::Deserialize;
use toml::Value;

use super::*;
use crate::error::chain;
use crate::section;
use crate::units::ByteSize;

section!(SizesFile { limit, names });

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct SmallFile {
    root: Option<Value>,
    socket: Option<Value>,
    log: Section<LogFile>,
    sizes: Section<SizesFile>,
    #[serde(flatten)]
    unknown: Unknown,
}

#[derive(Debug, PartialEq)]
struct Small {
    root: String,
    socket: PathBuf,
    log: LogConfig,
    limit: ByteSize,
    names: Vec<String>,
}

impl File for SmallFile {
    type Config = Small;

    fn set(&mut self, key: Override, value: Value) {
        match key {
            Override::Root => self.root = Some(value),
            Override::Socket => self.socket = Some(value),
            Override::LogLevel | Override::LogFormat => self.log.set(key, value),
        }
    }

    fn check(self, check: &mut Check) -> Small {
        check.note_unknown(self.unknown);
        let root = |text: &str| text.starts_with('/').then(|| text.to_owned());
        Small {
            root: check.text("root", self.root, "absolute", "/d".to_owned(), root),
            socket: check.socket("socket", self.socket, "/d/s".into()),
            log: check.log(self.log, LogConfig::default()),
            limit: {
                let SizesFile { limit, names, unknown } = check.enter("sizes", self.sizes);
                check.note_unknown(unknown);
                let names = check.texts("names", names, "names", Vec::new(), |name| !name.is_empty());
                assert!(names.iter().all(|name| !name.is_empty()));
                check.size("limit", limit, ByteSize::kib(1), (ByteSize::kib(1), ByteSize::mib(1)))
            },
            names: Vec::new(),
        }
    }
}

fn parsed(text: &str) -> Result<Loaded<Small>, ConfigError> {
    parse::<SmallFile>(Path::new("test.toml"), text, &Sources::default())
}

#[test]
fn a_value_of_any_wrong_type_is_one_fault_among_others() {
    let text = "root = 5\nsocket = \"s\"\nlog = 1\n[sizes]\nlimit = \"2MiB\"\nnames = [\"\"]\n";
    let Err(ConfigError::Faults { faults, .. }) = parsed(text) else {
        panic!("accepted")
    };
    let keys: Vec<_> = faults.iter().map(|fault| fault.key.as_str()).collect();
    assert_eq!(keys, ["root", "socket", "log", "sizes.names", "sizes.limit"]);
    let long = format!("socket = \"/{}\"", "x".repeat(90));
    assert!(parsed(&long).is_err());
}

#[test]
fn the_command_line_sets_every_override() {
    let overrides = [
        (Override::Root, "/other"),
        (Override::Socket, "/s"),
        (Override::LogLevel, "warn"),
        (Override::LogFormat, "text"),
    ];
    let sources = Sources {
        overrides: overrides.map(|(key, value)| (key, value.to_owned())).into(),
        ..Sources::default()
    };
    let loaded = parse::<SmallFile>(Path::new("t"), "root = \"bad\"\nodd = 1", &sources).unwrap();
    assert_eq!(
        (loaded.config.root.as_str(), loaded.config.socket),
        ("/other", PathBuf::from("/s"))
    );
    assert_eq!(loaded.config.log.level, "warn");
    assert_eq!(loaded.config.log.format, LogFormat::Text);
    assert_eq!(loaded.unknown, ["odd"]);
}

#[test]
fn a_syntax_error_is_one_line_with_its_place() {
    for (text, start) in [
        ("root = \n", "test.toml:1:8: "),
        ("root = \"/r\"\n[log\nlevel = 1", "test.toml:2:5: "),
        ("# é\n\nrööt = 1", "test.toml:3:2: "),
        ("root = 1\nroot = 2", "test.toml:2:1: "),
        ("root = \"", "test.toml:1:9: "),
    ] {
        let said = chain(&parsed(text).unwrap_err());
        assert!(said.starts_with(start) && said.lines().count() == 1, "{text:?}: {said}");
        assert!(said.len() > start.len() + 10, "{said}");
    }
}

#[test]
fn a_fault_is_one_line_whatever_the_value() {
    let said = parsed("root = \"\"\"a\nb\nc\"\"\"\n").unwrap_err().to_string();
    assert_eq!(said.lines().count(), 1, "{said}");
}

#[test]
fn a_missing_file_matters_only_if_it_was_named() {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("none.toml");
    let sources = Sources {
        file: Some(file.clone()),
        ..Sources::default()
    };
    assert!(matches!(
        load::<SmallFile>(Path::new("/nonexistent"), &sources),
        Err(ConfigError::Read { .. })
    ));
    std::fs::write(&file, "root = ").unwrap();
    assert!(matches!(
        load::<SmallFile>(Path::new("/nonexistent"), &sources),
        Err(ConfigError::Syntax { .. })
    ));
    std::fs::write(&file, " ".repeat((1 << 20) + 1)).unwrap();
    assert!(matches!(
        load::<SmallFile>(Path::new("/nonexistent"), &sources),
        Err(ConfigError::TooLong { .. })
    ));
    std::fs::write(&file, "root = \"/x\"").unwrap();
    assert_eq!(
        load::<SmallFile>(Path::new("/nonexistent"), &sources)
            .unwrap()
            .config
            .root,
        "/x"
    );
}
