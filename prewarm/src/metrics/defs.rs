//! Every metric family: name, unit, labels, help. `docs/prewarm-metrics.md` lists the same; a test compares them.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// A RunPodSandbox call.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct RequestLabels {
    /// What became of it: [`crate::adopt::Outcome::result`].
    pub result: &'static str,
    /// Why, from a fixed set; empty for a hit.
    pub reason: &'static str,
}

/// What a hull of a pool is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the names are the label values")]
pub enum HullState {
    /// Can be handed out.
    ready,
    /// Is being made by containerd.
    creating,
    /// Is being taken down.
    destroying,
}

/// Hulls of a handler in one state.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HullLabels {
    /// containerd's runtime handler.
    pub handler: String,
    /// What they are doing.
    pub state: HullState,
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct HandlerLabels {
    /// containerd's runtime handler.
    pub handler: String,
}

/// Success or the reason of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResultLabels {
    /// `ok`, or a reason from a fixed set.
    pub result: &'static str,
}

/// A state, from a fixed set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct StateLabels {
    /// Its name.
    pub state: &'static str,
}

/// Why something happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ReasonLabels {
    /// From a fixed set.
    pub reason: &'static str,
}

/// A call through the relay.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct CallLabels {
    /// A method of CRI, or `other`.
    pub method: &'static str,
    /// Name of the gRPC code.
    pub code: &'static str,
}

/// A histogram per label set.
pub type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Every family of the daemon.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// RunPodSandbox calls by what became of them.
    pub sandbox_requests: Family<RequestLabels, Counter>,
    /// Time from a RunPodSandbox call to its answer with a hull.
    pub adoption_duration: Histogram,
    /// Age of a hull at its adoption.
    pub hull_age: Histogram,
    /// Records rewritten in containerd after an adoption, by result.
    pub rebrands: Family<ResultLabels, Counter>,
    /// Hulls by pool and state.
    pub pool_hulls: Family<HullLabels, Gauge>,
    /// Hulls that a pool wants to have ready.
    pub pool_target: Family<HandlerLabels, Gauge>,
    /// 1 for each reason that keeps pools off now.
    pub pool_off: Family<ReasonLabels, Gauge>,
    /// Hulls that containerd was asked to make, by result.
    pub hull_creations: Family<ResultLabels, Counter>,
    /// Time that it took to make a hull, or to fail at it, by result.
    pub hull_creation_duration: Histograms<ResultLabels>,
    /// Age of the oldest hull of a pool; 0 without one.
    pub pool_oldest: Family<HandlerLabels, Gauge>,
    /// Measured memory of one hull.
    pub hull_memory: Gauge,
    /// Addresses that are free in the pods' network.
    pub free_addresses: Gauge,
    /// Hulls taken down, by reason.
    pub hulls_destroyed: Family<ReasonLabels, Counter>,
    /// Calls through the relay.
    pub relay_calls: Family<CallLabels, Counter>,
    /// Connections of clients now.
    pub relay_connections: Gauge,
    /// Container events made here because containerd has none.
    pub events_supplied: Counter,
    /// Images of the warming policy, by state.
    pub warm_images: Family<StateLabels, Gauge>,
    /// `Warm` calls that ended, by result.
    pub warm_runs: Family<ResultLabels, Counter>,
    /// Bytes of content that the warming policy covers, as far as is known.
    pub warm_wanted: Gauge,
    /// How many of those are resident.
    pub warm_resident: Gauge,
    /// Policy files that could not be used.
    pub warm_policy_errors: Counter,
    /// Logins of pulls, by what became of them.
    pub warm_credentials: Family<ResultLabels, Counter>,
}

/// 50 µs to 1.6 s: from a call answered with a hull to one that waited.
fn call_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_05, 2.0, 16))
}

/// 8 ms to 33 s, for what containerd makes.
fn creation_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.008, 2.0, 13))
}

/// 1 s to 12 days.
fn ages() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 4.0, 11))
}

