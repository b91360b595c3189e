//! One mounted, served file system.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::mpsc;
use std::task::{Context, Waker};
use std::time::Duration;

use fuse3::raw::Filesystem;
use futures_util::FutureExt;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use thiserror::Error;
use tokio::runtime::Handle;

use crate::channel::Channel;
use crate::forgetting::Notifier;
use crate::lifetime::{End, Lifetime};
use crate::mount::{self, Detached, DeviceNumber, MountConfig, MountError};
use crate::negotiate::{self, Negotiated, Wishes};
use crate::passthrough::Opener;
use crate::pending::Pending;
use crate::roster::Roster;
use crate::worker::Worker;

mod succession;

pub use self::succession::end;

/// How long the file system's `init` may take.
const INIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long workers may take to end once the connection is cut off. Only a handler that blocks its thread takes longer.
const JOIN_PATIENCE: Duration = Duration::from_secs(5);

/// The session did not end cleanly.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UnmountError {
    /// The kernel refused to unmount.
    #[error("cannot unmount {target}", target = .target.display())]
    Unmount {
        /// The mount point.
        target: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// Workers are stuck in handlers that block their thread. They end when those return.
    #[error("{workers} workers of {target} are still busy in handlers", target = .target.display())]
    WorkersBusy {
        /// The mount point.
        target: PathBuf,
        /// How many.
        workers: usize,
    },
}

/// A mounted file system and the threads that serve it. Dropping it unmounts, like [`Session::unmount`].
///
/// Never touch the mount from a worker or from a handler: a file system that waits for itself waits for ever.
#[derive(Debug)]
pub struct Session {
    target: PathBuf,
    device: DeviceNumber,
    negotiated: Negotiated,
    channel: Arc<Channel>,
    lifetime: Arc<Lifetime>,
    pending: Arc<Pending>,
    roster: Arc<Roster>,
    unmount_grace: Duration,
    unmounted: bool,
}

impl Session {
    /// Mounts `fs` on the directory `target` and serves it until the session is unmounted or dropped.
    ///
    /// Blocks for the handshake, and so for the file system's `init`: call it through `spawn_blocking` in async code.
    /// When it returns, the mount is visible and answers. On failure nothing is left behind.
    ///
    /// # Errors
    /// See [`MountError`].
    pub fn mount<FS>(fs: FS, target: &Path, config: MountConfig) -> Result<Self, MountError>
    where
        FS: Filesystem + Send + Sync + 'static,
    {
        config.check()?;
        let target = std::path::absolute(target).unwrap_or_else(|_| target.to_owned());
        let channel = Arc::new(Channel::new(mount::open_device()?));
        let detached = Detached::create(channel.fd().as_fd(), &target, &config)?;
        let fs = Arc::new(fs);
        let wishes = Wishes {
            max_background: config.max_background,
            readahead_bytes: config.read_ahead_kib.saturating_mul(1024),
            passthrough: config.passthrough.is_some(),
            posix_acl: config.posix_acl,
        };
        let negotiated = negotiate::handshake(&channel, wishes, |asker| initialise(&fs, asker, &config.runtime))
            .map_err(|source| MountError::Handshake {
                target: target.clone(),
                source,
            })?;
        mount::set_read_ahead(detached.device, config.read_ahead_kib);
        let mut session = Self::serve(fs, channel, target, detached.device, negotiated, &config)?;
        if let Err(error) = detached.attach(&session.target) {
            // Its mount went with the detached descriptor, so the workers end by themselves.
            session.unmounted = true;
            session.end(Duration::ZERO);
            return Err(error);
        }
        tracing::debug!(mount_point = %session.target.display(), minor = session.device.minor, "mounted");
        Ok(session)
    }

    /// Starts to serve an initialised connection.
    fn serve<FS>(
        fs: Arc<FS>,
        channel: Arc<Channel>,
        target: PathBuf,
        device: DeviceNumber,
        negotiated: Negotiated,
        config: &MountConfig,
    ) -> Result<Self, MountError>
    where
        FS: Filesystem + Send + Sync + 'static,
    {
        let limit = config.workers.get();
        let passthrough = config.passthrough.clone().filter(|_| negotiated.passes_through());
        let opener = passthrough.map(|passthrough| Arc::new(Opener::new(Arc::clone(&channel), passthrough)));
        let session = Self {
            target,
            device,
            negotiated,
            channel,
            // The first worker, started below.
            lifetime: Arc::new(Lifetime::new(1)),
            pending: Arc::new(Pending::new(config.max_pending, limit)),
            roster: Arc::new(Roster::new(limit, config.worker_patience)),
            unmount_grace: config.unmount_grace,
            unmounted: false,
        };
        let first = Worker {
            index: session.roster.enlist().unwrap_or(0),
            roster: Arc::clone(&session.roster),
            fs,
            channel: Arc::clone(&session.channel),
            pending: Arc::clone(&session.pending),
            lifetime: Arc::clone(&session.lifetime),
            runtime: config.runtime.clone(),
            device,
            can_resend: negotiated.can_resend(),
            opener,
        };
        match first.start() {
            Ok(()) => Ok(session),
            Err(error) => {
                let mut session = session;
                session.lifetime.leave(End::Unmounted);
                session.unmounted = true;
                session.end(Duration::ZERO);
                Err(MountError::Thread(error))
            }
        }
    }

    /// Where the file system is mounted.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Whether the mount is where it was put; not if somebody took it away or put another in its place, and it lives on for those
    /// who use it.
    pub fn is_shown(&self) -> bool {
        mount::device_of(CWD, &self.target).is_ok_and(|found| found == self.device)
    }

