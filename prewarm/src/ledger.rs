//! What the relay knows of sandboxes: which are hulls, which have been adopted and as what, and whose names are taken.
//!
//! Every rule asks here, and only here, whether a sandbox may be seen and under which identity. Moving a sandbox from
//! "hull" to "adopted" is one step under one lock, so no caller ever sees it as neither.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hullspeed_proto::cri::v1::{PodSandboxConfig, PodSandboxMetadata};

/// Label of a hull. Its value is the node's secret mark, so that no pod can hide itself by carrying it.
pub const HULL_LABEL: &str = "io.hullspeed.hull";

/// Ids of hulls that are gone, remembered to hide what containerd still reports of them; the oldest are forgotten.
const MAX_RETIRED: usize = 4096;

/// The secret that marks this node's hulls.
#[derive(Clone, PartialEq, Eq)]
pub struct Mark(String);

impl Mark {
    /// The mark with this text.
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The label's value.
    #[must_use]
    pub fn value(&self) -> &str {
        &self.0
    }

    /// Whether these labels are a hull's.
    #[must_use]
    pub fn is_on(&self, labels: &HashMap<String, String>) -> bool {
        labels.get(HULL_LABEL).is_some_and(|value| *value == self.0)
    }
}

impl std::fmt::Debug for Mark {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mark(…)")
    }
}

/// A hull's life as a pod's sandbox.
#[derive(Debug, Clone, PartialEq)]
pub struct Adoption {
    /// The sandbox, still under the id that it had as a hull.
    pub sandbox_id: String,
    /// What the kubelet asked for.
    pub config: PodSandboxConfig,
    /// The handler it asked for, as written.
    pub runtime_handler: String,
    /// When, in nanoseconds since the epoch: the sandbox's `created_at` for every client.
    pub adopted_at: i64,
}

/// A sandbox's name, as containerd reserves it: unique among the sandboxes that exist.
#[must_use]
pub fn sandbox_name(metadata: &PodSandboxMetadata) -> String {
    let PodSandboxMetadata {
        name,
        uid,
        namespace,
        attempt,
    } = metadata;
    format!("{name}_{namespace}_{uid}_{attempt}")
}

/// Names of requests that containerd did not answer with a sandbox; the oldest are forgotten.
const MAX_DOUBTFUL: usize = 1024;

/// Names in doubt at one time.
#[derive(Debug, Clone, Default)]
pub struct Doubts(Vec<(String, u64)>);

impl Doubts {
    /// Without these names.
    pub fn except(&mut self, names: &HashSet<String>) {
        self.0.retain(|(name, _)| !names.contains(name));
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Who has a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// A request that is under way.
    Pending,
    /// Perhaps a sandbox of containerd's: its request failed or was given up.
    Doubtful,
    /// A sandbox that containerd knows under this name.
    Native(String),
    /// An adopted sandbox: containerd may not know the name.
    Adopted(String),
}

#[derive(Debug, Default)]
struct State {
    hulls: HashSet<String>,
    retired: HashSet<String>,
    retired_order: VecDeque<String>,
    adopted: HashMap<String, Arc<Adoption>>,
    names: HashMap<String, Holder>,
    /// When a name came into doubt, by a count of its own: the oldest are forgotten.
    doubts: HashMap<String, u64>,
    doubtful_order: VecDeque<(u64, String)>,
    doubts_until_now: u64,
}

impl State {
    /// Nobody knows whether containerd has a sandbox of this name.
    fn doubt(&mut self, name: &str) {
        self.names.insert(name.to_owned(), Holder::Doubtful);
        self.doubts_until_now += 1;
        let count = self.doubts_until_now;
        self.doubts.insert(name.to_owned(), count);
        self.doubtful_order.push_back((count, name.to_owned()));
        while self.doubtful_order.len() > MAX_DOUBTFUL {
            let Some((count, oldest)) = self.doubtful_order.pop_front() else {
                break;
            };
            // A later doubt about the same name stands.
            if self.doubts.get(&oldest) == Some(&count) {
                self.end_doubt(&oldest);
            }
        }
    }

