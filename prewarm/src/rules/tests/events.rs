//! Subscribers that do not read, go, or come back; and events that are supplied.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hullspeed_proto::cri::v1::{
    Container, ContainerEventResponse, ContainerEventType, ContainerState, ListContainersResponse,
};
use prost::Message as _;
use tokio::sync::mpsc::{Sender, channel};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::handlers::{containerd, event, subscribed};
use super::scripted::World;
use super::*;
use crate::relay::{Failure, Messages};

const PATIENCE: Duration = Duration::from_secs(20);

/// For what must not happen.
const NOTHING: Duration = Duration::from_millis(100);

async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it does not come")
}

/// A subscriber, and containerd's end of its stream, which holds one event.
async fn subscriber(world: &World) -> (Messages, Sender<Result<Bytes, Failure>>) {
    let (sender, receiver) = channel(1);
    let mut messages = subscribed(world, ReceiverStream::new(receiver).boxed()).await;
    assert!(tokio::time::timeout(NOTHING, messages.next()).await.is_err());
    (messages, sender)
}

fn of_pod(number: usize) -> Result<Bytes, Failure> {
    let id = format!("pod-{number}");
    Ok(event(&id, &id, ContainerEventType::ContainerDeletedEvent, false))
}

async fn next(messages: &mut Messages) -> Result<(String, ContainerEventType), Status> {
    match soon(messages.next()).await.expect("the stream has ended") {
        Ok(message) => {
            let event = ContainerEventResponse::decode(message).unwrap();
            let kind = event.container_event_type();
            Ok((event.container_id, kind))
        }
        Err(failure) => Err(failure.status().clone()),
    }
}

#[tokio::test]
async fn containerd_is_listened_to_although_nobody_reads() {
    let world = World::new(containerd(Vec::new()));
    let (mut messages, sender) = subscriber(&world).await;
    for number in 0..1000 {
        soon(sender.send(of_pod(number))).await.unwrap();
    }
    for number in 0..1000 {
        assert_eq!(next(&mut messages).await.unwrap().0, format!("pod-{number}"));
    }
    // Further behind it is cut off, and so is the call in containerd, whether or not it reads now.
    for number in 0..3000 {
        if soon(sender.send(of_pod(number))).await.is_err() {
            break;
        }
    }
    soon(sender.closed()).await;
    let status = next(&mut messages).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(soon(messages.next()).await.is_none());
}

#[tokio::test]
async fn unread_bytes_are_bounded_too() {
    let world = World::new(containerd(Vec::new()));
    let (mut messages, sender) = subscriber(&world).await;
    let large = || {
        let response = ContainerEventResponse {
            container_id: "x".repeat(1 << 20),
            ..Default::default()
        };
        Ok(Bytes::from(response.encode_to_vec()))
    };
    // These are read.
    for _ in 0..6 {
        soon(sender.send(large())).await.unwrap();
        assert_eq!(next(&mut messages).await.unwrap().0.len(), 1 << 20);
    }
    for _ in 0..6 {
        if soon(sender.send(large())).await.is_err() {
            break;
        }
    }
    soon(sender.closed()).await;
    assert_eq!(next(&mut messages).await.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn an_adoption_waits_for_a_subscriber_that_hears_of_it() {
    use ContainerEventType::{ContainerCreatedEvent as Created, ContainerStartedEvent as Started};
    let pod = full_id(2);
    let world = World::new(containerd(vec![(pod.clone(), marked())]));
    let (messages, sender) = subscriber(&world).await;
    let one = world.ledger.adopt(adoption(&pod, "pod", HashMap::new()));
    world.events.adopted(&one);
    // The first one goes without having read it, the second in the middle.
    tokio::time::sleep(NOTHING).await;
    drop((messages, sender));
    let mut second = subscribed(&world, stream::pending().boxed()).await;
    assert_eq!(next(&mut second).await.unwrap(), (pod.clone(), Created));
    drop(second);
    let mut third = subscribed(&world, stream::pending().boxed()).await;
    assert_eq!(next(&mut third).await.unwrap(), (pod.clone(), Created));
    assert_eq!(next(&mut third).await.unwrap(), (pod.clone(), Started));
    // It asks for more, so it has that.
    assert!(tokio::time::timeout(NOTHING, third.next()).await.is_err());
    drop(third);
    // And nobody is told again.
    drop(subscriber(&world).await);
}

/// What containerd says of containers, by id.
type States = Arc<Mutex<Vec<(&'static str, ContainerState)>>>;

/// A containerd 1.6 with these containers, and how often it was asked for all of them.
fn old(states: &States) -> (World, Arc<Mutex<usize>>) {
    let asked = Arc::new(Mutex::new(0));
    let (states, count) = (Arc::clone(states), Arc::clone(&asked));
    let pods = containerd(vec![("sandbox".to_owned(), HashMap::new())]);
    let world = World::new(move |method, message| {
        if method != "ListContainers" {
            return pods(method, message);
        }
        *count.lock().unwrap() += 1;
        let container = |(id, state): &(&str, ContainerState)| Container {
            id: (*id).into(),
            pod_sandbox_id: "sandbox".into(),
            state: (*state).into(),
            ..Default::default()
        };
        let containers = states.lock().unwrap().iter().map(container).collect();
        Ok(ListContainersResponse { containers }.encode_to_vec())
    });
    (world, asked)
}

#[tokio::test]
async fn what_containerd_is_not_sure_of_has_not_ended() {
    use ContainerEventType::{ContainerDeletedEvent as Deleted, ContainerStoppedEvent as Stopped};
    use ContainerState::{ContainerExited as Exited, ContainerRunning as Running, ContainerUnknown as Unknown};
    let states = States::new(Mutex::new(vec![("seen", Running), ("unsure", Unknown)]));
    let (world, asked) = old(&states);
    let no_events = Err(Status::unimplemented("unknown method").into());
    let mut messages = subscribed(&world, stream::iter([no_events]).boxed()).await;
    let unheard = async |messages: &mut Messages| {
        // Every attempt to subscribe to containerd's events, which it does not serve here, compares the states.
        let before = *asked.lock().unwrap();
        while *asked.lock().unwrap() < before + 2 {
            assert!(
                tokio::time::timeout(Duration::from_millis(10), messages.next())
                    .await
                    .is_err()
            );
        }
    };
    unheard(&mut messages).await;
    *states.lock().unwrap() = vec![("seen", Unknown), ("unsure", Unknown)];
    unheard(&mut messages).await;
    *states.lock().unwrap() = vec![("seen", Exited), ("unsure", Unknown)];
    assert_eq!(next(&mut messages).await.unwrap(), ("seen".into(), Stopped));
    *states.lock().unwrap() = vec![("seen", Exited), ("unsure", Exited)];
    assert_eq!(next(&mut messages).await.unwrap(), ("unsure".into(), Stopped));
    states.lock().unwrap().pop();
    assert_eq!(next(&mut messages).await.unwrap(), ("unsure".into(), Deleted));
}
