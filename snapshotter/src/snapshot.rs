//! The snapshots service as an ordinary library: no gRPC types, tested without a socket.
//!
//! - [`service`] is the entry: every operation of containerd's service, with its semantics;
//! - [`store`] keeps the metadata in transactions, and knows neither directories nor mounts;
//! - [`directories`] owns `<root>/snapshots`;
//! - [`mounts`], [`labels`], [`filter`] and [`usage`] are pure parts;
//! - [`recover`] brings the mounts of lazy layers back after a start;
//! - [`decisions`] remembers which layers are not lazy, and why; [`outline`] is what reports need of snapshots.
//!
//! # Invariants
//! - A transaction never waits for a network or a mount.
//! - A snapshot that is in the metadata has its directory; a directory without a snapshot is garbage.
//! - A lazy layer is released only when no snapshot refers to it, and never while one is being made of it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use estargz::digest::Digest;
use serde::{Deserialize, Serialize};

use crate::layer::NotLazy;

pub mod decisions;
pub mod directories;
pub mod filter;
pub mod labels;
pub mod mounts;
pub mod no_layers;
pub mod outline;
pub mod recover;
mod remote;
pub mod service;
pub mod store;
pub mod usage;

pub use service::{Service, ServiceOptions};

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// State of a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Read-only, made of a committed parent.
    View,
    /// Writable.
    Active,
    /// Immutable; the only kind that can be a parent.
    Committed,
}

impl Kind {
    /// The name that filters use.
    pub fn name(self) -> &'static str {
        match self {
            Self::View => "view",
            Self::Active => "active",
            Self::Committed => "committed",
        }
    }
}

/// A snapshot as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Key of an active or view snapshot, name of a committed one.
    pub name: String,
    /// Name of the parent.
    pub parent: Option<String>,
    /// State.
    pub kind: Kind,
    /// Labels.
    pub labels: Labels,
    /// When it was made or committed.
    pub created: SystemTime,
    /// When its labels changed last.
    pub updated: SystemTime,
}

/// Why an operation of the service failed. `grpc` maps each to a status.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such snapshot.
    #[error("snapshot {key:?} does not exist")]
    NotFound {
        /// Key or name asked for.
        key: String,
    },
    /// No such parent.
    #[error("parent snapshot {parent:?} does not exist")]
    ParentNotFound {
        /// Name asked for.
        parent: String,
    },
    /// The key or name is taken.
    #[error("snapshot {key:?} already exists")]
    AlreadyExists {
        /// Key or name.
        key: String,
    },
    /// The target of a remote snapshot is there: the layer needs no unpacking.
    #[error("target snapshot {target:?} already exists")]
    TargetExists {
        /// Name of the target.
        target: String,
    },
    /// A new snapshot's parent is active or a view.
    #[error("parent snapshot {parent:?} is not committed")]
    ParentNotCommitted {
        /// Name of the parent.
        parent: String,
    },
    /// A commit names a parent that is active or a view.
    #[error("new parent snapshot {parent:?} is not committed")]
    NewParentNotCommitted {
        /// Name of the parent.
        parent: String,
    },
    /// A commit names a parent other than the snapshot's.
    #[error("cannot change the parent of snapshot {key:?} to {parent:?} on commit")]
    ParentChanged {
        /// Key of the active snapshot.
        key: String,
        /// The other parent.
        parent: String,
    },
    /// Commit of a view or of a committed snapshot.
    #[error("snapshot {key:?} is not active")]
    NotActive {
        /// Key asked for.
        key: String,
    },
    /// Mounts of a committed snapshot.
    #[error("snapshot {key:?} is committed and has no mounts")]
    NoMounts {
        /// Name asked for.
        key: String,
    },
    /// Removal of a snapshot that others are made of.
    #[error("cannot remove snapshot {key:?}: it has children")]
    HasChildren {
        /// Name asked for.
        key: String,
    },
    /// A key or name that is empty or too long.
    #[error("a snapshot's {what} must have 1 to {} bytes, not {length}", store::MAX_NAME_BYTES)]
    BadName {
        /// `key`, `name` or `parent`.
        what: &'static str,
        /// Its length.
        length: usize,
    },
    /// A label over containerd's limit.
    #[error(
        "label {key:?} has {length} bytes with its value, more than the {} allowed",
        labels::MAX_LABEL_BYTES
    )]
    LabelTooLong {
        /// The label's key, shortened.
        key: String,
        /// Bytes of key and value.
        length: usize,
    },
    /// An update of something immutable.
    #[error("cannot update field {field:?} of snapshot {key:?}: only labels can be changed")]
    ImmutableField {
        /// Key or name.
        key: String,
        /// Path in the mask.
        field: String,
    },
    /// A filter that cannot be parsed.
    #[error("filter {filter:?} cannot be parsed")]
    Filter {
        /// The filter, shortened.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: filter::FilterError,
    },
    /// A lazy layer below the snapshot cannot be mounted again.
    #[error("layer with TOC {toc} below snapshot {key:?} is not available")]
    LayerUnavailable {
        /// Key of the snapshot.
        key: String,
        /// Identity of the layer.
        toc: Digest,
        /// Why.
        #[source]
        source: Box<NotLazy>,
    },
    /// A snapshot's directory cannot be made, read or measured.
    #[error("cannot {action} {}", path.display())]
    Directory {
        /// What was tried.
        action: &'static str,
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The metadata cannot be read or written.
    #[error("the snapshot metadata cannot be used")]
    Store(#[from] store::StoreError),
    /// The task of the operation ended early, which is a defect.
    #[error("the operation ended early")]
    Interrupted(#[source] tokio::task::JoinError),
    /// The daemon is stopping.
    #[error("the snapshotter is stopping")]
    Stopping,
}

impl Error {
    /// Makes the closure for `map_err` of a directory operation.
    pub(crate) fn directory(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Directory { action, path, source }
    }
}
