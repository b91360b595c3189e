//! The configuration file as it is written: every key optional, every value of any type.
//!
//! [`super::validate`] gives the values their types, so that a wrong one is one fault among others and not the end.

use hullspeed_daemon::config::{LogFile, MetricsFile, Section, Unknown};
use hullspeed_daemon::section;
use serde::Deserialize;
use toml::Value;

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

section!(pub(super) LayersFile {
    lazy,
    mount,
    mount_timeout,
    restore_parallelism
});
section!(pub(super) RegistryFile {
    hosts_directory,
    plain_http,
    ca_file,
    credentials_file,
    docker_config,
    credential_provider_config,
    credential_provider_bin_dir,
    connect_timeout,
    stall_timeout
});
section!(pub(super) FetchFile {
    max_requests,
    read_around,
    max_range,
    prefetch,
    read_deadline,
    background,
    background_bandwidth,
    background_delay,
    background_deadline
});
section!(pub(super) CacheFile {
    checkpoint_interval,
    quota,
    min_free
});
section!(pub(super) FuseFile {
    workers,
    max_background,
    passthrough,
    read_ahead
});
