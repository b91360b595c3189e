//! The ways to mount a layer, and what both have in common.
//!
//! [`Way`] mounts a layer where its directory says, and takes up again what an earlier process of this daemon left; [`LayerMounted`] is a
//! layer that is mounted. Both block, and are called on threads that may.
//!
//! What keeps a mount alive without a process that serves it are descriptors in a store (see [`kept`]). With a store a stop *leaves*
//! mounts: who reads of them waits for the next process.

mod direct;
pub mod fuse;
pub mod kept;
pub mod native;
mod pages;
mod refused;
pub mod ways;

use std::io;
use std::path::Path;
use std::sync::Arc;

use estargz::index::Chunk;

use super::Cause;
use super::cache::LayerStore;
use super::fetch::LayerFetch;
use kept::KeptLayer;

/// How a layer is mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// EROFS, which the kernel serves.
    Erofs,
    /// FUSE, which this process serves.
    Fuse,
}

impl Kind {
    /// Name in metrics and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Erofs => "erofs",
            Self::Fuse => "fuse",
        }
    }
}

/// A way to mount layers.
pub trait Way: Send + Sync {
    /// Mounts the layer on its mount point.
    fn mount(&self, fetch: &Arc<LayerFetch>, store: &LayerStore) -> Result<Box<dyn LayerMounted>, Cause>;

    /// Goes on serving what an earlier process mounted of the layer in this way, and takes that from `kept`.
    fn resume(
        &self,
        fetch: &Arc<LayerFetch>,
        store: &LayerStore,
        kept: &mut KeptLayer,
    ) -> Vec<Result<Box<dyn LayerMounted>, Cause>>;
}

/// What is left of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Nothing.
    Wholly,
    /// Somebody has its file system in use, and is served on.
    InUse,
}

/// Makes the kernel forget what it has read of a chunk.
pub type Forget = Box<dyn FnOnce(&Chunk) -> io::Result<()> + Send>;

/// A layer that is mounted. Dropping it without a word unmounts it.
pub trait LayerMounted: Send + Sync {
    /// How.
    fn kind(&self) -> Kind;

    /// Where.
    fn target(&self) -> &Path;

    /// Whether the mount is there and served.
    fn is_alive(&self) -> bool;

    /// Whether those who come now see it; not if another mount has taken its place.
    fn is_shown(&self) -> bool;

    /// What makes the kernel forget a chunk; it may wait for reads that are under way, and so is not called with locks held.
    fn forget(&self) -> Forget;

    /// Unmounts. Who has files open finishes, or gets errors after a while; nobody ever reads what is not there.
    fn unmount(self: Box<Self>) -> Result<Ended, Cause>;

    /// Stops serving and leaves the mount to the next process; unmounts what cannot be left.
    fn leave(self: Box<Self>);
}
