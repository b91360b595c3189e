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
    pub(super) state: Option<Value>,
    pub(super) socket: Option<Value>,
    pub(super) control_socket: Option<Value>,
    pub(super) stop_timeout: Option<Value>,
    pub(super) log: Section<LogFile>,
    pub(super) metrics: Section<MetricsFile>,
    pub(super) containerd: Section<ContainerdFile>,
    pub(super) relay: Section<RelayFile>,
    pub(super) pool: Section<PoolFile>,
    pub(super) cni: Section<CniFile>,
    pub(super) adoption: Section<AdoptionFile>,
    pub(super) events: Section<EventsFile>,
    pub(super) warm: Section<WarmFile>,
    #[serde(flatten)]
    pub(super) unknown: Unknown,
}

section!(pub(super) ContainerdFile { address });
section!(pub(super) RelayFile {
    max_connections,
    max_parallel,
    max_gathered
});
section!(pub(super) PoolFile {
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
    allow_nri
});
section!(pub(super) CniFile { allow, r#override });
section!(pub(super) AdoptionFile {
    enabled,
    privileged,
    run_as,
    sysctls
});
section!(pub(super) EventsFile { supply });
section!(pub(super) WarmFile {
    policy,
    snapshotter,
    max_parallel,
    resolve_interval,
    credentials
});
