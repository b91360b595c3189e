//! RunPodSandbox, from its request to its answer.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast;

use super::eligibility::Policy;
use super::{HullSource, Recovered, RecoveryError};
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::ledger::{Adoption, Ledger};
use crate::relay::{Call, Reply};

/// How a RunPodSandbox was answered. Labels of a metric: [`Outcome::result`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// By an adoption.
    Hit,
    /// By containerd, for want of a hull.
    Miss,
    /// By containerd, because the pod needs something that a hull is not.
    Ineligible,
    /// By containerd, after an adoption that failed.
    Failed,
    /// By containerd or by a refusal, because only that is right.
    NativeOnly,
}

impl Outcome {
    /// A short, stable name.
    #[must_use]
    pub fn result(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Ineligible => "ineligible",
            Self::Failed => "failed",
            Self::NativeOnly => "native_only",
        }
    }
}

/// Counts what happens; implemented by the metrics. Called on the critical path: it must not block.
pub trait Observer: Send + Sync + 'static {
    /// A RunPodSandbox was decided on; `reason` is a short, stable name from a small set, empty for a hit.
    fn request(&self, outcome: Outcome, reason: &'static str) {
        let _ = (outcome, reason);
    }

    /// A hull became a pod's: what that took from request to answer, and how long the hull had waited.
    fn adopted(&self, took: Duration, hull_age: Duration) {
        let _ = (took, hull_age);
    }

    /// containerd's record of an adopted sandbox was rewritten ("done"), is gone ("gone"), or could not be ("failed").
    fn rebranded(&self, result: &'static str) {
        let _ = result;
    }
}

/// Counts nothing.
impl Observer for () {}

/// What an [`Adopter`] works with.
pub struct Options {
    /// The daemon's own connection.
    pub containerd: Containerd,
    /// Who is what.
    pub ledger: Ledger,
    /// Where hulls come from.
    pub hulls: Arc<dyn HullSource>,
    /// Directory of the journal, on a tmpfs: it must not outlive the node's sandboxes.
    pub state: PathBuf,
    /// Which pods may have a hull.
    pub policy: Policy,
    /// Who counts.
    pub observer: Arc<dyn Observer>,
}

/// Why there is no adopter.
#[derive(Debug, thiserror::Error)]
pub enum AdopterError {
    /// No journal.
    #[error("cannot open the journal of adoptions")]
    Journal(#[source] std::io::Error),
}

/// Answers RunPodSandbox. Cheap to clone; clones are one adopter.
#[derive(Clone)]
pub struct Adopter {
    inner: Arc<Options>,
    adoptions: broadcast::Sender<Arc<Adoption>>,
}

impl Adopter {
    /// An adopter that passes everything on until [`Self::recover`] has told it the facts.
    ///
    /// Call it within a tokio runtime.
    pub fn new(options: Options) -> Result<Self, AdopterError> {
        Ok(Self {
            inner: Arc::new(options),
            adoptions: broadcast::channel(64).0,
        })
    }

    /// Answers RunPodSandbox, of either version of CRI: by an adoption, or as containerd does.
    pub async fn run_pod_sandbox(&self, call: Call) -> Reply {
        call.upstream.unary(call.message).await.into()
    }

    /// The client has removed this sandbox and containerd has agreed.
    pub fn removed(&self, sandbox_id: &str) {
        self.inner.ledger.forget(sandbox_id);
    }

    /// Adoptions as they happen, before their answers are sent.
    #[must_use]
    pub fn subscribe(&self) -> broadcast::Receiver<Arc<Adoption>> {
        self.adoptions.subscribe()
    }

    /// Learns from containerd and the journal which sandboxes are hulls and which are pods'. For the start and after
    /// every restart of containerd; until it succeeds nothing is adopted.
    pub async fn recover(&self, facts: Arc<Facts>) -> Result<Recovered, RecoveryError> {
        let _ = facts;
        Ok(Recovered::default())
    }

    /// containerd is away, or its facts are in doubt: nothing is adopted until [`Self::recover`] succeeds.
    pub fn suspend(&self) {}

    /// Ends background work; what is left of it is done after the next start.
    pub async fn shutdown(&self) {}
}
