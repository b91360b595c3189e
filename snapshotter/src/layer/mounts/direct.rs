//! Files that the kernel reads by itself under a FUSE mount: those that are complete when they are first opened.
//!
//! A layer's files lie one behind the other in `data`, and FUSE passes a read on at the same place of another file. So what is passed on
//! to is the file in an EROFS mount of the layer that nobody sees: the same `data`, and no events, because all of the file is there. From
//! the first such file on nothing of the layer is given up any more until the next boot: what was passed on to outlives every mount.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use estargz::index::{Chunk, FileKind};
use fuse_session::passthrough::Backing;
use hullspeed_erofs::mount::{Detached, Mounter};
use rustix::fs::{Mode, OFlags};

use super::pages;
use crate::layer::Cause;
use crate::layer::cache::LayerStore;
use crate::layer::fetch::LayerFetch;

/// The files of one layer.
pub(super) struct DirectFiles {
    fetch: Arc<LayerFetch>,
    store: LayerStore,
    mount: OnceLock<Option<Detached>>,
}

impl DirectFiles {
    pub(super) fn new(fetch: &Arc<LayerFetch>, store: &LayerStore) -> Self {
        Self {
            fetch: fetch.clone(),
            store: store.clone(),
            mount: OnceLock::new(),
        }
    }

    fn mount(&self) -> Option<&Detached> {
        let mount = self.mount.get_or_init(|| {
            let mount = self.mounted();
            mount
                .inspect_err(|error| {
                    tracing::info!(toc = %self.fetch.layer().toc_digest(), error = &**error as &dyn std::error::Error,
                        "no file of the layer is read by the kernel itself");
                })
                .ok()
        });
        mount.as_ref()
    }

    fn mounted(&self) -> Result<Detached, Cause> {
        let layer = self.fetch.layer();
        let image = layer.erofs_image()?;
        if !self.store.leave_for_good(layer)? {
            return Err("all of it does not fit into the cache".into());
        }
        // Its read-ahead is not set, so that it need not be told from other mounts; each layer may have a mounter of its own.
        Ok(Mounter::default().create(&image, layer.content().as_fd())?)
    }
}

impl DirectFiles {
    /// Has the kernel forget what it has read of a chunk by itself.
    pub(super) fn forget(&self, chunk: &Chunk) -> io::Result<()> {
        match self.mount.get() {
            Some(Some(mount)) => pages::forget(mount.as_fd(), self.fetch.layer(), chunk),
            _ => Err(io::Error::other(
                "the file was first opened in an earlier process, and what the kernel has of it cannot be reached",
            )),
        }
    }
}

impl Backing for DirectFiles {
    fn backing(&self, inode: u64) -> Option<OwnedFd> {
        let layer = self.fetch.layer();
        let file = layer.index().inode(inode)?;
        let is_here = || layer.residency().contains_all(file.chunks.clone());
        if file.kind != FileKind::Regular || file.size == 0 || !is_here() {
            return None;
        }
        let mount = self.mount()?;
        // Something may have been given up before nothing was any more.
        if !is_here() {
            return None;
        }
        let path = layer.index().path_of(inode);
        let path = Path::new(OsStr::from_bytes(path.strip_prefix(b"/").unwrap_or(&path)));
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = rustix::fs::openat(mount.as_fd(), path, flags, Mode::empty());
        opened
            .inspect_err(
                |errno| tracing::debug!(path = %path.display(), %errno, "a file is not read by the kernel itself"),
            )
            .ok()
    }
}
