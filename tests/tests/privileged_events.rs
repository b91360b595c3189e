//! Events and stats as the relay's rules give them, against real containerd: supplied events are what a newer containerd
//! tells by itself, and a pod's usage that we read is what containerd reads.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use hullspeed_prewarm::adopt::hull::Hull;
use hullspeed_prewarm::adopt::{HullSource, Miss};
use hullspeed_prewarm::containerd::Containerd as Client;
use hullspeed_prewarm::ledger::{Adoption, HULL_LABEL, Ledger, Mark};
use hullspeed_prewarm::metrics::Metrics;
use hullspeed_prewarm::relay::{Answer, Api, Call, Failure, Messages, Method, Reply, Rules as _, Upstream};
use hullspeed_prewarm::rules::events::EventOptions;
use hullspeed_prewarm::rules::{CredentialSink, CriRules, Events, PoolHooks, RuleOptions, Sandboxes};
use hullspeed_proto::cri::v1::{
    AuthConfig, ContainerEventResponse, ContainerEventType, ContainerState, GetEventsRequest, ListPodSandboxRequest,
    ListPodSandboxResponse, PodSandboxFilter, PodSandboxState, PodSandboxStats, PodSandboxStatsRequest,
    PodSandboxStatsResponse, PodSandboxStatusRequest, PodSandboxStatusResponse,
};
use hullspeed_tests::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use hullspeed_tests::cri::{Cri, Pod};
use hullspeed_tests::network::Network;
use hullspeed_tests::pause;
use hullspeed_tests::registry::Registry;
use hullspeed_tests::release::Release;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::scenario::Scenario;
use prost::Message;

const MARK: &str = "the tests' mark";

/// How long an event may take.
const EVENT_LIMIT: Duration = Duration::from_secs(20);

/// After which nothing more is expected.
const QUIET: Duration = Duration::from_millis(1500);

/// A containerd with an image, and rules over it. Fields are dropped in order: the run last.
struct Setting {
    rules: CriRules,
    events: Events,
    metrics: Metrics,
    ledger: Ledger,
    client: Client,
    cri: Cri,
    image: String,
    containerd: Containerd,
    _registry: Registry,
    _network: Network,
    run: RunDir,
}

/// What is around the rules; nothing of it matters here.
struct Around(Ledger);

#[async_trait]
impl Sandboxes for Around {
    async fn run_pod_sandbox(&self, call: Call) -> Reply {
        call.upstream.unary(call.message).await.into()
    }

    fn removed(&self, sandbox_id: &str) {
        self.0.forget(sandbox_id);
    }
}

impl HullSource for Around {
    fn take(&self, _runtime_handler: &str) -> Result<Hull, Miss> {
        Err(Miss::Empty)
    }

    fn discard(&self, _hull: Hull, _why: &'static str) {}

    fn give_back(&self, _hull: Hull) {}

    fn start_begins(&self, _sandbox_id: &str) {}

    fn start_ended(&self, _sandbox_id: &str) {}
}

impl PoolHooks for Around {
    fn flush(&self, _reason: &'static str) {}
}

impl CredentialSink for Around {
    fn seen(&self, _image: &str, _auth: &AuthConfig) {}
}

/// containerd behind a call.
struct Direct {
    client: Client,
    method: Method,
}

fn answered(status: tonic::Status) -> Failure {
    let metadata = status.metadata().clone().into_headers();
    Failure::Answered { status, metadata }
}

macro_rules! forward {
    ($self:ident, $message:ident, $call:ident) => {{
        let request = tonic::Request::new(Message::decode($message).unwrap());
        let answer = $self.client.runtime().$call(request).await.map_err(answered)?;
        Ok(Answer::ours(answer.into_inner().encode_to_vec()))
    }};
}

#[async_trait]
impl Upstream for Direct {
    async fn unary(&self, message: bytes::Bytes) -> Result<Answer, Failure> {
        match self.method {
            Method::PodSandboxStatus => forward!(self, message, pod_sandbox_status),
            Method::ListPodSandbox => forward!(self, message, list_pod_sandbox),
            Method::PodSandboxStats => forward!(self, message, pod_sandbox_stats),
            Method::StopPodSandbox => forward!(self, message, stop_pod_sandbox),
            Method::RemovePodSandbox => forward!(self, message, remove_pod_sandbox),
            other => panic!("{other:?} is not asked for"),
        }
    }

