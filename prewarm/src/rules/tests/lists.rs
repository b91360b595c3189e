//! Lists in which a hull is in the way, over a scripted containerd.

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hullspeed_proto::cri::v1::{
    ContainerFilter, ContainerStatsFilter, ListContainerStatsRequest, ListContainersRequest,
    ListPodSandboxMetricsResponse, ListPodSandboxStatsRequest, ListPodSandboxStatsResponse, PodSandboxAttributes,
    PodSandboxMetrics, PodSandboxStats, PodSandboxStatsFilter, PodSandboxStatsRequest, PodSandboxStatsResponse,
    VersionResponse,
};
use prost::Message;
use tonic::{Code, Status};

use super::handlers::listed;
use super::scripted::World;
use super::*;
use crate::relay::{Method, Reply};

fn stats(id: &str) -> PodSandboxStats {
    let attributes = PodSandboxAttributes {
        id: id.into(),
        ..Default::default()
    };
    PodSandboxStats {
        attributes: Some(attributes),
        linux: None,
    }
}

/// A containerd of which sandbox 1 is a hull between its stop and its removal, and 2 and 3 are pods' sandboxes.
/// `ready` says whether 3 is.
fn containerd(version: &'static str, ready: bool) -> impl Fn(&str, &[u8]) -> Result<Vec<u8>, Status> {
    let why =
        |id: &str| format!("failed to get pod sandbox stats since sandbox container {id:?} is not in ready state");
    let is_ready = move |id: &str| id == full_id(2) || (ready && id == full_id(3));
    // 1.6 calls it unknown.
    let code = if version.starts_with("1.6") {
        Code::Unknown
    } else {
        Code::Unavailable
    };
    move |method, message| match method {
        "Version" => Ok(VersionResponse {
            runtime_version: version.into(),
            ..Default::default()
        }
        .encode_to_vec()),
        "ListPodSandbox" => Ok(listed(&[
            (full_id(1), marked()),
            (full_id(2), HashMap::new()),
            (full_id(3), HashMap::new()),
        ])),
        "ListPodSandboxStats" => {
            let filter = ListPodSandboxStatsRequest::decode(message).unwrap().filter;
            let Some(filter) = filter else {
                let id = full_id(1);
                return Err(Status::unknown(format!(
                    "failed to decode sandbox container metrics for sandbox {id:?}: {}",
                    why(&id)
                )));
            };
            let stats: Vec<_> = [2, 3]
                .map(full_id)
                .iter()
                .filter(|id| is_ready(id) && (filter.id.is_empty() || filter.id == **id))
                .map(|id| stats(id))
                .collect();
            Ok(ListPodSandboxStatsResponse { stats }.encode_to_vec())
        }
        "PodSandboxStats" => {
            let id = PodSandboxStatsRequest::decode(message).unwrap().pod_sandbox_id;
            assert_ne!(id, full_id(1), "a hull is asked about");
            if !is_ready(&id) {
                let text = format!("failed to decode pod sandbox metrics {id}: {}", why(&id));
                return Err(Status::new(code, text));
            }
            let stats = Some(stats(&id));
            Ok(PodSandboxStatsResponse { stats }.encode_to_vec())
        }
        _ => panic!("{method} is asked"),
    }
}

fn ids(message: Bytes) -> Vec<String> {
    let stats = ListPodSandboxStatsResponse::decode(message).unwrap().stats;
    stats.into_iter().map(|of| of.attributes.unwrap().id).collect()
}

#[tokio::test]
async fn a_hull_that_is_not_ready_fails_no_list_of_stats() {
    for version in ["1.6.20~ds1", "2.1.9"] {
        let world = World::new(containerd(version, true));
        // Not even if the ledger has not heard of it, or not any more.
        let answer = world.answer(Method::ListPodSandboxStats, Vec::new()).await.unwrap();
        assert_eq!(ids(answer), [full_id(2), full_id(3)], "{version}");
    }
}

#[tokio::test]
async fn a_pod_that_is_not_ready_fails_a_list_of_stats_as_natively() {
    let world = World::new(containerd("1.6.20~ds1", false));
    let status = world.answer(Method::ListPodSandboxStats, Vec::new()).await.unwrap_err();
    let id = full_id(3);
    let text = format!(
        "failed to decode sandbox container metrics for sandbox {id:?}: failed to get pod sandbox stats since sandbox container {id:?} is not in ready state"
    );
    assert_eq!((status.code(), status.message()), (Code::Unknown, text.as_str()));
    // Newer ones leave it out.
    let world = World::new(containerd("2.1.9", false));
    let answer = world.answer(Method::ListPodSandboxStats, Vec::new()).await.unwrap();
    assert_eq!(ids(answer), [full_id(2)]);
}