    /// Device number of the mount.
    pub fn device(&self) -> DeviceNumber {
        self.device
    }

    /// What the kernel and this session agreed on; store it beside the descriptor to resume without a handshake.
    pub fn negotiated(&self) -> &Negotiated {
        &self.negotiated
    }

    /// Handlers pending now.
    pub fn pending(&self) -> usize {
        self.pending.count()
    }

    /// Worker threads now: one while nobody asks for anything.
    pub fn workers(&self) -> usize {
        self.lifetime.running()
    }

    /// Whether the mount is served: no worker has found the session to be over.
    pub fn is_alive(&self) -> bool {
        self.lifetime.is_alive()
    }

    /// Resolves when the session has ended by whatever cause (someone ran `umount`, the connection was aborted, the
    /// device failed). The future does not borrow the session.
    pub fn closed(&self) -> impl Future<Output = End> + Send + 'static {
        let mut closed = self.lifetime.closed();
        // Keeps the sender alive, so that the wait cannot fail.
        let lifetime = Arc::clone(&self.lifetime);
        async move {
            let end = closed.wait_for(Option::is_some).await.ok().and_then(|end| *end);
            drop(lifetime);
            end.unwrap_or(End::Unmounted)
        }
    }

    /// What the kernel is told by to forget what it has read: see [`crate::forgetting`].
    pub fn notifier(&self) -> Notifier {
        Notifier {
            channel: Arc::clone(&self.channel),
            device: self.device,
        }
    }

    /// Unmounts: the mount point is free at once, processes with open files get `unmount_grace` to finish and errors
    /// after it, workers are joined. Blocks up to the grace and five seconds: `spawn_blocking` in async code.
    ///
    /// # Errors
    /// When the kernel refuses, or when handlers block their threads too long. The session is over in either case.
    pub fn unmount(mut self) -> Result<(), UnmountError> {
        self.take_down()
    }

    fn take_down(&mut self) -> Result<(), UnmountError> {
        let detached = if self.unmounted { Ok(()) } else { self.detach() };
        self.unmounted = true;
        let busy = self.end(self.unmount_grace);
        detached.map_err(|source| UnmountError::Unmount {
            target: self.target.clone(),
            source,
        })?;
        if busy > 0 {
            return Err(UnmountError::WorkersBusy {
                target: self.target.clone(),
                workers: busy,
            });
        }
        Ok(())
    }

    /// Takes the mount out of the tree, if what is mounted there is still ours.
    fn detach(&self) -> Result<(), Errno> {
        match mount::device_of(CWD, &self.target) {
            Ok(device) if device == self.device => {}
            Ok(_) | Err(Errno::NOENT) => return Ok(()),
            // A dead mount answers even this with ENOTCONN; it must be ours, for the connection is ended below.
            Err(_) => {}
        }
        match rustix::mount::unmount(&self.target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(errno),
        }
    }

    /// Waits for the workers, cuts the connection off if they do not end in `grace`; how many are left.
    fn end(&mut self, grace: Duration) -> usize {
        let mut left = self.lifetime.wait(grace);
        if left > 0 {
            match self.channel.abort(self.device) {
                Ok(()) => tracing::debug!(mount_point = %self.target.display(), "connection cut off, mount was in use"),
                // The connection vanished between the two calls.
                Err(Errno::NOENT) => {}
                Err(errno) => {
                    tracing::warn!(mount_point = %self.target.display(), %errno, "cannot cut the connection off")
                }
            }
            // Frees workers that wait for room; those that read see the end themselves.
            self.pending.end();
            left = self.lifetime.wait(JOIN_PATIENCE);
        }
        let threads = self.roster.take_threads();
        if left == 0 {
            for thread in threads {
                // Handlers' panics are caught; a worker's own is a bug that the panic hook has reported.
                let _ = thread.join();
            }
        }
        left
    }
}

impl AsFd for Session {
    /// The device descriptor, for a descriptor store: a duplicate of it, never another one, is what [`Session::resume`] takes.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.fd().as_fd()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.unmounted {
            return;
        }
        if let Err(error) = self.take_down() {
            tracing::warn!(%error, source = ?std::error::Error::source(&error), "session did not end cleanly");
        }
    }
}

/// Runs the file system's `init`: in place, or on the runtime if it must wait.
fn initialise<FS>(fs: &Arc<FS>, asker: fuse3::raw::Request, runtime: &Handle) -> Result<(), i32>
where
    FS: Filesystem + Send + Sync + 'static,
{
    let fs = Arc::clone(fs);
    let init = std::panic::AssertUnwindSafe(async move { fs.init(asker).await }).catch_unwind();
    let mut init = Box::pin(init);
    let _context = runtime.enter();
    let outcome = match pin!(&mut init).poll(&mut Context::from_waker(Waker::noop())) {
        std::task::Poll::Ready(outcome) => outcome,
        std::task::Poll::Pending => {
            let (sender, receiver) = mpsc::sync_channel(1);
            let task = runtime.spawn(async move {
                let _ = sender.send(init.await);
            });
            match receiver.recv_timeout(INIT_PATIENCE) {
                Ok(outcome) => outcome,
                Err(_) => {
                    task.abort();
                    return Err(libc::ETIMEDOUT);
                }
            }
        }
    };
    match outcome {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(errno)) => Err(i32::from(errno).saturating_neg()),
        Err(_) => Err(libc::EIO),
    }
}