impl Metrics {
    /// Makes all families and registers them under the prefix `hullspeed_`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::unregistered();
        let registry = registry.sub_registry_with_prefix("hullspeed");
        metrics.register_adoption(registry);
        metrics.register_pool(registry);
        metrics.register_relay(registry);
        metrics.register_warming(registry);
        metrics
    }

    /// Families that nobody reads, for tests of parts.
    #[must_use]
    pub fn unregistered() -> Self {
        Self {
            sandbox_requests: Family::default(),
            adoption_duration: call_seconds(),
            hull_age: ages(),
            rebrands: Family::default(),
            pool_hulls: Family::default(),
            pool_target: Family::default(),
            pool_off: Family::default(),
            hull_creations: Family::default(),
            hull_creation_duration: Family::new_with_constructor(creation_seconds),
            pool_oldest: Family::default(),
            hull_memory: Gauge::default(),
            free_addresses: Gauge::default(),
            hulls_destroyed: Family::default(),
            relay_calls: Family::default(),
            relay_connections: Gauge::default(),
            events_supplied: Counter::default(),
            warm_images: Family::default(),
            warm_runs: Family::default(),
            warm_wanted: Gauge::default(),
            warm_resident: Gauge::default(),
            warm_policy_errors: Counter::default(),
            warm_credentials: Family::default(),
        }
    }

    fn register_adoption(&self, r: &mut Registry) {
        r.register(
            "sandbox_requests",
            "RunPodSandbox calls, by what became of them",
            self.sandbox_requests.clone(),
        );
        r.register_with_unit(
            "adoption_duration",
            "Time from a RunPodSandbox call to its answer with a hull",
            Unit::Seconds,
            self.adoption_duration.clone(),
        );
        r.register_with_unit(
            "hull_age",
            "Age of a hull at its adoption",
            Unit::Seconds,
            self.hull_age.clone(),
        );
        r.register(
            "rebrands",
            "Records rewritten in containerd after an adoption, by result",
            self.rebrands.clone(),
        );
    }

    fn register_pool(&self, r: &mut Registry) {
        r.register("pool_hulls", "Hulls, by pool and state", self.pool_hulls.clone());
        r.register(
            "pool_target",
            "Hulls that a pool wants to have ready",
            self.pool_target.clone(),
        );
        r.register(
            "pool_off",
            "1 for each reason that keeps pools off now",
            self.pool_off.clone(),
        );
        r.register(
            "hull_creations",
            "Hulls that containerd was asked to make, by result",
            self.hull_creations.clone(),
        );
        r.register_with_unit(
            "hull_creation_duration",
            "Time that it took to make a hull, or to fail at it, by result",
            Unit::Seconds,
            self.hull_creation_duration.clone(),
        );
        r.register_with_unit(
            "pool_oldest_hull",
            "Age of the oldest hull of a pool; 0 without one",
            Unit::Seconds,
            self.pool_oldest.clone(),
        );
        r.register_with_unit(
            "hull_memory",
            "Measured memory of one hull; 0 before the first measurement",
            Unit::Bytes,
            self.hull_memory.clone(),
        );
        r.register(
            "pool_free_addresses",
            "Free addresses of the pods' network; -1 where they cannot be counted",
            self.free_addresses.clone(),
        );
        r.register(
            "hulls_destroyed",
            "Hulls taken down, by reason",
            self.hulls_destroyed.clone(),
        );
    }

    fn register_warming(&self, r: &mut Registry) {
        r.register(
            "warm_images",
            "Images of the warming policy, by state",
            self.warm_images.clone(),
        );
        r.register("warm_runs", "Warms that ended, by result", self.warm_runs.clone());
        r.register_with_unit(
            "warm_wanted",
            "Content that the warming policy covers, as far as is known",
            Unit::Bytes,
            self.warm_wanted.clone(),
        );
        r.register_with_unit(
            "warm_resident",
            "Content that the warming policy covers and that is resident",
            Unit::Bytes,
            self.warm_resident.clone(),
        );
        r.register(
            "warm_policy_errors",
            "Policy files that could not be used",
            self.warm_policy_errors.clone(),
        );
        r.register(
            "warm_credentials",
            "Logins of pulls, by what became of them",
            self.warm_credentials.clone(),
        );
    }

    fn register_relay(&self, r: &mut Registry) {
        r.register("relay_calls", "Calls through the relay", self.relay_calls.clone());
        r.register(
            "relay_connections",
            "Connections of clients now",
            self.relay_connections.clone(),
        );
        r.register(
            "events_supplied",
            "Container events made here because containerd has none",
            self.events_supplied.clone(),
        );
    }
}
