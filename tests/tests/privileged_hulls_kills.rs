//! kill -9 of the relay at each step of an adoption, of containerd, and of both in any order: pods keep running, the next
//! calls work, nothing is adopted twice, and containerd alone knows the pods in the end.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hullspeed_prewarm::adopt::fault::POINTS;
use hullspeed_proto::cri::v1::{PodSandbox, PodSandboxFilter};
use hullspeed_tests::cri::{Cri, Pod};
use hullspeed_tests::pod_node::{HULL_LABEL, PodNode};
use hullspeed_tests::pod_spec::Dice;
use hullspeed_tests::release::Release;

/// Kills of one daemon or both, in a row.
const ROUNDS: usize = 6;

const HULLS: u32 = 2;

/// How long daemons that were just started may answer that the other is not there yet.
const RECOVERY_LIMIT: Duration = Duration::from_secs(20);

/// Pods that should be running: name, sandbox, container, pid of the container.
type Running = BTreeMap<String, (String, String, u64)>;

fn pod(node: &PodNode, name: &str) -> Pod {
    node.pod(name)
        .label("io.kubernetes.pod.uid", name)
        .dns(&["10.96.0.10"], &["cluster.local"], &["ndots:5"])
        .sysctl("net.ipv4.ip_local_port_range", "20000 30000")
}

