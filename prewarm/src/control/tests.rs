//! The API over a real socket, as the command line uses it.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use hullspeed_daemon::activation::Inherited;
use hullspeed_daemon::answer::Form;
use hullspeed_proto::cri::v1::PodSandboxConfig;
use tonic::Code;

use super::*;
use crate::adopt::eligibility::Policy;
use crate::adopt::{self, Observer as _, Outcome};
use crate::cli::ask;
use crate::client::Client;
use crate::containerd::Containerd;
use crate::ledger::{Adoption, Mark};
use crate::metrics::Metrics;
use crate::pool::{Audit, CreationFailure, HandlerSnapshot, Off, PoolOptions, PoolSnapshot};
use crate::rules::Events;
use crate::rules::events::EventOptions;

struct Daemon {
    place: tempfile::TempDir,
    _state: tempfile::TempDir,
    control: Control,
    stopping: CancellationToken,
    served: tokio::task::JoinHandle<()>,
}

impl Daemon {
    async fn start() -> Self {
        let (place, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let config = Config {
            control_socket: place.path().join("control.sock"),
            ..Config::default()
        };
        let metrics = Metrics::unregistered();
        let ledger = Ledger::new(Mark::new("m".to_owned()));
        let containerd = Containerd::at(&place.path().join("none.sock"));
        let pool = Pool::new(
            PoolOptions::default(),
            containerd.clone(),
            ledger.clone(),
            metrics.clone(),
        );
        let adopter = Adopter::new(adopt::Options {
            containerd: containerd.clone(),
            ledger: ledger.clone(),
            hulls: Arc::new(pool.clone()),
            events: Events::new(EventOptions {
                ledger: ledger.clone(),
                containerd,
                facts: pool.facts(),
                supply: false,
                metrics: metrics.clone(),
            }),
            observer: Arc::new(()),
            state: state.path().to_owned(),
            policy: Policy::default(),
        });
        let control = Control {
            warm: None,
            pool,
            adopter: adopter.unwrap(),
            config: Arc::new(config),
            ledger,
            requests: Requests::new(metrics),
        };
        let path = &control.config.control_socket;
        let socket = Socket::open(&mut Inherited::default(), "control", path).await.unwrap();
        let stopping = CancellationToken::new();
        let served = tokio::spawn(control.clone().serve(socket, stopping.clone()));
        Self {
            place,
            _state: state,
            control,
            stopping,
            served,
        }
    }

    fn client(&self) -> Client {
        Client::at(&self.control.config.control_socket)
    }
}

#[tokio::test]
async fn status_shows_what_is_there() {
    let mut daemon = Daemon::start().await;
    let mode = std::fs::metadata(&daemon.control.config.control_socket).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    daemon.control.requests.request(Outcome::Ineligible, "host_port");
    daemon.control.ledger.adopt(Adoption {
        sandbox_id: "a".to_owned(),
        config: PodSandboxConfig::default(),
        runtime_handler: String::new(),
        adopted_at: 1,
    });
    let status = daemon.client().status().await.unwrap();
    assert_eq!(status.version, env!("CARGO_PKG_VERSION"));
    // No journal says that its record is rewritten.
    assert_eq!(status.unbranded.unwrap().pending, 1);
    assert_eq!((status.containerd_version.as_str(), status.adopted), ("", 1));
    let request = &status.requests[0];
    assert_eq!(
        (request.result.as_str(), request.reason.as_str(), request.count),
        ("ineligible", "host_port", 1)
    );
    let pool = status.pool.unwrap();
    assert_eq!((pool.handlers.len(), pool.handlers[0].min), (1, 2));
    daemon.stopping.cancel();
    (&mut daemon.served).await.unwrap();
    assert_eq!(
        std::fs::read_dir(daemon.place.path()).unwrap().count(),
        0,
        "the socket stays"
    );
    let error = daemon.client().status().await.unwrap_err();
    assert!(error.to_string().contains("control.sock"), "{error}");
}

#[tokio::test]
async fn the_pool_obeys() {
    let daemon = Daemon::start().await;
    let client = daemon.client();
    let paused = client.pool(api::PoolAction::Pause).await.unwrap();
    assert!(daemon.control.pool.snapshot().paused, "{paused:?}");
    client.pool(api::PoolAction::Flush).await.unwrap();
    client.pool(api::PoolAction::Resume).await.unwrap();
    assert!(!daemon.control.pool.snapshot().paused);
    let unknown = Request::new(api::PoolRequest { action: 99 });
    let error = PrewarmControl::pool(&daemon.control, unknown).await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
}

#[tokio::test]
async fn a_drain_does_not_end_while_containerd_is_away_and_holds_until_it_is_taken_back() {
    let daemon = Daemon::start().await;
    let client = daemon.client();
    let mut progress = client.drain().await.unwrap();
    for _ in 0..2 {
        let next = tokio::time::timeout(Duration::from_secs(10), progress.message()).await;
        let next = next.unwrap().unwrap().unwrap();
        // No hull is known of, but nobody can tell.
        assert_eq!((next.left, next.done), (0, false));
    }
    let pool = client.pool(api::PoolAction::Unspecified).await.unwrap();
    assert_eq!(pool.state, "drained");
    let pool = client.pool(api::PoolAction::Resume).await.unwrap();
    assert_ne!(pool.state, "drained");
}

#[tokio::test]
async fn a_drain_waits_for_records_but_not_for_ever() {
    let daemon = Daemon::start().await;
    daemon.control.ledger.adopt(Adoption {
        sandbox_id: "a".to_owned(),
        config: PodSandboxConfig::default(),
        runtime_handler: String::new(),
        adopted_at: 1,
    });
    let client = daemon.client();
    let mut out = Vec::new();
    let asked = ask::drain(&client, true, Form { json: false }, &mut out);
    assert!(
        tokio::time::timeout(2 * PROGRESS_INTERVAL, asked).await.is_err(),
        "it has not waited"
    );
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains("records pending   1"), "{text}");
    let bounded = daemon.control.branded(Duration::from_millis(10));
    tokio::time::timeout(Duration::from_secs(10), bounded).await.unwrap();
    // The pod goes, and with it what there was to wait for.
    daemon.control.ledger.forget("a");
    let unbounded = daemon.control.branded(Duration::from_secs(3600));
    tokio::time::timeout(Duration::from_secs(10), unbounded).await.unwrap();
}

