//! What became of RunPodSandbox calls, counted for metrics and for `status`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::adopt::{Observer, Outcome};
use crate::metrics::Metrics;
use crate::metrics::defs::{RequestLabels, ResultLabels};

/// A result and its reason.
type Key = (&'static str, &'static str);

/// Counts requests. Cheap to clone; clones count together.
#[derive(Debug, Clone)]
pub struct Requests {
    metrics: Metrics,
    counts: Arc<Mutex<BTreeMap<Key, u64>>>,
}

impl Requests {
    /// Counts from zero, and into these metrics.
    #[must_use]
    pub fn new(metrics: Metrics) -> Self {
        Self {
            metrics,
            counts: Arc::default(),
        }
    }

    /// Results with reasons and how often they were met, in the order of their names.
    #[must_use]
    pub fn counts(&self) -> Vec<(&'static str, &'static str, u64)> {
        let counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        counts
            .iter()
            .map(|((result, reason), count)| (*result, *reason, *count))
            .collect()
    }
}

impl Observer for Requests {
    fn request(&self, outcome: Outcome, reason: &'static str) {
        let result = outcome.result();
        let labels = RequestLabels { result, reason };
        self.metrics.sandbox_requests.get_or_create(&labels).inc();
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry((result, reason)).or_default() += 1;
    }

    fn adopted(&self, took: Duration, hull_age: Duration) {
        self.metrics.adoption_duration.observe(took.as_secs_f64());
        self.metrics.hull_age.observe(hull_age.as_secs_f64());
    }

    fn rebranded(&self, result: &'static str) {
        self.metrics.rebrands.get_or_create(&ResultLabels { result }).inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_result_and_reason() {
        let metrics = Metrics::unregistered();
        let requests = Requests::new(metrics.clone());
        let clone = requests.clone();
        clone.request(Outcome::Hit, "");
        clone.request(Outcome::Miss, "empty");
        clone.request(Outcome::Miss, "empty");
        assert_eq!(requests.counts(), [("hit", "", 1), ("miss", "empty", 2)]);
        let (result, reason) = ("miss", "empty");
        let counter = metrics
            .sandbox_requests
            .get_or_create(&RequestLabels { result, reason });
        assert_eq!(counter.get(), 2);
    }
}
