//! Every kind of call, over a scripted containerd.

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hullspeed_proto::cri::v1::{
    AuthConfig, ContainerEventResponse, ContainerEventType, CreateContainerResponse, ImageSpec, ListPodSandboxRequest,
    ListPodSandboxResponse, ListPodSandboxStatsRequest, ListPodSandboxStatsResponse, PodSandbox, PodSandboxAttributes,
    PodSandboxFilter, PodSandboxMetrics, PodSandboxStats, PodSandboxStatsFilter, PodSandboxStatus,
    PodSandboxStatusRequest, PodSandboxStatusResponse, PullImageRequest, StartContainerRequest,
};
use prost::Message;
use tonic::{Code, Status};

use super::scripted::World;
use super::*;
use crate::relay::{Failure, Messages, Method, Reply};

fn by_id(id: &str) -> Vec<u8> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: id.into(),
        verbose: false,
    };
    request.encode_to_vec()
}

pub(super) fn listed(sandboxes: &[(String, HashMap<String, String>)]) -> Vec<u8> {
    let item = |(id, labels): &(String, HashMap<String, String>)| PodSandbox {
        id: id.clone(),
        labels: labels.clone(),
        ..Default::default()
    };
    ListPodSandboxResponse {
        items: sandboxes.iter().map(item).collect(),
    }
    .encode_to_vec()
}

/// containerd 1.6's answers about the sandboxes that are given: full id, labels.
pub(super) fn containerd(
    all: Vec<(String, HashMap<String, String>)>,
) -> impl Fn(&str, &[u8]) -> Result<Vec<u8>, Status> {
    move |method, message| {
        let asked = PodSandboxStatusRequest::decode(message).map(|request| request.pod_sandbox_id);
        let id = asked.unwrap_or_default();
        let found: Vec<_> = all.iter().filter(|(full, _)| full.starts_with(&id)).collect();
        match method {
            "ListPodSandbox" => {
                let filter = ListPodSandboxRequest::decode(message)
                    .unwrap()
                    .filter
                    .unwrap_or_default();
                assert_eq!(filter.label_selector, HashMap::new());
                let kept = all
                    .iter()
                    .filter(|(full, _)| filter.id.is_empty() || *full == filter.id);
                Ok(listed(&kept.cloned().collect::<Vec<_>>()))
            }
            _ if id.is_empty() => Err(Status::unknown("prefix can't be empty")),
            "RemovePodSandbox" => Ok(Vec::new()),
            _ if found.is_empty() => Err(Status::not_found(format!(
                "an error occurred when try to find sandbox {id:?}: not found"
            ))),
            _ if found.len() > 1 => Err(Status::unknown(format!(
                "Multiple IDs found with provided prefix: {id}"
            ))),
            "PodSandboxStatus" => {
                let status = PodSandboxStatus {
                    id: found[0].0.clone(),
                    labels: found[0].1.clone(),
                    ..Default::default()
                };
                let response = PodSandboxStatusResponse {
                    status: Some(status),
                    ..Default::default()
                };
                Ok(response.encode_to_vec())
            }
            "CreateContainer" => {
                let container_id = "container".into();
                Ok(CreateContainerResponse { container_id }.encode_to_vec())
            }
            _ => Ok(Vec::new()),
        }
    }
}

const BY_ID: [Method; 6] = [
    Method::PodSandboxStatus,
    Method::StopPodSandbox,
    Method::CreateContainer,
    Method::PortForward,
    Method::PodSandboxStats,
    Method::UpdatePodSandboxResources,
];

