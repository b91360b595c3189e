//! The events that a client is told of a pod.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::{ContainerEventResponse, ContainerEventType, PodSandboxStatus};
use serde_json::{Map, Value};
use tokio::task::JoinHandle;

use crate::cri::{Cri, Pod};
use crate::release::Release;

/// How long the last event of a pod may take.
const EVENT_LIMIT: Duration = Duration::from_secs(10);

const POLL: Duration = Duration::from_millis(5);

/// What a pod's life looks like, from a container that was started to its end; so does the sandbox's own.
const WHOLE: [&str; 4] = ["created", "started", "stopped", "deleted"];

/// The same of a container that could not be started.
const CREATED_ONLY: [&str; 2] = ["created", "deleted"];

/// Everything that a socket tells, from the beginning on.
pub struct Events {
    release: Release,
    heard: Arc<Mutex<Vec<ContainerEventResponse>>>,
    listener: JoinHandle<()>,
}

impl Drop for Events {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

impl Events {
    /// Listens at this socket, in front of this containerd.
    #[must_use]
    pub fn listen(mut cri: Cri, release: Release) -> Self {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let listener = tokio::spawn({
            let heard = Arc::clone(&heard);
            async move {
                // The answer may come with the first event only; a containerd without events ends it at once.
                let Ok(mut events) = cri.events().await else { return };
                while let Ok(Some(event)) = events.message().await {
                    heard.lock().unwrap_or_else(PoisonError::into_inner).push(event);
                }
            }
        });
        Self {
            release,
            heard,
            listener,
        }
    }

    /// The events of these ids in their order, once the last has come, or what they should be where this socket has
    /// none. The flag says of an id whether it was ever started.
    pub(super) async fn of(&self, pod: &Pod, ids: &BTreeMap<&'static str, (String, bool)>) -> Value {
        let end = Instant::now() + EVENT_LIMIT;
        loop {
            // containerd 1.6 has no events. What the relay makes for it is what a newer one tells.
            let found: Map<_, _> = if self.listener.is_finished() && self.release == Release::One {
                ids.iter()
                    .map(|(name, (_, started))| ((*name).into(), expected(*started)))
                    .collect()
            } else {
                ids.iter()
                    .map(|(name, (id, _))| ((*name).into(), self.of_one(pod, id)))
                    .collect()
            };
            let is_whole = found.values().all(|events| {
                let last = events.as_array().and_then(|events| events.last());
                last.and_then(Value::as_str)
                    .is_some_and(|event| event.starts_with("deleted"))
            });
            if is_whole || Instant::now() > end {
                return found.into();
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn of_one(&self, pod: &Pod, id: &str) -> Value {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let of_id = heard.iter().filter(|event| event.container_id == id);
        of_id.map(|event| Value::from(self.told(event, pod))).collect()
    }

    /// The event's kind, and whose sandbox it shows.
    fn told(&self, event: &ContainerEventResponse, pod: &Pod) -> String {
        let kind = match event.container_event_type() {
            ContainerEventType::ContainerCreatedEvent => "created",
            ContainerEventType::ContainerStartedEvent => "started",
            ContainerEventType::ContainerStoppedEvent => "stopped",
            ContainerEventType::ContainerDeletedEvent => "deleted",
        };
        match &event.pod_sandbox_status {
            Some(status) if !is_of(status, pod) => format!("{kind}, with {status:?}"),
            _ if self.release == Release::One => kind.into(),
            Some(_) => format!("{kind}, with the pod's status"),
            None => format!("{kind}, without a status"),
        }
    }
}

fn expected(started: bool) -> Value {
    let kinds = if started { &WHOLE[..] } else { &CREATED_ONLY };
    kinds.iter().copied().map(Value::from).collect()
}

fn is_of(status: &PodSandboxStatus, pod: &Pod) -> bool {
    let config = pod.config();
    status.metadata == config.metadata && status.labels == config.labels && status.annotations == config.annotations
}