    async fn stream(&self, _message: bytes::Bytes) -> Result<Messages, Failure> {
        let mut client = self.client.runtime();
        // The answer's headers come with its first event.
        let events = async move {
            client
                .get_container_events(GetEventsRequest {})
                .await
                .map(|answer| answer.into_inner())
        };
        let events = stream::once(events).try_flatten();
        Ok(events
            .map(|event| event.map(|event| event.encode_to_vec().into()).map_err(answered))
            .boxed())
    }
}

impl Setting {
    async fn new(release: Release) -> Self {
        let run = Scenario::prepare().unwrap();
        let registry = Registry::start(&run, &run.directory("storage").unwrap()).unwrap();
        let layout = run.path().join("pause-image");
        pause::build(&layout, run.path()).unwrap();
        registry
            .push(&format!("oci:{}:latest", layout.display()), "pause:latest")
            .unwrap();
        let network = Network::create(&run).unwrap();
        let image = format!("{}/pause:latest", registry.address());
        let options = ContainerdOptions {
            name: release.name().into(),
            snapshotter: SnapshotterChoice::Overlayfs,
            pause_image: image.clone(),
            release,
        };
        let containerd = Containerd::start(&run, &network, &options).await.unwrap();
        let mut cri = containerd.cri().await.unwrap();
        cri.pull(&image).await.unwrap();
        let ledger = Ledger::new(Mark::new(MARK.into()));
        let client = Client::at(&containerd.socket());
        let metrics = Metrics::unregistered();
        let events = Events::new(EventOptions {
            ledger: ledger.clone(),
            containerd: client.clone(),
            facts: tokio::sync::watch::channel(None).1,
            supply: true,
            metrics: metrics.clone(),
        });
        let around = Arc::new(Around(ledger.clone()));
        let rules = CriRules::new(RuleOptions {
            ledger: ledger.clone(),
            containerd: client.clone(),
            sandboxes: around.clone(),
            hulls: around.clone(),
            hooks: around.clone(),
            credentials: around,
            events: events.clone(),
        });
        Self {
            rules,
            events,
            metrics,
            ledger,
            client,
            cri,
            image,
            containerd,
            _registry: registry,
            _network: network,
            run,
        }
    }

    fn pod(&self, name: &str) -> Pod {
        let logs = self.run.directory("logs").unwrap();
        Pod::new(name, &logs, &self.run.names().cgroup)
    }

    async fn call(&self, method: Method, message: &impl Message) -> Reply {
        let upstream = Direct {
            client: self.client.clone(),
            method,
        };
        let call = Call {
            method,
            api: Api::V1,
            message: message.encode_to_vec().into(),
            upstream: Box::new(upstream),
        };
        self.rules.call(call).await
    }

    async fn ask<A: Message + Default>(&self, method: Method, message: &impl Message) -> Result<A, tonic::Status> {
        match self.call(method, message).await {
            Reply::One(answer) => Ok(A::decode(answer.message).unwrap()),
            Reply::Failed(failure) => Err(failure.status().clone()),
            Reply::Stream(_) => panic!("a stream"),
        }
    }

