//! Every metric family: name, unit, labels, help. `docs/metrics.md` lists the same; a test compares them.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};

/// Outcome of a snapshot's preparation from a remote layer.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct PrepareLabels {
    /// `lazy` or `fallback`.
    pub result: PrepareResult,
    /// [`crate::layer::NotLazy::reason`] of a fallback, empty otherwise.
    pub reason: &'static str,
}

/// What became of a layer that containerd offered for lazy use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
#[expect(non_camel_case_types, reason = "the names are the label values")]
pub enum PrepareResult {
    /// Mounted; nothing is pulled.
    lazy,
    /// Left to containerd to pull and unpack.
    fallback,
}

/// An operation's name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OpLabels {
    /// Name of the operation, from a fixed set.
    pub op: &'static str,
}

/// An operation that failed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct OpErrorLabels {
    /// Name of the operation, from a fixed set.
    pub op: &'static str,
    /// Class of the error, from a fixed set: a gRPC code, or the name of an errno.
    pub error: &'static str,
}

/// Success or the reason of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ResultLabels {
    /// `ok`, or a reason from a fixed set.
    pub result: &'static str,
}

/// Where the bytes of a read came from.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct SourceLabels {
    /// `cache` or `registry`.
    pub source: &'static str,
}

/// Why something was fetched.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct FetchLabels {
    /// `toc`, `demand`, `prefetch`, `warm` or `background`.
    pub kind: &'static str,
    /// `ok`, or the class of the registry error.
    pub result: &'static str,
}

/// Bytes by reason of the fetch.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct KindLabels {
    /// `toc`, `demand`, `prefetch`, `warm` or `background`.
    pub kind: &'static str,
}

/// What the layer cache gave up.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct EvictedLabels {
    /// `layer` for layers that nobody used, `chunks` for parts of mounted ones.
    pub kind: &'static str,
}

/// What became of a question of the kernel's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct NativeEventLabels {
    /// What was answered, and why.
    pub outcome: NativeOutcome,
}

/// What the kernel was answered when it was about to read of a layer that it serves itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum NativeOutcome {
    /// Allowed: all of it was there.
    Resident,
    /// Allowed after it was fetched.
    Fetched,
    /// Denied: it could not be had.
    Denied,
    /// Denied: the question was not understood.
    Unknown,
}

impl EncodeLabelValue for NativeOutcome {
    fn encode(&self, encoder: &mut prometheus_client::encoding::LabelValueEncoder<'_>) -> Result<(), std::fmt::Error> {
        let name = match self {
            Self::Resident => "resident",
            Self::Fetched => "fetched",
            Self::Denied => "denied",
            Self::Unknown => "unknown",
        };
        EncodeLabelValue::encode(&name, encoder)
    }
}

/// How a layer is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct MountLabels {
    /// `erofs` or `fuse`.
    pub mount: &'static str,
}

