//! What all layers share: the gate to the network, the decompression threads, the memory for what is on its way.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use estargz::digest::Digest;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};
use tokio_util::sync::CancellationToken;

use super::background::Completion;
use super::flight::Urgency;
use super::gate::{Gate, Lane};
use super::health::{Host, Hosts};
use super::pace::Pace;
use super::report::InFlight;
use crate::config::Config;
use crate::metrics::Metrics;

/// Compressed and decompressed bytes of members being received and decoded, for the whole daemon.
const MEMORY_BUDGET: u64 = 128 << 20;
/// Unit in which the memory budget is handed out.
const MEMORY_UNIT: u64 = 1024;
/// Length of one prefetch request: a reader that needs its last chunk waits for no more than this.
const PREFETCH_RANGE: u64 = 4 << 20;
/// Bytes of tables of contents, compressed and unfolded, that are being looked at; a hundred ordinary ones.
const OPENING_BUDGET: u64 = 256 << 20;
/// Layers whose opening is remembered until they are used.
const MAX_OPENED: usize = 256;
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
    /// How long a read waits for bytes before it fails.
    pub read_deadline: Duration,
    /// How the rest of mounted layers is fetched.
    pub completion: Completion,
    /// Members decoded at once.
    pub decoders: usize,
    /// Compressed and decompressed bytes of members being received and decoded.
    pub memory: u64,
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
            read_deadline: config.fetch.read_deadline,
            completion: Completion::new(&config.fetch),
            decoders: std::thread::available_parallelism().map_or(1, |n| n.get().min(MAX_DECODERS)),
            memory: MEMORY_BUDGET,
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
    pub(super) hosts: Hosts,
    pub(super) in_flight: InFlight,
    pub(super) pace: Pace,
    /// What opening layers has cost, until they are used.
    opened: Mutex<VecDeque<(Digest, Opening)>>,
    opening: Arc<Semaphore>,
    /// Held by the one who copies much from one layer to another.
    copying: Semaphore,
    decoders: Arc<Semaphore>,
    memory: Arc<Semaphore>,
    /// Units of memory in all.
    units: u32,
    /// Fetches that wait for memory.
    waiting: watch::Sender<usize>,
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
        let units = u32::try_from(options.memory.min(MEMORY_BUDGET) / MEMORY_UNIT).expect("the budget is small");
        let units = units.max(1);
        Arc::new(Self {
            gate: Gate::new(options.max_requests),
            hosts: Hosts::new(options.max_requests),
            in_flight: InFlight::default(),
            pace: Pace::new(options.completion.bandwidth),
            opened: Mutex::default(),
            opening: Arc::new(Semaphore::new(memory_units(OPENING_BUDGET) as usize)),
            copying: Semaphore::new(1),
            decoders: Arc::new(Semaphore::new(options.decoders.max(1))),
            memory: Arc::new(Semaphore::new(units as usize)),
            units,
            waiting: watch::Sender::new(0),
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
        self.runtime.spawn_blocking(work).await.ok()
    }

    /// A share of the memory budget, if it is free now.
    pub(super) fn try_reserve(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        self.memory
            .clone()
            .try_acquire_many_owned(self.memory_units(bytes))
            .ok()
    }

    /// A share of the memory budget, when it is free.
    pub(super) async fn reserve(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        if let Some(memory) = self.try_reserve(bytes) {
            return Some(memory);
        }
        let _waiting = Waiting::new(&self.waiting);
        let units = self.memory_units(bytes);
        self.memory.clone().acquire_many_owned(units).await.ok()
    }

    /// Returns when somebody waits for memory.
    pub(super) async fn memory_wanted(&self) {
        // The sender is ours, so waiting cannot fail.
        let _ = self.waiting.subscribe().wait_for(|waiting| *waiting > 0).await;
    }

    /// Lets readers pass, as the gate says; but not while somebody waits for memory, which may be held right here.
    pub(super) async fn stand_aside(&self, lane: &Lane, urgency: &Urgency) {
        tokio::select! {
            biased;
            () = self.memory_wanted() => {}
            () = self.gate.stand_aside(lane, urgency) => {}
        }
    }

    /// Units of the budget for `bytes`; never more than there are, so that waiting always ends.
    fn memory_units(&self, bytes: u64) -> u32 {
        memory_units(bytes).min(self.units)
    }

    /// The turn to copy a piece of a layer for which nobody waits.
    pub(super) async fn copying(&self) -> Option<SemaphorePermit<'_>> {
        self.copying.acquire().await.ok()
    }

    /// Tells that a layer is opened or mounted: what is read next comes before the rest of others.
    pub(in crate::layer) fn note_activity(&self) {
        self.gate.note_activity();
    }

    /// Longest time without a byte.
    pub(in crate::layer) fn stall_timeout(&self) -> Duration {
        self.options.stall_timeout
    }

    /// How long a read waits for a source.
    pub(in crate::layer) fn read_deadline(&self) -> Duration {
        self.options.read_deadline
    }

    /// What is known of a host.
    pub(in crate::layer) fn host(&self, name: &str) -> Arc<Host> {
        self.hosts.of(name)
    }

    /// A share of the memory for tables of contents, when it is free. Nobody waits for it who has one.
    pub(in crate::layer) async fn reserve_opening(&self, bytes: u64) -> Option<OwnedSemaphorePermit> {
        let units = memory_units(bytes).min(memory_units(OPENING_BUDGET));
        self.opening.clone().acquire_many_owned(units).await.ok()
    }

    /// Remembers what opening a layer has cost, for its tally.
    pub(in crate::layer) fn note_opened(&self, toc: Digest, requests: u64, bytes: u64) {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        opened.push_back((toc, Opening { requests, bytes }));
        if opened.len() > MAX_OPENED {
            opened.pop_front();
        }
    }

    pub(super) fn take_opened(&self, toc: &Digest) -> Option<(u64, u64)> {
        let mut opened = self.opened.lock().unwrap_or_else(PoisonError::into_inner);
        let at = opened.iter().position(|(of, _)| of == toc)?;
        let (_, Opening { requests, bytes }) = opened.remove(at)?;
        Some((requests, bytes))
    }

    /// Tells all fetches to end.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

