//! What the pool is told: bounds, limits, permissions. Every limit has a documented default.

use std::time::Duration;

/// How many hulls of one runtime handler are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandlerPool {
    /// The handler, as pods name it. The empty one is containerd's default and serves pods that name that one, too.
    pub runtime_handler: String,
    /// So many are ready when nothing happens.
    pub min: usize,
    /// Never more than so many.
    pub max: usize,
}

/// Which CNI plugins may have made a hull's network before its pod is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CniPermissions {
    /// Plugin types that the operator vouches for, beside those known to ignore a pod's identity.
    pub extra_types: Vec<String>,
    /// No configuration is refused: the operator vouches for all of it.
    pub allow_any: bool,
}

/// Options of the pool.
#[derive(Debug, Clone)]
pub struct PoolOptions {
    /// Without it the pool stays off; recovery and the sweep go on.
    pub enabled: bool,
    /// One pool for each handler.
    pub handlers: Vec<HandlerPool>,
    /// All hulls together may use this much memory, by measurement.
    pub max_memory_bytes: u64,
    /// So many addresses of the pod network are left to ordinary pods.
    pub address_headroom: u64,
    /// Hulls that are made at once.
    pub parallel_creations: usize,
    /// The least time from the beginning of one creation to the next one's.
    pub creation_interval: Duration,
    /// Limit on one creation; containerd may have to pull the pause image in it.
    pub creation_limit: Duration,
    /// No creation begins within this time after a pod's start ended.
    pub quiet: Duration,
    /// A start that has not ended after this time is not waited for.
    pub start_limit: Duration,
    /// A creation that is due waits for quiet no longer than this.
    pub max_deferral: Duration,
    /// How long demand is remembered.
    pub demand_window: Duration,
    /// Surplus hulls are released one at a time, this far apart.
    pub release_interval: Duration,
    /// Time between searches for sandboxes that nobody knows.
    pub sweep_interval: Duration,
    /// CNI plugins.
    pub cni: CniPermissions,
    /// Keep hulls although NRI plugins, which would see a hull's identity instead of its pod's, are there.
    pub allow_nri: bool,
    /// Cgroup of hulls, without the ending `.slice`; made in every hierarchy if it is missing.
    pub cgroup: String,
}

impl Default for PoolOptions {
    fn default() -> Self {
        Self {
            enabled: true,
            handlers: vec![HandlerPool {
                runtime_handler: String::new(),
                min: 2,
                max: 10,
            }],
            max_memory_bytes: 256 << 20,
            address_headroom: 8,
            parallel_creations: 1,
            creation_interval: Duration::from_millis(50),
            creation_limit: Duration::from_secs(60),
            quiet: Duration::from_secs(1),
            start_limit: Duration::from_secs(10),
            max_deferral: Duration::from_secs(5),
            demand_window: Duration::from_secs(600),
            release_interval: Duration::from_secs(30),
            sweep_interval: Duration::from_secs(300),
            cni: CniPermissions::default(),
            allow_nri: false,
            cgroup: "hullspeed".into(),
        }
    }
}
