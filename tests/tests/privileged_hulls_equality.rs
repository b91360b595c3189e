//! A pod through the relay cannot be told from one at containerd's own socket: generated pods are run at both, one after
//! the other, on the same containerd, and all that a client can read of them is compared.
#![expect(clippy::unwrap_used, reason = "tests")]

use hullspeed_tests::observation::{Events, Observer};
use hullspeed_tests::pod_node::PodNode;
use hullspeed_tests::pod_spec::{self, Fate};
use hullspeed_tests::raw;
use hullspeed_tests::release::Release;

/// Pods of several changes, beside one for each change.
const RANDOM: usize = 20;

/// Hulls kept ready.
const HULLS: u32 = 2;

/// What may differ: in the verbose status, the OCI specification of the process that holds the sandbox's namespaces. It
/// was started as a hull's: in the cgroup of hulls, always with the runtime's seccomp profile, and by the image's user.
fn allowed(path: &str) -> bool {
    let pause =
        ["/verbose status", "/status when stopped"].map(|status| format!("{status}/2[0]/2[0]/json/runtimeSpec"));
    let Some(part) = pause.iter().find_map(|prefix| path.strip_prefix(prefix.as_str())) else {
        return false;
    };
    ["/linux/cgroupsPath", "/linux/seccomp", "/process/user/"]
        .iter()
        .any(|allowed| part.starts_with(allowed))
}

/// `HULLSPEED_SEED` is the number that the random pods are made from, to try others or a failure's again.
async fn pods_are_equal(release: Release) {
    let seed = std::env::var("HULLSPEED_SEED")
        .ok()
        .and_then(|seed| seed.parse().ok())
        .unwrap_or(1);
    let mut node = PodNode::with_hulls(release, HULLS).await.unwrap();
    let native_events = Events::listen(node.native.clone(), release);
    let relayed_events = Events::listen(node.relayed().await.unwrap(), release);
    let specs = pod_spec::all(seed, RANDOM, |name| node.pod(name));
    let mut faults = Vec::new();
    for spec in &specs {
        let observer = Observer::native(&node, &native_events).await.unwrap();
        let native = observer.observe(&spec.pod).await;
        node.prewarm().unwrap().wait_for_hulls(1).await.unwrap();
        let before = node.prewarm().unwrap().requests("hit").await.unwrap();
        let observer = Observer::relayed(&node, &relayed_events).await.unwrap();
        let relayed = observer.observe(&spec.pod).await;
        let hit = node.prewarm().unwrap().requests("hit").await.unwrap() > before;
        match spec.fate {
            Fate::Adopted if !hit => faults.push(format!("{}: not adopted", spec.note)),
            Fate::Ordinary if hit => faults.push(format!("{}: adopted", spec.note)),
            _ => {}
        }
        match (native, relayed) {
            (Ok(native), Ok(relayed)) => {
                let found = raw::differences(&native, &relayed);
                let found = found.iter().filter(|(path, ..)| !allowed(path));
                faults.extend(
                    found.map(|(path, native, relayed)| format!("{}: {path}: {native} != {relayed}", spec.note)),
                );
            }
            (Ok(_), Err(error)) => faults.push(format!("{}: through the relay: {error:#}", spec.note)),
            (Err(error), Ok(_)) => faults.push(format!("{}: natively: {error:#}", spec.note)),
            (native, relayed) => faults.push(format!("{}: {native:#?} != {relayed:#?}", spec.note)),
        }
    }
    assert!(
        faults.is_empty(),
        "seed {seed}, {} differences:\n{}",
        faults.len(),
        faults.join("\n")
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_on_containerd_1_are_equal() {
    pods_are_equal(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_on_containerd_2_are_equal() {
    pods_are_equal(Release::Two).await;
}
