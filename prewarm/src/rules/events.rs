//! Container events: containerd's, freed of hulls and told of adoptions, or supplied where containerd has none.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use hullspeed_proto::cri::v1::ContainerEventType;
use tokio::sync::{OnceCell, broadcast, watch};
use tonic::Status;

use super::identity::Identities;
use super::overlay::{self, Era};
use super::parts::{inner, put_text, text};
use super::question;
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::ledger::{Adoption, Ledger};
use crate::metrics::Metrics;
use crate::relay::{Call, Messages};
use crate::wire::{put_bytes, put_varint};

mod merge;
mod supply;

/// Adoptions and supplied events that a subscriber may be behind; one that is further behind is cut off.
const QUEUE: usize = 1024;

/// How long adoptions wait for a subscriber, as containerd's own events do.
const PARKED_FOR: Duration = Duration::from_secs(5 * 60);

/// How many adoptions wait for it.
const MAX_PARKED: usize = 4096;

/// What [`Events`] works with.
pub struct EventOptions {
    /// Who is what.
    pub ledger: Ledger,
    /// The daemon's own connection.
    pub containerd: Containerd,
    /// What containerd is, once that is known.
    pub facts: watch::Receiver<Option<Arc<Facts>>>,
    /// Whether events are supplied for a containerd that has none.
    pub supply: bool,
    /// Where supplied events are counted.
    pub metrics: Metrics,
}

/// The events' hub. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    hub: Arc<Hub>,
}

/// An adoption, as events tell of it.
#[derive(Debug)]
struct Announced {
    adoption: Arc<Adoption>,
    at: i64,
    pair: OnceCell<[Bytes; 2]>,
    /// Whether a subscriber has been told.
    told: AtomicBool,
}

impl Announced {
    /// A subscriber has been told.
    fn told(&self) {
        self.told.store(true, Ordering::Relaxed);
    }

    fn is_told(&self) -> bool {
        self.told.load(Ordering::Relaxed)
    }
}

struct Hub {
    identities: Arc<Identities>,
    containerd: Containerd,
    facts: watch::Receiver<Option<Arc<Facts>>>,
    supply: bool,
    metrics: Metrics,
    announced: broadcast::Sender<Arc<Announced>>,
    /// Adoptions that nobody has heard of, until somebody has: a subscriber may go before it was told. Its lock is held
    /// while subscribers come and adoptions are announced, so that a new subscriber gets each adoption once.
    parked: Mutex<VecDeque<(Instant, Arc<Announced>)>>,
    /// The supply that runs, if one does.
    running: Mutex<Option<broadcast::Sender<Bytes>>>,
}

impl Events {
    /// A hub without subscribers.
    #[must_use]
    pub fn new(options: EventOptions) -> Self {
        let hub = Hub {
            identities: Arc::new(Identities::new(options.ledger)),
            containerd: options.containerd,
            facts: options.facts,
            supply: options.supply,
            metrics: options.metrics,
            announced: broadcast::Sender::new(QUEUE),
            parked: Mutex::default(),
            running: Mutex::default(),
        };
        Self { hub: Arc::new(hub) }
    }

    /// A hull became a pod's sandbox: subscribers get its CREATED and STARTED. Call it after [`Ledger::adopt`] and
    /// before `RunPodSandbox` is answered, so that no event of the pod's containers is ahead of them. Never waits.
    pub fn adopted(&self, adoption: &Arc<Adoption>) {
        let announced = Arc::new(Announced {
            adoption: Arc::clone(adoption),
            at: now(),
            pair: OnceCell::new(),
            told: AtomicBool::new(false),
        });
        let mut parked = self.hub.parked();
        // Fails if there is no subscriber.
        let _ = self.hub.announced.send(Arc::clone(&announced));
        parked.push_back((Instant::now(), announced));
        let done = |(when, announced): &(Instant, Arc<Announced>)| announced.is_told() || when.elapsed() > PARKED_FOR;
        while parked.len() > MAX_PARKED || parked.front().is_some_and(done) {
            parked.pop_front();
        }
    }

