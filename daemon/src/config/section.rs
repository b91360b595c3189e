//! Sections of a configuration file as they are written.
//!
//! [`super::Check`] gives the values their types, so that a wrong one is one fault among others and not the end.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Value;

use super::Override;

/// Keys that nobody asked for.
pub type Unknown = BTreeMap<String, Value>;

/// A section, or something else under its name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub enum Section<T> {
    /// The section.
    Table(T),
    /// Something else.
    Other(Value),
}

impl<T: Default> Default for Section<T> {
    fn default() -> Self {
        Self::Table(T::default())
    }
}

/// Declares the struct of a section: an optional value per key, and the keys that nobody asked for. The crate that uses
/// it needs `serde` and `toml`.
#[macro_export]
macro_rules! section {
    ($(#[$attribute:meta])* $visibility:vis $name:ident { $($key:ident),* $(,)? }) => {
        $(#[$attribute])*
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(default)]
        #[allow(missing_docs, reason = "the names are the keys")]
        $visibility struct $name {
            $($visibility $key: Option<toml::Value>,)*
            #[serde(flatten)]
            $visibility unknown: $crate::config::Unknown,
        }
    };
}

section!(
    /// `[log]`
    pub LogFile { level, format }
);
section!(
    /// `[metrics]`
    pub MetricsFile { address }
);

impl Section<LogFile> {
    /// Replaces a value of this section, if `key` is one; a section that is none keeps its fault.
    pub fn set(&mut self, key: Override, value: Value) {
        match (key, self) {
            (Override::LogLevel, Self::Table(log)) => log.level = Some(value),
            (Override::LogFormat, Self::Table(log)) => log.format = Some(value),
            (Override::LogLevel | Override::LogFormat, Self::Other(_)) | (Override::Root | Override::Socket, _) => {}
        }
    }
}
