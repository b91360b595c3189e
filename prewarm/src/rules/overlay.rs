//! An adopted sandbox's messages, with the pod's identity in place of the hull's.

use prost::Message as _;

use super::parts::{inner, put_map, put_text, with_inner, without};
use crate::containerd::Release;
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

/// Which containerd it is, where its answers differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Era {
    /// A status always has namespace options, the three modes only. A list of stats fails with its first sandbox.
    Until1_6,
    /// Namespace options are as the pod gave them, or not there. A list of stats goes on without sandboxes that are
    /// going away, and says what all the others failed with.
    Since1_7,
}

impl Era {
    /// The era of a version, such as `1.6.20~ds1`.
    pub(crate) fn of(version: &str) -> Self {
        match Release::of(version) {
            Some(Release { major: 1, minor, .. }) if minor < 7 => Self::Until1_6,
            _ => Self::Since1_7,
        }
    }
}

/// Whether the two eras show this pod's options differently.
pub(crate) fn era_matters(adoption: &Adoption) -> bool {
    namespace_options(adoption, Era::Until1_6) != namespace_options(adoption, Era::Since1_7)
}

fn namespace_options(adoption: &Adoption, era: Era) -> Option<Vec<u8>> {
    let linux = adoption.config.linux.as_ref();
    let context = linux.and_then(|linux| linux.security_context.as_ref());
    let given = context.and_then(|context| context.namespace_options.clone());
    match era {
        Era::Since1_7 => given.map(|options| options.encode_to_vec()),
        Era::Until1_6 => {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eras_by_version() {
        assert_eq!(Era::of("1.6.20~ds1"), Era::Until1_6);
        assert_eq!(Era::of("v1.6.20"), Era::Until1_6);
        assert_eq!(Era::of("1.7.24"), Era::Since1_7);
        assert_eq!(Era::of("2.1.9"), Era::Since1_7);
        assert_eq!(Era::of("unknown"), Era::Since1_7);
    }
}
