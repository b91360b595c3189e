//! An adopted sandbox's messages, with the pod's identity in place of the hull's.

use prost::Message as _;

use super::parts::{inner, put_map, put_text, with_inner, without};
use crate::ledger::Adoption;
use crate::wire::{WireError, put_message, put_varint};

/// Numbers of the fields that carry an identity; 0 where a message has none.
struct Layout {
    metadata: u32,
    created_at: u32,
    labels: u32,
    annotations: u32,
    runtime_handler: u32,
}

const SANDBOX: Layout = Layout {
    metadata: 2,
    created_at: 4,
    labels: 5,
    annotations: 6,
    runtime_handler: 7,
};

const STATUS: Layout = Layout {
    metadata: 2,
    created_at: 4,
    labels: 7,
    annotations: 8,
    runtime_handler: 9,
};

const ATTRIBUTES: Layout = Layout {
    metadata: 2,
    created_at: 0,
    labels: 3,
    annotations: 4,
    runtime_handler: 0,
};

/// `PodSandboxStatus.linux`, `LinuxPodSandboxStatus.namespaces`, `Namespace.options`.
const LINUX: u32 = 6;
const NAMESPACES: u32 = 1;
const OPTIONS: u32 = 2;

fn dress(message: &[u8], layout: &Layout, adoption: &Adoption) -> Result<Vec<u8>, WireError> {
    let Layout {
        metadata,
        created_at,
        labels,
        annotations,
        runtime_handler,
    } = *layout;
    let mut out = without(message, &[metadata, created_at, labels, annotations, runtime_handler])?;
    if let Some(of) = &adoption.config.metadata {
        put_message(&mut out, metadata, of);
    }
    if created_at != 0 {
        // Times are int64: protobuf writes their two's complement.
        put_varint(&mut out, created_at, adoption.adopted_at.cast_unsigned());
    }
    put_map(&mut out, labels, &adoption.config.labels);
    put_map(&mut out, annotations, &adoption.config.annotations);
    if runtime_handler != 0 {
        put_text(&mut out, runtime_handler, &adoption.runtime_handler);
    }
    Ok(out)
}

/// A `PodSandbox` of a list.
pub(crate) fn sandbox(message: &[u8], adoption: &Adoption) -> Result<Vec<u8>, WireError> {
    dress(message, &SANDBOX, adoption)
}

/// The `PodSandboxAttributes` of stats.
pub(crate) fn attributes(message: &[u8], adoption: &Adoption) -> Result<Vec<u8>, WireError> {
    dress(message, &ATTRIBUTES, adoption)
}

/// How containerd shows a sandbox's namespace options.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    /// Until 1.6: always there, the three modes only.
    Modes,
    /// Since 1.7: as the pod gave them, or not at all.
    AsGiven,
}

/// Whether the two eras show this pod's options differently.
pub(crate) fn era_matters(adoption: &Adoption) -> bool {
    namespace_options(adoption, Era::Modes) != namespace_options(adoption, Era::AsGiven)
}

fn namespace_options(adoption: &Adoption, era: Era) -> Option<Vec<u8>> {
    let linux = adoption.config.linux.as_ref();
    let context = linux.and_then(|linux| linux.security_context.as_ref());
    let given = context.and_then(|context| context.namespace_options.clone());
    match era {
        Era::AsGiven => given.map(|options| options.encode_to_vec()),
        Era::Modes => {
            let mut options = given.unwrap_or_default();
            options.target_id.clear();
            options.userns_options = None;
            Some(options.encode_to_vec())
        }
    }
}

/// A `PodSandboxStatus`.
pub(crate) fn status(message: &[u8], adoption: &Adoption, era: Era) -> Result<Vec<u8>, WireError> {
    let out = dress(message, &STATUS, adoption)?;
    let Some(linux) = inner(&out, LINUX)? else {
        return Ok(out);
    };
    let Some(namespaces) = inner(&linux, NAMESPACES)? else {
        return Ok(out);
    };
    let namespaces = match namespace_options(adoption, era) {
        Some(options) => with_inner(&namespaces, OPTIONS, &options)?,
        None => without(&namespaces, &[OPTIONS])?,
    };
    let linux = with_inner(&linux, NAMESPACES, &namespaces)?;
    with_inner(&out, LINUX, &linux)
}