    /// Subscribes, and reads on in the background.
    async fn subscribe(&self) -> Told {
        let Reply::Stream(mut messages) = self.call(Method::GetContainerEvents, &GetEventsRequest {}).await else {
            panic!("not a stream");
        };
        let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Some(message) = messages.next().await {
                let event = message.map(|message| ContainerEventResponse::decode(message).unwrap());
                if sender.send(event.map_err(|failure| failure.status().clone())).is_err() {
                    return;
                }
            }
        });
        // Until the subscription stands in containerd: nothing says when it does.
        tokio::time::sleep(Duration::from_millis(300)).await;
        Told(receiver)
    }

    /// One pod's whole life, with a container.
    async fn life(&mut self, name: &str) -> (String, String) {
        let pod = self.pod(name);
        let sandbox = self.cri.run_sandbox(&pod).await.unwrap();
        let container = self
            .cri
            .create_container(&sandbox, &pod, "main", &self.image)
            .await
            .unwrap();
        self.cri.start_container(&container).await.unwrap();
        self.cri.remove_container(&container).await.unwrap();
        self.cri.remove_sandbox(&sandbox).await.unwrap();
        (sandbox, container)
    }

    /// A sandbox as the pool makes them.
    async fn hull(&mut self, name: &str) -> String {
        let pod = self.pod(name).label(HULL_LABEL, MARK);
        let id = self.cri.run_sandbox(&pod).await.unwrap();
        self.ledger.add_hull(&id);
        id
    }

    /// What the adopter does, as far as the rules see it.
    fn adopt(&self, id: &str, pod: &Pod) -> Arc<Adoption> {
        let adoption = self.ledger.adopt(Adoption {
            sandbox_id: id.into(),
            config: pod.config().clone(),
            runtime_handler: String::new(),
            adopted_at: 1_900_000_000_000_000_000,
        });
        self.events.adopted(&adoption);
        adoption
    }
}

struct Told(tokio::sync::mpsc::UnboundedReceiver<Result<ContainerEventResponse, tonic::Status>>);

impl Told {
    async fn next(&mut self) -> ContainerEventResponse {
        let event = tokio::time::timeout(EVENT_LIMIT, self.0.recv()).await;
        event.expect("no event").unwrap().unwrap()
    }

    async fn take(&mut self, count: usize) -> Vec<ContainerEventResponse> {
        let mut events = Vec::new();
        for _ in 0..count {
            events.push(self.next().await);
        }
        events
    }

    async fn is_quiet(&mut self) {
        if let Ok(event) = tokio::time::timeout(QUIET, self.0.recv()).await {
            panic!("one event more: {event:?}");
        }
    }
}

use ContainerEventType::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
    ContainerStoppedEvent as Stopped,
};

/// What is told of the pod, apart from ids and times: who, what, the sandbox's state, its containers' states.
type Line = (
    &'static str,
    ContainerEventType,
    Option<PodSandboxState>,
    Vec<ContainerState>,
);

fn lines(events: &[ContainerEventResponse], sandbox: &str) -> Vec<Line> {
    let line = |event: &ContainerEventResponse| {
        let who = if event.container_id == sandbox {
            "sandbox"
        } else {
            "container"
        };
        let status = event.pod_sandbox_status.as_ref();
        assert!(event.created_at > 1_600_000_000_000_000_000);
        // A supplied event shows how things are when CRI is asked: on a busy machine the pod's container may be there already.
        let beginning = matches!(event.container_event_type(), Created | Started);
        let states = match who {
            "sandbox" if beginning => Vec::new(),
            _ => event.containers_statuses.iter().map(|of| of.state()).collect(),
        };
        (who, event.container_event_type(), status.map(|of| of.state()), states)
    };
    events.iter().map(line).collect()
}

