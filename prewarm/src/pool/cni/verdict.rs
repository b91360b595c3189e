//! Which plugins may make a network before its pod is known.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::super::options::CniPermissions;
use super::super::snapshot::Off;
use super::Network;

/// Types that look at the container's id, its namespace and their own configuration, at nothing else.
const AGNOSTIC: [&str; 11] = [
    "bridge",
    "ptp",
    "flannel",
    "macvlan",
    "ipvlan",
    "loopback",
    "portmap",
    "bandwidth",
    "firewall",
    "tuning",
    "sbr",
];

/// What flannel's plugin may delegate to.
const DELEGATES: [&str; 4] = ["bridge", "ptp", "macvlan", "ipvlan"];

/// Capabilities whose values do not come from the pod, or come only with pods that are never adopted (host ports,
/// bandwidth annotations), or that containerd never passes.
const CAPABILITIES: [&str; 5] = ["portMappings", "bandwidth", "ipRanges", "ips", "mac"];

/// Types that are known to tie a network to a pod's identity, for a better reason than "unknown".
const IDENTITY_AWARE: [&str; 14] = [
    "antrea",
    "aws-cni",
    "azure-vnet",
    "calico",
    "cilium-cni",
    "egress-cni",
    "istio-cni",
    "linkerd-cni",
    "multus",
    "multus-shim",
    "ovn-k8s-cni-overlay",
    "sriov",
    "terway",
    "vpc-cni",
];

/// Keys of a plugin that decide here. Go reads them whatever their case, so no other spelling may be there.
const KEYS: [&str; 7] = [
    "type",
    "ipam",
    "capabilities",
    "delegate",
    "addresses",
    "subnetFile",
    "plugins",
];

/// Where flannel's daemon writes the node's subnet.
pub(super) const FLANNEL_SUBNET_FILE: &str = "/run/flannel/subnet.env";

/// Refuses a network that depends on its pod.
pub(super) fn check(network: &Network, permissions: &CniPermissions) -> Result<(), Off> {
    network
        .plugins
        .iter()
        .try_for_each(|plugin| check_plugin(&network.name, plugin, permissions))
}

/// Files that the network's plugins read.
pub(super) fn inputs(network: &Network) -> Vec<PathBuf> {
    let flannel = network
        .plugins
        .iter()
        .filter(|plugin| text(plugin, "type") == "flannel");
    flannel.map(flannel_subnet_file).collect()
}

/// Where this plugin finds the node's subnet.
pub(super) fn flannel_subnet_file(plugin: &Map<String, Value>) -> PathBuf {
    match text(plugin, "subnetFile") {
        "" => PathBuf::from(FLANNEL_SUBNET_FILE),
        path => PathBuf::from(path),
    }
}

pub(super) fn text<'a>(map: &'a Map<String, Value>, key: &str) -> &'a str {
    map.get(key).and_then(Value::as_str).unwrap_or_default()
}

fn check_plugin(network: &str, plugin: &Map<String, Value>, permissions: &CniPermissions) -> Result<(), Off> {
    check_keys(network, plugin)?;
    let kind = text(plugin, "type");
    let vouched = |kind: &str| permissions.extra_types.iter().any(|extra| extra == kind);
    if !AGNOSTIC.contains(&kind) && !vouched(kind) {
        let why = if IDENTITY_AWARE.contains(&kind) {
            "ties a pod's network to the pod's identity"
        } else if kind == "host-device" {
            "moves a device that exists once"
        } else {
            "is not known to ignore the pod's identity"
        };
        return Err(refusal("cni_plugin", network, format!("plugin type {kind:?} {why}")));
    }
    check_capabilities(network, kind, plugin)?;
    if kind == "flannel" {
        let delegate = object(network, plugin, "delegate")?;
        if let Some(delegate) = delegate {
            check_keys(network, delegate)?;
            let to = text(delegate, "type");
            if !to.is_empty() && !DELEGATES.contains(&to) {
                return Err(refusal("cni_plugin", network, format!("flannel delegates to {to:?}")));
            }
            check_capabilities(network, kind, delegate)?;
            check_ipam(network, delegate, &vouched)?;
        }
    }
    check_ipam(network, plugin, &vouched)
}

/// No key may mean one thing to us and another to a reader that does not mind its case.
fn check_keys(network: &str, map: &Map<String, Value>) -> Result<(), Off> {
    let strange = |key: &&String| {
        !key.is_ascii()
            || KEYS
                .iter()
                .any(|known| key.eq_ignore_ascii_case(known) && key.as_str() != *known)
    };
    match map.keys().find(strange) {
        None => Ok(()),
        Some(key) => Err(refusal("cni_invalid", network, format!("strange key {key:?}"))),
    }
}

fn check_capabilities(network: &str, kind: &str, plugin: &Map<String, Value>) -> Result<(), Off> {
    let Some(capabilities) = object(network, plugin, "capabilities")? else {
        return Ok(());
    };
    let refused = capabilities
        .iter()
        .find(|(name, value)| **value != Value::Bool(false) && !CAPABILITIES.contains(&name.as_str()));
    match refused {
        None => Ok(()),
        Some((name, _)) => Err(refusal(
            "cni_capability",
            network,
            format!("plugin {kind:?} asks for {name:?}, which may differ from pod to pod"),
        )),
    }
}

fn check_ipam(network: &str, plugin: &Map<String, Value>, vouched: &dyn Fn(&str) -> bool) -> Result<(), Off> {
    let Some(ipam) = object(network, plugin, "ipam")? else {
        return Ok(());
    };
    check_keys(network, ipam)?;
    let refuse = |why: String| Err(refusal("cni_ipam", network, why));
    match text(ipam, "type") {
        "host-local" => Ok(()),
        // Without addresses of its own it takes the pod's.
        "static" if matches!(ipam.get("addresses"), Some(Value::Array(items)) if !items.is_empty()) => Ok(()),
        "" if !ipam.contains_key("type") => Ok(()),
        kind if vouched(kind) => Ok(()),
        "dhcp" => refuse("a lease of \"dhcp\" would run while no pod uses it".into()),
        kind => refuse(format!("addresses of {kind:?} may depend on the pod")),
    }
}

fn object<'a>(
    network: &str,
    map: &'a Map<String, Value>,
    key: &'static str,
) -> Result<Option<&'a Map<String, Value>>, Off> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(refusal("cni_invalid", network, format!("{key:?} is not an object"))),
    }
}

fn refusal(reason: &'static str, network: &str, detail: String) -> Off {
    Off::new(reason, format!("CNI network {network:?}: {detail}"))
}
