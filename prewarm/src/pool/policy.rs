//! How many hulls to keep: enough for what has lately been asked for at once and for what is asked for while new ones
//! are made, within bounds; more at once when demand rises, fewer one by one when it has gone.
//!
//! Nothing here looks at a clock or at the system: the same demand at the same times gives the same targets.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Demand is counted in steps of this length.
const STEP: Duration = Duration::from_secs(1);

/// Requests within so many steps are one burst.
const BURST_STEPS: u64 = 3;

/// The rate is that of the last so many steps.
const RATE_STEPS: u64 = 30;

/// A longer memory is not kept.
const MAX_STEPS: u64 = 3600;

/// Memory of a hull that has not been measured.
const ASSUMED_BYTES: u64 = 6 << 20;

/// Demand for hulls of one handler.
#[derive(Debug)]
pub(super) struct Demand {
    origin: Option<Instant>,
    /// In steps.
    window: u64,
    /// Steps with requests, and how many; oldest first.
    counts: VecDeque<(u64, u32)>,
}

impl Demand {
    /// Remembers for this long.
    pub(super) fn new(window: Duration) -> Self {
        Self {
            origin: None,
            window: window.as_secs().clamp(BURST_STEPS, MAX_STEPS),
            counts: VecDeque::new(),
        }
    }

    /// A hull has been asked for, whether there was one or not.
    pub(super) fn record(&mut self, now: Instant) {
        self.origin.get_or_insert(now);
        let step = self.step(now);
        self.forget(step);
        match self.counts.back_mut() {
            // Time does not go back, but callers race.
            Some((last, count)) if *last >= step => *count = count.saturating_add(1),
            _ => self.counts.push_back((step, 1)),
        }
    }

    fn step(&self, now: Instant) -> u64 {
        let origin = self.origin.unwrap_or(now);
        now.saturating_duration_since(origin).as_secs() / STEP.as_secs()
    }

    fn forget(&mut self, step: u64) {
        while self
            .counts
            .front()
            .is_some_and(|(at, _)| step.saturating_sub(*at) >= self.window)
        {
            self.counts.pop_front();
        }
    }

    /// The largest number asked for at once, less and less of it as it grows old: all of it for half of the window, none
    /// at its end.
    fn burst(&self, step: u64) -> usize {
        let bursts = self.counts.iter().enumerate().map(|(first, (at, _))| {
            let steps = self.counts.iter().skip(first);
            let counts = steps
                .take_while(|(later, _)| later - at < BURST_STEPS)
                .map(|(_, count)| u64::from(*count));
            let total: u64 = counts.sum();
            let left = self.window.saturating_sub(step.saturating_sub(*at));
            (total * (2 * left).min(self.window)).div_ceil(self.window)
        });
        usize::try_from(bursts.max().unwrap_or(0)).unwrap_or(usize::MAX)
    }

    /// How many are asked for within `time`, at the rate of late.
    fn within(&self, time: Duration, step: u64) -> usize {
        let recent = self
            .counts
            .iter()
            .rev()
            .take_while(|(at, _)| step.saturating_sub(*at) < RATE_STEPS);
        let total: u64 = recent.map(|(_, count)| u64::from(*count)).sum();
        let steps = RATE_STEPS * STEP.as_secs();
        let expected = u128::from(total) * time.as_millis() / 1000;
        usize::try_from(expected.div_ceil(u128::from(steps))).unwrap_or(usize::MAX)
    }

    /// How many hulls this demand asks for, when a replacement takes `refill`.
    pub(super) fn wanted(&self, refill: Duration, min: usize, max: usize, now: Instant) -> usize {
        let step = self.step(now);
        let wanted = self.burst(step).max(self.within(refill, step)).max(min);
        wanted.min(max)
    }
}

/// A number that rises at once and falls by one at a time, each time only after it has been too high for a while.
#[derive(Debug, Default)]
pub(super) struct Steady {
    value: usize,
    /// Since when less would do, and how much at most.
    less: Option<(Instant, usize)>,
}

impl Steady {
    pub(super) fn update(&mut self, wanted: usize, patience: Duration, now: Instant) -> usize {
        if wanted >= self.value {
            self.value = wanted;
            self.less = None;
            return self.value;
        }
        let (since, most) = self.less.unwrap_or((now, wanted));
        let most = most.max(wanted);
        self.less = Some((since, most));
        if now.saturating_duration_since(since) >= patience {
            self.value = most.max(self.value - 1);
            self.less = None;
        }
        self.value
    }
}

/// What limits all hulls together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    pub(super) max_memory_bytes: u64,
    pub(super) bytes_per_hull: Option<u64>,
    pub(super) address_headroom: u64,
    /// Addresses that are free or that hulls have, counted at one moment.
    pub(super) addresses: Option<u64>,
}

impl Limits {
    /// So many hulls may there be.
    pub(super) fn total(&self) -> usize {
        let bytes = self.bytes_per_hull.unwrap_or(ASSUMED_BYTES).max(1);
        let by_memory = usize::try_from(self.max_memory_bytes / bytes).unwrap_or(usize::MAX);
        by_memory.min(self.by_addresses())
    }

    fn by_addresses(&self) -> usize {
        let Some(addresses) = self.addresses else {
            return usize::MAX;
        };
        usize::try_from(addresses.saturating_sub(self.address_headroom)).unwrap_or(usize::MAX)
    }

    /// Whether addresses are what limits.
    pub(super) fn is_by_addresses(&self) -> bool {
        self.by_addresses() <= self.total()
    }
}

/// Cuts `wanted` down to `total` in all, the largest first.
pub(super) fn share(wanted: &mut [usize], total: usize) {
    let mut sum = wanted.iter().fold(0usize, |sum, one| sum.saturating_add(*one));
    while sum > total {
        let Some(largest) = wanted.iter_mut().max() else { return };
        // Down to the next largest would do in one step, but the numbers are small.
        *largest -= 1;
        sum -= 1;
    }
}

#[cfg(test)]
mod tests;
