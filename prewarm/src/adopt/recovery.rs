//! Finding out, after a start or a restart of containerd, which sandboxes are hulls and which have become pods.

use std::sync::Arc;

use crate::ledger::Adoption;

/// A hull that nobody has used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdleHull {
    /// The sandbox.
    pub id: String,
    /// The runtime handler that it was made for.
    pub runtime_handler: String,
    /// Whether containerd calls it ready.
    pub ready: bool,
}

/// What there is.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Hulls that the pool may open, check and hand out, or destroy.
    pub idle: Vec<IdleHull>,
    /// Sandboxes of pods that were hulls; the ledger has them already.
    pub adopted: Vec<Arc<Adoption>>,
    /// Hulls never to be handed out, because somebody has had them: the pool destroys them.
    pub dropped: Vec<IdleHull>,
}

/// Why containerd could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// A call failed.
    #[error("containerd does not answer {call}")]
    Call {
        /// Which.
        call: &'static str,
        /// Its status.
        #[source]
        source: Box<tonic::Status>,
    },
}