#[tokio::test]
async fn a_stream_of_stats_names_no_hull() {
    let world = World::new(containerd("1.6.20~ds1", true));
    let failure = || {
        let text = format!("failed to obtain metrics for sandbox {:?}: cgroup deleted", full_id(1));
        crate::relay::Failure::Answered {
            status: Status::unknown(text),
            metadata: http::HeaderMap::new(),
        }
    };
    let piece = || {
        Ok(ListPodSandboxStatsResponse {
            stats: vec![stats(&full_id(2))],
        }
        .encode_to_vec()
        .into())
    };
    let seen = async |items| {
        let items = stream::iter(items).boxed();
        let reply = world
            .call_with(Method::StreamPodSandboxStats, Vec::new(), Some(items))
            .await;
        let Reply::Stream(messages) = reply else {
            panic!("not a stream")
        };
        messages.collect::<Vec<_>>().await
    };
    let all = seen(vec![Err(failure())]).await;
    assert_eq!(ids(all[0].clone().unwrap()), [full_id(2), full_id(3)]);
    let broken = seen(vec![piece(), Err(failure())]).await;
    let status = broken[1].as_ref().unwrap_err().status().clone();
    assert_eq!(status.code(), Code::Unknown);
    assert!(!status.message().contains(&full_id(1)), "{status:?}");
}

#[tokio::test]
async fn stats_of_a_pod_whose_cgroup_is_gone_fail_in_the_versions_words() {
    for (version, single, list) in [
        (
            "1.6.20~ds1",
            "failed getting metrics for sandbox ID: failed to load sandbox cgroup",
            "failed to obtain metrics for sandbox \"ID\": failed to load sandbox cgroup",
        ),
        (
            "2.1.9",
            "failed to decode pod sandbox metrics ID: failed getting metrics for sandbox ID: failed to load sandbox cgroup",
            "failed to decode sandbox container metrics for sandbox \"ID\": failed getting metrics for sandbox ID: failed to load sandbox cgroup",
        ),
    ] {
        let id = full_id(2);
        let world = World::new(containerd(version, true));
        // Its configuration names a cgroup that is not there.
        world.ledger.adopt(adoption(&id, "pod", HashMap::new()));
        let by_id = PodSandboxStatsRequest {
            pod_sandbox_id: id.clone(),
        };
        let status = world
            .answer(Method::PodSandboxStats, by_id.encode_to_vec())
            .await
            .unwrap_err();
        assert!(status.message().starts_with(&single.replace("ID", &id)), "{status:?}");
        let all = ListPodSandboxStatsRequest {
            filter: Some(PodSandboxStatsFilter::default()),
        };
        let status = world
            .answer(Method::ListPodSandboxStats, all.encode_to_vec())
            .await
            .unwrap_err();
        assert!(status.message().starts_with(&list.replace("ID", &id)), "{status:?}");
    }
}

#[tokio::test]
async fn containers_are_found_by_beginnings_that_only_hulls_make_ambiguous() {
    let (hull, native) = (format!("ab{}", "0".repeat(62)), format!("ac{}", "0".repeat(62)));
    let all = [(hull.clone(), marked()), (native.clone(), HashMap::new())];
    let world = World::new(move |method, _| {
        Ok(if method == "ListPodSandbox" {
            listed(&all)
        } else {
            Vec::new()
        })
    });
    world.ledger.add_hull(&hull);
    let containers = |id: &str| {
        let filter = ContainerFilter {
            id: "c".into(),
            pod_sandbox_id: id.into(),
            label_selector: pairs(&[("app", "web")]),
            ..Default::default()
        };
        ListContainersRequest { filter: Some(filter) }.encode_to_vec()
    };
    let stats = |id: &str| {
        let filter = ContainerStatsFilter {
            id: "c".into(),
            pod_sandbox_id: id.into(),
            ..Default::default()
        };
        ListContainerStatsRequest { filter: Some(filter) }.encode_to_vec()
    };
    let nobody = format!("~{hull}");
    let cases = [
        ("", ""),
        (&native, &native),
        ("a", &native),
        (&hull, &nobody),
        ("ab", "~ab"),
        ("ff", "ff"),
    ];
    for (asked, sent) in cases {
        let (of_containers, of_stats) = (containers(sent), stats(sent));
        for (list, stream, request, expected) in [
            (
                Method::ListContainers,
                Method::StreamContainers,
                containers(asked),
                of_containers,
            ),
            (
                Method::ListContainerStats,
                Method::StreamContainerStats,
                stats(asked),
                of_stats,
            ),
        ] {
            let same = |sent: &Bytes| match list {
                Method::ListContainers => {
                    ListContainersRequest::decode(sent.clone()).unwrap()
                        == ListContainersRequest::decode(expected.as_slice()).unwrap()
                }
                _ => sent == expected.as_slice(),
            };
            world.answer(list, request.clone()).await.unwrap();
            assert!(same(&world.last_sent()), "{list:?} {asked}");
            drop(world.call(stream, request).await);
            assert!(same(&world.last_sent()), "{stream:?} {asked}");
        }
    }
    // No filter, no change.
    world.answer(Method::ListContainers, Vec::new()).await.unwrap();
    assert!(world.last_sent().is_empty());
}

