//! The daemon's parts, made from its configuration.

use std::sync::Arc;

use hullspeed_daemon::grpc::code_name;
use tonic::Code;

use crate::adopt::eligibility::Policy;
use crate::adopt::{self, Adopter, AdopterError};
use crate::config::{CniVerdict, Config, RunAs, Supply};
use crate::containerd::Containerd;
use crate::control::Control;
use crate::credentials::{HandOver, HandOvers};
use crate::ledger::{Ledger, Mark};
use crate::metrics::Metrics;
use crate::metrics::defs::CallLabels;
use crate::pool::{CniPermissions, HandlerPool, Pool, PoolOptions};
use crate::relay::{Limits, Relay, RelayOptions, Watch};
use crate::requests::Requests;
use crate::rules::events::EventOptions;
use crate::rules::{CriRules, Events, PoolHooks, RuleOptions};
use crate::snapshotter::Snapshotter;
use crate::warm::seen::SeenImages;
use crate::warm::{WarmAgent, WarmOptions};

/// Everything that runs.
pub(super) struct Parts {
    pub(super) containerd: Containerd,
    pub(super) adopter: Adopter,
    pub(super) relay: Relay,
    pub(super) control: Control,
    /// Where logins are handed over.
    pub(super) logins: Option<HandOvers>,
    /// Where images are warmed.
    pub(super) warm: Option<WarmAgent>,
}

impl Parts {
    pub(super) fn new(config: &Arc<Config>, mark: Mark, metrics: Metrics) -> Result<Self, AdopterError> {
        let containerd = Containerd::at(&config.containerd.address);
        let ledger = Ledger::new(mark);
        let requests = Requests::new(metrics.clone());
        let pool = Pool::new(
            pool_options(config),
            containerd.clone(),
            ledger.clone(),
            metrics.clone(),
        );
        let events = Events::new(EventOptions {
            ledger: ledger.clone(),
            containerd: containerd.clone(),
            facts: pool.facts(),
            supply: config.events.supply == Supply::Auto,
            metrics: metrics.clone(),
        });
        let adopter = Adopter::new(adopt::Options {
            containerd: containerd.clone(),
            ledger: ledger.clone(),
            hulls: Arc::new(pool.clone()),
            state: config.state.clone(),
            policy: policy(config),
            events: events.clone(),
            observer: Arc::new(requests.clone()),
        })?;
        let images = SeenImages::default();
        let (credentials, logins) = logins(config, images.clone(), metrics.clone());
        let warm = warm_agent(config, &containerd, images, &pool, &metrics);
        let rules = CriRules::new(RuleOptions {
            ledger: ledger.clone(),
            containerd: containerd.clone(),
            sandboxes: Arc::new(adopter.clone()),
            hulls: Arc::new(pool.clone()),
            hooks: Arc::new(pool.clone()),
            credentials: Arc::new(credentials),
            events,
        });
        let control = Control {
            config: Arc::clone(config),
            pool,
            adopter: adopter.clone(),
            ledger,
            requests,
            warm: warm.clone(),
        };
        Ok(Self {
            containerd,
            adopter,
            relay: relay(config, rules, metrics),
            control,
            logins,
            warm,
        })
    }
}

fn relay(config: &Config, rules: CriRules, metrics: Metrics) -> Relay {
    Relay::new(RelayOptions {
        containerd_socket: config.containerd.address.clone(),
        rules: Arc::new(rules),
        watch: Arc::new(Counting(metrics)),
        limits: limits(config),
    })
}

fn logins(config: &Config, images: SeenImages, metrics: Metrics) -> (HandOver, Option<HandOvers>) {
    if !config.warm.credentials {
        return (HandOver::names_only(images, metrics), None);
    }
    let (taker, passer) = HandOver::new(Snapshotter::at(&config.warm.snapshotter), images, metrics);
    (taker, Some(passer))
}

fn limits(config: &Config) -> Limits {
    let gathered = usize::try_from(config.relay.max_gathered.bytes()).unwrap_or(usize::MAX);
    Limits {
        connections: config.relay.max_connections,
        streams: config.relay.max_parallel,
        requests: gathered,
        answers: gathered,
        ..Limits::default()
    }
}

fn policy(config: &Config) -> Policy {
    Policy {
        strict: config.adoption.run_as == RunAs::Strict,
        privileged: config.adoption.privileged,
        sysctls: config.adoption.sysctls,
    }
}

/// The pool's part of the configuration.
pub(crate) fn pool_options(config: &Config) -> PoolOptions {
    let pool = &config.pool;
    PoolOptions {
        enabled: pool.enabled && config.adoption.enabled && config.cni.verdict != CniVerdict::Deny,
        handlers: pool
            .handlers
            .iter()
            .map(|handler| HandlerPool {
                runtime_handler: handler.clone(),
                min: pool.min,
                max: pool.max,
            })
            .collect(),
        max_memory_bytes: pool.max_memory.bytes(),
        address_headroom: pool.ip_headroom,
        parallel_creations: pool.refill_parallel,
        creation_interval: pool.refill_interval,
        creation_limit: pool.creation_timeout,
        quiet: pool.refill_quiet,
        start_limit: pool.start_timeout,
        max_deferral: pool.refill_deferral,
        demand_window: pool.demand_window,
        release_interval: pool.release_interval,
        sweep_interval: pool.sweep_interval,
        cni: CniPermissions {
            extra_types: config.cni.allow.clone(),
            allow_any: config.cni.verdict == CniVerdict::Allow,
        },
        allow_nri: pool.allow_nri,
        cgroup: pool.cgroup.clone(),
    }
}

impl PoolHooks for Pool {
    fn flush(&self, reason: &'static str) {
        Self::flush(self, reason);
    }
}

fn warm_agent(
    config: &Config,
    containerd: &Containerd,
    images: SeenImages,
    pool: &Pool,
    metrics: &Metrics,
) -> Option<WarmAgent> {
    let policy = config.warm.policy.clone()?;
    Some(WarmAgent::new(WarmOptions {
        policy,
        snapshotter: Snapshotter::at(&config.warm.snapshotter),
        containerd: containerd.clone(),
        images,
        quiet: Arc::new(pool.clone()),
        max_parallel: config.warm.max_parallel,
        resolve_every: config.warm.resolve_interval,
        metrics: metrics.clone(),
    }))
}

/// Metrics of the relay.
struct Counting(Metrics);

impl Watch for Counting {
    fn call_ended(&self, method: &'static str, code: Code) {
        let code = code_name(code);
        self.0.relay_calls.get_or_create(&CallLabels { method, code }).inc();
    }

    fn connections(&self, open: usize) {
        self.0.relay_connections.set(i64::try_from(open).unwrap_or(i64::MAX));
    }
}
