//! A hull that is going away is not in the way of a list of statistics, which natively one sandbox that is not ready fails.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::{ListPodSandboxStatsRequest, StopPodSandboxRequest};
use hullspeed_tests::pod_node::PodNode;
use hullspeed_tests::release::Release;

/// Hulls kept ready.
const HULLS: u32 = 2;

/// Hulls that are stopped, one after the other.
const ROUNDS: usize = 5;

/// Limit on the removal of one.
const GONE_LIMIT: Duration = Duration::from_secs(60);

async fn a_stopped_hull_fails_no_list(release: Release) -> usize {
    let mut node = PodNode::with_hulls(release, HULLS).await.unwrap();
    let mut cri = node.relayed().await.unwrap();
    let pod = node.pod("pod-counted");
    let (sandbox, _) = node.run_pod(&mut cri, &pod).await.unwrap();
    let mut failed_natively = 0;
    for _ in 0..ROUNDS {
        node.prewarm().unwrap().wait_for_hulls(HULLS).await.unwrap();
        let hulls = node.hulls().await.unwrap();
        let hull = hulls.into_iter().find(|hull| hull.id != sandbox).unwrap().id;
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: hull.clone(),
        };
        node.native.runtime().stop_pod_sandbox(stop).await.unwrap();
        let end = Instant::now() + GONE_LIMIT;
        while node.hulls().await.unwrap().iter().any(|of| of.id == hull) {
            let all = ListPodSandboxStatsRequest::default();
            if let Err(status) = node.native.runtime().list_pod_sandbox_stats(all.clone()).await {
                failed_natively += usize::from(status.message().contains(&hull));
            }
            let listed = cri
                .runtime()
                .list_pod_sandbox_stats(all)
                .await
                .unwrap()
                .into_inner()
                .stats;
            let listed: Vec<_> = listed.into_iter().map(|of| of.attributes.unwrap().id).collect();
            assert_eq!(listed, [sandbox.as_str()]);
            assert!(Instant::now() < end, "a stopped hull stays");
        }
    }
    failed_natively
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_hull_fails_no_list_on_containerd_1() {
    let failed_natively = a_stopped_hull_fails_no_list(Release::One).await;
    assert!(failed_natively > 0, "no stopped hull was met");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_hull_fails_no_list_on_containerd_2() {
    a_stopped_hull_fails_no_list(Release::Two).await;
}
