//! Where the compressed bytes of a layer come from.
//!
//! A [`BlobSource`] answers one range with one stream; retrying, coalescing and verifying are the fetch engine's. The
//! registry is one source; mirrors, peers and a local content store can be others.

pub mod registry;

#[cfg(test)]
pub(crate) mod scripted;

use std::ops::Range;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::Stream;

/// Why a source did not deliver.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Asking again may help: a broken connection, a stall, an overloaded server.
    #[error("{what}")]
    Transient {
        /// What failed.
        what: String,
        /// How busy the host says it is, if that is why.
        load: Option<Overload>,
        /// The failure under it.
        #[source]
        cause: Option<BoxError>,
    },
    /// Asking again will not help soon: not found, not authorised, an answer that breaks the protocol.
    #[error("{what}")]
    Permanent {
        /// What failed.
        what: String,
        /// Class of the failure for metrics, from a fixed set.
        class: &'static str,
        /// The failure under it.
        #[source]
        cause: Option<BoxError>,
    },
}

/// A host that answers, and has too much to do (429, 5xx).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overload {
    /// How long it wants to be left alone, if it says so.
    pub retry_after: Option<Duration>,
}

/// An error of a source's own machinery.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl SourceError {
    /// A failure that may pass.
    pub fn transient(what: impl Into<String>) -> Self {
        Self::Transient {
            what: what.into(),
            load: None,
            cause: None,
        }
    }

    /// What a host that has too much to do said of it.
    pub fn overload(&self) -> Option<Overload> {
        match self {
            Self::Transient { load, .. } => *load,
            Self::Permanent { .. } => None,
        }
    }

    /// Whether asking again may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Transient { .. })
    }

    /// Class of the failure for metrics, from a fixed set.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Transient { .. } => "transient",
            Self::Permanent { class, .. } => class,
        }
    }
}

/// What a request is for; the order is the order of importance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// A reader or a mount waits for it.
    Demand,
    /// Files that the image's maker expects to be read first.
    Prefetch,
    /// What an operator wants resident, some time.
    Warm,
    /// The rest of a mounted layer.
    Background,
}

impl Priority {
    /// The metrics' `kind` label.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Demand => "demand",
            Self::Prefetch => "prefetch",
            Self::Warm => "warm",
            Self::Background => "background",
        }
    }
}

/// The bytes of an answer, in order.
pub type ByteStream = Pin<Box<dyn Stream<Item = Result<Bytes, SourceError>> + Send>>;

/// The end of a blob.
pub struct Tail {
    /// Where in the blob the bytes begin.
    pub start: u64,
    /// Size of the whole blob.
    pub blob_size: u64,
    /// The bytes up to the blob's end.
    pub body: ByteStream,
}

/// A blob that can be read in ranges.
#[async_trait]
pub trait BlobSource: Send + Sync + 'static {
    /// The host that is asked, as hosts.toml or the image reference names it. Sources of one host share its health.
    fn host(&self) -> &str;

    /// Tells sources apart that ask one host in different ways: by scheme, or below another path.
    fn identity(&self) -> &str {
        self.host()
    }

    /// What came from here was wrong or stopped coming; whatever is known of the way there is to be found out anew.
    fn distrust(&self) {}

    /// Size of the blob, where it is known without asking.
    fn size(&self) -> Option<u64>;

    /// Whether the server sends the whole blob whatever range is asked for, as far as is known: each request costs all that lies
    /// before its range.
    fn ignores_ranges(&self) -> bool {
        false
    }

    /// The bytes of `range`, which is neither empty nor beyond the blob's end.
    ///
    /// The stream gives exactly these bytes or ends in an error; a stream that ends early is treated as broken.
    async fn read(&self, range: Range<u64>, priority: Priority) -> Result<ByteStream, SourceError>;

    /// The last `length` bytes (all of it if the blob is shorter), for a blob whose size is not known.
    async fn read_tail(&self, length: u64) -> Result<Tail, SourceError>;
}
