//! A snapshot's record as it is stored.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use estargz::digest::Digest;
use serde::{Deserialize, Serialize};

use super::Found;
use crate::layer::{LayerOrigin, Usage};
use crate::snapshot::decisions::Fallback;
use crate::snapshot::{Info, Kind, Labels};

/// A stored snapshot; its name is the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: u64,
    pub(super) kind: Kind,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) parent: Option<String>,
    #[serde(default, skip_serializing_if = "Labels::is_empty")]
    pub(super) labels: Labels,
    created: Timestamp,
    updated: Timestamp,
    #[serde(default)]
    pub(super) usage: StoredUsage,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) layer: Option<StoredOrigin>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fallback: Option<StoredFallback>,
}

/// [`Fallback`] as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredFallback {
    reason: String,
    error: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    host: String,
    at: Timestamp,
}

/// Seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Timestamp(u64, u32);

/// [`Usage`] as stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredUsage {
    bytes: u64,
    inodes: u64,
}

/// [`LayerOrigin`] as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredOrigin {
    pub(super) toc_digest: Digest,
    image: String,
    layer_digest: Digest,
}

impl Record {
    /// A record made at `now`. Labels without a value are left out, as containerd does.
    pub(super) fn new(
        id: u64,
        kind: Kind,
        parent: Option<&str>,
        labels: &Labels,
        layer: Option<&LayerOrigin>,
        now: SystemTime,
    ) -> Self {
        let labels = labels
            .iter()
            .filter(|(_, value)| !value.is_empty())
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        let now = Timestamp::from(now);
        Self {
            id,
            kind,
            parent: parent.map(str::to_owned),
            labels,
            created: now,
            updated: now,
            usage: StoredUsage::default(),
            layer: layer.cloned().map(StoredOrigin::from),
            fallback: None,
        }
    }

    pub(super) fn touch(&mut self, now: SystemTime) {
        self.updated = now.into();
    }

    pub(super) fn into_found(self, name: &str) -> Found {
        Found {
            id: self.id,
            usage: Usage {
                bytes: self.usage.bytes,
                inodes: self.usage.inodes,
            },
            layer: self.layer.map(LayerOrigin::from),
            fallback: self.fallback.map(Fallback::from),
            info: Info {
                name: name.to_owned(),
                parent: self.parent,
                kind: self.kind,
                labels: self.labels,
                created: self.created.into(),
                updated: self.updated.into(),
            },
        }
    }
}

impl From<SystemTime> for Timestamp {
    fn from(time: SystemTime) -> Self {
        // A clock before 1970 is not worth a failed pull.
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(since.as_secs(), since.subsec_nanos())
    }
}

impl From<Timestamp> for SystemTime {
    fn from(Timestamp(seconds, nanos): Timestamp) -> Self {
        let since = Duration::from_secs(seconds).checked_add(Duration::from_nanos(nanos.into()));
        since
            .and_then(|since| UNIX_EPOCH.checked_add(since))
            .unwrap_or(UNIX_EPOCH)
    }
}

impl From<Usage> for StoredUsage {
    fn from(Usage { bytes, inodes }: Usage) -> Self {
        Self { bytes, inodes }
    }
}

impl From<Fallback> for StoredFallback {
    fn from(fallback: Fallback) -> Self {
        let Fallback {
            reason,
            error,
            host,
            at,
        } = fallback;
        let at = at.into();
        Self {
            reason,
            error,
            host,
            at,
        }
    }
}

impl From<StoredFallback> for Fallback {
    fn from(stored: StoredFallback) -> Self {
        let StoredFallback {
            reason,
            error,
            host,
            at,
        } = stored;
        let at = at.into();
        Self {
            reason,
            error,
            host,
            at,
        }
    }
}

impl From<LayerOrigin> for StoredOrigin {
    fn from(
        LayerOrigin {
            toc_digest,
            image,
            layer_digest,
        }: LayerOrigin,
    ) -> Self {
        Self {
            toc_digest,
            image,
            layer_digest,
        }
    }
}

impl From<StoredOrigin> for LayerOrigin {
    fn from(
        StoredOrigin {
            toc_digest,
            image,
            layer_digest,
        }: StoredOrigin,
    ) -> Self {
        Self {
            toc_digest,
            image,
            layer_digest,
        }
    }
}