/// What a kubelet does: uses the sandbox of the pod's uid that is there, else runs one; errors are tried again.
async fn ensure_pod(node: &PodNode, pod: &Pod) -> String {
    let end = Instant::now() + RECOVERY_LIMIT;
    loop {
        let tried = async {
            let mut cri = node.relayed().await?;
            let found = of_uid(&mut cri, &pod.config().hostname).await?;
            assert!(found.len() < 2, "two sandboxes for one pod: {found:?}");
            match found.first() {
                Some(sandbox) => Ok(sandbox.id.clone()),
                None => cri.run_sandbox(pod).await,
            }
        };
        match tried.await {
            Ok(id) => return id,
            Err(error) if Instant::now() > end => panic!("{error:#}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

async fn of_uid(cri: &mut Cri, uid: &str) -> anyhow::Result<Vec<PodSandbox>> {
    let filter = PodSandboxFilter {
        label_selector: [("io.kubernetes.pod.uid".to_string(), uid.to_string())].into(),
        ..Default::default()
    };
    cri.sandboxes(filter).await
}

async fn container_pid(cri: &mut Cri, container: &str) -> u64 {
    let status = cri.container(container).await.unwrap();
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    info["pid"].as_u64().unwrap()
}

/// Gives a sandbox its container, and checks that the pod is what was asked for.
async fn finish_pod(node: &PodNode, pod: &Pod, sandbox: String, running: &mut Running) {
    let mut cri = node.relayed().await.unwrap();
    let container = cri.create_container(&sandbox, pod, "main", &node.image).await.unwrap();
    cri.start_container(&container).await.unwrap();
    let script = "hostname; cat /etc/hostname /etc/resolv.conf /proc/sys/net/ipv4/ip_local_port_range";
    let said = cri.exec(&container, &["sh", "-c", script]).await.unwrap().stdout;
    let name = &pod.config().hostname;
    let expected =
        format!("{name}\n{name}\nsearch cluster.local\nnameserver 10.96.0.10\noptions ndots:5\n20000\t30000\n");
    assert_eq!(String::from_utf8_lossy(&said), expected);
    let pid = container_pid(&mut cri, &container).await;
    assert!(
        !running.values().any(|(id, ..)| *id == sandbox),
        "{sandbox} was adopted twice"
    );
    running.insert(name.clone(), (sandbox, container, pid));
}

/// Exactly the running pods are seen, and they run as they did.
async fn check_running(cri: &mut Cri, running: &Running) {
    let mut seen = BTreeMap::new();
    let all = cri.sandboxes(PodSandboxFilter::default()).await.unwrap();
    for sandbox in all.clone() {
        assert!(!sandbox.labels.contains_key(HULL_LABEL), "a hull is seen: {sandbox:?}");
        assert_eq!(sandbox.state, 0, "not ready: {sandbox:?}");
        let name = sandbox.metadata.unwrap().name;
        assert_eq!(sandbox.labels["io.kubernetes.pod.uid"], name);
        let other = seen.insert(name, sandbox.id);
        assert_eq!(other, None, "two sandboxes of one name: {all:?}");
    }
    let expected = running
        .iter()
        .map(|(name, (sandbox, ..))| (name.clone(), sandbox.clone()))
        .collect();
    assert_eq!(seen, expected);
    for (_, container, pid) in running.values() {
        assert_eq!(
            container_pid(cri, container).await,
            *pid,
            "the container was started again"
        );
        assert_eq!(cri.exec(container, &["true"]).await.unwrap().exit_code, 0);
    }
}

/// Waits until every pod that this relay has given a hull is a pod in containerd's records, too.
async fn rebranded(node: &mut PodNode) {
    let prewarm = node.prewarm().unwrap();
    let wanted = prewarm.requests("hit").await.unwrap();
    let end = Instant::now() + RECOVERY_LIMIT;
    loop {
        let done = prewarm
            .metric("hullspeed_rebrands_total", &["result=\"ok\""])
            .await
            .unwrap();
        if done >= wanted as f64 {
            return;
        }
        assert!(Instant::now() < end, "{done} of {wanted} pods are re-branded");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The relay goes, containerd is restarted, and a plain client ends the pods.
async fn leave(mut node: PodNode, running: &Running) {
    rebranded(&mut node).await;
    let ended = node.prewarm().unwrap().process().stop().unwrap();
    assert!(ended.success(), "{ended}");
    node.containerd.restart(&node.run).await.unwrap();
    let mut cri = node.containerd.cri().await.unwrap();
    for hull in node.hulls().await.unwrap() {
        cri.remove_sandbox(&hull.id).await.unwrap();
    }
    check_running(&mut cri, running).await;
    for (name, (sandbox, ..)) in running {
        let found = of_uid(&mut cri, name).await.unwrap();
        assert_eq!(found.len(), 1, "{name}: {found:?}");
        assert_eq!(found[0].id, *sandbox);
        cri.remove_sandbox(sandbox).await.unwrap();
    }
    assert_eq!(cri.sandboxes(PodSandboxFilter::default()).await.unwrap(), []);
    let left = hullspeed_tests::census::addresses(&node.run).unwrap();
    assert_eq!(left, Vec::<String>::new(), "addresses are left");
}

async fn killed_at_each_step(release: Release) {
    let mut node = PodNode::with_hulls(release, HULLS).await.unwrap();
    let mut running = Running::new();
    for point in POINTS {
        node.prewarm().unwrap().process().stop().unwrap();
        node.start_prewarm_again(Some(point)).unwrap();
        node.prewarm().unwrap().wait_for_hulls(1).await.unwrap();
        check_running(&mut node.relayed().await.unwrap(), &running).await;
        let pod = pod(&node, &format!("pod-{point}"));
        let mut cri = node.relayed().await.unwrap();
        let answer = cri.run_sandbox(&pod).await;
        node.prewarm()
            .unwrap()
            .wait_killed()
            .unwrap_or_else(|error| panic!("at {point}: {error:#}"));
        let place = |name: &str| POINTS.iter().position(|other| *other == name).unwrap();
        // From there on the kubelet has its answer.
        let late = place(point) >= place("answered");
        assert!(answer.is_ok() || !late, "{point}: {answer:?}");
        node.start_prewarm_again(None).unwrap();
        let sandbox = ensure_pod(&node, &pod).await;
        if let Ok(answered) = answer {
            assert_eq!(sandbox, answered, "{point}: the sandbox that was answered is gone");
        }
        finish_pod(&node, &pod, sandbox, &mut running).await;
        check_running(&mut node.relayed().await.unwrap(), &running).await;
    }
    leave(node, &running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_step_on_containerd_1() {
    killed_at_each_step(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_each_step_on_containerd_2() {
    killed_at_each_step(Release::Two).await;
}

async fn killed_in_any_order(release: Release, seed: u64) {
    let mut dice = Dice::new(seed);
    let mut node = PodNode::with_hulls(release, HULLS).await.unwrap();
    let mut running = Running::new();
    let mut adopted = 0;
    for round in 0..ROUNDS {
        node.prewarm().unwrap().wait_for_hulls(1).await.unwrap();
        let hulls = node.hulls().await.unwrap();
        let pod = pod(&node, &format!("pod-{round}"));
        let in_flight = dice.chance(50).then(|| {
            let (socket, pod) = (node.prewarm.as_ref().unwrap().socket(), pod.clone());
            tokio::spawn(async move { Cri::connect(&socket).await?.run_sandbox(&pod).await })
        });
        tokio::time::sleep(Duration::from_millis(dice.below(20) as u64)).await;
        let (relay, containerd) = *dice.pick(&[(true, false), (false, true), (true, true)]);
        if relay {
            node.prewarm().unwrap().process().kill().unwrap();
        }
        if containerd {
            node.containerd.process().kill().unwrap();
        }
        let relay_first = dice.chance(50);
        if relay && relay_first {
            node.start_prewarm_again(None).unwrap();
        }
        if containerd {
            node.containerd.start_again(&node.run).await.unwrap();
        }
        if relay && !relay_first {
            node.start_prewarm_again(None).unwrap();
        }
        let story = format!("seed {seed}, round {round}: relay {relay} (first {relay_first}), containerd {containerd}");
        eprintln!("{story}, in flight {}", in_flight.is_some());
        if let Some(call) = in_flight {
            let _ = call.await.unwrap();
        }
        let sandbox = ensure_pod(&node, &pod).await;
        // Counters do not outlive a relay; a sandbox that was a hull tells as much.
        adopted += usize::from(hulls.iter().any(|hull| hull.id == sandbox));
        finish_pod(&node, &pod, sandbox, &mut running).await;
        check_running(&mut node.relayed().await.unwrap(), &running).await;
        node.native = node.containerd.cri().await.unwrap();
    }
    assert!(adopted > 0, "seed {seed}: no pod had a hull");
    // One that nobody disturbs.
    node.prewarm().unwrap().wait_for_hulls(1).await.unwrap();
    let pod = pod(&node, "pod-last");
    let sandbox = ensure_pod(&node, &pod).await;
    finish_pod(&node, &pod, sandbox, &mut running).await;
    assert!(node.prewarm().unwrap().requests("hit").await.unwrap() > 0);
    leave(node, &running).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_any_order_on_containerd_1() {
    killed_in_any_order(Release::One, 11).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_in_any_order_on_containerd_2() {
    killed_in_any_order(Release::Two, 12).await;
}
