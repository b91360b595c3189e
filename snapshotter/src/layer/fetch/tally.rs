//! What one layer has cost since it was opened: counted as it happens, read by reports.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use crate::layer::source::Priority;

/// What a layer has cost.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// Reads that waited for bytes that were not resident.
    pub demand_reads_stalled: u64,
    /// How long they waited, all together.
    pub stall_time: Duration,
    /// The longest time that one of them waited.
    pub longest_stall: Duration,
    /// Bytes received.
    pub bytes: Amounts,
    /// Requests made, whatever became of them.
    pub requests: Amounts,
    /// Bytes of content that were taken from other layers.
    pub reused_bytes: u64,
    /// Chunks whose bytes were wrong.
    pub verify_failures: u64,
    /// What went wrong last.
    pub last_failure: Option<LastFailure>,
    /// How far background completion is.
    pub background: BackgroundState,
}

/// One number for each reason to fetch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Amounts {
    /// Tables of contents.
    pub toc: u64,
    /// What readers waited for, and what was read around and ahead for them.
    pub demand: u64,
    /// What the image's maker put first.
    pub prefetch: u64,
    /// What was warmed.
    pub warm: u64,
    /// Background completion.
    pub background: u64,
}

impl Amounts {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.toc + self.demand + self.prefetch + self.warm + self.background
    }
}

/// A request or a check that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastFailure {
    /// When.
    pub at: SystemTime,
    /// Who was asked.
    pub host: String,
    /// What happened, for a person.
    pub what: String,
    /// Its class, from a fixed set.
    pub reason: &'static str,
}

/// How far background completion of a layer is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum BackgroundState {
    /// Not asked for.
    #[default]
    Off,
    /// It waits for its turn, or gives way.
    Waiting,
    /// A request is under way.
    Running,
    /// The source fails or the disk is full; it is tried again later.
    Paused,
    /// All that can be had is there; chunks whose bytes are wrong are missing.
    GaveUp,
    /// All of the layer is resident.
    Complete,
}

impl BackgroundState {
    const ALL: [Self; 6] = [
        Self::Off,
        Self::Waiting,
        Self::Running,
        Self::Paused,
        Self::GaveUp,
        Self::Complete,
    ];

    /// Stable, short name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::GaveUp => "gave_up",
            Self::Complete => "complete",
        }
    }
}

#[derive(Debug, Default)]
struct Counters {
    toc: AtomicU64,
    demand: AtomicU64,
    prefetch: AtomicU64,
    warm: AtomicU64,
    background: AtomicU64,
}

impl Counters {
    fn of(&self, priority: Priority) -> &AtomicU64 {
        match priority {
            Priority::Demand => &self.demand,
            Priority::Prefetch => &self.prefetch,
            Priority::Warm => &self.warm,
            Priority::Background => &self.background,
        }
    }

    fn amounts(&self) -> Amounts {
        let [toc, demand, prefetch, warm, background] =
            [&self.toc, &self.demand, &self.prefetch, &self.warm, &self.background]
                .map(|counter| counter.load(Ordering::Relaxed));
        Amounts {
            toc,
            demand,
            prefetch,
            warm,
            background,
        }
    }
}

/// The living form of a [`Tally`].
#[derive(Debug, Default)]
pub(super) struct Counts {
    stalled: AtomicU64,
    stall_micros: AtomicU64,
    longest_micros: AtomicU64,
    bytes: Counters,
    requests: Counters,
    reused: AtomicU64,
    verify_failures: AtomicU64,
    last_failure: Mutex<Option<LastFailure>>,
    background: AtomicU8,
}

impl Counts {
    pub(super) fn stalled(&self, time: Duration) {
        self.stalled.fetch_add(1, Ordering::Relaxed);
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.stall_micros.fetch_add(micros, Ordering::Relaxed);
        self.longest_micros.fetch_max(micros, Ordering::Relaxed);
    }

    pub(super) fn toc(&self, requests: u64, bytes: u64) {
        self.requests.toc.fetch_add(requests, Ordering::Relaxed);
        self.bytes.toc.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn request(&self, priority: Priority) {
        self.requests.of(priority).fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn received(&self, priority: Priority, bytes: u64) {
        self.bytes.of(priority).fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn reused(&self, bytes: u64) {
        self.reused.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(super) fn verify_failed(&self, chunks: u64) {
        self.verify_failures.fetch_add(chunks, Ordering::Relaxed);
    }

    pub(super) fn failed(&self, host: &str, what: String, reason: &'static str) {
        let failure = LastFailure {
            at: SystemTime::now(),
            host: host.to_owned(),
            what,
            reason,
        };
        // Replaced whole.
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(failure);
    }

    pub(super) fn background(&self, state: BackgroundState) {
        self.background.store(state as u8, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Tally {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = usize::from(self.background.load(Ordering::Relaxed));
        Tally {
            demand_reads_stalled: load(&self.stalled),
            stall_time: Duration::from_micros(load(&self.stall_micros)),
            longest_stall: Duration::from_micros(load(&self.longest_micros)),
            bytes: self.bytes.amounts(),
            requests: self.requests.amounts(),
            reused_bytes: load(&self.reused),
            verify_failures: load(&self.verify_failures),
            last_failure: self.last_failure.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            background: BackgroundState::ALL.get(state).copied().unwrap_or_default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_counted_is_told_apart() {
        let counts = Counts::default();
        counts.toc(1, 10);
        for (priority, bytes) in [
            (Priority::Demand, 20),
            (Priority::Prefetch, 30),
            (Priority::Warm, 40),
            (Priority::Background, 50),
        ] {
            counts.request(priority);
            counts.received(priority, bytes);
        }
        counts.stalled(Duration::from_millis(5));
        counts.stalled(Duration::from_millis(2));
        counts.failed("mirror.test", "no".to_owned(), "transient");
        let tally = counts.read();
        assert_eq!((tally.requests.total(), tally.bytes.total()), (5, 150));
        assert_eq!(
            (tally.bytes.toc, tally.bytes.warm, tally.bytes.background),
            (10, 40, 50)
        );
        assert_eq!(
            (tally.demand_reads_stalled, tally.stall_time),
            (2, Duration::from_millis(7))
        );
        assert_eq!(tally.longest_stall, Duration::from_millis(5));
        assert_eq!(tally.last_failure.unwrap().host, "mirror.test");
        for state in BackgroundState::ALL {
            counts.background(state);
            assert_eq!(counts.read().background, state);
        }
    }
}
