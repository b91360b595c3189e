//! Making a hull a pod's: hostname, files, sysctls.
//!
//! Namespaces belong to threads, so one thread of its own enters them, does what is to be done, and comes back. Jobs
//! queue for it within a bound. A thread that cannot come back ends, with those that wait for it, whose pods are
//! containerd's then; the next job gets a new thread.

use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;

use hullspeed_daemon::error::chain;
use tokio::sync::oneshot;

use super::hull::Hull;

pub mod identity;
mod namespaces;

pub use identity::Identity;
use namespaces::Home;

/// Adoptions that wait for the thread, each for well under a millisecond.
const QUEUE: usize = 256;

/// Why a hull could not be made a pod's.
#[derive(Debug, thiserror::Error)]
pub enum PatchError {
    /// Too many at once.
    #[error("{QUEUE} adoptions wait already")]
    Busy,
    /// The thread has ended.
    #[error("the thread that enters namespaces has ended")]
    Ended,
    /// A namespace could not be entered.
    #[error("cannot enter the {namespace} namespace")]
    Enter {
        /// Which.
        namespace: &'static str,
        /// Why not.
        #[source]
        source: rustix::io::Errno,
    },
    /// A namespace could not be left.
    #[error("cannot leave the {namespace} namespace")]
    Leave {
        /// Which.
        namespace: &'static str,
        /// Why not.
        #[source]
        source: rustix::io::Errno,
    },
    /// The kernel refuses the name.
    #[error("cannot set the {what}")]
    Name {
        /// Host's or domain's.
        what: &'static str,
        /// Why not.
        #[source]
        source: rustix::io::Errno,
    },
    /// A file cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A sysctl cannot be set.
    #[error("cannot set sysctl {name}")]
    Sysctl {
        /// Its name.
        name: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// What a privileged pod may write to stays read-only.
    #[error("cannot make sysfs writable")]
    Sysfs(#[source] rustix::io::Errno),
    /// A sysctl that is not a pod's.
    #[error("sysctl {name} is not one of a pod's own")]
    Unsafe {
        /// Its name.
        name: String,
    },
}

impl PatchError {
    /// Whether the hull has not been touched.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(self, Self::Busy | Self::Ended)
    }

    fn file<'a>(what: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> Self + 'a {
        move |source| Self::File {
            what,
            path: path.to_owned(),
            source,
        }
    }
}

/// A hull that was worked on.
type Worked = (Hull, Result<(), PatchError>);

struct Job {
    hull: Hull,
    identity: Identity,
    answer: oneshot::Sender<Worked>,
}

/// The thread, and the way to it.
#[derive(Debug)]
struct Worker {
    jobs: SyncSender<Job>,
    thread: JoinHandle<()>,
}

/// Has hulls made pods'.
#[derive(Debug)]
pub struct Patcher {
    /// None once stopped.
    worker: Mutex<Option<Worker>>,
}

impl Worker {
    /// Starts the thread, in the namespaces of the caller.
    fn start() -> Result<Self, PatchError> {
        let failed = PatchError::file("start a thread from", Path::new("/proc/thread-self/ns"));
        let (sender, receiver) = sync_channel(QUEUE);
        let (started, has_started) = sync_channel(1);
        let work = move || match Home::open() {
            Ok(home) => {
                let _ = started.send(Ok(()));
                serve(&receiver, &home);
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        };
        let thread = std::thread::Builder::new()
            .name("namespaces".into())
            .spawn(work)
            .map_err(failed)?;
        has_started.recv().map_err(|_| PatchError::Ended)??;
        Ok(Self { jobs: sender, thread })
    }

    /// Ends the thread when it has done what waits for it. Blocks that long.
    fn stop(self) {
        drop(self.jobs);
        if self.thread.join().is_err() {
            tracing::error!("the thread that enters namespaces has panicked");
        }
    }
}

impl Patcher {
    /// Starts the thread, in the namespaces of the caller.
    pub fn start() -> Result<Self, PatchError> {
        Ok(Self {
            worker: Mutex::new(Some(Worker::start()?)),
        })
    }

    /// Gives the hull this identity. The hull comes back whether that worked or not; none comes back from a thread that
    /// ended meanwhile.
    pub async fn patch(&self, hull: Hull, identity: Identity) -> (Option<Hull>, Result<(), PatchError>) {
        let (answer, worked) = oneshot::channel();
        let job = Job { hull, identity, answer };
        let refused = self.submit(job);
        match refused {
            Some((job, error)) => (Some(job.hull), Err(error)),
            None => match worked.await {
                Ok((hull, result)) => (Some(hull), result),
                Err(_) => (None, Err(PatchError::Ended)),
            },
        }
    }

    /// Has the thread do it, or a new one if that has ended. Gives back what cannot be done.
    fn submit(&self, job: Job) -> Option<(Job, PatchError)> {
        let mut worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(current) = worker.as_mut() else {
            return Some((job, PatchError::Ended));
        };
        let job = match current.jobs.try_send(job).err()? {
            TrySendError::Full(job) => return Some((job, PatchError::Busy)),
            TrySendError::Disconnected(job) => job,
        };
        match Worker::start() {
            Ok(new) => *current = new,
            Err(error) => {
                tracing::error!(error = %chain(&error), "no new thread enters namespaces");
                return Some((job, PatchError::Ended));
            }
        }
        match current.jobs.try_send(job).err()? {
            TrySendError::Full(job) => Some((job, PatchError::Busy)),
            TrySendError::Disconnected(job) => Some((job, PatchError::Ended)),
        }
    }

    /// Ends the thread when it has done what waits for it. Blocks that long.
    pub fn stop(&self) {
        let worker = self.worker.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(worker) = worker {
            worker.stop();
        }
    }
}

impl Drop for Patcher {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(jobs: &Receiver<Job>, home: &Home) {
    while let Ok(Job { hull, identity, answer }) = jobs.recv() {
        let result = identity.apply(&hull, home);
        let lost = matches!(result, Err(PatchError::Leave { .. }));
        let _ = answer.send((hull, result));
        if lost {
            tracing::error!(
                "a thread is caught in a sandbox's namespace: it ends, and the next adoption has a new one"
            );
            return;
        }
    }
}
