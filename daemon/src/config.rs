//! Reading a daemon's configuration.
//!
//! A file is read into a struct that accepts anything that is TOML ([`File`]), and turned into a configuration whose
//! values are all usable by way of a [`Check`]; every fault of the file is reported at once.

use std::fmt;
use std::io::{self, Read as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use toml::Value;

pub use check::Check;
pub use section::{LogFile, MetricsFile, Section, Unknown};

mod check;
mod section;
#[cfg(test)]
mod tests;
pub mod written;

/// Longest file accepted.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// A configuration file as it is written: every key optional, every value of any type.
pub trait File: DeserializeOwned {
    /// What it becomes.
    type Config;

    /// Replaces a value. A section that is not one keeps its fault.
    fn set(&mut self, key: Override, value: Value);

    /// The configuration that its good values make; faults and unknown keys go to `check`.
    fn check(self, check: &mut Check) -> Self::Config;
}

/// `[log]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogConfig {
    /// A level, or a filter in the syntax of `RUST_LOG`.
    pub level: String,
    /// Form of the lines.
    pub format: LogFormat,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            level: "info".to_owned(),
            format: LogFormat::Json,
        }
    }
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// For people.
    Text,
}

impl LogFormat {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Text => "text",
        }
    }
}

/// `[metrics]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MetricsConfig {
    /// Address of `/metrics` and `/healthz`; none switches them off.
    pub address: Option<SocketAddr>,
    /// The address was asked for; a default one that is taken is done without.
    pub explicit: bool,
}

impl MetricsConfig {
    /// The default of a daemon: this port of the loopback interface.
    #[must_use]
    pub fn at_port(port: u16) -> Self {
        Self {
            address: Some(SocketAddr::from(([127, 0, 0, 1], port))),
            explicit: false,
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
    #[must_use]
    pub fn of(text: &str, byte: usize) -> Self {
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
pub struct Loaded<C> {
    /// The configuration.
    pub config: C,
    /// Keys of the file that mean nothing, with the section they are in.
    pub unknown: Vec<String>,
}

impl<C> Loaded<C> {
    /// Logs what was odd.
    pub fn warn(&self) {
        for key in &self.unknown {
            tracing::warn!(key, "unknown key in the configuration is ignored");
        }
    }

    /// What `check-config` prints: what was odd as comments, then the configuration, `written` as a file.
    #[must_use]
    pub fn checked(&self, written: &str) -> String {
        let lines = self
            .unknown
            .iter()
            .map(|key| format!("# warning: {key} is unknown and ignored\n"));
        lines.collect::<String>() + written
    }
}

/// Reads the configuration from the file that `sources` name, or from `default` if that exists.
pub fn load<F: File>(default: &Path, sources: &Sources) -> Result<Loaded<F::Config>, ConfigError> {
    let path = sources.file.as_deref().unwrap_or(default);
    let text = match read(path) {
        Err(ConfigError::Read { source, .. }) if sources.file.is_none() && source.kind() == io::ErrorKind::NotFound => {
            String::new()
        }
        read => read?,
    };
    parse::<F>(path, &text, sources)
}

/// The text of a file that is no longer than any configuration.
pub fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        source,
    };
    let mut text = String::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    let length = file
        .take(MAX_FILE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if u64::try_from(length).unwrap_or(u64::MAX) > MAX_FILE_BYTES {
        return Err(ConfigError::TooLong { path: path.to_owned() });
    }
    Ok(text)
}

/// Makes the configuration of a text; `path` is for messages.
pub fn parse<F: File>(path: &Path, text: &str, sources: &Sources) -> Result<Loaded<F::Config>, ConfigError> {
    let mut file: F = toml::from_str(text).map_err(|error| ConfigError::Syntax {
        path: path.to_owned(),
        place: Place::of(text, error.span().map_or(0, |span| span.start)),
        // What was expected follows on a line of its own.
        reason: error.message().lines().collect::<Vec<_>>().join(", "),
    })?;
    for (key, value) in &sources.overrides {
        file.set(*key, Value::String(value.clone()));
    }
    let mut check = Check::default();
    let config = file.check(&mut check);
    let (mut faults, unknown) = check.into_outcome();
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
