//! One subscriber's stream: containerd's events as they may be seen, the pairs of adoptions between them, and the
//! supply in their place if containerd has no events.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use hullspeed_proto::cri::v1::ContainerEventType;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Code, Status};

use super::super::identity::Sight;
use super::super::malformed_answer;
use super::super::parts::{inner, map, number, text, with_inner};
use super::{Announced, Hub, QUEUE, supply};
use crate::relay::{Call, Failure, Messages, Upstream};

/// Bytes of events that a subscriber may be behind.
const QUEUE_BYTES: usize = 4 << 20;

/// What is on its way to a subscriber.
enum Queued {
    /// An event.
    Event {
        event: Bytes,
        /// Its share of the queue's bytes.
        _bytes: OwnedSemaphorePermit,
    },
    /// An adoption. Its events are made when they are read: what containerd is asked for that must not hold up its events.
    Adoption(Arc<Announced>),
}

/// One subscriber.
enum Subscriber {
    /// containerd has not been asked yet.
    Unasked(Arc<Hub>, Box<Call>),
    /// Events.
    Reading(Box<Reader>),
    /// Nothing more.
    Ended,
}

/// What a subscriber has not read yet.
struct Reader {
    hub: Arc<Hub>,
    /// Adoptions that are told next, those that were parked first of all.
    parked: VecDeque<Arc<Announced>>,
    /// The adoption whose first event was given, and the second.
    begun: Option<(Arc<Announced>, Bytes)>,
    queue: mpsc::Receiver<Result<Queued, Failure>>,
    /// Cancelled if the queue was too short.
    overrun: CancellationToken,
    /// The adoption whose last event was given, and may still be on its way.
    given: Option<Arc<Announced>>,
    _drain: AbortOnDropHandle<()>,
}

/// Takes what containerd says as it says it, whether or not the subscriber reads: containerd 2.x tells nobody anything
/// while one of its subscribers does not read.
struct Drain {
    hub: Arc<Hub>,
    messages: Messages,
    /// Whether nothing has come yet: then "unimplemented" means that containerd has no events at all.
    fresh: bool,
    adoptions: broadcast::Receiver<Arc<Announced>>,
    queue: mpsc::Sender<Result<Queued, Failure>>,
    bytes: Arc<Semaphore>,
    overrun: CancellationToken,
    // Kept as long as the stream is read.
    _upstream: Box<dyn Upstream>,
}

/// Why a [`Drain`] ends.
enum End {
    /// containerd's stream has ended, or failed.
    Over(Option<Failure>),
    /// The subscriber is too far behind.
    Overrun,
}

/// The answer to `GetContainerEvents`.
pub(super) fn stream(hub: Arc<Hub>, call: Call) -> Messages {
    let subscriber = Subscriber::Unasked(hub, Box::new(call));
    stream::unfold(subscriber, |mut subscriber| async move {
        let item = subscriber.next().await?;
        if item.is_err() {
            // Nothing is kept for it any more, neither here nor in containerd.
            subscriber = Subscriber::Ended;
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
        let reader = match std::mem::replace(self, Self::Ended) {
            Self::Unasked(hub, call) => Reader::open(hub, *call).await.map(Box::new),
            Self::Reading(reader) => Ok(reader),
            Self::Ended => return None,
        };
        match reader {
            Ok(mut reader) => {
                let item = reader.next().await;
                *self = Self::Reading(reader);
                item
            }
            Err(failure) => Some(Err(failure)),
        }
    }
}

impl Reader {
    async fn open(hub: Arc<Hub>, call: Call) -> Result<Self, Failure> {
        let messages = call.upstream.stream(call.message).await?;
        let (adoptions, parked) = hub.subscribe();
        let (sender, queue) = mpsc::channel(QUEUE);
        let overrun = CancellationToken::new();
        let drain = Drain {
            hub: Arc::clone(&hub),
            messages,
            fresh: true,
            adoptions,
            queue: sender,
            bytes: Arc::new(Semaphore::new(QUEUE_BYTES)),
            overrun: overrun.clone(),
            _upstream: call.upstream,
        };
        Ok(Self {
            hub,
            parked,
            begun: None,
            queue,
            overrun,
            given: None,
            _drain: AbortOnDropHandle::new(tokio::spawn(drain.run())),
        })
    }

    async fn next(&mut self) -> Option<Result<Bytes, Failure>> {
        if let Some(announced) = self.given.take() {
            announced.told();
        }
        loop {
            if self.overrun.is_cancelled() {
                return Some(Err(too_slow()));
            }
            if let Some((announced, started)) = self.begun.take() {
                self.given = Some(announced);
                return Some(Ok(started));
            }
            if let Some(announced) = self.parked.pop_front() {
                let [created, started] = self.hub.pair(&announced).await;
                self.begun = Some((announced, started));
                return Some(Ok(created));
            }
            let queued = tokio::select! {
                biased;
                () = self.overrun.cancelled() => continue,
                queued = self.queue.recv() => queued?,
            };
            match queued {
                Ok(Queued::Event { event, .. }) => return Some(Ok(event)),
                Ok(Queued::Adoption(announced)) => self.parked.push_back(announced),
                Err(failure) => return Some(Err(failure)),
            }
        }
    }
}

impl Drain {
    async fn run(mut self) {
        let end = loop {
            if let Err(end) = self.step().await {
                break end;
            }
        };
        let overrun = match end {
            End::Overrun => true,
            End::Over(None) => false,
            End::Over(Some(failure)) => self.queue.try_send(Err(failure)).is_err(),
        };
        if overrun {
            self.overrun.cancel();
        }
    }

    /// Takes what comes next.
    async fn step(&mut self) -> Result<(), End> {
        let item = tokio::select! {
            // Adoptions first: an event of a pod's container comes after the pod was adopted and announced.
            biased;
            announced = self.adoptions.recv() => {
                return match announced {
                    Ok(announced) => self.queue(Queued::Adoption(announced)),
                    Err(RecvError::Lagged(_)) => Err(End::Overrun),
                    Err(RecvError::Closed) => Err(End::Over(None)),
                };
            }
            item = self.messages.next() => item,
        };
        let first = std::mem::replace(&mut self.fresh, false);
        match item {
            None => Err(End::Over(None)),
            Some(Err(failure)) if self.hub.supply && first && has_no_events(&failure) => {
                self.messages = supply::join(&self.hub);
                Ok(())
            }
            Some(Err(failure)) => Err(End::Over(Some(failure))),
            Some(Ok(message)) => match seen(&self.hub, &message).await {
                Ok(None) => Ok(()),
                Ok(Some(event)) => self.put(&event),
                Err(failure) => Err(End::Over(Some(failure))),
            },
        }
    }

    /// Puts an event into the queue, if there is room.
    fn put(&self, event: &Bytes) -> Result<(), End> {
        let bytes = u32::try_from(event.len().min(QUEUE_BYTES)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.bytes).try_acquire_many_owned(bytes);
        self.queue(Queued::Event {
            // A copy, because a short message may be a part of a long piece of memory.
            event: Bytes::copy_from_slice(event),
            _bytes: permit.map_err(|_| End::Overrun)?,
        })
    }

    fn queue(&self, queued: Queued) -> Result<(), End> {
        self.queue.try_send(Ok(queued)).map_err(|_| End::Overrun)
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
