//! From values of a file to values that can be used.

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum as _;
use toml::Value;

use super::{Fault, LogConfig, LogFile, LogFormat, MetricsConfig, MetricsFile, Section, Unknown};
use crate::telemetry;
use crate::units::{self, ByteSize, display_duration};

/// A socket's path must fit `sockaddr_un`, with room for the temporary name it is bound under.
const MAX_SOCKET_PATH: usize = 90;

/// Characters of a value that are shown in its fault.
const MAX_SHOWN: usize = 200;

/// Collects faults and unknown keys while values are converted.
#[derive(Debug, Default)]
pub struct Check {
    section: &'static str,
    faults: Vec<Fault>,
    unknown: Vec<String>,
}

impl Check {
    /// All faults, and all unknown keys.
    #[must_use]
    pub fn into_outcome(self) -> (Vec<Fault>, Vec<String>) {
        (self.faults, self.unknown)
    }

    /// The section `[log]`.
    pub fn log(&mut self, section: Section<LogFile>, default: LogConfig) -> LogConfig {
        let LogFile { level, format, unknown } = self.enter("log", section);
        self.note_unknown(unknown);
        let levels = "error, warn, info, debug, trace, off, or a list such as info,hyper=warn";
        LogConfig {
            level: self.text("level", level, levels, default.level, |text| {
                (!text.is_empty() && telemetry::parse_level(text).is_ok()).then(|| text.to_owned())
            }),
            format: self.text("format", format, "\"json\" or \"text\"", default.format, |text| {
                LogFormat::from_str(text, false).ok()
            }),
        }
    }

    /// The section `[metrics]`.
    pub fn metrics(&mut self, section: Section<MetricsFile>, default: MetricsConfig) -> MetricsConfig {
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

    /// The path of a Unix socket.
    pub fn socket(&mut self, key: &'static str, value: Option<Value>, default: PathBuf) -> PathBuf {
        let allowed = "an absolute path of at most 90 bytes";
        self.text(key, value, allowed, default, |text| {
            let usable = Path::new(text).is_absolute() && text.len() <= MAX_SOCKET_PATH && !text.ends_with('/');
            usable.then(|| PathBuf::from(text))
        })
    }

    /// `true` or `false`.
    pub fn switch(&mut self, key: &'static str, value: Option<Value>, default: bool) -> bool {
        self.value(key, value, "true or false".to_owned(), default, Value::as_bool)
    }

    /// A whole number within bounds.
    pub fn count<T: TryFrom<i64> + PartialOrd + fmt::Display>(
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

    /// A time within bounds.
    pub fn duration(
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

    /// A size within bounds.
    pub fn size(
        &mut self,
        key: &'static str,
        value: Option<Value>,
        default: ByteSize,
        (least, most): (ByteSize, ByteSize),
    ) -> ByteSize {
        let allowed = format!("a size from \"{least}\" to \"{most}\"");
        self.text(key, value, &allowed, default, |text| {
            text.parse().ok().filter(|size| (least..=most).contains(size))
        })
    }

    /// A list of texts, each of which `convert` accepts.
    pub fn texts(
        &mut self,
        key: &'static str,
        value: Option<Value>,
        allowed: &str,
        default: Vec<String>,
        usable: impl Fn(&str) -> bool,
    ) -> Vec<String> {
        self.value(key, value, allowed.to_owned(), default, |value| {
            let text = |value: &Value| Some(value.as_str().filter(|text| usable(text))?.to_owned());
            value.as_array()?.iter().map(text).collect()
        })
    }

    /// A text that `convert` accepts.
    pub fn text<T>(
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
    pub fn enter<T: Default>(&mut self, name: &'static str, section: Section<T>) -> T {
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

    /// Faults from now on are outside of every section.
    pub fn leave(&mut self) {
        self.section = "";
    }

    fn path(&self, key: &str) -> String {
        if self.section.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.section)
        }
    }

    /// Notes a fault of the section that was entered last.
    pub fn fault(&mut self, key: &str, value: String, allowed: String) {
        let key = self.path(key);
        self.faults.push(Fault {
            key,
            value: one_line(&value).take(MAX_SHOWN).collect(),
            allowed: one_line(&allowed).collect(),
        });
    }

    /// Notes keys that nobody asked for.
    pub fn note_unknown(&mut self, unknown: Unknown) {
        let keys = unknown.into_keys().map(|key| self.path(&key)).collect::<Vec<_>>();
        self.unknown.extend(keys);
    }
}

/// A fault is one line, whatever a value or a path has in it.
fn one_line(text: &str) -> impl Iterator<Item = char> {
    text.chars().map(|c| if c.is_control() { ' ' } else { c })
}
