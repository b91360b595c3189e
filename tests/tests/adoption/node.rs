//! A containerd with one hull at a time, and an adopter in front of it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hullspeed_prewarm::adopt::eligibility::Policy;
use hullspeed_prewarm::adopt::hull::Hull;
use hullspeed_prewarm::adopt::{Adopter, HullSource, Miss, Observer, Options, Outcome};
use hullspeed_prewarm::containerd::Containerd as Client;
use hullspeed_prewarm::containerd::facts::Facts;
use hullspeed_prewarm::ledger::{HULL_LABEL, Ledger, Mark};
use hullspeed_prewarm::relay::{Answer, Api, Call, Failure, Messages, Method, Reply, Upstream};
use hullspeed_prewarm::rules::Events;
use hullspeed_prewarm::rules::events::EventOptions;
use hullspeed_proto::containerd::services::containers::v1::GetContainerRequest;
use hullspeed_proto::cri::v1::{RunPodSandboxRequest, RunPodSandboxResponse, SecurityProfile};
use hullspeed_tests::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use hullspeed_tests::cri::{Cri, Pod};
use hullspeed_tests::network::Network;
use hullspeed_tests::registry::Registry;
use hullspeed_tests::release::Release;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::{pause, process, requirements};
use prost::Message as _;
use serde_json::Value;

/// How long anything in the background may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// The mark of the test's hulls.
pub(crate) const MARK: &str = "of-the-test";

/// The pool: what is put into it.
#[derive(Default)]
pub(crate) struct Hulls {
    pub(crate) hulls: Mutex<Vec<Hull>>,
    pub(crate) discarded: Mutex<Vec<(String, &'static str)>>,
    pub(crate) begun: Mutex<Vec<String>>,
}

impl HullSource for Hulls {
    fn take(&self, _runtime_handler: &str) -> Result<Hull, Miss> {
        self.hulls.lock().unwrap().pop().ok_or(Miss::Empty)
    }

    fn discard(&self, hull: Hull, why: &'static str) {
        self.discarded.lock().unwrap().push((hull.id.clone(), why));
    }

    fn give_back(&self, hull: Hull) {
        self.hulls.lock().unwrap().push(hull);
    }

    fn start_begins(&self, sandbox_id: &str) {
        self.begun.lock().unwrap().push(sandbox_id.into());
    }

    fn start_ended(&self, _sandbox_id: &str) {}
}

/// What was counted.
#[derive(Default)]
pub(crate) struct Counts {
    pub(crate) requests: Mutex<Vec<(Outcome, &'static str)>>,
    pub(crate) took: Mutex<Vec<Duration>>,
}

impl Observer for Counts {
    fn request(&self, outcome: Outcome, reason: &'static str) {
        self.requests.lock().unwrap().push((outcome, reason));
    }

    fn adopted(&self, took: Duration, _hull_age: Duration) {
        self.took.lock().unwrap().push(took);
    }
}

/// containerd, as a call reaches it.
struct Real(Client);

#[async_trait::async_trait]
impl Upstream for Real {
    async fn unary(&self, message: bytes::Bytes) -> Result<Answer, Failure> {
        let request = RunPodSandboxRequest::decode(message).unwrap();
        match self.0.runtime().run_pod_sandbox(request).await {
            Ok(response) => Ok(Answer::ours(response.into_inner().encode_to_vec())),
            Err(status) => Err(Failure::Answered {
                status,
                metadata: http::HeaderMap::new(),
            }),
        }
    }

