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
        assert_eq!(
            due(&shared, now),
            (now + options.quiet).min(begin + options.max_deferral)
        );
    }
}

#[tokio::test]
async fn a_drain_is_done_when_containerd_has_shown_that_nothing_is_left() {
    let shared = pool_of_one();
    shared.state().unchecked = true;
    let mut drain = std::pin::pin!(shared.drain());
    let mut is_done = async || {
        shared.removed.notify_waiters();
        tokio::time::timeout(Duration::from_millis(10), drain.as_mut())
            .await
            .is_ok()
    };
    assert!(!is_done().await, "nothing was looked at");
    // A sweep that began before is not enough; this is what one does that began after.
    shared.state().unchecked = false;
    assert!(!is_done().await && shared.snapshot(Instant::now()).sweeping);
    shared.state().drain_swept = true;
    assert!(!shared.snapshot(Instant::now()).sweeping);
    let away = super::Off::new("containerd_away", "");
    shared.state().away = Some(away);
    assert!(
        !is_done().await && shared.snapshot(Instant::now()).sweeping,
        "it is away"
    );
    shared.state().away = None;
    shared.condemn(&mut shared.state(), "hull", "drained", Instant::now());
    assert!(!is_done().await, "one is left");
    shared.removed("hull", &Ok(()));
    assert!(is_done().await);
}

#[tokio::test]
async fn a_containerd_that_does_not_answer_is_away_for_everybody() {
    let shared = pool_of_one();
    let mut facts = shared.facts.subscribe();
    shared.facts.send_replace(Some(Arc::new(Facts::default())));
    assert!(facts.borrow_and_update().is_some());
    assert!(super::survey::survey(&shared).await.is_err());
    assert!(facts.has_changed().unwrap() && facts.borrow_and_update().is_none());
    assert_eq!(shared.snapshot(Instant::now()).off.unwrap().reason, "containerd_away");
    assert_eq!(shared.take("", Instant::now()).unwrap_err(), Miss::Off);
    // Told once.
    assert!(super::survey::survey(&shared).await.is_err());
    assert!(!facts.has_changed().unwrap());
}

#[tokio::test]
async fn addresses_that_pods_need_are_given_back_at_once() {
    let shared = Arc::new(pool_of_one());
    let now = Instant::now();
    shared.start_begins("pod", now);
    for hull in 0..6 {
        shared.condemn(&mut shared.state(), &hull.to_string(), "surplus", now);
    }
    let mut tasks = tokio::task::JoinSet::new();
    let next = shared.clear(&mut tasks, now);
    assert_eq!((tasks.len(), next), (0, Some(now + shared.options.max_deferral)));
    shared.release_all("no_addresses");
    assert_eq!(shared.clear(&mut tasks, now), None);
    assert_eq!(tasks.len(), 4, "four at once, though a pod starts");
    assert_eq!(shared.state().holders(), 6);
    shared.state().condemned.get_mut("3").unwrap().stopped = true;
    assert_eq!(shared.state().holders(), 5);
}

#[tokio::test]
async fn what_breaks_off_leaves_nothing_under_way() {
    let shared = Arc::new(pool_of_one());
    let now = Instant::now();
    shared.retarget(now);
    let mut tasks = tokio::task::JoinSet::new();
    shared.refill(&mut tasks, now);
    shared.condemn(&mut shared.state(), "hull", "surplus", now);
    shared.clear(&mut tasks, now);
    let busy = |shared: &Shared| {
        let state = shared.state();
        let removing = state.condemned.values().filter(|one| one.under_way).count();
        (state.expected.len(), state.shelves[0].creating, removing)
    };
    assert_eq!((tasks.len(), busy(&shared)), (2, (1, 1, 1)));
    // Images are not warmed beside it.
    assert!(shared.quiet_at(&mut shared.state(), now) > now);
    // As a panic in one would.
    tasks.shutdown().await;
    assert_eq!(busy(&shared), (0, 0, 0));
    assert!(shared.quiet_at(&mut shared.state(), now) <= now);
    assert!(shared.state().backoff.until().is_some());
}
