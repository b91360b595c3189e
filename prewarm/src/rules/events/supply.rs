//! Events for a containerd whose CRI has none (1.6): made from containerd's own events and CRI's state.
//!
//! containerd's events say that something happened to an id, a little before CRI's state shows it. So each is taken as a
//! reason to look at that id until CRI's state has come as far as the event says; what is told are the steps from what
//! was told before to what is there now. No step is told twice or left out, also when containerd was away meanwhile.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hullspeed_proto::containerd::events::{ContainerCreate, ContainerDelete, TaskExit, TaskStart};
use hullspeed_proto::containerd::services::events::v1::{Envelope, SubscribeRequest};
use prost::Message as _;
use tokio::sync::broadcast::{self, error::RecvError};
use tonic::{Status, Streaming};

use super::merge::too_slow;
use super::{Hub, QUEUE};
use crate::relay::{Failure, Messages};

mod track;

use track::{Exit, Step, Tracks, Trigger};

/// containerd's namespace of everything that CRI makes.
const NAMESPACE: &str = "k8s.io";

/// Between two attempts to reach containerd: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How often it is looked whether anybody still listens.
const IDLE: Duration = Duration::from_secs(1);

/// What of containerd's events is of interest.
const TOPICS: [&str; 4] = [
    "/containers/create",
    "/tasks/start",
    "/tasks/exit",
    "/containers/delete",
];

/// Supplied events from now on. The first subscriber starts the supply, which ends after the last.
pub(super) fn join(hub: &Arc<Hub>) -> Messages {
    let mut running = hub.running.lock().unwrap_or_else(PoisonError::into_inner);
    let receiver = if let Some(supply) = &*running {
        supply.subscribe()
    } else {
        let (sender, receiver) = broadcast::channel(QUEUE);
        *running = Some(sender.clone());
        tokio::spawn(run(Arc::clone(hub), sender));
        receiver
    };
    drop(running);
    stream::unfold(receiver, |mut receiver| async move {
        let item = match receiver.recv().await {
            Ok(event) => Ok(event),
            Err(RecvError::Lagged(_)) => Err(too_slow()),
            Err(RecvError::Closed) => Err(Failure::Ours(Status::unavailable(
                "hullspeed: the supply of events has ended",
            ))),
        };
        Some((item, receiver))
    })
    .boxed()
}

/// Where events go.
struct Outlet {
    hub: Arc<Hub>,
    sender: broadcast::Sender<Bytes>,
}

impl Outlet {
    fn send(&self, events: Vec<Bytes>) {
        self.hub.metrics.events_supplied.inc_by(events.len() as u64);
        for event in events {
            // Without a subscriber it is nobody's loss: the supply is about to end.
            let _ = self.sender.send(event);
        }
    }

    /// Whether nobody listens; then the supply is no longer the one that subscribers join.
    fn is_idle(&self) -> bool {
        let mut running = self.hub.running.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = self.sender.receiver_count() == 0;
        if idle {
            *running = None;
        }
        idle
    }
}

impl Drop for Outlet {
    /// However the supply ends, nobody joins what does not run any more.
    fn drop(&mut self) {
        let mut running = self.hub.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.take_if(|supply| supply.same_channel(&self.sender));
    }
}

/// How far the supply has come.
#[derive(Default)]
struct Progress {
    /// Whether the state is known that events start from.
    seeded: bool,
    /// Whether this connection has been of use.
    stood: bool,
}

