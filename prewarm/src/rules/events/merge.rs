//! One subscriber's stream: containerd's events as they may be seen, the pairs of adoptions between them, and the
//! supply in their place if containerd has no events.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hullspeed_proto::cri::v1::ContainerEventType;
use tokio::sync::broadcast::{self, error::RecvError};
use tonic::{Code, Status};

use super::super::identity::Sight;
use super::super::malformed_answer;
use super::super::parts::{inner, map, number, text, with_inner};
use super::{Announced, Hub, supply};
use crate::relay::{Call, Failure, Messages, Upstream};

/// What a subscriber reads from.
enum Source {
    /// containerd has not been asked yet.
    Unasked(Box<Call>),
    /// Events, of containerd or of the supply.
    Events {
        messages: Messages,
        /// Whether nothing has come yet: then "unimplemented" means that containerd has no events at all.
        fresh: bool,
        adoptions: broadcast::Receiver<Arc<Announced>>,
        // Kept as long as the stream is read.
        _upstream: Box<dyn Upstream>,
    },
    /// Nothing more.
    Ended,
}

struct Subscriber {
    hub: Arc<Hub>,
    source: Source,
    /// Adoptions to be told next.
    announced: VecDeque<Arc<Announced>>,
    ready: VecDeque<Bytes>,
}

/// The answer to `GetContainerEvents`.
pub(super) fn stream(hub: Arc<Hub>, call: Call) -> Messages {
    let subscriber = Subscriber {
        hub,
        source: Source::Unasked(Box::new(call)),
        announced: VecDeque::new(),
        ready: VecDeque::new(),
    };
    stream::unfold(subscriber, |mut subscriber| async move {
        let item = subscriber.next().await?;
        if item.is_err() {
            subscriber.source = Source::Ended;
        }
        Some((item, subscriber))
    })
    .boxed()
}

/// A subscriber that does not read. Unread events are bounded, so it is told to come again.
pub(super) fn too_slow() -> Failure {
    Failure::Ours(Status::resource_exhausted(
        "hullspeed: this subscriber is too slow, events were lost; subscribe again and list",
    ))
}

impl Subscriber {
    async fn next(&mut self) -> Option<Result<Bytes, Failure>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(Ok(event));
            }
            if let Some(announced) = self.announced.pop_front() {
                self.ready.extend(self.hub.pair(&announced).await);
                continue;
            }
            match self.step().await {
                Ok(true) => {}
                Ok(false) => return None,
                Err(failure) => return Some(Err(failure)),
            }
        }
    }

    /// Makes something ready, or not; `false` at the end.
    async fn step(&mut self) -> Result<bool, Failure> {
        let Source::Events {
            messages,
            fresh,
            adoptions,
            ..
        } = &mut self.source
        else {
            return self.open().await;
        };
        let item = tokio::select! {
            // Adoptions first: an event of a pod's container comes after the pod was adopted and announced.
            biased;
            announced = adoptions.recv() => {
                match announced {
                    Ok(announced) => self.announced.push_back(announced),
                    Err(RecvError::Lagged(_)) => return Err(too_slow()),
                    Err(RecvError::Closed) => return Ok(false),
                }
                return Ok(true);
            }
            item = messages.next() => item,
        };
        let first = std::mem::replace(fresh, false);
        match item {
            None => return Ok(false),
            Some(Err(failure)) if self.hub.supply && first && has_no_events(&failure) => {
                *messages = supply::join(&self.hub);
            }
            Some(Err(failure)) => return Err(failure),
            Some(Ok(message)) => self.ready.extend(seen(&self.hub, &message).await?),
        }
        Ok(true)
    }

    async fn open(&mut self) -> Result<bool, Failure> {
        let Source::Unasked(call) = std::mem::replace(&mut self.source, Source::Ended) else {
            return Ok(false);
        };
        let messages = call.upstream.stream(call.message.clone()).await?;
        let (adoptions, parked) = self.hub.subscribe();
        self.announced = parked;
        self.source = Source::Events {
            messages,
            fresh: true,
            adoptions,
            _upstream: call.upstream,
        };
        Ok(true)
    }
}

fn has_no_events(failure: &Failure) -> bool {
    failure.status().code() == Code::Unimplemented
}

/// One of containerd's events, as it may be seen.
pub(super) async fn seen(hub: &Hub, message: &Bytes) -> Result<Option<Bytes>, Failure> {
    let wrong = |error| malformed_answer("GetContainerEvents", &error);
    let id = text(message, 1).map_err(wrong)?;
    let status = inner(message, 4).map_err(wrong)?;
    let (sandbox, labels) = match &status {
        Some(status) => (text(status, 1).map_err(wrong)?, map(status, 7).map_err(wrong)?),
        // About the sandbox itself, when it is gone; about a container, its sandbox is not named anywhere.
        None => (id.clone(), std::collections::HashMap::new()),
    };
    let adoption = match hub.identities.sight(&sandbox, &labels) {
        Sight::Hidden => return Ok(None),
        Sight::Native => return Ok(Some(message.clone())),
        Sight::Adopted(adoption) => adoption,
    };
    let kind = number(message, 2).map_err(wrong)?.unwrap_or_default();
    let begins = [
        ContainerEventType::ContainerCreatedEvent,
        ContainerEventType::ContainerStartedEvent,
    ];
    if id == adoption.sandbox_id && begins.iter().any(|begin| *begin as u64 == kind) {
        // The hull's beginning, maybe told again from containerd's queue. The pod's is announced by its adoption.
        return Ok(None);
    }
    let Some(status) = status else {
        return Ok(Some(message.clone()));
    };
    let Some(status) = hub.dress(&status, &adoption).await else {
        return Err(Failure::Ours(Status::internal(
            "hullspeed: the status in an event cannot be read",
        )));
    };
    Ok(Some(with_inner(message, 4, &status).map_err(wrong)?.into()))
}
