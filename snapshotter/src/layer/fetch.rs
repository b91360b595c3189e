//! The fetch engine: makes chunks resident, each of them once.
//!
//! One [`Engine`] per daemon bounds requests, memory and decompression; one [`LayerFetch`] per open layer knows what of it is
//! under way. A reader calls [`LayerFetch::ensure`]:
//!
//! 1. [`flight`] tells which members are being fetched already; the reader waits for those and claims the rest;
//! 2. [`plan`] groups the claimed members with their neighbours into ranges, sized by [`readahead`];
//! 3. each group runs as a task of its own ([`group`]), so a reader that goes away wastes nothing: one request, its body cut into
//!    members as it arrives, each decompressed, verified and stored by [`decode`], its waiters woken at once;
//! 4. [`gate`] lets demand pass before prefetch.
//!
//! A body that breaks is continued at the byte where it broke; if its source gives up, at the layer's next one ([`remotes`]).
//! Wrong bytes are asked for once more, alone. Nothing here trusts the source: what is not verified by [`CachedLayer::store`](super::cache::CachedLayer::store) is never readable.

mod decode;
mod download;
mod engine;
mod error;
mod flight;
mod gate;
mod group;
mod layer;
mod plan;
mod prefetch;
mod readahead;
mod remotes;
mod report;

#[cfg(test)]
mod tests;

pub(super) use decode::ingest;
pub use engine::{Engine, FetchOptions};
pub use error::{Failure, FetchError};
pub use layer::{LayerFetch, LayerNames};
pub use prefetch::Extent;