    async fn stream(&self, _message: bytes::Bytes) -> Result<Messages, Failure> {
        unreachable!("no test streams")
    }
}

/// The state directory, the pool and the adopter of one life of the relay.
pub(crate) struct Life {
    pub(crate) adopter: Adopter,
    pub(crate) hulls: Arc<Hulls>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) ledger: Ledger,
}

impl Life {
    pub(crate) fn begin(client: &Client, state: &Path) -> Self {
        let hulls = Arc::new(Hulls::default());
        let counts = Arc::new(Counts::default());
        let ledger = Ledger::new(Mark::new(MARK.into()));
        let options = Options {
            containerd: client.clone(),
            ledger: ledger.clone(),
            hulls: Arc::clone(&hulls) as Arc<dyn HullSource>,
            events: Events::new(EventOptions {
                ledger: ledger.clone(),
                containerd: client.clone(),
                facts: tokio::sync::watch::channel(None).1,
                supply: false,
                metrics: hullspeed_prewarm::metrics::Metrics::unregistered(),
            }),
            observer: Arc::clone(&counts) as Arc<dyn Observer>,
            state: state.to_owned(),
            policy: Policy::default(),
        };
        let adopter = Adopter::new(options).unwrap();
        Self {
            adopter,
            hulls,
            counts,
            ledger,
        }
    }

    /// Puts a hull into the pool.
    pub(crate) fn stock(&self, id: &str, pid: i32, facts: &Facts) {
        let hull = Hull::open(id, "", pid, facts).unwrap();
        assert!(hull.is_alive());
        self.ledger.add_hull(id);
        self.hulls.hulls.lock().unwrap().push(hull);
    }

    /// RunPodSandbox through the adopter.
    pub(crate) async fn run_pod(&self, client: &Client, request: Vec<u8>) -> Result<String, tonic::Status> {
        match self.adopter.run_pod_sandbox(call(client, request)).await {
            Reply::One(answer) => Ok(RunPodSandboxResponse::decode(answer.message).unwrap().pod_sandbox_id),
            Reply::Failed(failure) => Err(failure.status().clone()),
            Reply::Stream(_) => unreachable!("RunPodSandbox does not stream"),
        }
    }
}

/// RunPodSandbox as the relay hands it over.
pub(crate) fn call(client: &Client, request: Vec<u8>) -> Call {
    Call {
        method: Method::RunPodSandbox,
        api: Api::V1,
        message: request.into(),
        upstream: Box::new(Real(client.clone())),
    }
}

/// The machine.
pub(crate) struct Node {
    pub(crate) life: Option<Life>,
    pub(crate) cri: Cri,
    pub(crate) containerd: Containerd,
    pub(crate) client: Client,
    pub(crate) facts: Arc<Facts>,
    pub(crate) image: String,
    pub(crate) state: PathBuf,
    ipam: PathBuf,
    logs: PathBuf,
    made: u32,
    _registry: Registry,
    _network: Network,
    // Declared last: what is above is dropped first.
    pub(crate) run: RunDir,
}

impl Node {
    pub(crate) async fn new(release: Release) -> Self {
        requirements::check().unwrap();
        let run = RunDir::temporary().unwrap();
        let registry = Registry::start(&run, &run.directory("storage").unwrap()).unwrap();
        let layout = run.path().join("pause-image");
        pause::build(&layout, run.path()).unwrap();
        registry
            .push(&format!("oci:{}:latest", layout.display()), "pause:latest")
            .unwrap();
        let network = Network::create(&run).unwrap();
        let image = format!("{}/pause:latest", registry.address());
        let options = ContainerdOptions {
            name: "containerd".into(),
            snapshotter: SnapshotterChoice::Overlayfs,
            pause_image: image.clone(),
            release,
        };
        let containerd = Containerd::start(&run, &network, &options).await.unwrap();
        let mut cri = containerd.cri().await.unwrap();
        cri.pull(&image).await.unwrap();
        let client = Client::at(&containerd.socket());
        let facts = Arc::new(Facts::read(&client).await.unwrap());
        Self {
            life: None,
            cri,
            client,
            facts,
            image,
            state: run.directory("state").unwrap(),
            ipam: run.path().join("cni/ipam"),
            logs: run.directory("pods").unwrap(),
            made: 0,
            containerd,
            _registry: registry,
            _network: network,
            run,
        }
    }

    /// A pod of the run.
    pub(crate) fn pod(&self, name: &str) -> Pod {
        Pod::new(name, &self.logs, &self.run.names().cgroup).security(|security| {
            security.seccomp = Some(SecurityProfile::default());
        })
    }