/// A histogram per label set.
pub type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// Every family of the daemon.
#[derive(Debug, Clone)]
pub struct Metrics {
    /// Layers offered for lazy use, by what became of them.
    pub snapshot_prepare: Family<PrepareLabels, Counter>,
    /// Time of each operation of the snapshots service.
    pub snapshot_operation: Histograms<OpLabels>,
    /// Operations of the snapshots service that failed.
    pub snapshot_operation_errors: Family<OpErrorLabels, Counter>,
    /// Remote snapshots mounted again after a start, by result.
    pub mounts_restored: Family<ResultLabels, Counter>,
    /// Snapshot directories that could not be removed.
    pub snapshot_cleanup_errors: Counter,
    /// Layers mounted now, by how.
    pub layers_mounted: Family<MountLabels, Gauge>,
    /// Questions of the kernel about layers that it serves itself, by what became of them.
    pub native_events: Family<NativeEventLabels, Counter>,
    /// Times that questions could not be read, so that their readers waited longer.
    pub native_event_read_failures: Counter,
    /// Time from the request for a layer to its mount.
    pub layer_mount: Histogram,
    /// Time of each FUSE operation.
    pub fuse_operation: Histograms<OpLabels>,
    /// FUSE operations answered with an unexpected error.
    pub fuse_operation_errors: Family<OpErrorLabels, Counter>,
    /// Bytes given to readers.
    pub read_bytes: Family<SourceLabels, Counter>,
    /// Time that a read waited for bytes that were not resident.
    pub read_stall: Histogram,
    /// Requests to registries.
    pub fetch_requests: Family<FetchLabels, Counter>,
    /// Bytes received from registries.
    pub fetch_bytes: Family<KindLabels, Counter>,
    /// Time of each request to a registry.
    pub fetch_request: Histogram,
    /// Requests that went on at another source of the layer.
    pub fetch_failovers: Counter,
    /// Layers that a server sends whole whatever range is asked for.
    pub fetch_ranges_ignored: Counter,
    /// Mounted layers whose rest is being fetched.
    pub background_layers: Gauge,
    /// Chunks whose bytes did not match their digest.
    pub verify_failures: Counter,
    /// Writes to the layer cache that failed.
    pub cache_write_errors: Counter,
    /// Bytes that the layer cache takes on disk.
    pub cache_bytes: Gauge,
    /// Bytes that it may take; 0 without a quota.
    pub cache_quota_bytes: Gauge,
    /// Whether only readers are served for lack of room.
    pub cache_short_of_room: Gauge,
    /// Bytes that it gave up to make room.
    pub cache_evicted_bytes: Family<EvictedLabels, Counter>,
    /// Bytes of chunks taken over from other layers of the node.
    pub cache_reused_bytes: Counter,
}

/// 25 µs to 26 s: from a request answered from memory to one that waits for a slow registry.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.000_025, 4.0, 11))
}

/// 1 ms to 65 s, for what always crosses a network or a mount.
fn slow_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 17))
}

impl Metrics {
    /// Makes all families and registers them under the prefix `hullspeed_`.
    pub fn register(registry: &mut Registry) -> Self {
        let metrics = Self::unregistered();
        metrics.register_snapshots(registry.sub_registry_with_prefix("hullspeed"));
        metrics.register_layers(registry.sub_registry_with_prefix("hullspeed"));
        metrics
    }

    /// Families that nobody reads, for tests of parts.
    pub fn unregistered() -> Self {
        Self {
            snapshot_prepare: Family::default(),
            snapshot_operation: Family::new_with_constructor(seconds),
            snapshot_operation_errors: Family::default(),
            mounts_restored: Family::default(),
            snapshot_cleanup_errors: Counter::default(),
            layers_mounted: Family::default(),
            native_events: Family::default(),
            native_event_read_failures: Counter::default(),
            layer_mount: slow_seconds(),
            fuse_operation: Family::new_with_constructor(seconds),
            fuse_operation_errors: Family::default(),
            read_bytes: Family::default(),
            read_stall: slow_seconds(),
            fetch_requests: Family::default(),
            fetch_bytes: Family::default(),
            fetch_request: slow_seconds(),
            fetch_failovers: Counter::default(),
            fetch_ranges_ignored: Counter::default(),
            background_layers: Gauge::default(),
            verify_failures: Counter::default(),
            cache_write_errors: Counter::default(),
            cache_bytes: Gauge::default(),
            cache_quota_bytes: Gauge::default(),
            cache_short_of_room: Gauge::default(),
            cache_evicted_bytes: Family::default(),
            cache_reused_bytes: Counter::default(),
        }
    }

