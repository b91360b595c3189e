//! OCI distribution client: credentials, manifests, ranged blob reads, uploads.
//!
//! One [`Client`] serves a whole process; it is cheap to clone and keeps connections, tokens and the final addresses of
//! redirected blobs. Everything that a server says is treated as hostile: bodies are bounded ([`limits`]), digests are
//! checked, redirects are followed by hand so that credentials never reach another host, and every wait is bounded by
//! *progress*, not by total time. Callers: the `estargz` command (whole images) and the snapshotter's fetch engine
//! (manifests and [`Client::blob_range`]).

mod auth;
mod blob;
mod body;
mod client;
mod credentials;
mod digest;
mod duration;
mod endpoint;
mod error;
mod exchange;
mod files;
mod handed_over;
mod hosts;
pub mod limits;
mod manifest;
mod range;
mod reference;
mod retry;
mod tls;
mod turns;
mod upload;
mod urls;

pub use blob::BlobStream;
pub use client::{Client, ClientOptions, HostHandle, check_ca_file};
pub use credentials::{CredentialError, Credentials, Login, ProviderError, Providers, check_credentials_file};
pub use digest::{Digest, DigestError, Hasher};
pub use error::{Error, ErrorClass, Fault};
pub use handed_over::{HandedOver, InUse, Keeping, Place, PlaceError};
pub use manifest::{MANIFEST_ACCEPT, Manifest};
pub use range::{RangeResponse, RangeSpec};
pub use reference::{Reference, ReferenceError, Version};
pub use retry::RetryPolicy;
pub use upload::{Progress, Upload, Uploaded};
