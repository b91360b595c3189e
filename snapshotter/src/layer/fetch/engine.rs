//! What all layers share: the gate to the network, the decompression threads, the memory for what is on its way.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::gate::Gate;
use crate::config::Config;
use crate::metrics::Metrics;

/// Compressed and decompressed bytes of members being received and decoded, for the whole daemon.
pub(super) const MEMORY_BUDGET: u64 = 128 << 20;
/// Unit in which the memory budget is handed out.
const MEMORY_UNIT: u64 = 1024;
/// Length of one prefetch request: a reader that needs its last chunk waits for no more than this.
const PREFETCH_RANGE: u64 = 4 << 20;
/// Threads that decompress, at most.
const MAX_DECODERS: usize = 8;

/// Limits of the engine.
#[derive(Debug, Clone)]
pub struct FetchOptions {
    /// Requests under way at once.
    pub max_requests: usize,
    /// Least window around a miss, in compressed bytes.
    pub read_around: u64,
    /// Longest request.
    pub max_range: u64,
    /// Length of one prefetch request.
    pub prefetch_range: u64,
    /// Longest time without a byte before a request counts as broken.
    pub stall_timeout: Duration,
    /// Members decoded at once.
    pub decoders: usize,
}

impl FetchOptions {
    /// What the configuration says.
    pub fn new(config: &Config) -> Self {
        let max_range = config.fetch.max_range.bytes();
        Self {
            max_requests: config.fetch.max_requests,
            read_around: config.fetch.read_around.bytes().min(max_range),
            max_range,
            prefetch_range: PREFETCH_RANGE.min(max_range),
            stall_timeout: config.registry.stall_timeout,
            decoders: std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_DECODERS)),
        }
    }
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self::new(&Config::default())
    }
}

/// The part of the fetch engine that all layers share.
pub struct Engine {
    pub(super) gate: Gate,
    pub(super) options: FetchOptions,
    pub(super) metrics: Metrics,
    decoders: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    runtime: Handle,
    stop: CancellationToken,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// An engine whose tasks run on `runtime`.
    pub fn new(options: FetchOptions, metrics: Metrics, runtime: Handle) -> Arc<Self> {
        let units = usize::try_from(MEMORY_BUDGET / MEMORY_UNIT).expect("the budget is small");
        Arc::new(Self {
            gate: Gate::new(options.max_requests),
            decoders: Arc::new(Semaphore::new(options.decoders.max(1))),
            memory: Arc::new(Semaphore::new(units)),
            options,
            metrics,
            runtime,
            stop: CancellationToken::new(),
        })
    }

    /// The counters that the engine feeds.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Where tasks run.
    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// A signal that comes when the engine stops, or earlier.
    pub(super) fn stop_signal(&self) -> CancellationToken {
        self.stop.child_token()
    }

    /// Runs `work` on one of the bounded number of decompression threads; `None` if it panicked.
    pub(super) async fn decode<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let _turn = self.decoders.acquire().await.ok()?;
        tokio::task::spawn_blocking(work).await.ok()
    }

    /// A share of the memory budget, if it is free now.
    pub(super) fn try_reserve(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        self.memory.clone().try_acquire_many_owned(memory_units(bytes)).ok()
    }

    /// A share of the memory budget, when it is free.
    pub(super) async fn reserve(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        self.memory.clone().acquire_many_owned(memory_units(bytes)).await.ok()
    }

    /// Tells all fetches to end.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

/// Units of the budget for `bytes`; never more than there are, so that waiting always ends.
fn memory_units(bytes: u64) -> u32 {
    let units = bytes.clamp(1, MEMORY_BUDGET).div_ceil(MEMORY_UNIT);
    u32::try_from(units).expect("the budget is small")
}