    fn register_snapshots(&self, r: &mut Registry) {
        r.register(
            "snapshot_prepare",
            "Layers offered for lazy use, by what became of them",
            self.snapshot_prepare.clone(),
        );
        r.register_with_unit(
            "snapshot_operation_duration",
            "Time of each operation of the snapshots service",
            Unit::Seconds,
            self.snapshot_operation.clone(),
        );
        r.register(
            "snapshot_operation_errors",
            "Operations of the snapshots service that failed, by gRPC code",
            self.snapshot_operation_errors.clone(),
        );
        r.register(
            "mounts_restored",
            "Remote snapshots mounted again after a start, by result",
            self.mounts_restored.clone(),
        );
        r.register(
            "snapshot_cleanup_errors",
            "Directories of removed snapshots that could not be removed",
            self.snapshot_cleanup_errors.clone(),
        );
    }

    fn register_layers(&self, r: &mut Registry) {
        r.register(
            "layers_mounted",
            "Layers mounted now, by how",
            self.layers_mounted.clone(),
        );
        r.register(
            "native_events",
            "Questions of the kernel about layers that it serves itself, by what became of them",
            self.native_events.clone(),
        );
        r.register(
            "native_event_read_failures",
            "Times that questions could not be read, so that their readers waited longer",
            self.native_event_read_failures.clone(),
        );
        r.register_with_unit(
            "layer_mount_duration",
            "Time from the request for a layer to its mount",
            Unit::Seconds,
            self.layer_mount.clone(),
        );
        r.register_with_unit(
            "fuse_operation_duration",
            "Time of each FUSE operation",
            Unit::Seconds,
            self.fuse_operation.clone(),
        );
        r.register(
            "fuse_operation_errors",
            "FUSE operations answered with an unexpected error, by errno",
            self.fuse_operation_errors.clone(),
        );
        r.register_with_unit("read", "Bytes given to readers", Unit::Bytes, self.read_bytes.clone());
        r.register_with_unit(
            "read_stall",
            "Time that a read waited for bytes that were not resident",
            Unit::Seconds,
            self.read_stall.clone(),
        );
        r.register("fetch_requests", "Requests to registries", self.fetch_requests.clone());
        r.register_with_unit(
            "fetch",
            "Bytes received from registries",
            Unit::Bytes,
            self.fetch_bytes.clone(),
        );
        r.register_with_unit(
            "fetch_request_duration",
            "Time of each request to a registry",
            Unit::Seconds,
            self.fetch_request.clone(),
        );
        r.register(
            "fetch_failovers",
            "Requests that went on at another source of the layer",
            self.fetch_failovers.clone(),
        );
        r.register(
            "fetch_ranges_ignored",
            "Layers that a server was found to send whole whatever range is asked for",
            self.fetch_ranges_ignored.clone(),
        );
        r.register(
            "background_layers",
            "Mounted layers whose rest is being fetched",
            self.background_layers.clone(),
        );
        r.register(
            "verify_failures",
            "Chunks whose bytes did not match their digest",
            self.verify_failures.clone(),
        );
        r.register(
            "cache_write_errors",
            "Writes to the layer cache that failed",
            self.cache_write_errors.clone(),
        );
        self.register_cache(r);
    }

    fn register_cache(&self, r: &mut Registry) {
        r.register_with_unit(
            "cache",
            "Bytes that the layer cache takes on disk",
            Unit::Bytes,
            self.cache_bytes.clone(),
        );
        r.register_with_unit(
            "cache_quota",
            "Bytes that the layer cache may take; 0 without a quota",
            Unit::Bytes,
            self.cache_quota_bytes.clone(),
        );
        r.register(
            "cache_short_of_room",
            "1 while nothing is fetched but for readers, because the quota or the disk has no room to spare",
            self.cache_short_of_room.clone(),
        );
        r.register_with_unit(
            "cache_evicted",
            "Bytes that the layer cache gave up to make room",
            Unit::Bytes,
            self.cache_evicted_bytes.clone(),
        );
        r.register_with_unit(
            "cache_reused",
            "Bytes of chunks that were copied from other layers of the node instead of being fetched",
            Unit::Bytes,
            self.cache_reused_bytes.clone(),
        );
    }
}