/// What opening a layer has cost.
#[derive(Debug, Clone, Copy)]
struct Opening {
    requests: u64,
    bytes: u64,
}

fn memory_units(bytes: u64) -> u32 {
    u32::try_from(bytes.max(1).div_ceil(MEMORY_UNIT)).unwrap_or(u32::MAX)
}

/// Somebody who waits for memory, as long as it lives.
struct Waiting<'a>(&'a watch::Sender<usize>);

impl<'a> Waiting<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count = count.saturating_sub(1));
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::super::sequence::Sequence;
    use super::*;

    #[tokio::test]
    async fn nobody_stands_aside_while_somebody_waits_for_memory() {
        let engine = Engine::new(FetchOptions::default(), Metrics::unregistered(), Handle::current());
        let urgency = Urgency::default();
        let lane = Lane::Prefetch;
        let share = engine.gate.share();
        let demand = engine.gate.enter_demand(&share, &Sequence::default()).await;
        let held = engine.reserve(MEMORY_BUDGET).await;
        assert!(engine.stand_aside(&lane, &urgency).now_or_never().is_none());
        let mut waiting = Box::pin(engine.reserve(1));
        assert!(waiting.as_mut().now_or_never().is_none());
        assert!(engine.stand_aside(&lane, &urgency).now_or_never().is_some());
        drop(held);
        assert!(waiting.await.is_some());
        assert!(engine.stand_aside(&lane, &urgency).now_or_never().is_none());
        // A wait that is cancelled is none.
        let _held = engine.reserve(MEMORY_BUDGET).await;
        assert!(engine.reserve(1).now_or_never().is_none());
        assert!(engine.stand_aside(&lane, &urgency).now_or_never().is_none());
        drop(demand);
        assert!(engine.stand_aside(&lane, &urgency).now_or_never().is_some());
    }
}