    fn end_doubt(&mut self, name: &str) {
        self.doubts.remove(name);
        if self.names.get(name) == Some(&Holder::Doubtful) {
            self.names.remove(name);
        }
    }
}

/// The ledger. Cheap to clone; clones share their state.
#[derive(Debug, Clone)]
pub struct Ledger {
    mark: Mark,
    state: Arc<Mutex<State>>,
}

impl Ledger {
    /// An empty ledger for hulls with this mark.
    #[must_use]
    pub fn new(mark: Mark) -> Self {
        Self {
            mark,
            state: Arc::default(),
        }
    }

    /// The mark of this node's hulls.
    #[must_use]
    pub fn mark(&self) -> &Mark {
        &self.mark
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every step under the lock leaves the maps whole, so a panic elsewhere spoils nothing.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A hull exists.
    pub fn add_hull(&self, id: &str) {
        self.state().hulls.insert(id.to_owned());
    }

    /// A hull is gone, or about to be; what is still heard of it stays hidden.
    pub fn retire_hull(&self, id: &str) {
        let mut state = self.state();
        state.hulls.remove(id);
        if state.retired.insert(id.to_owned()) {
            state.retired_order.push_back(id.to_owned());
        }
        while state.retired_order.len() > MAX_RETIRED {
            if let Some(oldest) = state.retired_order.pop_front() {
                state.retired.remove(&oldest);
            }
        }
    }

    /// Whether the id is that of a hull, present or past.
    #[must_use]
    pub fn is_hull(&self, id: &str) -> bool {
        let state = self.state();
        state.hulls.contains(id) || state.retired.contains(id)
    }

    /// Whether a hull's id begins with `prefix`; containerd accepts any unambiguous beginning of an id.
    #[must_use]
    pub fn any_hull_begins_with(&self, prefix: &str) -> bool {
        let state = self.state();
        let mut ids = state.hulls.iter().chain(&state.retired);
        ids.any(|id| id.starts_with(prefix))
    }

    /// Whether nobody may see this sandbox. The labels tell of a hull whose id has not come back from containerd yet.
    #[must_use]
    pub fn is_hidden(&self, id: &str, labels: &HashMap<String, String>) -> bool {
        let state = self.state();
        if state.adopted.contains_key(id) {
            return false;
        }
        state.hulls.contains(id) || state.retired.contains(id) || self.mark.is_on(labels)
    }

    /// The sandbox is a pod's from now on. Its name should be reserved; it is settled here.
    pub fn adopt(&self, adoption: Adoption) -> Arc<Adoption> {
        let adoption = Arc::new(adoption);
        let mut state = self.state();
        let id = adoption.sandbox_id.clone();
        state.hulls.remove(&id);
        if let Some(metadata) = &adoption.config.metadata {
            state.names.insert(sandbox_name(metadata), Holder::Adopted(id.clone()));
        }
        state.adopted.insert(id, Arc::clone(&adoption));
        adoption
    }

    /// The identity of an adopted sandbox.
    #[must_use]
    pub fn adoption(&self, id: &str) -> Option<Arc<Adoption>> {
        self.state().adopted.get(id).cloned()
    }

    /// All adopted sandboxes.
    #[must_use]
    pub fn adoptions(&self) -> Vec<Arc<Adoption>> {
        self.state().adopted.values().cloned().collect()
    }

    /// The full ids of adopted sandboxes that begin with `prefix`.
    #[must_use]
    pub fn adopted_with_prefix(&self, prefix: &str) -> Vec<String> {
        let state = self.state();
        let ids = state.adopted.keys().filter(|id| id.starts_with(prefix));
        ids.cloned().collect()
    }

    /// The sandbox does not exist any more: its adoption and its name go.
    pub fn forget(&self, id: &str) {
        let mut state = self.state();
        state.adopted.remove(id);
        state.names.retain(|_, holder| match holder {
            Holder::Pending | Holder::Doubtful => true,
            Holder::Native(of) | Holder::Adopted(of) => of != id,
        });
    }

    /// A sandbox that containerd knows under this name.
    pub fn add_native(&self, name: String, id: &str) {
        let mut state = self.state();
        if !matches!(state.names.get(&name), Some(Holder::Adopted(_))) {
            state.names.insert(name, Holder::Native(id.to_owned()));
        }
    }

    /// Ids of the sandboxes whose names containerd knows.
    #[must_use]
    pub fn natives(&self) -> HashSet<String> {
        let state = self.state();
        let ids = state.names.values().filter_map(|holder| match holder {
            Holder::Native(id) => Some(id.clone()),
            _ => None,
        });
        ids.collect()
    }

    /// The names that are in doubt, before containerd is asked for its sandboxes.
    #[must_use]
    pub fn doubts(&self) -> Doubts {
        let state = self.state();
        let doubtful = state.names.iter().filter(|(_, holder)| **holder == Holder::Doubtful);
        let names = doubtful.filter_map(|(name, _)| Some((name.clone(), *state.doubts.get(name)?)));
        Doubts(names.collect())
    }

    /// containerd has told of all its sandboxes, natives among them were added: these doubts are none any more, unless
    /// the name was asked for again meanwhile.
    pub fn end_doubts(&self, doubts: &Doubts) {
        let mut state = self.state();
        for (name, count) in &doubts.0 {
            if state.doubts.get(name) == Some(count) && state.names.get(name) == Some(&Holder::Doubtful) {
                state.end_doubt(name);
            }
        }
    }

    /// Takes a name for a request; given back when the reservation is dropped unsettled. A name that containerd has, or
    /// may have, is lent to one request at a time: containerd decides.
    pub fn reserve(&self, name: &str) -> Result<Reservation, Holder> {
        let mut state = self.state();
        let before = match state.names.get(name) {
            Some(holder @ (Holder::Pending | Holder::Adopted(_))) => return Err(holder.clone()),
            other => other.cloned(),
        };
        state.names.insert(name.to_owned(), Holder::Pending);
        Ok(Reservation {
            ledger: self.clone(),
            name: name.to_owned(),
            unsettled: before,
        })
    }
}

/// A name taken for a request that is under way.
#[derive(Debug)]
pub struct Reservation {
    ledger: Ledger,
    name: String,
    /// Who has the name if this request does not settle it.
    unsettled: Option<Holder>,
}

impl Reservation {
    /// The name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether only containerd knows if the name is free.
    #[must_use]
    pub fn is_contested(&self) -> bool {
        self.unsettled.is_some()
    }

