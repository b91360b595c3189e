//! Sessions of layers that cannot be had any more: whoever uses their mounts gets EIO, and does not wait for ever.

use std::ffi::OsStr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use estargz::digest::Digest;
use fuse_session::{MountConfig, Session};
use fuse3::raw::Request;
use fuse3::raw::reply::{
    DirectoryEntry, DirectoryEntryPlus, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEntry,
    ReplyInit, ReplyLSeek, ReplyOpen, ReplyStatFs, ReplyXAttr,
};
use fuse3::{Errno, Result};
use futures_util::Stream;
use futures_util::stream::Empty;
use tokio::runtime::Handle;

use super::kept::{Descriptors, KeptLayer, KeptSession};
use super::{Ended, Forget, Kind, LayerMounted};
use crate::layer::Cause;

/// Nothing is written; the protocol wants a number.
const MAX_WRITE: NonZeroU32 = NonZeroU32::MIN.saturating_add(128 * 1024 - 1);

/// Answers everything with EIO.
struct Refusal;

fn refused<T>() -> Result<T> {
    Err(Errno::from(libc::EIO))
}

/// Goes on with the kept sessions of a layer, and refuses what is asked.
pub(super) fn resume(
    toc: &Digest,
    target: &Path,
    kept: &mut KeptLayer,
    descriptors: &Descriptors,
    runtime: &Handle,
) -> Vec<Box<dyn LayerMounted>> {
    let mut mounts: Vec<Box<dyn LayerMounted>> = Vec::new();
    for KeptSession {
        device,
        number,
        negotiated,
        name,
        key,
    } in std::mem::take(&mut kept.sessions)
    {
        let modes = kept.take_modes(key).map(|_| Descriptors::modes_name(toc, key));
        let names: Vec<_> = modes.into_iter().chain([name]).collect();
        let config = MountConfig::new(runtime.clone());
        match Session::resume(Refusal, device, target, number, negotiated, config) {
            Ok(session) => {
                tracing::error!(%toc, path = %target.display(),
                    "a layer that an earlier process left mounted cannot be served; what is asked of it is an error");
                forget_when_over(&session, names, descriptors, runtime);
                mounts.push(Box::new(RefusedMount {
                    target: target.to_owned(),
                    session,
                }));
            }
            // Its connection is over, or nobody can be told anything by it.
            Err(error) => {
                tracing::warn!(%toc, error = &error as &dyn std::error::Error, "a kept session is given back");
                names.iter().for_each(|name| descriptors.forget(name));
            }
        }
    }
    mounts
}

/// Ends sessions of which not even the mount point is known.
pub(super) fn end(sessions: Vec<KeptSession>, descriptors: &Descriptors) {
    for KeptSession {
        device, number, name, ..
    } in sessions
    {
        let ended = fuse_session::end(device, number);
        tracing::error!(
            name,
            error = ended.err().map(|error| hullspeed_daemon::error::chain(&error)),
            "a layer is gone that an earlier process left mounted; who uses it gets errors"
        );
        descriptors.forget(&name);
    }
}

/// Gives back what is kept of a session once nobody uses its mount any more.
fn forget_when_over(session: &Session, names: Vec<String>, descriptors: &Descriptors, runtime: &Handle) {
    let (closed, descriptors) = (session.closed(), descriptors.clone());
    runtime.spawn(async move {
        if closed.await != fuse_session::End::Left {
            let forget = move || names.iter().for_each(|name| descriptors.forget(name));
            // A panic there has been reported.
            let _ = tokio::task::spawn_blocking(forget).await;
        }
    });
}

struct RefusedMount {
    target: PathBuf,
    session: Session,
}

impl LayerMounted for RefusedMount {
    fn kind(&self) -> Kind {
        Kind::Fuse
    }

    fn target(&self) -> &Path {
        &self.target
    }

    fn is_alive(&self) -> bool {
        self.session.is_alive()
    }

    fn is_shown(&self) -> bool {
        self.session.is_alive() && self.session.is_shown()
    }

    fn forget(&self) -> Forget {
        Box::new(|_| Ok(()))
    }

    fn unmount(self: Box<Self>) -> std::result::Result<Ended, Cause> {
        self.session.unmount()?;
        Ok(Ended::Wholly)
    }

    fn leave(self: Box<Self>) {
        self.session.leave();
    }
}

impl fuse3::raw::Filesystem for Refusal {
    async fn init(&self, _req: Request) -> Result<ReplyInit> {
        Ok(ReplyInit::new(MAX_WRITE))
    }

    async fn destroy(&self, _req: Request) {}

    async fn lookup(&self, _req: Request, _parent: u64, _name: &OsStr) -> Result<ReplyEntry> {
        refused()
    }

    async fn getattr(&self, _req: Request, _inode: u64, _fh: Option<u64>, _flags: u32) -> Result<ReplyAttr> {
        refused()
    }

    async fn readlink(&self, _req: Request, _inode: u64) -> Result<ReplyData> {
        refused()
    }

    async fn open(&self, _req: Request, _inode: u64, _flags: u32) -> Result<ReplyOpen> {
        refused()
    }

    async fn read(&self, _req: Request, _inode: u64, _fh: u64, _offset: u64, _size: u32) -> Result<ReplyData> {
        refused()
    }

    async fn statfs(&self, _req: Request, _inode: u64) -> Result<ReplyStatFs> {
        refused()
    }

    async fn getxattr(&self, _req: Request, _inode: u64, _name: &OsStr, _size: u32) -> Result<ReplyXAttr> {
        refused()
    }

    async fn listxattr(&self, _req: Request, _inode: u64, _size: u32) -> Result<ReplyXAttr> {
        refused()
    }

    async fn opendir(&self, _req: Request, _inode: u64, _flags: u32) -> Result<ReplyOpen> {
        refused()
    }

    async fn readdir<'a>(
        &'a self,
        _req: Request,
        _parent: u64,
        _fh: u64,
        _offset: i64,
    ) -> Result<ReplyDirectory<impl Stream<Item = Result<DirectoryEntry>> + Send + 'a>> {
        refused::<ReplyDirectory<Empty<_>>>()
    }

    async fn readdirplus<'a>(
        &'a self,
        _req: Request,
        _parent: u64,
        _fh: u64,
        _offset: u64,
        _lock_owner: u64,
    ) -> Result<ReplyDirectoryPlus<impl Stream<Item = Result<DirectoryEntryPlus>> + Send + 'a>> {
        refused::<ReplyDirectoryPlus<Empty<_>>>()
    }

    async fn access(&self, _req: Request, _inode: u64, _mask: u32) -> Result<()> {
        refused()
    }

    async fn lseek(&self, _req: Request, _inode: u64, _fh: u64, _offset: u64, _whence: u32) -> Result<ReplyLSeek> {
        refused()
    }
}
