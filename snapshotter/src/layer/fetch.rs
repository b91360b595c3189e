//! The fetch engine: makes chunks resident, each of them once.
//!
//! One [`Engine`] per daemon bounds requests, memory and decompression; one [`LayerFetch`] per open layer knows what of it is
//! under way. A reader calls [`LayerFetch::ensure`] ([`demand`]):
//!
//! 1. [`flight`] tells which members are being fetched already; the reader waits for those and claims the rest;
//! 2. [`plan`] groups the claimed members with their neighbours into ranges, sized by [`readahead`];
//! 3. each group runs as a task of its own ([`group`]), so a reader that goes away wastes nothing: one request, its body cut into
//!    members as it arrives, each decompressed, verified and stored by [`decode`], its waiters woken at once;
//! 4. [`gate`] lets demand pass before what nobody waits for yet.
//!
//! What other layers of the node have is copied from there first ([`reuse`]). What readers will want is fetched before they ask:
//! [`ahead`] of a [`sequence`], the maker's choice ([`prefetch`]), and in the end all of a mounted layer ([`background`]).
//!
//! A request that fails goes on at once at the layer's next source ([`remotes`]), at the byte where it broke; [`health`] knows which
//! hosts are to be left alone, and how many requests each bears. [`tally`] counts what a layer costs. Wrong bytes are asked for once
//! more, alone. Nothing here trusts the source: what is not verified by [`OpenLayer::store`](super::cache::OpenLayer::store) is never
//! readable.

mod ahead;
mod background;
mod decode;
mod demand;
mod download;
mod engine;
mod error;
mod flight;
mod gate;
mod group;
pub(super) mod health;
mod lately;
mod layer;
mod pace;
mod plan;
mod prefetch;
mod readahead;
mod remotes;
mod report;
mod reuse;
mod sequence;
mod tally;

#[cfg(test)]
mod tests;

pub use background::Completion;
pub(super) use decode::ingest;
pub use demand::Reading;
pub use engine::{Engine, FetchOptions};
pub use error::{Failure, FetchError};
pub use layer::{LayerFetch, LayerNames};
pub use prefetch::Extent;
pub use tally::{Amounts, BackgroundState, LastFailure, Tally};
