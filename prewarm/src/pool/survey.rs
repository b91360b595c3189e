//! Looking at what hulls are made with: containerd, its configuration, the networks. Decides what is off and what has to
//! go; says when the sandboxes themselves have to be looked at, too.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use hullspeed_daemon::error::chain;

use crate::containerd::facts::{Facts, FactsError};

use super::cgroup;
use super::cni::{self, Network};
use super::fingerprint::{Current, Fingerprint, Stamp, directory_paths, network_paths};
use super::nri;
use super::options::PoolOptions;
use super::snapshot::Off;
use super::state::Shared;

/// The only shim whose sandboxes are hulls; what it runs (runc, crun, youki) does not matter.
const RUNC_SHIM: &str = "io.containerd.runc.v2";

/// The networks of one CNI directory, or why hulls cannot have them.
struct Directory {
    assessed: Result<Vec<Network>, Off>,
    stamp_paths: Vec<std::path::PathBuf>,
}

/// One look. An error leaves the pool off until the next one.
pub(super) async fn survey(shared: &Shared) -> Result<(), FactsError> {
    // Taken before anything is read, so that what changes meanwhile is found changed at the next look.
    let instance = Stamp::of([shared.containerd.socket().to_owned()]);
    let facts = match Facts::read(&shared.containerd).await {
        Ok(facts) => Arc::new(facts),
        Err(error) => {
            let detail = chain(&error);
            shared.state().away = Some(Off::new("containerd_away", detail));
            return Err(error);
        }
    };
    // One that was started anew has forgotten what it was told, though nothing of its configuration may have changed.
    let restarted = {
        let state = shared.state();
        state
            .current
            .as_ref()
            .is_none_or(|current| current.instance != instance)
    };
    shared.facts.send_if_modified(|known| {
        let changed = restarted || known.as_ref() != Some(&facts);
        *known = Some(Arc::clone(&facts));
        changed
    });
    install(shared, facts, instance);
    Ok(())
}

fn install(shared: &Shared, facts: Arc<Facts>, instance: Stamp) {
    let options = &shared.options;
    let mut offs = Vec::new();
    let mut networks = Vec::new();
    let mut paths = Vec::new();
    let mut seen: Vec<(std::path::PathBuf, Directory)> = Vec::new();
    for handler in &options.handlers {
        let name = &handler.runtime_handler;
        let (directory, max, own) = conf_dir(&facts, name);
        if !seen.iter().any(|(known, _)| *known == directory) {
            let look = look(&directory, max, options, facts.cni_loaded.as_deref().filter(|_| !own));
            paths.extend(look.stamp_paths.clone());
            networks.extend(look.assessed.iter().flatten().cloned());
            seen.push((directory.clone(), look));
        }
        let refused = seen.iter().find(|(known, _)| *known == directory);
        let refused = refused.and_then(|(_, look)| look.assessed.as_ref().err().cloned());
        offs.push(handler_objection(&facts, name).or(refused));
    }
    // Read between two looks at the files, the content is that of the stamp, or the stamp is found changed.
    let network = Stamp::of(paths);
    let fingerprint = Fingerprint::new(
        &facts,
        networks.iter(),
        &cgroup::parent(&options.cgroup, facts.systemd_cgroup),
    );
    let current = Arc::new(Current {
        facts,
        instance,
        network,
        fingerprint,
        networks,
    });
    let objection = (!options.allow_nri)
        .then(|| nri::objection(&nri::Places::default()))
        .flatten();
    apply(shared, current, offs, objection);
}