    /// A sandbox as the pool makes them.
    pub(crate) async fn hull(&mut self) -> (String, i32) {
        self.made += 1;
        let pod = self.pod(&format!("hull-{:016x}", self.made)).label(HULL_LABEL, MARK);
        let id = self.cri.run_sandbox(&pod).await.unwrap();
        let pid = self.pid(&id).await;
        (id, pid)
    }

    /// The pause process of a sandbox.
    pub(crate) async fn pid(&mut self, id: &str) -> i32 {
        let info = self.cri.sandbox(id).await.unwrap().info;
        let info: Value = serde_json::from_str(&info["info"]).unwrap();
        i32::try_from(info["pid"].as_i64().unwrap()).unwrap()
    }

    /// A relay starts: the state directory as it is, everything else from nothing.
    pub(crate) fn begin_life(&mut self) -> &Life {
        self.life.insert(Life::begin(&self.client, &self.state))
    }

    pub(crate) fn life(&self) -> &Life {
        self.life.as_ref().unwrap()
    }

    /// Puts a new hull into the pool.
    pub(crate) async fn stock(&mut self) -> String {
        let (id, pid) = self.hull().await;
        self.life().stock(&id, pid, &self.facts);
        id
    }

    pub(crate) fn call(&self, pod: &Pod) -> Call {
        call(&self.client, pod.request().encode_to_vec())
    }

    /// RunPodSandbox through the adopter.
    pub(crate) async fn run_pod(&self, pod: &Pod) -> Result<String, tonic::Status> {
        self.life().run_pod(&self.client, pod.request().encode_to_vec()).await
    }

    /// A file of a sandbox, as it is on disk.
    pub(crate) fn file(&self, id: &str, name: &str) -> String {
        std::fs::read_to_string(self.facts.root.join("sandboxes").join(id).join(name)).unwrap()
    }

    /// containerd's record of a sandbox: labels and metadata.
    pub(crate) async fn record(&self, id: &str) -> (std::collections::HashMap<String, String>, Value) {
        let request = GetContainerRequest { id: id.into() };
        let container = self
            .client
            .containers()
            .get(request)
            .await
            .unwrap()
            .into_inner()
            .container
            .unwrap();
        let metadata = &container.extensions["io.cri-containerd.sandbox.metadata"].value;
        (container.labels, serde_json::from_slice(metadata).unwrap())
    }

    /// Waits until containerd's record is the pod's and the journal knows.
    pub(crate) async fn rebranded(&self, id: &str) {
        let end = Instant::now() + LIMIT;
        while self.record(id).await.1["Metadata"]["Config"]["labels"][HULL_LABEL] == MARK {
            assert!(Instant::now() < end, "the record is not rewritten");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // The second copy and the journal follow.
        tokio::time::sleep(Duration::from_millis(200)).await;
    }

    /// Addresses that are given out.
    pub(crate) fn addresses(&self) -> Vec<String> {
        let mut found = Vec::new();
        for network in std::fs::read_dir(&self.ipam).unwrap() {
            for file in std::fs::read_dir(network.unwrap().path()).unwrap() {
                let name = file.unwrap().file_name().into_string().unwrap();
                if name.starts_with("10.") {
                    found.push(name);
                }
            }
        }
        found.sort();
        found
    }

    /// containerd is restarted, as by an upgrade.
    pub(crate) async fn restart_containerd(&mut self) {
        self.containerd.restart(&self.run).await.unwrap();
        self.cri = self.containerd.cri().await.unwrap();
    }
}

/// What a program prints in namespaces of a process.
pub(crate) fn inside(pid: i32, namespaces: &[&str], program: &[&str]) -> String {
    let mut command = Command::new("nsenter");
    for namespace in namespaces {
        command.arg(format!("--{namespace}=/proc/{pid}/ns/{namespace}"));
    }
    let printed = process::output(command.args(program)).unwrap();
    String::from_utf8(printed).unwrap().trim_end().to_owned()
}

/// A file as a process sees it.
pub(crate) fn seen_by(pid: i64, path: &str) -> String {
    std::fs::read_to_string(Path::new(&format!("/proc/{pid}/root")).join(path)).unwrap()
}
