//! Nobody sees a hull through the relay, none is used twice, and a dead one is never handed out.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hullspeed_proto::cri::v1::{
    ContainerEventResponse, CreateContainerRequest, ListContainerStatsRequest, ListPodSandboxMetricsRequest,
    ListPodSandboxStatsRequest, PodSandboxFilter, PodSandboxMetadata, PodSandboxState, PodSandboxStateValue,
    PodSandboxStatsRequest, PodSandboxStatusRequest, PortForwardRequest, RemovePodSandboxRequest,
    StopPodSandboxRequest,
};
use hullspeed_tests::cri::{Cri, container_config};
use hullspeed_tests::pod_node::{HULL_LABEL, PodNode};
use hullspeed_tests::process;
use hullspeed_tests::release::Release;
use tonic::Code;

/// Pods that come and go while others look, by each worker.
const PODS: usize = 8;

/// Workers that run pods at once.
const WORKERS: usize = 3;

/// Hulls kept ready.
const HULLS: u32 = 3;

/// Whether a sandbox of this identity is one of the tests' pods.
fn check(what: &str, metadata: Option<&PodSandboxMetadata>, labels: &std::collections::HashMap<String, String>) {
    let name = metadata.map_or("", |metadata| &metadata.name);
    assert!(name.starts_with("pod-"), "{what} shows a sandbox named {name:?}");
    assert!(!labels.contains_key(HULL_LABEL), "{what} shows the mark of a hull");
}

/// How often everything was looked at, and how often what may answer an error did not.
#[derive(Debug, Default)]
struct Looks {
    all: u64,
    sandbox_stats: u64,
    container_stats: u64,
    metrics: u64,
    /// This containerd has no such call; neither has the relay in front of it.
    metrics_unimplemented: u64,
}

impl Looks {
    fn check(&self, release: Release) {
        assert!(self.all > 10, "only few looks: {self:?}");
        assert!(self.sandbox_stats > 0 && self.container_stats > 0, "{self:?}");
        if self.metrics_unimplemented > 0 {
            eprintln!(
                "{}: ListPodSandboxMetrics is unimplemented, so it shows nothing",
                release.name()
            );
            assert_eq!((self.metrics, self.metrics_unimplemented), (0, self.all), "{self:?}");
        } else {
            assert!(self.metrics > 0, "{self:?}");
        }
    }
}

/// One look at everything that tells of sandboxes.
async fn look(cri: &mut Cri, looks: &mut Looks) {
    looks.all += 1;
    let state = |state: PodSandboxState| PodSandboxFilter {
        state: Some(PodSandboxStateValue { state: state.into() }),
        ..Default::default()
    };
    for filter in [
        PodSandboxFilter::default(),
        state(PodSandboxState::SandboxReady),
        state(PodSandboxState::SandboxNotready),
    ] {
        for sandbox in cri.sandboxes(filter).await.unwrap() {
            check("a list", sandbox.metadata.as_ref(), &sandbox.labels);
        }
    }
    // Pods may go while their statistics are read; then containerd may answer an error for all.
    if let Ok(answer) = cri
        .runtime()
        .list_pod_sandbox_stats(ListPodSandboxStatsRequest::default())
        .await
    {
        looks.sandbox_stats += 1;
        for stats in answer.into_inner().stats {
            let attributes = stats.attributes.unwrap_or_default();
            check("a list of statistics", attributes.metadata.as_ref(), &attributes.labels);
        }
    }
    let answer = cri
        .runtime()
        .list_container_stats(ListContainerStatsRequest::default())
        .await;
    if let Ok(answer) = answer {
        looks.container_stats += 1;
        for stats in answer.into_inner().stats {
            let attributes = stats.attributes.unwrap_or_default();
            let name = attributes.metadata.unwrap_or_default().name;
            assert_eq!(name, "main", "container statistics show {name:?}");
        }
    }
    let answer = cri
        .runtime()
        .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})
        .await;
    match answer {
        Ok(answer) => {
            looks.metrics += 1;
            for metric in answer.into_inner().pod_metrics.into_iter().flat_map(|pod| pod.metrics) {
                let shows_hull = metric.label_values.iter().any(|value| value.starts_with("hull-"));
                assert!(!shows_hull, "{metric:?}");
            }
        }
        Err(status) => looks.metrics_unimplemented += u64::from(status.code() == Code::Unimplemented),
    }
}

