//! What the pool does by itself, as an operator sees it: it grows with demand, gives way to pods where addresses are few,
//! and hands out nothing that was made with what is no more.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::{NamespaceMode, NetworkConfig, RuntimeConfig, UpdateRuntimeConfigRequest};
use hullspeed_tests::census;
use hullspeed_tests::cri::{Cri, Pod};
use hullspeed_tests::pod_node::PodNode;
use hullspeed_tests::prewarm::PrewarmOptions;
use hullspeed_tests::release::Release;
use tokio::task::JoinSet;

/// For whatever should happen.
const LIMIT: Duration = Duration::from_secs(60);

/// Hulls of a pool whose size is set.
const HULLS: u32 = 3;

/// Pods of a burst, and the most hulls that there are by default.
const BURST: u32 = 10;

/// The fewest hulls by default.
const FEW: u32 = 2;

/// Addresses of the small network.
const ADDRESSES: u8 = 12;

/// Addresses that are left to pods in the small network.
const HEADROOM: usize = 3;

/// Waits for a condition.
async fn until(what: &str, node: &mut PodNode, mut holds: impl AsyncFnMut(&mut PodNode) -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds(node).await {
        let status = node.prewarm().unwrap().control(&["status"]).unwrap();
        assert!(Instant::now() < end, "{what} did not come:\n{status}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn hulls(node: &mut PodNode) -> BTreeSet<String> {
    node.hulls().await.unwrap().into_iter().map(|hull| hull.id).collect()
}

async fn ready(node: &mut PodNode, count: u32) {
    node.prewarm().unwrap().wait_for_hulls(count).await.unwrap();
}

async fn hits(node: &mut PodNode) -> u64 {
    node.prewarm().unwrap().requests("hit").await.unwrap()
}

/// Starts this many pods at once; how many of them got a hull?
async fn burst(node: &mut PodNode, name: &str) -> u64 {
    let before = hits(node).await;
    let mut runs = JoinSet::new();
    for number in 0..BURST {
        let (mut cri, pod) = (node.relayed().await.unwrap(), node.pod(&format!("{name}-{number}")));
        runs.spawn(async move { cri.run_sandbox(&pod).await });
    }
    let mut cri = node.relayed().await.unwrap();
    for sandbox in runs.join_all().await {
        cri.remove_sandbox(&sandbox.unwrap()).await.unwrap();
    }
    hits(node).await - before
}

/// With the bounds and the times that are the defaults.
async fn demand_raises_the_target(node: &mut PodNode) {
    let options = PrewarmOptions {
        as_shipped: true,
        ..PrewarmOptions::new(node.containerd.socket(), None)
    };
    node.start_prewarm_as(options).unwrap();
    let target = async |node: &mut PodNode| {
        node.prewarm()
            .unwrap()
            .metric("hullspeed_pool_target", &[])
            .await
            .unwrap()
    };
    ready(node, FEW).await;
    assert_eq!(target(node).await, f64::from(FEW));
    assert_eq!(hulls(node).await.len(), FEW as usize);
    let adopted = burst(node, "first").await;
    assert!((1..u64::from(BURST)).contains(&adopted), "{adopted} of the first burst");
    ready(node, BURST).await;
    assert_eq!(target(node).await, f64::from(BURST));
    assert_eq!(burst(node, "second").await, u64::from(BURST));
    ready(node, BURST).await;
    assert_eq!(hulls(node).await.len(), BURST as usize, "more than the most by default");
}

/// The next pod gets a hull that is none of `old`, or none at all; in the end none of them is there any more.
async fn are_replaced(node: &mut PodNode, old: &BTreeSet<String>, name: &str) {
    let mut cri = node.relayed().await.unwrap();
    for number in 0..HULLS {
        let pod = node.pod(&format!("{name}-{number}"));
        let (sandbox, _) = node.run_pod(&mut cri, &pod).await.unwrap();
        assert!(!old.contains(&sandbox), "an old hull was handed out");
        cri.remove_sandbox(&sandbox).await.unwrap();
    }
    until("a new pool", node, async |node| {
        let now = hulls(node).await;
        now.len() == HULLS as usize && now.is_disjoint(old)
    })
    .await;
    ready(node, HULLS).await;
    let before = hits(node).await;
    let pod = node.pod(&format!("{name}-adopted"));
    let (sandbox, _) = node.run_pod(&mut cri, &pod).await.unwrap();
    assert_eq!(hits(node).await, before + 1);
    cri.remove_sandbox(&sandbox).await.unwrap();
    ready(node, HULLS).await;
}

/// containerd may write another network configuration when it is told the pods' addresses.
async fn runtime_config_flushes(node: &mut PodNode) {
    ready(node, HULLS).await;
    let old = hulls(node).await;
    assert_eq!(old.len(), HULLS as usize);
    let network_config = Some(NetworkConfig {
        pod_cidr: "10.213.0.0/16".into(),
    });
    let request = UpdateRuntimeConfigRequest {
        runtime_config: Some(RuntimeConfig { network_config }),
    };
    let mut cri = node.relayed().await.unwrap();
    cri.runtime().update_runtime_config(request).await.unwrap();
    are_replaced(node, &old, "configured").await;
}

/// The image that a sandbox's first process runs.
async fn pause_image(node: &mut PodNode, sandbox: &str) -> String {
    let information = node.native.sandbox(sandbox).await.unwrap().info;
    let information: serde_json::Value = serde_json::from_str(&information["info"]).unwrap();
    information["image"].as_str().unwrap().to_owned()
}

/// The toolbox's command sleeps, which makes it a pause image.
async fn another_pause_image_replaces_hulls(node: &mut PodNode) {
    ready(node, HULLS).await;
    let old = hulls(node).await;
    let first = old.first().unwrap().clone();
    let before = pause_image(node, &first).await;
    let (from, to) = (format!("{}/pause:latest", node.registry.address()), node.image.clone());
    node.containerd.restart_with(&node.run, &from, &to).await.unwrap();
    node.native = node.containerd.cri().await.unwrap();
    are_replaced(node, &old, "paused").await;
    for hull in hulls(node).await {
        let now = pause_image(node, &hull).await;
        assert_ne!(now, before, "a hull of the image that was configured before");
    }
    node.containerd.restart_with(&node.run, &to, &from).await.unwrap();
    node.native = node.containerd.cri().await.unwrap();
}

/// A pod that gets no hull, but an address.
fn ordinary(node: &PodNode, name: &str) -> Pod {
    node.pod(name)
        .namespaces(NamespaceMode::Pod, NamespaceMode::Node, NamespaceMode::Pod)
}

async fn remove(cri: &mut Cri, sandboxes: Vec<String>) {
    for sandbox in sandboxes {
        cri.remove_sandbox(&sandbox).await.unwrap();
    }
}

/// Runs pods until all but `left` of the addresses that hulls have not are taken.
async fn occupy(node: &mut PodNode, cri: &mut Cri, name: &str, left: usize) -> Vec<String> {
    let mut sandboxes = Vec::new();
    while census::addresses(&node.run).unwrap().len() + left < usize::from(ADDRESSES) {
        let pod = ordinary(node, &format!("{name}-{}", sandboxes.len()));
        sandboxes.push(cri.run_sandbox(&pod).await.unwrap());
        assert!(sandboxes.len() < usize::from(ADDRESSES));
    }
    sandboxes
}

/// Pods that come one after the other find the headroom that was promised, because hulls give way.
async fn headroom_is_left_to_pods(node: &mut PodNode) {
    node.start_prewarm(HULLS, &format!("ip_headroom = {HEADROOM}\n"))
        .unwrap();
    ready(node, HULLS).await;
    let mut cri = node.relayed().await.unwrap();
    let others = usize::from(ADDRESSES) - HEADROOM - 1;
    let mut sandboxes = Vec::new();
    for number in 0..others {
        let pod = ordinary(node, &format!("headroom-{number}"));
        sandboxes.push(cri.run_sandbox(&pod).await.unwrap());
        until("the headroom", node, async |node| {
            census::addresses(&node.run).unwrap().len() + HEADROOM <= usize::from(ADDRESSES)
        })
        .await;
    }
    until("a pool of one", node, async |node| hulls(node).await.len() == 1).await;
    let pod = ordinary(node, "headroom-last");
    sandboxes.push(cri.run_sandbox(&pod).await.unwrap());
    until("an empty pool", node, async |node| hulls(node).await.is_empty()).await;
    assert_eq!(node.prewarm().unwrap().requests("failed").await.unwrap(), 0);
    remove(&mut cri, sandboxes).await;
}

/// Without headroom hulls keep their addresses until a pod is refused one; its next try succeeds, as a kubelet's would.
async fn a_pod_without_address_empties_the_pool(node: &mut PodNode) {
    node.start_prewarm(HULLS, "ip_headroom = 0\n").unwrap();
    ready(node, HULLS).await;
    let mut cri = node.relayed().await.unwrap();
    let mut sandboxes = occupy(node, &mut cri, "exhaust", 0).await;
    assert_eq!(hulls(node).await.len(), HULLS as usize);
    let pod = ordinary(node, "refused");
    let refused = cri.run_sandbox(&pod).await.unwrap_err();
    let said = format!("{refused:#}");
    assert!(said.contains("no IP addresses available"), "{said}");
    let metrics = node.prewarm().unwrap().metrics();
    until("the hulls' end", node, async |node| hulls(node).await.is_empty()).await;
    let released = metrics.sum("hullspeed_hulls_destroyed_total", &["reason=\"no_addresses\""]);
    assert_eq!(released.await.unwrap(), f64::from(HULLS));
    // All the addresses that hulls had are there for pods, and no hull takes one in between.
    sandboxes.push(cri.run_sandbox(&pod).await.unwrap());
    sandboxes.extend(occupy(node, &mut cri, "after", 0).await);
    assert_eq!(census::addresses(&node.run).unwrap().len(), usize::from(ADDRESSES));
    assert_eq!(hulls(node).await.len(), 0);
    remove(&mut cri, sandboxes).await;
}

async fn pool_of(node: &mut PodNode, hulls: u32) {
    node.prewarm().unwrap().control(&["drain", "--wait"]).unwrap();
    node.prewarm().unwrap().process().stop().unwrap();
    node.start_prewarm(hulls, "").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_follows_demand_and_configuration_on_containerd_1() {
    let mut node = PodNode::start(Release::One).await.unwrap();
    demand_raises_the_target(&mut node).await;
    pool_of(&mut node, HULLS).await;
    runtime_config_flushes(&mut node).await;
    another_pause_image_replaces_hulls(&mut node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_follows_configuration_on_containerd_2() {
    let mut node = PodNode::with_hulls(Release::Two, HULLS).await.unwrap();
    runtime_config_flushes(&mut node).await;
    another_pause_image_replaces_hulls(&mut node).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_come_first_where_addresses_are_few() {
    let mut node = PodNode::start(Release::One).await.unwrap();
    node.network.narrow(10, ADDRESSES).unwrap();
    headroom_is_left_to_pods(&mut node).await;
    node.prewarm().unwrap().control(&["drain", "--wait"]).unwrap();
    a_pod_without_address_empties_the_pool(&mut node).await;
}