/// The supply's task.
async fn run(hub: Arc<Hub>, sender: broadcast::Sender<Bytes>) {
    let mut tracks = Tracks::new(hub.containerd.clone());
    let outlet = Outlet { hub, sender };
    let mut pause = FIRST_PAUSE;
    let mut progress = Progress::default();
    while !outlet.is_idle() {
        progress.stood = false;
        match connected(&mut tracks, &outlet, &mut progress).await {
            Ok(()) => return,
            Err(error) if progress.seeded => tracing::info!(%error, "containerd's events are away"),
            Err(error) => tracing::warn!(%error, "no events from containerd yet"),
        }
        if progress.stood {
            pause = FIRST_PAUSE;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// One connection; ends well when nobody listens any more.
async fn connected(tracks: &mut Tracks, outlet: &Outlet, progress: &mut Progress) -> Result<(), Status> {
    let mut client = outlet.hub.containerd.events();
    let filters = TOPICS.map(|topic| format!("namespace==\"{NAMESPACE}\",topic==\"{topic}\""));
    let request = SubscribeRequest {
        filters: filters.to_vec(),
    };
    // containerd answers with its first event, not before: until then nothing tells that the subscription stands.
    let subscribing = client.subscribe(request);
    tokio::pin!(subscribing);
    if progress.seeded {
        outlet.send(tracks.catch_up().await?);
    } else {
        tokio::select! {
            biased;
            // Polled first, so that the request leaves before the state is read.
            answer = &mut subscribing => {
                tracks.seed().await?;
                progress.seeded = true;
                let events_of = answer?.into_inner();
                progress.stood = true;
                return events(tracks, outlet, events_of).await;
            }
            seeded_now = tracks.seed() => seeded_now?,
        }
        progress.seeded = true;
    }
    loop {
        tokio::select! {
            answer = &mut subscribing => {
                let events_of = answer?.into_inner();
                progress.stood = true;
                // What happened before the subscription stood.
                outlet.send(tracks.catch_up().await?);
                return events(tracks, outlet, events_of).await;
            }
            () = tokio::time::sleep(IDLE) => {
                // A node where nothing happens sends nothing; the state tells what was missed.
                outlet.send(tracks.catch_up().await?);
                progress.stood = true;
                if outlet.is_idle() {
                    return Ok(());
                }
            }
        }
    }
}

async fn events(tracks: &mut Tracks, outlet: &Outlet, mut events: Streaming<Envelope>) -> Result<(), Status> {
    loop {
        let due = tracks.due();
        tokio::select! {
            biased;
            envelope = events.message() => match envelope? {
                Some(envelope) => {
                    if let Some(trigger) = trigger(&envelope) {
                        outlet.send(tracks.take(trigger).await);
                    }
                }
                None => return Err(Status::unavailable("containerd ended its events")),
            },
            () = sleep_until(due) => outlet.send(tracks.look_again().await),
            () = tokio::time::sleep(IDLE) => {
                if outlet.is_idle() {
                    return Ok(());
                }
            }
        }
    }
}

async fn sleep_until(due: Option<tokio::time::Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

/// What an event says, if it is about a container as a whole.
fn trigger(envelope: &Envelope) -> Option<Trigger> {
    if envelope.namespace != NAMESPACE {
        return None;
    }
    let payload = envelope.event.as_ref()?.value.as_slice();
    let mut exit = None;
    let (id, step) = match envelope.topic.as_str() {
        "/containers/create" => (ContainerCreate::decode(payload).ok()?.id, Step::Created),
        "/tasks/start" => (TaskStart::decode(payload).ok()?.container_id, Step::Started),
        "/tasks/exit" => {
            let ended = TaskExit::decode(payload).ok()?;
            let at = ended.exited_at.unwrap_or_default();
            exit = Some(Exit {
                code: ended.exit_status,
                at: at.seconds.saturating_mul(1_000_000_000).saturating_add(at.nanos.into()),
            });
            // Others are of processes that were executed in the container.
            (ended.container_id == ended.id).then_some((ended.container_id, Step::Stopped))?
        }
        "/containers/delete" => (ContainerDelete::decode(payload).ok()?.id, Step::Deleted),
        _ => return None,
    };
    (!id.is_empty()).then_some(Trigger { id, step, exit })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(topic: &str, payload: Vec<u8>) -> Envelope {
        Envelope {
            namespace: NAMESPACE.into(),
            topic: topic.into(),
            event: Some(prost_types::Any {
                value: payload,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_supply_that_dies_is_not_joined() {
        let events = super::super::Events::new(super::super::EventOptions {
            ledger: crate::ledger::Ledger::new(crate::ledger::Mark::new("secret".into())),
            containerd: crate::containerd::Containerd::at(std::path::Path::new("/no/such/socket")),
            facts: tokio::sync::watch::channel(None).1,
            supply: true,
            metrics: crate::metrics::Metrics::unregistered(),
        });
        let supply = |sender: &broadcast::Sender<Bytes>| Outlet {
            hub: Arc::clone(&events.hub),
            sender: sender.clone(),
        };
        let (sender, _receiver) = broadcast::channel(1);
        *events.hub.running.lock().unwrap() = Some(sender.clone());
        // An older one is no matter.
        drop(supply(&broadcast::channel(1).0));
        assert!(events.hub.running.lock().unwrap().is_some());
        let outlet = supply(&sender);
        let died = tokio::spawn(async move {
            let _outlet = outlet;
            panic!("as it must not");
        });
        assert!(died.await.unwrap_err().is_panic());
        assert!(events.hub.running.lock().unwrap().is_none());
    }

    #[test]
    fn events_of_whole_containers_only() {
        let exit = |id: &str| TaskExit {
            container_id: "abc".into(),
            id: id.into(),
            exit_status: 7,
            exited_at: Some(prost_types::Timestamp { seconds: 2, nanos: 3 }),
            ..Default::default()
        };
        let own = trigger(&envelope("/tasks/exit", exit("abc").encode_to_vec()));
        assert_eq!(
            own,
            Some(Trigger {
                id: "abc".into(),
                step: Step::Stopped,
                exit: Some(Exit {
                    code: 7,
                    at: 2_000_000_003
                }),
            })
        );
        assert_eq!(trigger(&envelope("/tasks/exit", exit("exec-1").encode_to_vec())), None);
        assert_eq!(trigger(&envelope("/tasks/exit", vec![0xff])), None);
        assert_eq!(trigger(&envelope("/tasks/oom", exit("abc").encode_to_vec())), None);
        let mut elsewhere = envelope("/tasks/exit", exit("abc").encode_to_vec());
        elsewhere.namespace = "moby".into();
        assert_eq!(trigger(&elsewhere), None);
    }
}