/// Collects events until told to stop.
async fn listen(mut cri: Cri, stop: Arc<AtomicBool>) -> Vec<ContainerEventResponse> {
    let mut events = cri.events().await.unwrap();
    let mut found = Vec::new();
    loop {
        match tokio::time::timeout(Duration::from_millis(300), events.message()).await {
            Ok(event) => found.push(event.unwrap().unwrap()),
            Err(_) if stop.load(Ordering::Relaxed) => return found,
            Err(_) => {}
        }
    }
}

async fn hulls_are_never_seen(release: Release) {
    let node = Arc::new(PodNode::with_hulls(release, HULLS).await.unwrap());
    let stop = Arc::new(AtomicBool::new(false));
    let listener = tokio::spawn(listen(node.relayed().await.unwrap(), Arc::clone(&stop)));
    let watcher = tokio::spawn({
        let (stop, mut cri) = (Arc::clone(&stop), node.relayed().await.unwrap());
        async move {
            let mut looks = Looks::default();
            while !stop.load(Ordering::Relaxed) {
                look(&mut cri, &mut looks).await;
            }
            looks
        }
    });
    let workers: Vec<_> = (0..WORKERS)
        .map(|worker| {
            let node = Arc::clone(&node);
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for pod in 0..PODS {
                    let mut cri = node.relayed().await.unwrap();
                    let pod = node.pod(&format!("pod-{worker}-{pod}"));
                    let (sandbox, container) = node.run_pod(&mut cri, &pod).await.unwrap();
                    let said = cri.exec(&container, &["hostname"]).await.unwrap().stdout;
                    assert_eq!(String::from_utf8_lossy(&said).trim(), pod.config().hostname);
                    cri.remove_sandbox(&sandbox).await.unwrap();
                    ids.extend([sandbox, container]);
                }
                ids
            })
        })
        .collect();
    let mut ids = Vec::new();
    for worker in workers {
        ids.extend(worker.await.unwrap());
    }
    stop.store(true, Ordering::Relaxed);
    watcher.await.unwrap().check(release);
    let events = listener.await.unwrap();
    let all: BTreeSet<_> = ids.iter().collect();
    assert_eq!(all.len(), WORKERS * PODS * 2, "an id was given twice");
    let mut node = Arc::into_inner(node).unwrap();
    let hits = node.prewarm().unwrap().requests("hit").await.unwrap();
    assert!(hits >= (WORKERS * PODS / 4) as u64, "only {hits} pods got a hull");
    for event in &events {
        assert!(
            all.contains(&event.container_id),
            "an event of an unknown sandbox or container: {event:?}"
        );
        if let Some(status) = &event.pod_sandbox_status {
            check("an event", status.metadata.as_ref(), &status.labels);
        }
    }
    for id in &all {
        let kinds: Vec<_> = events
            .iter()
            .filter(|event| event.container_id == **id)
            .map(|event| event.container_event_type)
            .collect();
        // Created, started, stopped, deleted: each once, in this order.
        assert_eq!(kinds, [0, 1, 2, 3], "events of {id}");
    }
    assert_eq!(
        node.native.sandboxes(PodSandboxFilter::default()).await.unwrap().len(),
        node.hulls().await.unwrap().len()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn hulls_are_never_seen_on_containerd_1() {
    hulls_are_never_seen(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hulls_are_never_seen_on_containerd_2() {
    hulls_are_never_seen(Release::Two).await;
}

/// Who knows a hull's id, whole or in part, can do nothing with it, and its pod comes to no harm.
async fn hulls_cannot_be_touched(release: Release) {
    let mut node = PodNode::with_hulls(release, 1).await.unwrap();
    let hull = node.hulls().await.unwrap().remove(0);
    let mut cri = node.relayed().await.unwrap();
    for id in [&hull.id[..], &hull.id[..13]] {
        let id = || id.to_owned();
        let filter = PodSandboxFilter {
            id: id(),
            ..Default::default()
        };
        assert_eq!(cri.sandboxes(filter).await.unwrap(), []);
        let runtime = cri.runtime();
        let status = PodSandboxStatusRequest {
            pod_sandbox_id: id(),
            verbose: true,
        };
        assert_eq!(
            runtime.pod_sandbox_status(status).await.unwrap_err().code(),
            Code::NotFound
        );
        let stats = PodSandboxStatsRequest { pod_sandbox_id: id() };
        // 1.6 calls this an unknown error, as it does for any id that it does not know.
        let none = PodSandboxStatsRequest {
            pod_sandbox_id: "0".repeat(64),
        };
        let expected = runtime.pod_sandbox_stats(none).await.unwrap_err().code();
        assert_eq!(runtime.pod_sandbox_stats(stats).await.unwrap_err().code(), expected);
        let forward = PortForwardRequest {
            pod_sandbox_id: id(),
            port: vec![80],
        };
        assert!(runtime.port_forward(forward).await.is_err());
        let create = CreateContainerRequest {
            pod_sandbox_id: id(),
            config: Some(container_config("intruder", &node.image, &[])),
            sandbox_config: Some(node.pod("intruder").config().clone()),
        };
        assert_eq!(
            runtime.create_container(create).await.unwrap_err().code(),
            Code::NotFound
        );
        let stop = |id: String| StopPodSandboxRequest { pod_sandbox_id: id };
        // 1.6 refuses to stop what is not there, 2.x does not; of removing both think alike.
        let expected = runtime
            .stop_pod_sandbox(stop("0".repeat(64)))
            .await
            .map_err(|status| status.code());
        let stopped = runtime
            .stop_pod_sandbox(stop(id()))
            .await
            .map_err(|status| status.code());
        assert_eq!(stopped.is_ok(), expected.is_ok(), "{stopped:?} instead of {expected:?}");
        let remove = RemovePodSandboxRequest { pod_sandbox_id: id() };
        runtime.remove_pod_sandbox(remove).await.unwrap();
    }
    let pod = node.pod("pod-after");
    let (sandbox, _) = node.run_pod(&mut cri, &pod).await.unwrap();
    assert_eq!(sandbox, hull.id, "the hull did not survive");
}

#[tokio::test(flavor = "multi_thread")]
async fn hulls_cannot_be_touched_on_containerd_1() {
    hulls_cannot_be_touched(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hulls_cannot_be_touched_on_containerd_2() {
    hulls_cannot_be_touched(Release::Two).await;
}

/// A pod that comes right after all hulls died.
async fn dead_hulls_are_not_handed_out(release: Release) {
    let mut node = PodNode::with_hulls(release, HULLS).await.unwrap();
    let mut cri = node.relayed().await.unwrap();
    for (round, kill_shim) in [("pause", false), ("shim", true)] {
        node.prewarm().unwrap().wait_for_hulls(HULLS).await.unwrap();
        let mut dead = BTreeSet::new();
        for hull in node.hulls().await.unwrap() {
            let (pause, shim) = node.processes(&hull.id).await.unwrap();
            let pid = if kill_shim { shim } else { pause };
            process::kill(pid).unwrap();
            dead.insert(hull.id);
        }
        assert!(!dead.is_empty());
        for number in 0..HULLS {
            let pod = node.pod(&format!("pod-{round}-{number}"));
            let sandbox = cri.run_sandbox(&pod).await.unwrap();
            assert!(
                !dead.contains(&sandbox),
                "{number}: a hull whose {round} was killed was handed out"
            );
            let container = cri.create_container(&sandbox, &pod, "main", &node.image).await.unwrap();
            let started = cri.start_container(&container).await;
            started.unwrap_or_else(|error| panic!("{number}, after each {round} was killed: {error:#}"));
            let said = cri.exec(&container, &["hostname"]).await.unwrap().stdout;
            assert_eq!(String::from_utf8_lossy(&said).trim(), pod.config().hostname);
            cri.remove_sandbox(&sandbox).await.unwrap();
        }
        // They do not stay behind either.
        node.prewarm().unwrap().wait_for_hulls(HULLS).await.unwrap();
        let end = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            let left: Vec<_> = node
                .hulls()
                .await
                .unwrap()
                .into_iter()
                .filter(|hull| dead.contains(&hull.id))
                .collect();
            if left.is_empty() {
                break;
            }
            assert!(std::time::Instant::now() < end, "dead hulls stay: {left:?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_hulls_are_not_handed_out_on_containerd_1() {
    dead_hulls_are_not_handed_out(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_hulls_are_not_handed_out_on_containerd_2() {
    dead_hulls_are_not_handed_out(Release::Two).await;
}