#[tokio::test]
async fn pieces_of_metrics_do_not_show_hulls_that_came_meanwhile() {
    let hulls: Shared<Vec<(String, HashMap<String, String>)>> = Shared::default();
    let known = Arc::clone(&hulls);
    let world = World::new(move |_, _| Ok(listed(&known.lock().unwrap())));
    let piece = move |n: u8| {
        // This hull was made after the stream had begun.
        hulls.lock().unwrap().push((full_id(n), marked()));
        let metrics = |n| PodSandboxMetrics {
            pod_sandbox_id: full_id(n),
            ..Default::default()
        };
        let pod_metrics = vec![metrics(n), metrics(n + 100)];
        Ok(ListPodSandboxMetricsResponse { pod_metrics }.encode_to_vec().into())
    };
    let items = stream::iter([1, 2]).map(piece).boxed();
    let reply = world
        .call_with(Method::StreamPodSandboxMetrics, Vec::new(), Some(items))
        .await;
    let Reply::Stream(messages) = reply else {
        panic!("not a stream")
    };
    let seen = messages.map(|piece| {
        let piece = ListPodSandboxMetricsResponse::decode(piece.unwrap()).unwrap();
        piece
            .pod_metrics
            .into_iter()
            .map(|of| of.pod_sandbox_id)
            .collect::<Vec<_>>()
    });
    assert_eq!(seen.collect::<Vec<_>>().await, [vec![full_id(101)], vec![full_id(102)]]);
}

#[tokio::test]
async fn few_lists_are_in_memory_at_once() {
    let world = World::new(containerd("2.1.9", true));
    let containerd = &world.containerd;
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(crate::rules::question::sandboxes(containerd, "").await.unwrap());
    }
    let next = crate::rules::question::sandboxes(containerd, "");
    let waiting = tokio::time::timeout(std::time::Duration::from_millis(50), next);
    assert!(waiting.await.is_err());
    held.pop();
    assert!(crate::rules::question::sandboxes(containerd, "").await.is_ok());
}

#[tokio::test]
async fn the_version_is_not_asked_once_the_facts_are_known() {
    use hullspeed_proto::cri::v1::{NamespaceMode, PodSandboxStatus, PodSandboxStatusResponse, UserNamespace};
    let id = full_id(2);
    let asked: Shared<usize> = Shared::default();
    let count = Arc::clone(&asked);
    let world = World::new(move |method, _| {
        if method == "Version" {
            *count.lock().unwrap() += 1;
            let runtime_version = "1.6.20".into();
            return Ok(VersionResponse {
                runtime_version,
                ..Default::default()
            }
            .encode_to_vec());
        }
        let status = PodSandboxStatus {
            id: full_id(2),
            labels: marked(),
            ..Default::default()
        };
        let response = PodSandboxStatusResponse {
            status: Some(status),
            ..Default::default()
        };
        Ok(response.encode_to_vec())
    });
    let mut pod = adoption(&id, "pod", HashMap::new());
    let context = pod.config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    context.namespace_options.as_mut().unwrap().userns_options = Some(UserNamespace {
        mode: NamespaceMode::Node.into(),
        ..Default::default()
    });
    world.ledger.adopt(pod);
    let request = PodSandboxStatsRequest { pod_sandbox_id: id }.encode_to_vec();
    world.answer(Method::PodSandboxStatus, request.clone()).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), 1);
    world.learn(crate::containerd::facts::Facts {
        version: "1.6.20".into(),
        ..Default::default()
    });
    world.answer(Method::PodSandboxStatus, request).await.unwrap();
    assert_eq!(*asked.lock().unwrap(), 1);
}
