//! The configuration file as it is written: every key optional, every value of any type.
//!
//! [`super::validate`] gives the values their types, so that a wrong one is one fault among others and not the end.

use std::collections::BTreeMap;

use serde::Deserialize;
use toml::Value;

/// Keys that nobody asked for.
pub(super) type Unknown = BTreeMap<String, Value>;

/// A section, or something else under its name.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Section<T> {
    Table(T),
    Other(Value),
}

impl<T: Default> Default for Section<T> {
    fn default() -> Self {
        Self::Table(T::default())
    }
}

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct ConfigFile {
    pub(super) root: Option<Value>,
    pub(super) socket: Option<Value>,
    pub(super) stop_timeout: Option<Value>,
    pub(super) log: Section<LogFile>,
    pub(super) metrics: Section<MetricsFile>,
    pub(super) layers: Section<LayersFile>,
    pub(super) registry: Section<RegistryFile>,
    pub(super) fetch: Section<FetchFile>,
    pub(super) cache: Section<CacheFile>,
    pub(super) fuse: Section<FuseFile>,
    #[serde(flatten)]
    pub(super) unknown: Unknown,
}

/// Declares the struct of a section.
macro_rules! section {
    ($name:ident { $($key:ident),* }) => {
        #[derive(Debug, Default, Deserialize)]
        #[serde(default)]
        pub(super) struct $name {
            $(pub(super) $key: Option<Value>,)*
            #[serde(flatten)]
            pub(super) unknown: Unknown,
        }
    };
}

section!(LogFile { level, format });
section!(MetricsFile { address });
section!(LayersFile {
    lazy,
    mount_timeout,
    restore_parallelism
});
section!(RegistryFile {
    plain_http,
    ca_file,
    connect_timeout,
    stall_timeout
});
section!(FetchFile {
    max_requests,
    read_around,
    max_range,
    prefetch
});
section!(CacheFile { checkpoint_interval });
section!(FuseFile {
    workers,
    max_background,
    read_ahead
});

impl ConfigFile {
    /// Replaces a value. A section that is not one keeps its fault.
    pub(super) fn set(&mut self, key: super::Override, value: Value) {
        use super::Override;
        match (key, &mut self.log) {
            (Override::Root, _) => self.root = Some(value),
            (Override::Socket, _) => self.socket = Some(value),
            (Override::LogLevel, Section::Table(log)) => log.level = Some(value),
            (Override::LogFormat, Section::Table(log)) => log.format = Some(value),
            (Override::LogLevel | Override::LogFormat, Section::Other(_)) => {}
        }
    }
}
