//! The agent against a snapshotter that a test directs: its real one is in the integration tests.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use hullspeed_proto::hullspeed::control::v1 as api;
use hullspeed_proto::hullspeed::control::v1::snapshotter_control_server::{
    SnapshotterControl, SnapshotterControlServer,
};
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::*;
use crate::containerd::Containerd;
use crate::credentials::HandOver;
use crate::metrics::Metrics;
use crate::metrics::defs::{ResultLabels, StateLabels};
use crate::rules::CredentialSink as _;
use crate::snapshotter::Snapshotter;
use crate::warm::seen::SeenImages;

type Reports = mpsc::Sender<Result<api::WarmProgress, Status>>;

/// Takes calls down; warms last until the test ends them.
#[derive(Clone, Default)]
struct Directed {
    logins: Arc<Mutex<Vec<api::SetCredentialsRequest>>>,
    warms: Arc<Mutex<Vec<(api::WarmRequest, Reports)>>>,
    refuse: Arc<AtomicBool>,
    refused: Arc<AtomicUsize>,
}

#[tonic::async_trait]
impl SnapshotterControl for Directed {
    type WarmStream = ReceiverStream<Result<api::WarmProgress, Status>>;

    async fn warm(&self, request: Request<api::WarmRequest>) -> Result<Response<Self::WarmStream>, Status> {
        if self.refuse.load(Ordering::SeqCst) {
            self.refused.fetch_add(1, Ordering::SeqCst);
            return Err(Status::resource_exhausted("busy"));
        }
        let (sender, reports) = mpsc::channel(4);
        self.warms.lock().unwrap().push((request.into_inner(), sender));
        Ok(Response::new(ReceiverStream::new(reports)))
    }

    async fn set_credentials(
        &self,
        request: Request<api::SetCredentialsRequest>,
    ) -> Result<Response<api::SetCredentialsResponse>, Status> {
        let login = request.into_inner();
        let bad = login.password == "refused-secret";
        self.logins.lock().unwrap().push(login);
        if bad {
            return Err(Status::invalid_argument("no good"));
        }
        Ok(Response::new(api::SetCredentialsResponse {}))
    }

    async fn forget_credentials(
        &self,
        _: Request<api::ForgetCredentialsRequest>,
    ) -> Result<Response<api::ForgetCredentialsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn status(&self, _: Request<api::StatusRequest>) -> Result<Response<api::StatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn diagnose(&self, _: Request<api::DiagnoseRequest>) -> Result<Response<api::DiagnoseResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn explain(&self, _: Request<api::ExplainRequest>) -> Result<Response<api::ExplainResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn list_layers(
        &self,
        _: Request<api::ListLayersRequest>,
    ) -> Result<Response<api::ListLayersResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn cache_usage(
        &self,
        _: Request<api::CacheUsageRequest>,
    ) -> Result<Response<api::CacheUsageResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn prune_cache(
        &self,
        _: Request<api::PruneCacheRequest>,
    ) -> Result<Response<api::PruneCacheResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    type VerifyCacheStream = ReceiverStream<Result<api::VerifyCacheProgress, Status>>;

    async fn verify_cache(
        &self,
        _: Request<api::VerifyCacheRequest>,
    ) -> Result<Response<Self::VerifyCacheStream>, Status> {
        Err(Status::unimplemented(""))
    }
}

impl Directed {
    fn serve(&self, socket: &Path) {
        let incoming = UnixListenerStream::new(UnixListener::bind(socket).unwrap());
        let server = tonic::transport::Server::builder()
            .add_service(SnapshotterControlServer::new(self.clone()))
            .serve_with_incoming(incoming);
        tokio::spawn(server);
    }

    /// The calls under way: image, share, and where reports go.
    fn open(&self) -> Vec<(String, api::Share, Reports)> {
        let warms = self.warms.lock().unwrap();
        let open = warms.iter().filter(|(_, reports)| !reports.is_closed());
        open.map(|(request, reports)| (request.image.clone(), request.share(), reports.clone()))
            .collect()
    }
}

#[derive(Default)]
struct Starts(AtomicBool);

impl Quiet for Starts {
    fn quiet_in(&self) -> Duration {
        if self.0.load(Ordering::SeqCst) {
            Duration::from_millis(100)
        } else {
            Duration::ZERO
        }
    }
}

async fn until(mut holds: impl FnMut() -> bool) {
    let waiting = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waiting)
        .await
        .expect("it never came to that");
}

fn resident() -> api::WarmProgress {
    api::WarmProgress {
        manifest_digest: "sha256:0".to_owned(),
        layers: vec![api::LayerProgress {
            state: api::layer_progress::State::Resident.into(),
            ..api::LayerProgress::default()
        }],
        bytes_wanted: 7,
        bytes_resident: 7,
        done: true,
    }
}

struct Bench {
    place: tempfile::TempDir,
    snapshotter: Directed,
    starts: Arc<Starts>,
    images: SeenImages,
    metrics: Metrics,
    agent: WarmAgent,
    stopping: CancellationToken,
}

impl Bench {
    fn start(policy: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        std::fs::write(place.path().join("warm.toml"), policy).unwrap();
        let (snapshotter, starts) = (Directed::default(), Arc::new(Starts::default()));
        let socket = place.path().join("s.sock");
        snapshotter.serve(&socket);
        let (images, metrics) = (SeenImages::default(), Metrics::unregistered());
        let agent = WarmAgent::new(WarmOptions {
            policy: place.path().join("warm.toml"),
            snapshotter: Snapshotter::at(&socket),
            containerd: Containerd::at(&place.path().join("no-containerd.sock")),
            images: images.clone(),
            quiet: starts.clone(),
            max_parallel: 2,
            resolve_every: Duration::from_millis(300),
            metrics: metrics.clone(),
        });
        let stopping = CancellationToken::new();
        let (running, stop) = (agent.clone(), stopping.clone());
        tokio::spawn(async move { running.run(stop).await });
        Self {
            place,
            snapshotter,
            starts,
            images,
            metrics,
            agent,
            stopping,
        }
    }