fn apply(shared: &Shared, current: Arc<Current>, offs: Vec<Option<Off>>, objection: Option<Off>) {
    let now = Instant::now();
    let mut state = shared.state();
    let before = state.current.replace(Arc::clone(&current));
    let restarted = before.as_ref().is_none_or(|before| before.instance != current.instance);
    state.unchecked |= restarted;
    state.away = None;
    state.off = if shared.options.enabled {
        objection
    } else {
        Some(off_by_configuration())
    };
    let change = before.and_then(|before| current.fingerprint.change_since(&before.fingerprint));
    if let Some(reason) = change {
        tracing::info!(reason, "what hulls are made with has changed: they are made anew");
    }
    let off = state.off.as_ref().map(|off| off.reason);
    let mut gone = Vec::new();
    for (shelf, shelf_off) in state.shelves.iter_mut().zip(offs) {
        if shelf.off != shelf_off {
            match &shelf_off {
                Some(off) => tracing::warn!(handler = shelf.config.runtime_handler, "no hulls: {}", off.detail),
                None => tracing::info!(handler = shelf.config.runtime_handler, "hulls are kept"),
            }
        }
        shelf.off = shelf_off;
        let why = change.or(off).or(shelf.off.as_ref().map(|off| off.reason));
        if let Some(why) = why {
            gone.extend(shelf.idle.drain(..).map(|idle| (idle.hull.id, why)));
        }
    }
    for (id, why) in gone {
        shared.condemn(&mut state, &id, why, now);
    }
}

/// Where a handler's CNI configurations are, how many count, and whether that is a place of its own.
fn conf_dir(facts: &Facts, handler: &str) -> (std::path::PathBuf, usize, bool) {
    match facts.handler(handler) {
        Some(handler) if handler.cni_conf_dir.is_some() => {
            let directory = handler.cni_conf_dir.clone().unwrap_or_default();
            (directory, handler.cni_max_conf_num, true)
        }
        _ => (facts.cni_conf_dir.clone(), facts.cni_max_conf_num, false),
    }
}

fn look(directory: &Path, max: usize, options: &PoolOptions, loaded: Option<&str>) -> Directory {
    let mut stamp_paths = directory_paths(directory);
    let first = cni::assess(directory, max, &options.cni);
    stamp_paths.extend(network_paths(directory, first.as_deref().unwrap_or_default()));
    let assessed = first.and_then(|networks| {
        if loaded.and_then(|loaded| cni::is_loaded(&networks, loaded)) == Some(false) {
            return Err(Off::new(
                "cni_loading",
                format!("containerd has not loaded what is in {} (yet)", directory.display()),
            ));
        }
        Ok(networks)
    });
    Directory { assessed, stamp_paths }
}

fn handler_objection(facts: &Facts, name: &str) -> Option<Off> {
    let Some(handler) = facts.handler(name) else {
        return Some(Off::new(
            "handler_unknown",
            format!("containerd has no runtime handler {name:?}"),
        ));
    };
    if handler.runtime_type != RUNC_SHIM {
        let detail = format!(
            "runtime handler {name:?} is of {}, not of {RUNC_SHIM}",
            handler.runtime_type
        );
        return Some(Off::new("handler_type", detail));
    }
    if !matches!(handler.sandboxer.as_str(), "" | "podsandbox") {
        let detail = format!(
            "sandboxes of runtime handler {name:?} are made by {:?}",
            handler.sandboxer
        );
        return Some(Off::new("handler_sandboxer", detail));
    }
    None
}

/// What a pool with these options would make of this node.
#[derive(Debug)]
pub struct Preview {
    /// Why there would be no pool at all.
    pub off: Option<Off>,
    /// The networks that each handler's hulls would be attached to, or why it would have none.
    pub handlers: Vec<(String, Result<Vec<String>, Off>)>,
}

/// Looks as the pool does, and changes nothing.
#[must_use]
pub fn preview(facts: &Facts, options: &PoolOptions) -> Preview {
    let off = if options.enabled {
        let nri = (!options.allow_nri).then(|| nri::objection(&nri::Places::default()));
        nri.flatten()
    } else {
        Some(off_by_configuration())
    };
    let handler = |name: &String| {
        let (directory, max, own) = conf_dir(facts, name);
        let loaded = facts.cni_loaded.as_deref().filter(|_| !own);
        let networks = match handler_objection(facts, name) {
            Some(off) => Err(off),
            None => look(&directory, max, options, loaded).assessed,
        };
        let names = networks.map(|networks| networks.into_iter().map(|network| network.name).collect());
        (name.clone(), names)
    };
    Preview {
        off,
        handlers: options
            .handlers
            .iter()
            .map(|pool| handler(&pool.runtime_handler))
            .collect(),
    }
}

fn off_by_configuration() -> Off {
    Off::new("config", "the pool is off by configuration")
}
