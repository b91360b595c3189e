//! Why chunks did not become resident.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use estargz::member::MemberError;

use crate::layer::cache::StoreError;
use crate::layer::source::SourceError;

/// A failed fetch.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The source did not deliver, after all attempts.
    #[error("the source did not deliver after {attempts} attempts")]
    Source {
        /// Requests made to the source asked last.
        attempts: u32,
        /// The last failure.
        #[source]
        source: SourceError,
    },
    /// The source delivered wrong bytes, twice.
    #[error("the source delivered wrong bytes for chunk {chunk}")]
    Corrupt {
        /// Number of the chunk in its layer.
        chunk: u32,
        /// What was wrong.
        #[source]
        reason: Corruption,
    },
    /// The bytes are right and could not be stored.
    #[error("the chunk cannot be stored")]
    Store(#[source] StoreError),
    /// The read waited as long as it may. Who fetches for it goes on.
    #[error("no source delivered within {waited:?}")]
    Deadline {
        /// How long it waited.
        waited: Duration,
    },
    /// The daemon is stopping, or the fetch died.
    #[error("the fetch was abandoned")]
    Abandoned,
}

/// How bytes were wrong.
#[derive(Debug, thiserror::Error)]
pub enum Corruption {
    /// The compressed member cannot be decompressed, or ends before the chunk does.
    #[error("its member cannot be decompressed")]
    Inflate(#[source] Arc<MemberError>),
    /// Another digest than the TOC promises.
    #[error("wrong digest")]
    Digest(#[source] StoreError),
}

/// A failure that several readers are told of.
pub type Failure = Arc<FetchError>;

impl FetchError {
    /// Stable, short name of the failure.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Source { .. } => "source",
            Self::Corrupt { .. } => "corrupt",
            Self::Store(_) => "store",
            Self::Deadline { .. } => "deadline",
            Self::Abandoned => "stopped",
        }
    }

    /// The disk's error, where the disk is at fault.
    pub fn disk_error(&self) -> Option<&io::Error> {
        match self {
            Self::Store(StoreError::Write { source, .. }) => Some(source),
            Self::Store(_) | Self::Source { .. } | Self::Corrupt { .. } | Self::Deadline { .. } | Self::Abandoned => {
                None
            }
        }
    }
}
