//! The verbose part of `PodSandboxStatus`: a JSON document in which the hull's configuration appears.
//!
//! It is edited as a tree, so what containerd adds to it survives. Where the pause process runs (its cgroup, its
//! namespaces, its image) is what containerd says: that is a fact about the hull, not a name.

use std::borrow::Cow;

use hullspeed_proto::cri::v1::PodSandboxConfig;
use serde_json::{Map, Value};

use super::parts::{put_text, text};
use crate::adopt::gojson;
use crate::containerd::facts::Facts;
use crate::containerd::has_writable_sysfs;
use crate::containerd::sysctls::stored;
use crate::ledger::{Adoption, sandbox_name};
use crate::wire::{Edit, WireError, edit, put_bytes};

/// `PodSandboxStatusResponse.info`, and the entry of it that holds the document.
const INFO: u32 = 2;
const DOCUMENT: &str = "info";

/// Prefix of the annotations that containerd puts on a sandbox's specification.
const CRI: &str = "io.kubernetes.cri.";

/// Prefix of the annotations that the pool puts on a hull. A handler may let all annotations through to specifications.
const OURS: &str = "io.hullspeed.";

/// A `PodSandboxStatusResponse` with the pod in its document. A document that is not JSON stays as it is.
pub(crate) fn dressed(response: &[u8], adoption: &Adoption, facts: Option<&Facts>) -> Result<Vec<u8>, WireError> {
    edit(response, |field| {
        let (INFO, Some(entry)) = (field.number, field.value.bytes()) else {
            return Ok(Edit::Keep);
        };
        if text(entry, 1)? != DOCUMENT {
            return Ok(Edit::Keep);
        }
        let Ok(Value::Object(mut document)) = serde_json::from_str(&text(entry, 2)?) else {
            return Ok(Edit::Keep);
        };
        let config = facts.map_or(Cow::Borrowed(&adoption.config), |facts| stored(&adoption.config, facts));
        edit_document(&mut document, adoption, &gojson::value(&config));
        if is_privileged(&adoption.config) && facts.is_some_and(|facts| has_writable_sysfs(&facts.version)) {
            show_writable_sysfs(&mut document);
        }
        let mut out = Vec::new();
        put_text(&mut out, 1, DOCUMENT);
        put_bytes(&mut out, 2, Value::Object(document).to_string().as_bytes());
        Ok(Edit::Bytes(out))
    })
}

fn edit_document(document: &mut Map<String, Value>, adoption: &Adoption, config: &Value) {
    replace(document, "config", config);
    replace(document, "runtimeHandler", &adoption.runtime_handler.as_str().into());
    if let Some(Value::Object(specification)) = document.get_mut("runtimeSpec") {
        edit_specification(specification, &adoption.config);
    }
    if let Some(Value::Object(metadata)) = document.get_mut("sandboxMetadata") {
        // Versioned on the wire: the fields are one level down.
        let fields = match metadata.get_mut("Metadata") {
            Some(Value::Object(fields)) => fields,
            _ => metadata,
        };
        let name = adoption.config.metadata.as_ref().map(sandbox_name);
        replace(fields, "Name", &name.unwrap_or_default().into());
        replace(fields, "Config", config);
        replace(fields, "RuntimeHandler", &adoption.runtime_handler.as_str().into());
    }
}

/// Sets a key that is there; containerd's version decides which are.
fn replace(object: &mut Map<String, Value>, key: &str, value: &Value) {
    if let Some(slot) = object.get_mut(key) {
        slot.clone_from(value);
    }
}

fn is_privileged(config: &PodSandboxConfig) -> bool {
    let linux = config.linux.as_ref();
    let context = linux.and_then(|linux| linux.security_context.as_ref());
    context.is_some_and(|context| context.privileged)
}

/// A privileged pod's sandbox has a writable sysfs. At adoption it became so; the hull's was specified without.
fn show_writable_sysfs(document: &mut Map<String, Value>) {
    let mounts = document.get_mut("runtimeSpec").and_then(|spec| spec.get_mut("mounts"));
    let of_sysfs = |mount: &&mut Value| mount.get("destination").and_then(Value::as_str) == Some("/sys");
    let mounts = mounts.and_then(Value::as_array_mut);
    for mount in mounts.into_iter().flatten().filter(of_sysfs) {
        let options = mount.get_mut("options").and_then(Value::as_array_mut);
        for option in options.into_iter().flatten().filter(|option| *option == "ro") {
            *option = "rw".into();
        }
    }
}

fn edit_specification(specification: &mut Map<String, Value>, config: &PodSandboxConfig) {
    if config.hostname.is_empty() {
        // An OCI specification leaves out an empty host name.
        specification.shift_remove("hostname");
    } else {
        specification.insert("hostname".into(), config.hostname.as_str().into());
    }
    let linux = config.linux.as_ref();
    if let Some(Value::Object(annotations)) = specification.get_mut("annotations") {
        annotations.retain(|key, _| !key.starts_with(OURS) || config.annotations.contains_key(key));
        let metadata = config.metadata.clone().unwrap_or_default();
        let identity = [
            ("sandbox-name", metadata.name),
            ("sandbox-namespace", metadata.namespace),
            ("sandbox-uid", metadata.uid),
            ("sandbox-log-directory", config.log_directory.clone()),
        ];
        for (key, value) in identity {
            replace(annotations, &format!("{CRI}{key}"), &value.into());
        }
        let resources = linux.and_then(|linux| linux.resources.as_ref());
        let numbers = [
            ("sandbox-cpu-period", resources.map(|of| of.cpu_period)),
            ("sandbox-cpu-quota", resources.map(|of| of.cpu_quota)),
            ("sandbox-cpu-shares", resources.map(|of| of.cpu_shares)),
            ("sandbox-memory", resources.map(|of| of.memory_limit_in_bytes)),
        ];
        for (key, value) in numbers {
            let key = format!("{CRI}{key}");
            match value {
                Some(value) => annotations.insert(key, value.to_string().into()),
                None => annotations.shift_remove(&key),
            };
        }
    }
    let sysctls = linux.map(|linux| &linux.sysctls).filter(|sysctls| !sysctls.is_empty());
    if let (Some(sysctls), Some(Value::Object(of))) = (sysctls, specification.get_mut("linux"))
        && let Value::Object(shown) = of.entry("sysctl").or_insert_with(|| Value::Object(Map::new()))
    {
        // The hull has containerd's defaults only, and the pod's own win over those.
        let own = sysctls.iter().map(|(key, value)| (key.clone(), value.as_str().into()));
        shown.extend(own);
    }
}
