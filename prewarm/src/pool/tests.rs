//! Decisions of the pool, without a containerd.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::fingerprint::{Current, Fingerprint, Stamp};
use super::state::Shared;
use super::{HandlerPool, PoolOptions};
use crate::adopt::Miss;
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::ledger::{Ledger, Mark};
use crate::metrics::Metrics;

const SECOND: Duration = Duration::from_secs(1);

/// A pool of one hull, which is missing; containerd has answered.
fn pool_of_one() -> Shared {
    let options = PoolOptions {
        handlers: vec![HandlerPool {
            runtime_handler: String::new(),
            min: 1,
            max: 8,
        }],
        ..Default::default()
    };
    let containerd = Containerd::at(Path::new("/nonexistent/containerd.sock"));
    let ledger = Ledger::new(Mark::new("0123456789abcdef".into()));
    let shared = Shared::new(options, containerd, ledger, Metrics::unregistered());
    let facts = Arc::new(Facts::default());
    let current = Current {
        fingerprint: Fingerprint::new(&facts, [].iter(), "/hullspeed"),
        facts,
        instance: Stamp::of(Vec::<PathBuf>::new()),
        network: Stamp::of(Vec::<PathBuf>::new()),
        networks: Vec::new(),
    };
    let mut state = shared.state();
    state.current = Some(Arc::new(current));
    state.away = None;
    state.unchecked = false;
    state.candidates = Some(std::collections::HashSet::new());
    drop(state);
    shared
}

/// When the next hull is due.
fn due(shared: &Shared, now: Instant) -> Instant {
    shared.retarget(now);
    shared.next_creation(&mut shared.state(), now).unwrap().1
}

#[tokio::test]
async fn a_burst_is_over_before_a_hull_is_made() {
    let shared = pool_of_one();
    let begin = Instant::now();
    assert_eq!(due(&shared, begin), begin, "nothing starts, nothing is waited for");
    let pods = ["a", "b", "c", "d", "e"];
    for pod in pods {
        assert_eq!(shared.take("", begin).unwrap_err(), Miss::Empty);
        shared.start_begins(pod, begin);
    }
    let options = &shared.options;
    let patient = begin + options.max_deferral;
    assert_eq!(due(&shared, begin + options.quiet), patient);
    for (pod, at) in pods.into_iter().zip(0..) {
        assert_eq!(due(&shared, begin + SECOND), patient, "{pod} starts");
        shared.start_ended(pod, begin + at * SECOND / 2);
    }
    assert_eq!(due(&shared, begin + 2 * SECOND), begin + 2 * SECOND + options.quiet);
}

#[tokio::test]
async fn a_miss_stirs_and_steady_misses_do_not_starve() {
    let shared = pool_of_one();
    let begin = Instant::now();
    let options = &shared.options;
    assert_eq!(shared.take("", begin).unwrap_err(), Miss::Empty);
    assert_eq!(due(&shared, begin), begin + options.quiet);
    for half in 1..20 {
        let now = begin + half * SECOND / 2;
        assert_eq!(shared.take("", now).unwrap_err(), Miss::Empty);
        assert_eq!(due(&shared, now), (now + options.quiet).min(begin + options.max_deferral));
    }
}