    /// The request goes to containerd. If it fails or is given up, the name may be taken nevertheless: containerd keeps
    /// it for a sandbox that it could not clean up, and two sandboxes of one name keep it from starting.
    pub fn forwarded(&mut self) {
        self.unsettled.get_or_insert(Holder::Doubtful);
    }

    /// containerd has made the sandbox.
    pub fn settle_native(self, id: &str) {
        self.ledger.add_native(self.name.clone(), id);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut state = self.ledger.state();
        // Settled by adoption or by containerd's answer, it is not pending any more.
        if state.names.get(&self.name) != Some(&Holder::Pending) {
            return;
        }
        match self.unsettled.take() {
            None => {
                state.names.remove(&self.name);
            }
            Some(Holder::Doubtful) => state.doubt(&self.name),
            Some(holder) => {
                state.names.insert(self.name.clone(), holder);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(Mark::new("secret".into()))
    }

    fn adoption(id: &str, name: &str) -> Adoption {
        let metadata = PodSandboxMetadata {
            name: name.into(),
            ..Default::default()
        };
        Adoption {
            sandbox_id: id.into(),
            config: PodSandboxConfig {
                metadata: Some(metadata),
                ..Default::default()
            },
            runtime_handler: String::new(),
            adopted_at: 1,
        }
    }

    #[test]
    fn hulls_are_hidden_until_they_are_adopted() {
        let ledger = ledger();
        let marked = HashMap::from([(HULL_LABEL.to_owned(), "secret".to_owned())]);
        let foreign = HashMap::from([(HULL_LABEL.to_owned(), "guess".to_owned())]);
        assert!(ledger.is_hidden("new", &marked));
        assert!(!ledger.is_hidden("new", &foreign));
        ledger.add_hull("h1");
        ledger.add_hull("h2");
        assert!(ledger.is_hidden("h1", &HashMap::new()) && ledger.any_hull_begins_with("h"));
        ledger.adopt(adoption("h1", "pod"));
        assert!(!ledger.is_hidden("h1", &marked) && !ledger.is_hull("h1"));
        ledger.retire_hull("h2");
        assert!(ledger.is_hidden("h2", &HashMap::new()));
    }

    #[test]
    fn retired_hulls_are_forgotten_in_their_order() {
        let ledger = ledger();
        for id in 0..=MAX_RETIRED {
            ledger.retire_hull(&id.to_string());
        }
        assert!(!ledger.is_hull("0") && ledger.is_hull("1"));
    }

    #[test]
    fn a_name_has_one_holder() {
        let ledger = ledger();
        let name = "pod___0";
        let first = ledger.reserve(name).unwrap();
        assert_eq!(ledger.reserve(name).unwrap_err(), Holder::Pending);
        drop(first);
        let second = ledger.reserve(name).unwrap();
        ledger.adopt(adoption("h", "pod"));
        drop(second);
        assert_eq!(ledger.reserve(name).unwrap_err(), Holder::Adopted("h".into()));
        ledger.forget("h");
        assert!(ledger.adoption("h").is_none());
        ledger.reserve(name).unwrap().settle_native("n");
        let contested = ledger.reserve(name).unwrap();
        assert!(contested.is_contested(), "containerd decides about names that it has");
        drop(contested);
        assert_eq!(ledger.natives(), HashSet::from(["n".to_owned()]));
        ledger.reserve(name).unwrap().settle_native("m");
        assert_eq!(ledger.natives(), HashSet::from(["m".to_owned()]));
        ledger.forget("m");
        assert!(!ledger.reserve(name).unwrap().is_contested());
    }

    #[test]
    fn a_request_that_was_given_up_leaves_its_name_in_doubt() {
        let ledger = ledger();
        let given_up = |name: &str| {
            let mut reservation = ledger.reserve(name).unwrap();
            assert!(!reservation.is_contested());
            reservation.forwarded();
        };
        given_up("name");
        let again = ledger.reserve("name").unwrap();
        assert!(again.is_contested());
        drop(again);
        assert!(ledger.reserve("name").unwrap().is_contested());
        let doubts = ledger.doubts();
        drop(ledger.reserve("name").map(|mut again| again.forwarded()));
        ledger.end_doubts(&doubts);
        assert!(
            ledger.reserve("name").unwrap().is_contested(),
            "asked for again meanwhile"
        );
        ledger.end_doubts(&ledger.doubts());
        assert!(
            !ledger.reserve("name").unwrap().is_contested(),
            "containerd has not got it"
        );
        given_up("name");
        for other in 0..MAX_DOUBTFUL {
            given_up(&other.to_string());
        }
        assert!(!ledger.reserve("name").unwrap().is_contested(), "doubts are bounded");
        // Again and again the same one counts as its last.
        given_up("again");
        for _ in 0..3 {
            drop(ledger.reserve("again").unwrap());
        }
        for other in 0..MAX_DOUBTFUL - 1 {
            given_up(&format!("other-{other}"));
        }
        assert!(ledger.reserve("again").unwrap().is_contested());
    }
}