    fn write(&self, policy: &str) {
        let new = self.place.path().join("new");
        std::fs::write(&new, policy).unwrap();
        std::fs::rename(new, self.place.path().join("warm.toml")).unwrap();
    }

    fn state(&self, image: &str) -> Option<ImageState> {
        let images = self.agent.status().images;
        let found = images.into_iter().find(|status| status.target.key.image == image);
        found.map(|status| status.state)
    }
}

const THREE: &str = "[[image]]\nname = \"r.io/a\"\nshare = \"all\"\npriority = 3\n\
    [[image]]\nname = \"r.io/b\"\nshare = \"hot\"\npriority = 2\n\
    [[image]]\nname = \"r.io/c\"\nshare = \"toc\"\npriority = 1\n";

#[tokio::test]
async fn few_at_once_none_while_pods_start_and_tags_are_resolved_again() {
    let bench = Bench::start(THREE);
    let open = || bench.snapshotter.open();
    until(|| open().len() == 2).await;
    let mut under_way = open();
    under_way.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!((under_way[0].0.as_str(), under_way[0].1), ("r.io/a", api::Share::All));
    assert_eq!((under_way[1].0.as_str(), under_way[1].1), ("r.io/b", api::Share::Hot));
    assert_eq!(bench.state("r.io/c"), Some(ImageState::Waiting));

    bench.starts.0.store(true, Ordering::SeqCst);
    until(|| open().is_empty()).await;
    until(|| bench.state("r.io/a") == Some(ImageState::Paused)).await;
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(open().is_empty());
    bench.starts.0.store(false, Ordering::SeqCst);
    until(|| open().len() == 2).await;
    for (_, _, reports) in open() {
        reports.send(Ok(resident())).await.unwrap();
    }
    bench.snapshotter.warms.lock().unwrap().clear();
    drop(under_way);
    until(|| bench.state("r.io/a") == Some(ImageState::Resident)).await;
    assert_eq!(bench.agent.status().images[0].bytes_resident, 7);
    // The third has its turn, and then the first again.
    until(|| open().iter().any(|(image, ..)| image == "r.io/c")).await;
    until(|| open().iter().any(|(image, ..)| image == "r.io/a")).await;
    let ok = ResultLabels { result: "ok" };
    assert!(bench.metrics.warm_runs.get_or_create(&ok).get() >= 2);
    bench.stopping.cancel();
    until(|| open().is_empty()).await;
}

#[tokio::test]
async fn a_new_policy_is_taken_up_and_a_broken_one_is_named_and_changes_nothing() {
    let bench = Bench::start(THREE);
    let open = || bench.snapshotter.open();
    until(|| open().len() == 2).await;
    bench.write("[[image]]\nname = \"r.io/a\"\nshare = \"most\"\n");
    until(|| bench.agent.status().policy_problem.is_some()).await;
    let problem = bench.agent.status().policy_problem.unwrap();
    assert!(
        problem.contains("warm.toml:3:9") && problem.contains("most"),
        "{problem}"
    );
    assert!(bench.agent.status().images.len() == 3 && open().len() == 2);
    assert_eq!(bench.metrics.warm_policy_errors.get(), 1);

    bench.images.add("r.io/team/app:2");
    bench.write("[[image]]\nname = \"r.io/**\"\nshare = \"hot\"\n");
    until(|| bench.agent.status().policy_problem.is_none()).await;
    // What is not wanted any more is stopped; the pattern fits what was pulled.
    until(|| open().len() == 1 && open()[0].0 == "r.io/team/app:2").await;
    assert_eq!(bench.agent.status().images.len(), 1);
    bench.snapshotter.refuse.store(true, Ordering::SeqCst);
    bench.snapshotter.warms.lock().unwrap().clear();
    let failed = StateLabels { state: "failed" };
    until(|| bench.metrics.warm_images.get_or_create(&failed).get() == 1).await;
    let status = bench.agent.status().images.remove(0);
    assert!(
        status.due_in > Duration::from_secs(1) && status.problem.is_some(),
        "{status:?}"
    );
    bench.stopping.cancel();
}

#[tokio::test]
async fn logins_go_to_the_snapshotter_in_order() {
    let place = tempfile::tempdir().unwrap();
    let socket = place.path().join("s.sock");
    let directed = Directed::default();
    directed.serve(&socket);
    let metrics = Metrics::unregistered();
    let (taker, passer) = HandOver::new(Snapshotter::at(&socket), SeenImages::default(), metrics.clone());
    let stopping = CancellationToken::new();
    tokio::spawn(passer.run(stopping.clone()));
    for password in ["1", "2", "refused-secret", "3"] {
        taker.seen(
            "r.io/x:1",
            &hullspeed_proto::cri::v1::AuthConfig {
                username: "u".to_owned(),
                password: password.to_owned(),
                ..Default::default()
            },
        );
    }
    until(|| directed.logins.lock().unwrap().len() == 4).await;
    let logins = directed.logins.lock().unwrap();
    let passwords: Vec<_> = logins.iter().map(|login| login.password.as_str()).collect();
    assert_eq!(passwords, ["1", "2", "refused-secret", "3"]);
    stopping.cancel();
}