#[test]
fn a_pool_is_shown_whole() {
    let off = Off {
        reason: "cni",
        detail: "calico depends on the pod".to_owned(),
    };
    let handler = HandlerSnapshot {
        runtime_handler: "kata".to_owned(),
        min: 1,
        max: 4,
        target: 3,
        idle: 2,
        creating: 1,
        oldest: Some(Duration::from_millis(1500)),
        off: Some(off.clone()),
    };
    let snapshot = PoolSnapshot {
        off: Some(off),
        paused: true,
        drained: false,
        sweeping: false,
        handlers: vec![handler],
        removing: 5,
        networks: vec!["net".to_owned()],
        free_addresses: Some(6),
        bytes_per_hull: None,
        failure: Some(CreationFailure {
            reason: "no".to_owned(),
            in_a_row: 7,
            retry_in: Duration::from_secs(1),
        }),
        audit: Audit {
            sweeps: 8,
            lost: 9,
            spared: 10,
        },
    };
    assert_eq!(view::left(&snapshot), 8);
    let shown = view::pool(snapshot.clone());
    assert_eq!((shown.state.as_str(), shown.reason.as_str()), ("off", "cni"));
    let handler = &shown.handlers[0];
    assert_eq!((handler.ready, handler.oldest_ms), (2, Some(1500)));
    assert_eq!(handler.off_detail, "calico depends on the pod");
    assert_eq!(shown.failure.unwrap().retry_in_ms, 1000);
    assert_eq!(shown.audit.unwrap().spared, 10);
    for (off, drained, state) in [(false, false, "paused"), (true, true, "drained")] {
        let snapshot = PoolSnapshot {
            off: snapshot.off.clone().filter(|_| off),
            drained,
            ..snapshot.clone()
        };
        assert_eq!(view::pool(snapshot).state, state);
    }
}
