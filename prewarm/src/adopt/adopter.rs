//! RunPodSandbox, from its request to its answer.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::{PodSandboxConfig, RunPodSandboxRequest};
use prost::Message as _;
use tokio::sync::{OwnedRwLockReadGuard, RwLock, oneshot, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::eligibility::{self, Policy};
use super::journal::{Journal, JournalError};
use super::patch::{PatchError, Patcher};
use super::rebrand::{Rebrander, Unbranded};
use super::{HullSource, Observer, Outcome, recovery, schema};
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::ledger::{Holder, Ledger, Reservation, sandbox_name};
use crate::relay::{Api, Call, Failure, Reply};
use crate::rules::Events;

mod adoption;
mod forward;
mod recover;
mod setbacks;

use adoption::Attempt;
use setbacks::Setbacks;

/// The journal's name in the state directory.
pub const JOURNAL: &str = "journal";

/// How long a call waits for containerd to have been asked what its sandboxes are.
const KNOWN_LIMIT: Duration = Duration::from_secs(5);

/// What an [`Adopter`] works with.
pub struct Options {
    /// The daemon's own connection.
    pub containerd: Containerd,
    /// Who is what.
    pub ledger: Ledger,
    /// Where hulls come from.
    pub hulls: Arc<dyn HullSource>,
    /// Who tells of sandboxes that begin.
    pub events: Events,
    /// Who counts.
    pub observer: Arc<dyn Observer>,
    /// Directory of the journal, on a tmpfs: it must not outlive the node's sandboxes.
    pub state: PathBuf,
    /// Which pods may have a hull.
    pub policy: Policy,
}

/// Why there is no adopter.
#[derive(Debug, thiserror::Error)]
pub enum AdopterError {
    /// No journal.
    #[error("cannot open the journal of adoptions")]
    Journal(#[source] JournalError),
    /// No thread.
    #[error("cannot start the thread that enters namespaces")]
    Patcher(#[source] PatchError),
}

/// Parts of an adopter, shared by its tasks.
struct Shared {
    options: Options,
    journal: Arc<Journal>,
    patcher: Patcher,
    rebrander: Rebrander,
    /// Whether containerd has been asked, once, which sandboxes it has. Until then what is a hull is not known.
    known: watch::Sender<bool>,
    /// Adoptions hold it for reading. None until containerd's state is known.
    facts: Arc<RwLock<Option<Arc<Facts>>>>,
    setbacks: Mutex<Setbacks>,
    stopping: CancellationToken,
    work: Mutex<Option<JoinHandle<()>>>,
}

/// Answers RunPodSandbox. Cheap to clone; clones are one adopter.
#[derive(Clone)]
pub struct Adopter {
    shared: Arc<Shared>,
}

/// Why containerd answers instead.
type Passed = (Outcome, &'static str);

/// The facts, for as long as an adoption takes.
type Gate = OwnedRwLockReadGuard<Option<Arc<Facts>>>;

impl Adopter {
    /// An adopter that knows what the journal tells, and passes every RunPodSandbox on until [`Self::recover`] has told it the facts.
    ///
    /// Call it within a tokio runtime.
    pub fn new(options: Options) -> Result<Self, AdopterError> {
        let journal = Journal::open(&options.state.join(JOURNAL)).map_err(AdopterError::Journal)?;
        let journal = Arc::new(journal);
        let patcher = Patcher::start().map_err(AdopterError::Patcher)?;
        let rebrander = Rebrander::new(&options, Arc::clone(&journal));
        let stopping = CancellationToken::new();
        let work = tokio::spawn(rebrander.clone().run(stopping.clone()));
        // Whoever asks before containerd has been asked is told of these at least.
        for entry in journal.contents().adopted.values().filter(|entry| entry.whole) {
            if let Some(adoption) = recovery::written(entry) {
                options.ledger.adopt(adoption);
            }
        }
        let shared = Shared {
            options,
            journal,
            patcher,
            rebrander,
            known: watch::Sender::new(false),
            facts: Arc::default(),
            setbacks: Mutex::default(),
            stopping,
            work: Mutex::new(Some(work)),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// Answers RunPodSandbox, of either version of CRI: by an adoption, or as containerd does.
    ///
    /// Dropping the future gives up a call that is with containerd, but not an adoption: that is completed, and the
    /// client finds the sandbox at its next look, as if the answer had been lost.
    pub async fn run_pod_sandbox(&self, call: Call) -> Reply {
        let begun = Instant::now();
        let Ok(request) = RunPodSandboxRequest::decode(call.message.clone()) else {
            return self.pass(call, None, (Outcome::NativeOnly, "malformed")).await;
        };
        let Some(metadata) = request.config.as_ref().and_then(|config| config.metadata.as_ref()) else {
            return self.pass(call, None, (Outcome::Ineligible, "metadata")).await;
        };
        let name = sandbox_name(metadata);
        let mut reservation = match self.reserve(&name).await {
            Ok(reservation) => reservation,
            Err(refusal) => {
                self.count((Outcome::NativeOnly, "name_reserved"));
                return Reply::Failed(refusal.into());
            }
        };
        let passed = match self.may_adopt(&call, request, &reservation) {
            Err(passed) => passed,
            Ok((gate, config, handler)) => match self.shared.options.hulls.take(&handler) {
                Err(miss) => (Outcome::Miss, miss.reason()),
                Ok(hull) => {
                    let attempt = Attempt {
                        gate,
                        hull,
                        config,
                        handler,
                        begun,
                    };
                    match self.adopt(attempt, reservation).await {
                        Ok(reply) => return reply,
                        Err((given_back, reason)) => {
                            reservation = given_back;
                            (Outcome::Failed, reason)
                        }
                    }
                }
            },
        };
        self.pass(call, Some(reservation), passed).await
    }

    /// Whether this pod may have a hull; what is needed for that.
    fn may_adopt(
        &self,
        call: &Call,
        request: RunPodSandboxRequest,
        name: &Reservation,
    ) -> Result<(Gate, PodSandboxConfig, String), Passed> {
        if call.api != Api::V1 {
            return Err((Outcome::NativeOnly, "api_version"));
        }
        // containerd has a sandbox of this name, or may have: it knows best, and answers in its own words.
        if name.is_contested() {
            return Err((Outcome::NativeOnly, "name_contested"));
        }
        let recovering = (Outcome::NativeOnly, "recovering");
        let gate = Arc::clone(&self.shared.facts)
            .try_read_owned()
            .map_err(|_| recovering)?;
        let facts = gate.as_ref().ok_or(recovering)?;
        if self.shared.setbacks().is_paused(Instant::now()) {
            return Err((Outcome::NativeOnly, "paused"));
        }
        schema::check(&call.message).map_err(|error| {
            tracing::debug!(%error, "a pod asks for something that is not known");
            (Outcome::Ineligible, "unknown_field")
        })?;
        let config = request.config.unwrap_or_default();
        let handler = request.runtime_handler;
        eligibility::check(&config, &handler, facts, &self.shared.options.policy)
            .map_err(|why| (Outcome::Ineligible, why.reason()))?;
        if self.shared.setbacks().refuses(&config, Instant::now()) {
            return Err((Outcome::Ineligible, "sysctl_refused"));
        }
        Ok((gate, config, handler))
    }

    /// Takes the name, or says in containerd's words that it is taken.
    async fn reserve(&self, name: &str) -> Result<Reservation, Status> {
        let ledger = &self.shared.options.ledger;
        let holder = match ledger.reserve(name) {
            Ok(reservation) => return Ok(reservation),
            Err(Holder::Adopted(id)) => {
                // Removed behind our back, it has no right to the name any more.
                if self.is_gone(&id).await {
                    self.removed(&id);
                    if let Ok(reservation) = ledger.reserve(name) {
                        return Ok(reservation);
                    }
                }
                id
            }
            Err(_) => "a request under way".to_owned(),
        };
        let text = format!("failed to reserve sandbox name {name:?}: name {name:?} is reserved for {holder:?}");
        Err(Status::new(self.name_taken_code(), text))
    }

    /// The code with which this containerd refuses a name that is taken: 1.x says nothing of the kind of error.
    fn name_taken_code(&self) -> Code {
        // Unknown while containerd is asked: nobody waits for that here.
        let facts = self.shared.facts.try_read().ok();
        match facts.as_deref().and_then(Option::as_ref) {
            Some(facts) if !facts.version.trim_start_matches('v').starts_with("1.") => Code::FailedPrecondition,
            _ => Code::Unknown,
        }
    }

    /// The client has removed this sandbox and containerd has agreed.
    pub fn removed(&self, sandbox_id: &str) {
        let adopted = self.shared.options.ledger.adoption(sandbox_id).is_some();
        self.shared.options.ledger.forget(sandbox_id);
        if adopted {
            self.shared.forget(sandbox_id);
        }
    }

    /// Adopted sandboxes whose records in containerd are still their hulls'.
    #[must_use]
    pub fn unbranded(&self) -> Unbranded {
        self.shared.rebrander.unbranded()
    }

    /// Waits for the first [`Self::recover`] that succeeds, within a bound. Before that a pod could be taken for a hull
    /// and hidden, and its kubelet would make a second sandbox of its name: no answer is better than that one.
    pub async fn known(&self) -> Result<(), Failure> {
        let mut known = self.shared.known.subscribe();
        if *known.borrow_and_update() {
            return Ok(());
        }
        match tokio::time::timeout(KNOWN_LIMIT, known.wait_for(|known| *known)).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                let text = "hullspeed-prewarm has not learnt from containerd yet which sandboxes are pods'";
                Err(Status::unavailable(text).into())
            }
        }
    }

    /// containerd is away, or its facts are in doubt: nothing is adopted until [`Self::recover`] succeeds. Waits for
    /// adoptions that are under way.
    pub async fn suspend(&self) {
        *self.shared.facts.write().await = None;
    }

    /// Ends background work, once records that wait are rewritten or cannot be in time; what is left is done after the
    /// next start.
    pub async fn shutdown(&self) {
        self.suspend().await;
        self.shared.stopping.cancel();
        let work = self.shared.work.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(work) = work {
            let _ = work.await;
        }
        let shared = Arc::clone(&self.shared);
        let _ = tokio::task::spawn_blocking(move || shared.patcher.stop()).await;
    }

    fn count(&self, (outcome, reason): Passed) {
        self.shared.options.observer.request(outcome, reason);
    }

    /// In a task of its own, which nobody can give up halfway.
    async fn adopt(&self, attempt: Attempt, name: Reservation) -> Result<Reply, (Reservation, &'static str)> {
        let (answer, answered) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        tokio::spawn(async move { shared.adopt(attempt, name, answer).await });
        match answered.await {
            Ok(result) => result,
            // Only a runtime that shuts down drops a task.
            Err(_) => Ok(Reply::Failed(Status::unavailable("the relay is shutting down").into())),
        }
    }
}

#[async_trait::async_trait]
impl crate::rules::Sandboxes for Adopter {
    async fn run_pod_sandbox(&self, call: Call) -> Reply {
        Self::run_pod_sandbox(self, call).await
    }

    async fn known(&self) -> Result<(), Failure> {
        Self::known(self).await
    }

    fn removed(&self, sandbox_id: &str) {
        Self::removed(self, sandbox_id);
    }
}
