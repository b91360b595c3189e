//! Who a sandbox is for clients: nobody, itself, or the pod that adopted it.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::ledger::{Adoption, Ledger};

/// How long the identity of a removed sandbox is kept for what containerd still says of it.
const LINGER: Duration = Duration::from_secs(30);

/// How many removed sandboxes are remembered; the oldest are forgotten.
const MAX_DEPARTED: usize = 4096;

/// What a client may see of a sandbox.
#[derive(Debug, Clone)]
pub(crate) enum Sight {
    /// Nothing.
    Hidden,
    /// The pod that adopted it.
    Adopted(Arc<Adoption>),
    /// What containerd says.
    Native,
}

/// The ledger, and the identities of sandboxes that were removed a moment ago.
///
/// A name is free as soon as its sandbox is removed, so the ledger forgets both at once; events about the removal come
/// later and must still show the pod.
#[derive(Debug)]
pub(crate) struct Identities {
    ledger: Ledger,
    departed: Mutex<VecDeque<(Instant, Arc<Adoption>)>>,
}

impl Identities {
    pub(crate) fn new(ledger: Ledger) -> Self {
        Self {
            ledger,
            departed: Mutex::default(),
        }
    }

    pub(crate) fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What may be seen of the sandbox that containerd reports with these labels.
    pub(crate) fn sight(&self, id: &str, labels: &HashMap<String, String>) -> Sight {
        if let Some(adoption) = self.adoption(id) {
            return Sight::Adopted(adoption);
        }
        if self.ledger.is_hidden(id, labels) {
            return Sight::Hidden;
        }
        // It may have been adopted between the two questions.
        match self.adoption(id) {
            Some(adoption) => Sight::Adopted(adoption),
            None if self.ledger.mark().is_on(labels) => Sight::Hidden,
            None => Sight::Native,
        }
    }

    /// The pod of an adopted sandbox, also if it has just been removed.
    pub(crate) fn adoption(&self, id: &str) -> Option<Arc<Adoption>> {
        self.ledger.adoption(id).or_else(|| {
            let departed = self.departed.lock().unwrap_or_else(PoisonError::into_inner);
            let found = departed.iter().rev().find(|(_, adoption)| adoption.sandbox_id == id);
            found.map(|(_, adoption)| Arc::clone(adoption))
        })
    }

    /// Remembers who a sandbox was; call it before the ledger forgets.
    pub(crate) fn depart(&self, id: &str) {
        let Some(adoption) = self.ledger.adoption(id) else {
            return;
        };
        let mut departed = self.departed.lock().unwrap_or_else(PoisonError::into_inner);
        departed.push_back((Instant::now(), adoption));
        while departed.len() > MAX_DEPARTED || departed.front().is_some_and(|(when, _)| when.elapsed() > LINGER) {
            departed.pop_front();
        }
    }
}