    /// The answer to `GetContainerEvents`.
    pub(super) fn stream(&self, call: Call) -> Messages {
        merge::stream(Arc::clone(&self.hub), call)
    }

    /// What containerd is, if that is known.
    pub(crate) fn facts(&self) -> Option<Arc<Facts>> {
        self.hub.facts.borrow().clone()
    }

    /// Which containerd this is.
    pub(super) async fn era(&self) -> Result<Era, Status> {
        self.hub.era().await
    }

    pub(super) fn identities(&self) -> &Arc<Identities> {
        &self.hub.identities
    }
}

impl Hub {
    fn parked(&self) -> std::sync::MutexGuard<'_, VecDeque<(Instant, Arc<Announced>)>> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new subscriber, and the adoptions that waited for one.
    fn subscribe(&self) -> (broadcast::Receiver<Arc<Announced>>, VecDeque<Arc<Announced>>) {
        let mut parked = self.parked();
        let receiver = self.announced.subscribe();
        parked.retain(|(when, announced)| !announced.is_told() && when.elapsed() <= PARKED_FOR);
        (
            receiver,
            parked.iter().map(|(_, announced)| Arc::clone(announced)).collect(),
        )
    }

    /// CREATED and STARTED of an adoption: what containerd sends when it has made a sandbox, which has no containers.
    async fn pair(&self, announced: &Announced) -> [Bytes; 2] {
        let made = announced.pair.get_or_init(|| async {
            let adoption = &announced.adoption;
            let status = self.pod_status(adoption).await;
            [
                ContainerEventType::ContainerCreatedEvent,
                ContainerEventType::ContainerStartedEvent,
            ]
            .map(|kind| event(&adoption.sandbox_id, kind, announced.at, status.as_deref(), &[]))
        });
        made.await.clone()
    }

    /// The status of an adopted sandbox; `None` if containerd cannot say, upon which an event goes without, as there.
    async fn pod_status(&self, adoption: &Adoption) -> Option<Vec<u8>> {
        let id = &adoption.sandbox_id;
        let answer = question::sandbox_status(&self.containerd, id).await;
        let answer = answer.inspect_err(|error| tracing::warn!(sandbox = %id, %error, "no status for an event"));
        let status = inner(&answer.ok()?, 1).ok()??.into_owned();
        self.dress(&status, adoption).await
    }

    /// Which containerd this is. It is asked only as long as its facts are not known.
    async fn era(&self) -> Result<Era, Status> {
        let facts = self.facts.borrow().clone();
        match facts {
            Some(facts) => Ok(Era::of(&facts.version)),
            None => question::era(&self.containerd).await,
        }
    }

    /// A status with the pod's identity.
    async fn dress(&self, status: &[u8], adoption: &Adoption) -> Option<Vec<u8>> {
        let era = if overlay::era_matters(adoption) {
            self.era().await.ok()?
        } else {
            Era::Since1_7
        };
        overlay::status(status, adoption, era).ok()
    }
}

/// Nanoseconds since the epoch.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// `ContainerEventResponse`.
fn event(id: &str, kind: ContainerEventType, at: i64, status: Option<&[u8]>, containers: &[Vec<u8>]) -> Bytes {
    let mut out = Vec::new();
    put_text(&mut out, 1, id);
    put_varint(&mut out, 2, u64::from((kind as i32).unsigned_abs()));
    put_varint(&mut out, 3, at.cast_unsigned());
    if let Some(status) = status {
        put_bytes(&mut out, 4, status);
    }
    for container in containers {
        put_bytes(&mut out, 5, container);
    }
    out.into()
}

/// Id in a message that has it in its first field.
fn id_of(message: &[u8]) -> Option<String> {
    text(message, 1).ok()
}