#[tokio::test]
async fn a_hull_is_a_stranger_by_id_and_by_beginning() {
    let hull = format!("ab{}", "0".repeat(62));
    let native = format!("ac{}", "0".repeat(62));
    let world = World::new(containerd(vec![
        (hull.clone(), marked()),
        (native.clone(), HashMap::new()),
    ]));
    world.ledger.add_hull(&hull);
    for method in BY_ID {
        for id in [hull.as_str(), "ab", "ab0"] {
            let status = world.answer(method, by_id(id)).await.unwrap_err();
            assert_eq!(status.code(), Code::NotFound, "{method:?} {id}");
            let text = format!("an error occurred when try to find sandbox {id:?}: not found");
            assert_eq!(status.message(), text, "{method:?}");
        }
        // Natively this would be ambiguous.
        world.answer(method, by_id("a")).await.unwrap();
        assert_eq!(world.last_sent(), by_id(&native), "{method:?}");
        let status = world.answer(method, by_id("")).await.unwrap_err();
        assert_eq!(status.message(), "prefix can't be empty");
    }
    // Removing a stranger succeeds, and the hull stays.
    world.answer(Method::RemovePodSandbox, by_id(&hull)).await.unwrap();
    assert_eq!(world.last_sent(), by_id(&format!("~{hull}")));
    assert!(world.ledger.is_hull(&hull));
    assert!(world.told.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_hull_that_the_ledger_does_not_know_yet_is_a_stranger_too() {
    let hull = full_id(1);
    let world = World::new(containerd(vec![(hull.clone(), marked())]));
    let status = world.answer(Method::PodSandboxStatus, by_id(&hull)).await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound);
    assert!(status.message().contains(&format!("{hull:?}")), "{status:?}");
}

#[tokio::test]
async fn a_list_by_id_finds_no_hull_and_tells_beginnings_apart() {
    let (hull, native) = (format!("ab{}", "0".repeat(62)), format!("ac{}", "0".repeat(62)));
    let world = World::new(containerd(vec![
        (hull.clone(), marked()),
        (native.clone(), HashMap::new()),
    ]));
    world.ledger.add_hull(&hull);
    let ids = async |id: &str| {
        let filter = PodSandboxFilter {
            id: id.into(),
            ..Default::default()
        };
        let request = ListPodSandboxRequest { filter: Some(filter) };
        let answer = world
            .answer(Method::ListPodSandbox, request.encode_to_vec())
            .await
            .unwrap();
        let items = ListPodSandboxResponse::decode(answer).unwrap().items;
        items.into_iter().map(|item| item.id).collect::<Vec<_>>()
    };
    assert_eq!(ids("").await, [native.as_str()]);
    assert_eq!(ids("a").await, [native.as_str()]);
    assert_eq!(ids("ab").await, Vec::<String>::new());
    assert_eq!(ids(&hull).await, Vec::<String>::new());
    assert_eq!(ids(&native).await, [native.as_str()]);
}

#[tokio::test]
async fn removing_frees_the_name_and_keeps_the_identity_for_late_events() {
    let id = full_id(7);
    let world = World::new(containerd(vec![(id.clone(), marked())]));
    world.ledger.adopt(adoption(&id, "pod", pairs(&[("app", "web")])));
    let answer = world.answer(Method::PodSandboxStatus, by_id("07")).await.unwrap();
    let status = PodSandboxStatusResponse::decode(answer).unwrap().status.unwrap();
    assert_eq!(status.labels, pairs(&[("app", "web")]));
    world.answer(Method::RemovePodSandbox, by_id("07")).await.unwrap();
    assert_eq!(*world.told.lock().unwrap(), [format!("removed {id}")]);
    assert!(world.ledger.adoption(&id).is_none());
    let late = event(&id, &id, ContainerEventType::ContainerDeletedEvent, true);
    let seen = events_of(&world, vec![Ok(late)]).await;
    let status = seen[0].as_ref().unwrap().pod_sandbox_status.clone().unwrap();
    assert_eq!(status.labels, pairs(&[("app", "web")]));
    assert_eq!(status.metadata.unwrap().name, "pod");
}

#[tokio::test]
async fn the_pool_hears_of_starts_and_of_changes_and_the_warmer_of_credentials() {
    let (id, native) = (full_id(7), full_id(8));
    let sandboxes = vec![(id.clone(), marked()), (native.clone(), HashMap::new())];
    let world = World::new(containerd(sandboxes));
    world.ledger.adopt(adoption(&id, "pod", HashMap::new()));
    let start = StartContainerRequest {
        container_id: "container".into(),
    };
    for sandbox in [&id, &native] {
        world.answer(Method::CreateContainer, by_id(sandbox)).await.unwrap();
        let _ = world.answer(Method::StartContainer, start.encode_to_vec()).await;
    }
    assert!(world.answer(Method::UpdateRuntimeConfig, Vec::new()).await.is_err());
    world.answer(Method::UpdateRuntimeConfig, by_id(&id)).await.unwrap();
    let pull = PullImageRequest {
        image: Some(ImageSpec {
            image: "registry/image".into(),
            ..Default::default()
        }),
        auth: Some(AuthConfig {
            username: "me".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let mut pull = pull.encode_to_vec();
    crate::wire::put_bytes(&mut pull, 900, b"new");
    let _ = world.answer(Method::PullImage, pull.clone()).await;
    assert_eq!(world.last_sent(), pull);
    let told = world.told.lock().unwrap().clone();
    let expected = [
        format!("started {id}"),
        format!("started {native}"),
        "flush runtime_config".into(),
        "credentials registry/image me".into(),
    ];
    assert_eq!(told, expected);
}

#[tokio::test]
async fn garbage_is_refused_and_garbage_from_containerd_is_not_relayed() {
    let world = World::new(|_, _| Ok(vec![0x0b, 0xff]));
    for method in [
        Method::ListPodSandbox,
        Method::PodSandboxStatus,
        Method::ListPodSandboxStats,
    ] {
        let status = world.answer(method, vec![0x0a, 9, 1]).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        assert!(
            status.message().starts_with("grpc: error unmarshalling request: "),
            "{status:?}"
        );
        let status = world.answer(method, Vec::new()).await.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
        let text = status.message();
        assert!(
            text.contains(&format!("{method:?}")) && text.contains("byte 0 is a group"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn stats_of_a_selection_do_not_fail_for_a_stranger() {
    let (web, other) = (full_id(1), full_id(2));
    let all = vec![(web.clone(), pairs(&[("app", "web")])), (other.clone(), HashMap::new())];
    let cri = containerd(all);
    let world = World::new(move |method, message| {
        if method != "ListPodSandboxStats" {
            return cri(method, message);
        }
        let filter = ListPodSandboxStatsRequest::decode(message).unwrap().filter.unwrap();
        assert_eq!(filter.label_selector, HashMap::new());
        if filter.id != full_id(1) {
            return Err(Status::unknown("failed to obtain metrics for sandbox"));
        }
        let attributes = PodSandboxAttributes {
            id: filter.id,
            labels: pairs(&[("app", "web")]),
            ..Default::default()
        };
        let stats = PodSandboxStats {
            attributes: Some(attributes),
            linux: None,
        };
        Ok(ListPodSandboxStatsResponse { stats: vec![stats] }.encode_to_vec())
    });
    let request = |selector: &[(&str, &str)]| ListPodSandboxStatsRequest {
        filter: Some(PodSandboxStatsFilter {
            label_selector: pairs(selector),
            ..Default::default()
        }),
    };
    let asked = request(&[("app", "web")]).encode_to_vec();
    let answer = world.answer(Method::ListPodSandboxStats, asked).await.unwrap();
    let stats = ListPodSandboxStatsResponse::decode(answer).unwrap().stats;
    assert_eq!(stats.len(), 1);
    let all = request(&[]).encode_to_vec();
    assert!(world.answer(Method::ListPodSandboxStats, all).await.is_err());
}

#[tokio::test]
async fn metrics_of_hulls_are_hidden_even_before_the_ledger_knows_them() {
    let (hull, native) = (full_id(1), full_id(2));
    let cri = containerd(vec![(hull.clone(), marked()), (native.clone(), HashMap::new())]);
    let world = World::new(move |method, message| {
        if method != "ListPodSandboxMetrics" {
            return cri(method, message);
        }
        let metrics = |n| PodSandboxMetrics {
            pod_sandbox_id: full_id(n),
            ..Default::default()
        };
        let pod_metrics = vec![metrics(1), metrics(2)];
        Ok(hullspeed_proto::cri::v1::ListPodSandboxMetricsResponse { pod_metrics }.encode_to_vec())
    });
    let answer = world.answer(Method::ListPodSandboxMetrics, Vec::new()).await.unwrap();
    let seen = hullspeed_proto::cri::v1::ListPodSandboxMetricsResponse::decode(answer).unwrap();
    let ids: Vec<_> = seen.pod_metrics.into_iter().map(|of| of.pod_sandbox_id).collect();
    assert_eq!(ids, [native]);
}

pub(super) fn event(id: &str, sandbox: &str, kind: ContainerEventType, with_status: bool) -> Bytes {
    let status = PodSandboxStatus {
        id: sandbox.into(),
        labels: marked(),
        ..Default::default()
    };
    let event = ContainerEventResponse {
        container_id: id.into(),
        container_event_type: kind.into(),
        created_at: 5,
        pod_sandbox_status: with_status.then_some(status),
        ..Default::default()
    };
    event.encode_to_vec().into()
}

pub(super) async fn subscribed(world: &World, items: Messages) -> Messages {
    match world
        .call_with(Method::GetContainerEvents, Vec::new(), Some(items))
        .await
    {
        Reply::Stream(messages) => messages,
        _ => panic!("not a stream"),
    }
}

/// All events that a subscriber gets from containerd's `items`.
async fn events_of(world: &World, items: Vec<Result<Bytes, Failure>>) -> Vec<Result<ContainerEventResponse, Status>> {
    let messages = subscribed(world, stream::iter(items).boxed()).await;
    let decoded = messages.map(|item| match item {
        Ok(message) => Ok(ContainerEventResponse::decode(message).unwrap()),
        Err(failure) => Err(failure.status().clone()),
    });
    decoded.collect().await
}

#[tokio::test]
async fn events_tell_of_pods_and_not_of_hulls() {
    use ContainerEventType::{
        ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted, ContainerStartedEvent as Started,
        ContainerStoppedEvent as Stopped,
    };
    let (hull, pod, gone) = (full_id(1), full_id(2), full_id(3));
    let world = World::new(containerd(vec![(hull.clone(), marked()), (pod.clone(), marked())]));
    world.ledger.add_hull(&hull);
    world.ledger.retire_hull(&gone);
    let one = world.ledger.adopt(adoption(&pod, "pod", pairs(&[("app", "web")])));
    // Nobody listens yet: it waits.
    world.events.adopted(&one);
    let items = vec![
        // Told again from containerd's queue: the hulls' beginnings.
        event(&pod, &pod, Created, true),
        event(&pod, &pod, Started, true),
        event(&hull, &hull, Created, true),
        event(&full_id(9), &full_id(9), Started, true),
        event(&gone, &gone, Deleted, false),
        event("container", &pod, Created, true),
        event(&pod, &pod, Stopped, true),
        event(&pod, &pod, Deleted, false),
        event("stranger", "stranger", Deleted, false),
    ];
    let seen = events_of(&world, items.into_iter().map(Ok).collect()).await;
    let seen: Vec<_> = seen.into_iter().map(Result::unwrap).collect();
    let told: Vec<_> = seen
        .iter()
        .map(|event| (event.container_id.as_str(), event.container_event_type()))
        .collect();
    let pod = pod.as_str();
    let expected = [
        (pod, Created),
        (pod, Started),
        ("container", Created),
        (pod, Stopped),
        (pod, Deleted),
        ("stranger", Deleted),
    ];
    assert_eq!(told, expected);
    for event in &seen[..4] {
        let status = event.pod_sandbox_status.as_ref().unwrap();
        assert_eq!(status.metadata.as_ref().unwrap().name, "pod");
        assert_eq!(status.labels, pairs(&[("app", "web")]));
        assert_eq!(status.created_at, one.adopted_at);
    }
    assert!(seen[0].containers_statuses.is_empty() && seen[0].created_at > 1_700_000_000_000_000_000);
    // A second subscriber is not told again.
    let again = events_of(&world, vec![Ok(event("stranger", "stranger", Deleted, false))]).await;
    assert_eq!(again.len(), 1);
}

#[tokio::test]
async fn an_adoption_is_ahead_of_what_comes_after_it_for_every_subscriber() {
    let pod = full_id(2);
    let world = World::new(containerd(vec![(pod.clone(), marked())]));
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let items = tokio_stream::wrappers::UnboundedReceiverStream::new(receiver).boxed();
    let mut first = subscribed(&world, items).await;
    let mut second = subscribed(&world, stream::pending().boxed()).await;
    // Both have asked containerd before the adoption.
    for subscriber in [&mut first, &mut second] {
        let waiting = tokio::time::timeout(std::time::Duration::from_millis(50), subscriber.next());
        assert!(waiting.await.is_err());
    }
    let one = world.ledger.adopt(adoption(&pod, "pod", HashMap::new()));
    world.events.adopted(&one);
    let created = ContainerEventType::ContainerCreatedEvent;
    sender.send(Ok(event("container", &pod, created, true))).unwrap();
    let ids = async |count, subscriber: &mut Messages| {
        let mut ids = Vec::new();
        for _ in 0..count {
            let message = subscriber.next().await.unwrap().unwrap();
            ids.push(ContainerEventResponse::decode(message).unwrap().container_id);
        }
        ids
    };
    assert_eq!(ids(3, &mut first).await, [pod.as_str(), &pod, "container"]);
    assert_eq!(ids(2, &mut second).await, [pod.as_str(), &pod]);
    sender.send(Err(Status::unavailable("away").into())).unwrap();
    let failed = first.next().await.unwrap().unwrap_err();
    assert_eq!(failed.status().code(), Code::Unavailable);
    assert!(first.next().await.is_none());
}

#[tokio::test]
async fn a_subscriber_that_does_not_read_is_cut_off() {
    let world = World::new(containerd(Vec::new()));
    let mut slow = subscribed(&world, stream::pending().boxed()).await;
    let waiting = tokio::time::timeout(std::time::Duration::from_millis(50), slow.next());
    assert!(waiting.await.is_err());
    for n in 0..2000 {
        world
            .events
            .adopted(&Arc::new(adoption(&format!("{n}"), "pod", HashMap::new())));
    }
    let failed = slow.next().await.unwrap().unwrap_err();
    assert_eq!(failed.status().code(), Code::ResourceExhausted);
}
