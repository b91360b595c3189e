//! The layer cache on disk: one directory per layer, named by its TOC digest.
//!
//! ```text
//! <root>/layers/<hex toc digest>/
//!   toc       the verified TOC bytes             index     their compact form, mapped into memory
//!   data      sparse; every chunk of every regular file at the place that the index gives it, uncompressed
//!   resident  checkpoint of the bitmap of resident chunks
//!   origin    where the layer came from          mnt/      where it is mounted
//!   erofs     its EROFS image, once it was mounted natively
//! ```
//!
//! Invariants, all of them kept in this module and its children:
//! - a layer directory appears under its name only when `toc`, `index`, `data` and `origin` are in place and durable;
//! - a byte reaches `data` only through [`OpenLayer::store`], which compares the chunk's digest first, or as a clone of another layer's
//!   ([`OpenLayer::adopt_chunk`]), which is compared before it counts;
//! - a bit reaches `resident` only after the data under it is durable ([`OpenLayer::checkpoint`]), and leaves it before they go;
//! - a layer is open once in the process, and stays as long as it is open or a snapshot refers to it.
//!
//! [`LayerStore`] opens and creates layers for [`super::layers`]; the fetch engine writes and the filesystem reads a
//! [`CachedLayer`]. All calls are synchronous; those that sync files belong on a blocking thread.

mod evict;
mod files;
mod heat;
mod hold;
mod image;
mod kernel;
mod layer;
pub mod limits;
mod report;
mod residency;
pub mod reuse;
mod room;
mod shelf;
mod stale;
mod store;

#[cfg(test)]
mod tests;

pub use evict::Dropped;
pub use hold::Held;
pub use image::LayerImageError;
pub use layer::{CachedLayer, OpenLayer, StoreError};
pub use report::CacheLimits;
pub use residency::{Residency, ResidencyError};
pub use room::NoRoom;
pub use shelf::Pin;
pub use stale::{detach_stale, kind_at, stack_at};
pub use store::{CacheError, Inherited, LayerStore, Origin};
