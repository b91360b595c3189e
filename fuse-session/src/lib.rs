//! A multi-threaded FUSE session loop under [`fuse3::raw::Filesystem`], for read-only file systems.
//!
//! The trait and its reply types are fuse3's; the loop, the protocol records and the mount are ours. One thread reads the
//! `/dev/fuse` descriptor of a quiet session, several that of a busy one. They poll the handler in place and answer without
//! a hop; only a handler that has to wait moves to the runtime.
//!
//! ```no_run
//! # fn example(fs: impl fuse3::raw::Filesystem + Send + Sync + 'static) -> Result<(), Box<dyn std::error::Error>> {
//! use fuse_session::{MountConfig, Session};
//!
//! let mut config = MountConfig::new(tokio::runtime::Handle::current());
//! config.fs_name = "sha256:0123…".to_owned();
//! let session = Session::mount(fs, "/var/lib/hullspeed/layers/0123…/mnt".as_ref(), config)?;
//! assert!(session.is_alive());
//! session.unmount()?;
//! # Ok(()) }
//! ```
//!
//! A session may outlive its process: [`Session::leave`] ends serving and keeps the mount, [`Session::resume`] serves a kept
//! descriptor, after a graceful end as after SIGKILL. Files that are complete can be read by the kernel alone:
//! [`passthrough`].
//!
//! `mount` and `unmount` block: call them through `spawn_blocking`. `closed()` gives a future that resolves when the
//! session ends for whatever reason.
//!
//! # For those who implement the trait
//! - Called methods: `init`, `destroy`, `lookup`, `forget`, `batch_forget`, `getattr`, `readlink`, `open`, `read`,
//!   `release`, `statfs`, `getxattr`, `listxattr`, `flush` (by old kernels only), `opendir`, `readdir`, `readdirplus`, `releasedir`, `access`,
//!   `lseek`. Never called: `ready`, `interrupt`, everything that writes (the mount is read-only; EROFS). A method left
//!   at its default answers ENOSYS: the kernel then stops asking (`open`, `flush`, `opendir`, `getxattr`, `lseek`).
//! - The first poll of a handler runs on a worker thread, inside the runtime's context. Short blocking work there
//!   (`pread` of a local file) is right; waiting for the network must be `.await`, or it takes a worker away.
//! - `ReplyEntry` with `attr.ino == 0` and a `ttl` is a negative entry the kernel may cache. The node id of an entry is
//!   its `attr.ino`; the root is 1. Keep node ids a function of the content, then forgets can be ignored.
//! - `readdir`/`readdirplus` streams start *after* the entry whose `offset` is given (0 = from the start), including
//!   `.` and `..` if wanted; each entry's `offset` is the position after it. The stream is dropped when the reply is
//!   full. Both are used: the kernel chooses.
//! - `read` answers are cut to the requested size; shorter means end of file. [`bytes::Bytes`] are written without a
//!   copy. Open flags worth answering: `FOPEN_KEEP_CACHE`, for directories `FOPEN_CACHE_DIR`.
//! - A handler that panics answers EIO. A pending handler is dropped when its caller is killed or the session ends.

mod abi;
mod channel;
mod control;
mod directory;
mod dispatch;
pub mod forgetting;
mod lifetime;
mod mount;
mod negotiate;
pub mod passthrough;
mod pending;
mod reply;
mod request;
mod roster;
mod session;
mod sys;
mod worker;

pub use lifetime::End;
pub use mount::{DeviceNumber, MountConfig, MountError, WORKERS_MAX};
pub use negotiate::{HandshakeError, Negotiated};
pub use session::{Session, UnmountError, end};

/// Page size the limits are counted in. FUSE counts pages of the machine; with larger ones requests only get larger.
pub(crate) const PAGE_BYTES: usize = 4096;
/// Most payload of one answer: what the kernel asks for at once (256 pages).
pub(crate) const MAX_REPLY_BYTES: usize = 256 * PAGE_BYTES;
