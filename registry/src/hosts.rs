//! Which hosts are asked for the images of a registry, as containerd's `certs.d` says.
//!
//! The files are looked at again at most every [`HOSTS_CHECKED`], and read again when they have changed, so that neither a new mirror nor
//! a new certificate needs a restart. A `hosts.toml` that makes no sense is an error in the log; what was good before stays in use,
//! and where nothing was, the registry itself is asked, with the certificates beside the file: that is what containerd does.

mod directory;
mod file;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

pub(crate) use file::{Capabilities, HostEntry, TlsFiles, line_of};

use crate::endpoint::Endpoint;
use crate::files::Stamp;
use crate::limits::{HOSTS_CHECKED, MAX_REGISTRIES};

/// The hosts of a registry in the order in which they are asked.
pub(crate) type Endpoints = Arc<[Arc<Endpoint>]>;

/// The hosts of all registries that were asked for.
#[derive(Debug)]
pub(crate) struct Hosts {
    /// `certs.d`; without it each registry is its own only host.
    root: Option<PathBuf>,
    known: Mutex<HashMap<String, Known>>,
    /// How often files had changed when they were looked at.
    changes: AtomicU64,
}

#[derive(Debug)]
struct Known {
    endpoints: Endpoints,
    /// Whether nothing was wrong with the files that they were made of.
    sound: bool,
    seen: Vec<(PathBuf, Stamp)>,
    checked: Instant,
}

impl Known {
    fn has_changed(&self) -> bool {
        self.seen.iter().any(|(path, stamp)| Stamp::of(path) != *stamp)
    }
}

impl Hosts {
    pub(crate) fn new(root: Option<PathBuf>) -> Self {
        Self {
            root,
            known: Mutex::default(),
            changes: AtomicU64::new(0),
        }
    }

    /// The registries whose hosts are known.
    pub(crate) fn registries(&self) -> Vec<String> {
        let table = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        table.keys().cloned().collect()
    }

    /// How often files had changed when they were looked at.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// The hosts of `registry`, which `make` makes out of what the files say.
    pub(crate) fn of(&self, registry: &str, make: impl Fn(HostEntry) -> Endpoint) -> Endpoints {
        // What the lock guards changes by whole entries.
        let mut table = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        if let Some(known) = table.get_mut(registry) {
            if self.root.is_none() || now.duration_since(known.checked) < HOSTS_CHECKED {
                return known.endpoints.clone();
            }
            known.checked = now;
            if !known.has_changed() {
                return known.endpoints.clone();
            }
        }
        let previous = table.remove(registry);
        if previous.is_some() {
            self.changes.fetch_add(1, Ordering::AcqRel);
        }
        let known = self.read(registry, previous, &make);
        let endpoints = known.endpoints.clone();
        if table.len() >= MAX_REGISTRIES {
            let oldest = table.iter().min_by_key(|(_, known)| known.checked);
            if let Some(oldest) = oldest.map(|(name, _)| name.clone()) {
                table.remove(&oldest);
            }
        }
        table.insert(registry.to_owned(), known);
        endpoints
    }

    fn read(&self, registry: &str, previous: Option<Known>, make: &impl Fn(HostEntry) -> Endpoint) -> Known {
        let Some(root) = &self.root else {
            return Known {
                endpoints: [Arc::new(make(HostEntry::registry()))].into(),
                sound: true,
                seen: Vec::new(),
                checked: Instant::now(),
            };
        };
        let directory::Loaded { entries, seen, problem } = directory::load(root, registry);
        let endpoints = each_once(entries.into_iter().map(make));
        let mut known = Known {
            sound: problem.is_none() && endpoints.iter().all(|endpoint| endpoint.problem().is_none()),
            endpoints,
            seen,
            checked: Instant::now(),
        };
        if known.sound {
            return known;
        }
        let kept = previous.filter(|previous| previous.sound);
        let instead = if kept.is_some() {
            "what it said before stays in use"
        } else {
            "the registry itself is asked in its place"
        };
        if let Some(problem) = &problem {
            tracing::error!(
                registry,
                error = problem as &dyn std::error::Error,
                "hosts of a registry: {instead}"
            );
        }
        for endpoint in known.endpoints.iter() {
            if let Some(problem) = endpoint.problem() {
                tracing::error!(
                    registry,
                    host = endpoint.name,
                    problem,
                    "a host of a registry cannot be used"
                );
            }
        }
        if let Some(kept) = kept {
            known.endpoints = kept.endpoints;
            known.sound = true;
        }
        known
    }
}

/// Leaves out what would only be asked twice: the registry, where the file lists it as a host that may do as much.
fn each_once(endpoints: impl Iterator<Item = Endpoint>) -> Endpoints {
    let mut kept: Vec<Arc<Endpoint>> = Vec::new();
    for endpoint in endpoints {
        let same =
            |known: &Arc<Endpoint>| known.key() == endpoint.key() && known.capabilities.contains(endpoint.capabilities);
        if !kept.iter().any(same) {
            kept.push(Arc::new(endpoint));
        }
    }
    kept.into()
}
