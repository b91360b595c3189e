//! Whether pods' networks may be made before their pods are known.
//!
//! A hull has its interface and its addresses before anybody knows whose they will be. That is right only for plugins
//! that look at nothing but the container's id and network namespace. So there is a list of types that do ([`verdict`]),
//! conditions on what they delegate to, and everything else is refused, with a reason for people to read. The active
//! configurations are found as containerd finds them ([`files`]); [`addresses`] counts what is left to hand out.

mod addresses;
mod files;
mod verdict;

pub(super) use addresses::{AddressSet, free};
pub(super) use files::{MAX_FILES, is_configuration};

use std::path::{Path, PathBuf};

use hullspeed_daemon::error::chain;
use serde_json::{Map, Value};

use super::options::CniPermissions;
use super::snapshot::Off;

/// One CNI network that every ordinary pod is attached to.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Network {
    /// Its name.
    pub(super) name: String,
    /// Its plugins' configurations, in order.
    pub(super) plugins: Vec<Map<String, Value>>,
    /// Where its addresses come from; `None` if that cannot be told.
    pub(super) addresses: Option<Vec<AddressSet>>,
    /// Files that its plugins read beside their configuration.
    pub(super) inputs: Vec<PathBuf>,
}

/// The networks of `directory`, of which containerd uses the first `max` (0: all), or why hulls cannot have them.
pub(super) fn assess(directory: &Path, max: usize, permissions: &CniPermissions) -> Result<Vec<Network>, Off> {
    let mut networks = files::active(directory, max).map_err(|error| {
        let reason = if matches!(error, files::FilesError::None { .. }) {
            "cni_absent"
        } else {
            "cni_invalid"
        };
        Off::new(reason, chain(&error))
    })?;
    for network in &mut networks {
        if !permissions.allow_any {
            verdict::check(network, permissions)?;
        }
        network.inputs = verdict::inputs(network);
        network.addresses = addresses::of_network(network);
    }
    Ok(networks)
}

/// Whether containerd has loaded just these networks, by its own description. It takes a moment to notice a new file.
/// `None`: it does not say.
pub(super) fn is_loaded(networks: &[Network], description: &str) -> Option<bool> {
    let description: Value = serde_json::from_str(description).ok()?;
    let loaded = description.get("Networks")?.as_array()?;
    let loaded: Option<Vec<_>> = loaded
        .iter()
        .filter_map(|network| network.get("Config"))
        .filter(|config| config.get("Name").and_then(Value::as_str) != Some("cni-loopback"))
        .map(loaded_network)
        .collect();
    let ours = networks.iter().map(|network| {
        let plugins = network
            .plugins
            .iter()
            .map(|plugin| comparable(&Value::Object(plugin.clone())));
        (network.name.clone(), plugins.collect::<Vec<_>>())
    });
    Some(loaded?.into_iter().eq(ours))
}

fn loaded_network(config: &Value) -> Option<(String, Vec<Value>)> {
    let name = config.get("Name")?.as_str()?.to_owned();
    let plugins = config.get("Plugins")?.as_array()?.iter().map(|plugin| {
        let source = plugin.get("Source")?.as_str()?;
        Some(comparable(&serde_json::from_str(source).ok()?))
    });
    Some((name, plugins.collect::<Option<_>>()?))
}

/// containerd reads all numbers as floating-point ones before it writes them again. The name and the version that a
/// configuration of a single plugin carries are set by containerd in either form.
fn comparable(value: &Value) -> Value {
    match value {
        Value::Number(number) => number.as_f64().map_or_else(|| value.clone(), Value::from),
        Value::Array(items) => items.iter().map(comparable).collect(),
        Value::Object(map) => map
            .iter()
            .map(|(key, value)| (key.clone(), comparable(value)))
            .collect(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests;
