//! From a decoded operation to the file system's method and back to an answer.
//!
//! The only module that knows both [`Operation`] and the trait's methods. Its futures own everything they need, so that
//! [`crate::worker`] may poll them in place and hand them to the runtime.

use std::sync::Arc;

use fuse3::raw::reply::{ReplyData, ReplyXAttr};
use fuse3::raw::{Filesystem, Request as Asker};

use crate::directory;
use crate::passthrough::Opener;
use crate::reply::Reply;
use crate::request::{Caller, Operation, ReadRange};

/// What a file system must be: shared by worker threads and runtime tasks.
pub(crate) trait Shareable: Filesystem + Send + Sync + 'static {}
impl<FS: Filesystem + Send + Sync + 'static> Shareable for FS {}

/// Runs one operation. Operations that concern the session itself (interrupt, destroy, refused ones) never come here;
/// should one, ENOSYS is the harmless answer.
pub(crate) async fn answer<FS: Shareable>(
    fs: Arc<FS>,
    caller: Caller,
    operation: Operation,
    opener: Option<Arc<Opener>>,
) -> Reply {
    let asker = Asker {
        unique: caller.unique,
        uid: caller.uid,
        gid: caller.gid,
        pid: caller.pid,
    };
    let node = caller.node;
    match operation {
        Operation::Lookup { name } => reply(fs.lookup(asker, node, &name).await),
        Operation::Getattr { fh, flags } => reply(fs.getattr(asker, node, fh, flags).await),
        Operation::Readlink => fs
            .readlink(asker, node)
            .await
            .map_or_else(Reply::from, |link| Reply::link(link.data)),
        Operation::Open { flags } => match (fs.open(asker, node, flags).await, opener) {
            (Ok(open), Some(opener)) => match opener.answer(node, flags, &open) {
                Ok(open) => Reply::record(&open),
                Err(errno) => {
                    // The kernel knows of no handle then.
                    let _ = fs.release(asker, node, open.fh, flags, 0, false).await;
                    Reply::Error(errno.raw_os_error())
                }
            },
            (outcome, _) => reply(outcome),
        },
        Operation::Read(range) => {
            let ReadRange { fh, offset, size, .. } = range;
            let data = |read: ReplyData| Reply::data(read.data, size);
            fs.read(asker, node, fh, offset, size)
                .await
                .map_or_else(Reply::from, data)
        }
        Operation::Release {
            fh,
            flags,
            lock_owner,
            flush,
        } => done(fs.release(asker, node, fh, flags, lock_owner, flush).await),
        Operation::Statfs => reply(fs.statfs(asker, node).await),
        Operation::Getxattr { name, size } => xattr(fs.getxattr(asker, node, &name, size).await, size),
        Operation::Listxattr { size } => xattr(fs.listxattr(asker, node, size).await, size),
        Operation::Flush { fh, lock_owner } => done(fs.flush(asker, node, fh, lock_owner).await),
        Operation::Opendir { flags } => reply(fs.opendir(asker, node, flags).await),
        Operation::Readdir(range) => match fs.readdir(asker, node, range.fh, range.offset.cast_signed()).await {
            Ok(listing) => directory::pack(listing.entries, range.size).await,
            Err(errno) => errno.into(),
        },
        Operation::Readdirplus(range) => {
            match fs
                .readdirplus(asker, node, range.fh, range.offset, range.lock_owner)
                .await
            {
                Ok(listing) => directory::pack(listing.entries, range.size).await,
                Err(errno) => errno.into(),
            }
        }
        Operation::Releasedir { fh, flags } => done(fs.releasedir(asker, node, fh, flags).await),
        Operation::Access { mask } => done(fs.access(asker, node, mask).await),
        Operation::Lseek { fh, offset, whence } => fs
            .lseek(asker, node, fh, offset, whence)
            .await
            .map_or_else(Reply::from, |seek| {
                Reply::record(&crate::abi::LseekOut { offset: seek.offset })
            }),
        Operation::Forget { nodes } => {
            forget(&*fs, asker, &nodes).await;
            Reply::Empty
        }
        Operation::Interrupt { .. } | Operation::Destroy | Operation::Ignored | Operation::Refused { .. } => {
            Reply::Error(libc::ENOSYS)
        }
    }
}

async fn forget<FS: Shareable>(fs: &FS, asker: Asker, nodes: &[(u64, u64)]) {
    match nodes {
        [(node, nlookup)] => fs.forget(asker, *node, *nlookup).await,
        many => fs.batch_forget(asker, many).await,
    }
}

fn reply<T: Into<Reply>>(outcome: fuse3::Result<T>) -> Reply {
    outcome.map_or_else(Reply::from, T::into)
}

fn done(outcome: fuse3::Result<()>) -> Reply {
    outcome.map_or_else(Reply::from, |()| Reply::Empty)
}

fn xattr(outcome: fuse3::Result<ReplyXAttr>, size: u32) -> Reply {
    outcome.map_or_else(Reply::from, |value| Reply::xattr(value, size))
}
