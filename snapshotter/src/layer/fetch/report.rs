//! What the engine tells of layers and hosts, for people.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::engine::Engine;
use super::health::Host;
use super::layer::LayerFetch;
use super::tally::{LastFailure, Tally};
use crate::layer::report::{Cost, Failure, Fetched, HostReport};
use crate::layer::source::Priority;

/// Requests under way, by what they are for.
#[derive(Debug, Default)]
pub(super) struct InFlight {
    demand: Arc<AtomicU64>,
    prefetch: Arc<AtomicU64>,
    warm: Arc<AtomicU64>,
    background: Arc<AtomicU64>,
}

/// A request, counted as long as it lives.
#[derive(Debug)]
pub(super) struct Asking(Arc<AtomicU64>);

impl InFlight {
    /// Counts a request.
    pub(super) fn enter(&self, priority: Priority) -> Asking {
        let count = match priority {
            Priority::Demand => &self.demand,
            Priority::Prefetch => &self.prefetch,
            Priority::Warm => &self.warm,
            Priority::Background => &self.background,
        };
        count.fetch_add(1, Ordering::Relaxed);
        Asking(count.clone())
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// The hosts that were asked, by name.
    pub fn hosts(&self) -> Vec<HostReport> {
        let mut hosts: Vec<_> = self.hosts.all().iter().map(|host| host_report(host)).collect();
        hosts.sort_by(|a, b| a.host.cmp(&b.host));
        hosts
    }

    /// Requests under way, by what they are for.
    pub fn in_flight(&self) -> Vec<(&'static str, u64)> {
        let InFlight {
            demand,
            prefetch,
            warm,
            background,
        } = &self.in_flight;
        let kinds = [
            (Priority::Demand, demand),
            (Priority::Prefetch, prefetch),
            (Priority::Warm, warm),
            (Priority::Background, background),
        ];
        kinds
            .map(|(priority, count)| (priority.kind(), count.load(Ordering::Relaxed)))
            .to_vec()
    }
}

fn host_report(host: &Host) -> HostReport {
    HostReport {
        host: host.name().to_owned(),
        failures_in_a_row: host.failures(),
        retry_in: host.pause(),
    }
}

impl LayerFetch {
    /// What the layer has cost since it was opened.
    pub fn cost(&self) -> Cost {
        let Tally {
            demand_reads_stalled,
            stall_time,
            longest_stall,
            bytes,
            requests,
            reused_bytes,
            verify_failures,
            last_failure,
            background,
        } = self.tally();
        let fetched = |kind, requests, bytes| Fetched { kind, requests, bytes };
        let remotes = self.remotes().all();
        let mut hosts: Vec<HostReport> = Vec::new();
        for remote in &remotes {
            // One host may serve several images of the layer.
            if hosts.iter().all(|known| known.host != remote.host.name()) {
                hosts.push(host_report(&remote.host));
            }
        }
        Cost {
            stalls: demand_reads_stalled,
            stall_time,
            longest_stall,
            fetched: vec![
                fetched("toc", requests.toc, bytes.toc),
                fetched(Priority::Demand.kind(), requests.demand, bytes.demand),
                fetched(Priority::Prefetch.kind(), requests.prefetch, bytes.prefetch),
                fetched(Priority::Warm.kind(), requests.warm, bytes.warm),
                fetched(Priority::Background.kind(), requests.background, bytes.background),
            ],
            reused: reused_bytes,
            verify_failures,
            last_failure: last_failure.map(|LastFailure { at, host, what, reason }| Failure {
                at,
                reason: reason.to_owned(),
                what,
                host,
                image: remotes
                    .first()
                    .map(|remote| remote.names.image.clone())
                    .unwrap_or_default(),
                layer: remotes.first().map(|remote| remote.names.layer_digest),
            }),
            background: background.name(),
            hosts,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_as_long_as_they_live() {
        let in_flight = InFlight::default();
        let asking = [in_flight.enter(Priority::Warm), in_flight.enter(Priority::Warm)];
        let _other = in_flight.enter(Priority::Demand);
        let count = || {
            (
                in_flight.warm.load(Ordering::Relaxed),
                in_flight.demand.load(Ordering::Relaxed),
            )
        };
        assert_eq!(count(), (2, 1));
        drop(asking);
        assert_eq!(count(), (0, 1));
    }
}