fn a_life() -> Vec<Line> {
    let (ready, not_ready) = (
        Some(PodSandboxState::SandboxReady),
        Some(PodSandboxState::SandboxNotready),
    );
    let (created, running, exited) = (
        ContainerState::ContainerCreated,
        ContainerState::ContainerRunning,
        ContainerState::ContainerExited,
    );
    vec![
        ("sandbox", Created, ready, vec![]),
        ("sandbox", Started, ready, vec![]),
        ("container", Created, ready, vec![created]),
        ("container", Started, ready, vec![running]),
        ("container", Stopped, ready, vec![exited]),
        ("container", Deleted, ready, vec![]),
        ("sandbox", Stopped, not_ready, vec![]),
        ("sandbox", Deleted, not_ready, vec![]),
    ]
}

async fn native_lives_are_told(release: Release) {
    let mut setting = Setting::new(release).await;
    let mut first = setting.subscribe().await;
    for name in ["one", "two"] {
        let (sandbox, container) = setting.life(name).await;
        let events = first.take(8).await;
        assert_eq!(lines(&events, &sandbox), a_life(), "{name}");
        let ids: Vec<_> = events[2..6].iter().map(|event| event.container_id.as_str()).collect();
        assert_eq!(ids, [container.as_str(); 4]);
        for event in &events {
            let status = event.pod_sandbox_status.as_ref().unwrap();
            assert_eq!(
                (status.id.as_str(), status.metadata.as_ref().unwrap().name.as_str()),
                (sandbox.as_str(), name)
            );
        }
    }
    // Another subscriber is told from now on, and both are told the same.
    let mut second = setting.subscribe().await;
    let (sandbox, _) = setting.life("three").await;
    for told in [&mut first, &mut second] {
        assert_eq!(lines(&told.take(8).await, &sandbox), a_life());
        told.is_quiet().await;
    }
    assert_eq!(setting.metrics.events_supplied.get() > 0, release == Release::One);
    setting.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn native_lives_are_supplied_where_containerd_has_no_events() {
    native_lives_are_told(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn native_lives_are_passed_on_where_it_has() {
    native_lives_are_told(Release::Two).await;
}

async fn adopted_lives_look_native(release: Release) {
    let mut setting = Setting::new(release).await;
    let mut told = setting.subscribe().await;
    let hull = setting.hull("hull-0123456789abcdef").await;
    let gone = setting.hull("hull-00000000deadbeef").await;
    setting.ledger.retire_hull(&gone);
    setting.cri.remove_sandbox(&gone).await.unwrap();
    told.is_quiet().await;
    let pod = setting.pod("web").label("app", "web");
    setting.adopt(&hull, &pod);
    let container = setting
        .cri
        .create_container(&hull, &pod, "main", &setting.image)
        .await
        .unwrap();
    setting.cri.start_container(&container).await.unwrap();
    setting.cri.remove_container(&container).await.unwrap();

    // By id, by its beginning, in a list with the pod's labels; never as a hull.
    let by_id = |id: &str| PodSandboxStatusRequest {
        pod_sandbox_id: id.into(),
        verbose: true,
    };
    let seen: PodSandboxStatusResponse = setting
        .ask(Method::PodSandboxStatus, &by_id(&hull[..20]))
        .await
        .unwrap();
    let status = seen.status.unwrap();
    assert_eq!(status.metadata, pod.config().metadata);
    assert_eq!(
        (&status.labels, status.created_at),
        (&pod.config().labels, 1_900_000_000_000_000_000)
    );
    let document: serde_json::Value = serde_json::from_str(&seen.info["info"]).unwrap();
    assert_eq!(
        document["config"],
        hullspeed_prewarm::adopt::gojson::value(pod.config())
    );
    assert_eq!(document["runtimeSpec"]["hostname"], "web");
    assert_eq!(
        document["runtimeSpec"]["annotations"]["io.kubernetes.cri.sandbox-name"],
        "web"
    );
    assert!(
        !seen.info["info"].contains("hull-0123456789abcdef"),
        "{}",
        seen.info["info"]
    );
    let filter = PodSandboxFilter {
        label_selector: HashMap::from([("app".into(), "web".into())]),
        ..Default::default()
    };
    let list = ListPodSandboxRequest { filter: Some(filter) };
    let list: ListPodSandboxResponse = setting.ask(Method::ListPodSandbox, &list).await.unwrap();
    assert_eq!(
        list.items.iter().map(|item| item.id.as_str()).collect::<Vec<_>>(),
        [hull.as_str()]
    );

    // What containerd says of a stranger, it says of a hull.
    let hidden = setting.hull("hull-00000000000000aa").await;
    let stranger = "0123456789".repeat(6);
    for method in [
        Method::PodSandboxStatus,
        Method::StopPodSandbox,
        Method::RemovePodSandbox,
        Method::PodSandboxStats,
    ] {
        let of_hull = setting.ask::<PodSandboxStatusResponse>(method, &by_id(&hidden)).await;
        let of_stranger = setting.ask::<PodSandboxStatusResponse>(method, &by_id(&stranger)).await;
        match (of_hull, of_stranger) {
            (Err(of_hull), Err(of_stranger)) => {
                assert_eq!(of_hull.code(), of_stranger.code(), "{method:?}");
                assert_eq!(
                    of_hull.message().replace(&hidden, &stranger),
                    of_stranger.message(),
                    "{method:?}"
                );
            }
            (of_hull, of_stranger) => assert_eq!(of_hull.ok(), of_stranger.ok(), "{method:?}"),
        }
    }

    for method in [Method::StopPodSandbox, Method::RemovePodSandbox] {
        setting
            .ask::<PodSandboxStatusResponse>(method, &by_id(&hull))
            .await
            .unwrap();
    }
    let events = told.take(8).await;
    assert_eq!(lines(&events, &hull), a_life());
    for event in &events {
        let status = event.pod_sandbox_status.as_ref().unwrap();
        assert_eq!(status.metadata, pod.config().metadata);
        assert_eq!(
            (&status.labels, status.created_at),
            (&pod.config().labels, 1_900_000_000_000_000_000)
        );
    }
    told.is_quiet().await;
    setting.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn adopted_lives_look_native_in_supplied_events() {
    adopted_lives_look_native(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn adopted_lives_look_native_in_containerds_events() {
    adopted_lives_look_native(Release::Two).await;
}

/// A restart of containerd: what happened meanwhile is told, nothing is told twice, and life goes on.
#[tokio::test(flavor = "multi_thread")]
async fn the_supply_survives_a_restart_of_containerd() {
    let mut setting = Setting::new(Release::One).await;
    let pod = setting.pod("before");
    let sandbox = setting.cri.run_sandbox(&pod).await.unwrap();
    let mut told = setting.subscribe().await;
    let container = setting
        .cri
        .create_container(&sandbox, &pod, "main", &setting.image)
        .await
        .unwrap();
    setting.cri.start_container(&container).await.unwrap();
    assert_eq!(told.take(2).await.len(), 2);
    setting.containerd.restart(&setting.run).await.unwrap();
    setting.cri = setting.containerd.cri().await.unwrap();
    setting.cri.remove_container(&container).await.unwrap();
    let (next, _) = setting.life("after").await;
    let kinds = |events: &[ContainerEventResponse]| {
        let kind = |event: &ContainerEventResponse| (event.container_id.clone(), event.container_event_type());
        events.iter().map(kind).collect::<Vec<_>>()
    };
    let events = told.take(2).await;
    assert_eq!(kinds(&events), [(container.clone(), Stopped), (container, Deleted)]);
    // A life that went by while containerd was not heard is not told; one that is told is whole.
    let mut events = Vec::new();
    while let Ok(event) = tokio::time::timeout(QUIET, told.0.recv()).await {
        events.push(event.unwrap().unwrap());
    }
    assert!(events.is_empty() || lines(&events, &next).len() == 8, "{events:?}");
    let (last, _) = setting.life("last").await;
    assert_eq!(lines(&told.take(8).await, &last), a_life());
    setting.cri.remove_everything().await.unwrap();
}

fn close(ours: u64, theirs: u64, slack: u64) -> bool {
    ours.abs_diff(theirs) <= slack
}

async fn usage_is_read_as_containerd_reads_it(release: Release) {
    let mut setting = Setting::new(release).await;
    let pod = setting.pod("busy");
    let sandbox = setting.cri.run_sandbox(&pod).await.unwrap();
    let container = setting
        .cri
        .create_container(&sandbox, &pod, "main", &setting.image)
        .await
        .unwrap();
    setting.cri.start_container(&container).await.unwrap();
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: sandbox.clone(),
    };
    let stats = async |setting: &Setting| -> PodSandboxStats {
        let answer: PodSandboxStatsResponse = setting.ask(Method::PodSandboxStats, &request).await.unwrap();
        answer.stats.unwrap()
    };
    // The same pod, as containerd reads it and, said to be adopted, as we do; at rest, for nobody reads both at once.
    let memory_of = |stats: &PodSandboxStats| stats.linux.as_ref().and_then(|linux| linux.memory).unwrap();
    let in_use = |stats: &PodSandboxStats| memory_of(stats).usage_bytes.unwrap().value;
    let mut native = stats(&setting).await;
    let end = Instant::now() + EVENT_LIMIT;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let before = std::mem::replace(&mut native, stats(&setting).await);
        if close(in_use(&before), in_use(&native), 64 << 10) {
            break;
        }
        assert!(Instant::now() < end, "the pod does not come to rest: {native:?}");
    }
    let adoption = setting.adopt(&sandbox, &pod);
    let ours = stats(&setting).await;
    assert_eq!(ours.attributes.as_ref().unwrap().metadata, adoption.config.metadata);
    let (ours, native) = (ours.linux.unwrap(), native.linux.unwrap());
    let (cpu, native_cpu) = (ours.cpu.unwrap(), native.cpu.unwrap());
    assert!(cpu.timestamp > native_cpu.timestamp && cpu.timestamp - native_cpu.timestamp < 5_000_000_000);
    assert_eq!(cpu.usage_nano_cores.is_some(), native_cpu.usage_nano_cores.is_some());
    let used = |cpu: &hullspeed_proto::cri::v1::CpuUsage| cpu.usage_core_nano_seconds.unwrap().value;
    assert!(used(&native_cpu) > 0 && used(&cpu) >= used(&native_cpu));
    assert!(
        close(used(&cpu), used(&native_cpu), 100_000_000),
        "{cpu:?} {native_cpu:?}"
    );
    let (memory, native_memory) = (ours.memory.unwrap(), native.memory.unwrap());
    let of = |memory: &hullspeed_proto::cri::v1::MemoryUsage| {
        let value = |field: &Option<hullspeed_proto::cri::v1::UInt64Value>| field.as_ref().unwrap().value;
        [
            value(&memory.working_set_bytes),
            value(&memory.available_bytes),
            value(&memory.usage_bytes),
            value(&memory.rss_bytes),
            value(&memory.page_faults),
            value(&memory.major_page_faults),
        ]
    };
    let (ours_of, theirs_of) = (of(&memory), of(&native_memory));
    assert!(theirs_of[2] > 0 && theirs_of[4] > 0, "{native_memory:?}");
    for (ours, theirs) in ours_of.into_iter().zip(theirs_of) {
        assert!(close(ours, theirs, 1 << 20), "{memory:?} {native_memory:?}");
    }
    assert_eq!(
        ours.process,
        native.process.map(|mut of| {
            of.timestamp = ours.process.unwrap().timestamp;
            of
        })
    );
    setting.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_read_as_containerd_one_reads_it() {
    usage_is_read_as_containerd_reads_it(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn usage_is_read_as_containerd_two_reads_it() {
    usage_is_read_as_containerd_reads_it(Release::Two).await;
}
