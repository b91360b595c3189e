//! Telling the kernel to forget pages of a file, from a process of its own.
//!
//! The kernel waits for a page that a read under way has locked, and nothing interrupts that wait. A process with a thread in it
//! does not end, not even by SIGKILL; and before it has ended nobody starts the successor that would answer the read. So that
//! thread is a helper's, which has nothing of this process but the device: [`Helpers`] starts it, [`serve`] is what it does.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use thiserror::Error;
use zerocopy::IntoBytes as _;

use crate::abi;
use crate::channel::Channel;
use crate::mount::DeviceNumber;

/// Most helpers at once, those included that nobody waits for any more.
const HELPERS_MAX: usize = 8;
/// Variable that tells a helper what to do.
const VARIABLE: &str = "FUSE_SESSION_FORGET";
/// Variables of a supervisor that are none of a helper's business.
const NOT_ITS_OWN: [&str; 5] = ["NOTIFY_SOCKET", "FDSTORE", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"];
/// How often a helper looks whether the process that started it is there.
const LOOK: Duration = Duration::from_millis(100);
/// How long a helper may outlive that process when a successor may come; then nobody has come, and its descriptor is all that
/// keeps readers waiting.
const ORPHAN_PATIENCE: Duration = Duration::from_secs(15 * 60);
/// A helper's exit code when it does not know what to do. No errno is so large.
const EX_TASK: u8 = 200;

/// Why the kernel was not made to forget.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ForgetError {
    /// Too many helpers wait in the kernel.
    #[error("{HELPERS_MAX} processes wait already until pages can be forgotten")]
    Busy,
    /// No helper can be started.
    #[error("cannot start the process that has pages forgotten")]
    Start(#[source] io::Error),
    /// The helper waits for a read that is not answered. It goes on, and the pages are forgotten when that is.
    #[error("pages are not forgotten yet: a read of them is not answered after {0:?}")]
    Patience(Duration),
    /// The kernel refuses.
    #[error("the kernel does not forget pages")]
    Refused(#[source] Errno),
    /// The helper ended without a word.
    #[error("the process that has pages forgotten ended early: {0}")]
    Ended(std::process::ExitStatus),
}

/// What becomes of a session when its process has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Afterwards {
    /// Somebody has its descriptor for a successor.
    Resumed,
    /// It ends.
    Over,
}

/// A session whose kernel side can be told to forget; it does not keep the session from ending.
#[derive(Debug, Clone)]
pub struct Notifier {
    pub(crate) channel: Arc<Channel>,
    pub(crate) device: DeviceNumber,
}

/// Processes that have pages forgotten.
#[derive(Debug)]
pub struct Helpers {
    command: fn() -> Command,
    patience: Duration,
    running: Mutex<Running>,
}

#[derive(Debug, Default)]
struct Running {
    /// Those that somebody waits for.
    awaited: usize,
    /// Those that nobody waits for any more; each with the end of the pipe that tells it that this process is there.
    left: Vec<(Child, OwnedFd)>,
}

impl Helpers {
    /// Helpers that are started by `command` and then call [`serve`]; each is waited for at most `patience`.
    pub fn new(command: fn() -> Command, patience: Duration) -> Self {
        Self {
            command,
            patience,
            running: Mutex::default(),
        }
    }

    /// Drops `range` of a file from the page cache, mapped or not: whoever reads it again asks the file system. `afterwards` says
    /// what becomes of the session if this process ends meanwhile.
    ///
    /// Blocks until reads of those pages that are under way have been answered, but not longer than these helpers' patience: never
    /// call it from a handler.
    ///
    /// # Errors
    /// See [`ForgetError`]. That the kernel does not know the inode, or that the session is over, is none: there is nothing to drop.
    pub fn forget_pages(
        &self,
        session: &Notifier,
        inode: u64,
        range: Range<u64>,
        afterwards: Afterwards,
    ) -> Result<(), ForgetError> {
        let task = Task {
            inode,
            start: range.start,
            len: range.end.saturating_sub(range.start),
            device: session.device,
            afterwards,
        };
        if task.len == 0 {
            // To the kernel that would be the rest of the file.
            return Ok(());
        }
        self.enter()?;
        let (outcome, left) = match self.start(session, &task) {
            Ok((child, pipe)) => self.wait(child, pipe),
            Err(error) => (Err(ForgetError::Start(error)), None),
        };
        let mut running = self.lock();
        running.awaited -= 1;
        running.left.extend(left);
        outcome
    }

    fn enter(&self) -> Result<(), ForgetError> {
        let mut running = self.lock();
        running
            .left
            .retain_mut(|(child, _)| matches!(child.try_wait(), Ok(None)));
        if running.awaited + running.left.len() >= HELPERS_MAX {
            return Err(ForgetError::Busy);
        }
        running.awaited += 1;
        Ok(())
    }

    fn start(&self, session: &Notifier, task: &Task) -> io::Result<(Child, OwnedFd)> {
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        let mut command = (self.command)();
        for name in NOT_ITS_OWN {
            command.env_remove(name);
        }
        command
            .env(VARIABLE, task.to_text())
            .stdin(Stdio::from(session.channel.fd().try_clone()?))
            // By this pipe each learns of the other's end.
            .stdout(Stdio::from(theirs))
            .stderr(Stdio::null())
            // Whoever waits for this process's group, or signals it, does not mean the helper.
            .process_group(0);
        Ok((command.spawn()?, ours))
    }

    fn wait(&self, mut child: Child, pipe: OwnedFd) -> (Result<(), ForgetError>, Option<(Child, OwnedFd)>) {
        match is_closed(&pipe, self.patience) {
            // It has ended or is about to.
            Ok(true) => match child.wait() {
                Ok(status) => (outcome(status), None),
                Err(error) => (Err(ForgetError::Start(error)), None),
            },
            Ok(false) => (Err(ForgetError::Patience(self.patience)), Some((child, pipe))),
            Err(error) => (Err(ForgetError::Start(error.into())), Some((child, pipe))),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Running> {
        // Every change is one step.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn outcome(status: std::process::ExitStatus) -> Result<(), ForgetError> {
    match status.code() {
        Some(0) => Ok(()),
        Some(code) if code < i32::from(EX_TASK) && status.signal().is_none() => {
            Err(ForgetError::Refused(Errno::from_raw_os_error(code)))
        }
        _ => Err(ForgetError::Ended(status)),
    }
}

/// Whether nobody has the other end of a pipe, or the last one closes it in time.
fn is_closed(pipe: &OwnedFd, patience: Duration) -> Result<bool, Errno> {
    let end = Instant::now() + patience;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        // Without a flag: only the end is told.
        match poll(&mut [PollFd::new(pipe, PollFlags::empty())], Some(&left)) {
            Ok(closed) => return Ok(closed > 0),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

/// What a helper does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Task {
    inode: u64,
    start: u64,
    len: u64,
    device: DeviceNumber,
    afterwards: Afterwards,
}

impl Task {
    fn to_text(self) -> String {
        let DeviceNumber { major, minor } = self.device;
        let over = u8::from(self.afterwards == Afterwards::Over);
        format!("{} {} {} {major} {minor} {over}", self.inode, self.start, self.len)
    }

    fn from_text(text: &str) -> Option<Self> {
        let words: Vec<u64> = text.split(' ').map(|word| word.parse().ok()).collect::<Option<_>>()?;
        let &[inode, start, len, major, minor, over] = words.as_slice() else {
            return None;
        };
        let (major, minor) = (u32::try_from(major).ok()?, u32::try_from(minor).ok()?);
        Some(Self {
            inode,
            start,
            len,
            device: DeviceNumber { major, minor },
            afterwards: if over == 0 {
                Afterwards::Resumed
            } else {
                Afterwards::Over
            },
        })
    }

    fn notify(self, channel: &Channel) -> Result<(), Errno> {
        let (Ok(off), Ok(len)) = (i64::try_from(self.start), i64::try_from(self.len)) else {
            return Err(Errno::INVAL);
        };
        let record = abi::NotifyInvalInodeOut {
            ino: self.inode,
            off,
            len,
        };
        match channel.notify(abi::NOTIFY_INVAL_INODE, record.as_bytes()) {
            Err(Errno::NOENT | Errno::NODEV | Errno::NOTCONN | Errno::CONNABORTED) => Ok(()),
            told => told,
        }
    }
}

/// What a process does that was started by [`Helpers`]; the rest of the program has no business in it.
pub fn serve() -> ExitCode {
    let task = std::env::var(VARIABLE).ok().and_then(|text| Task::from_text(&text));
    let standard = (
        io::stdin().as_fd().try_clone_to_owned(),
        io::stdout().as_fd().try_clone_to_owned(),
    );
    let (Some(task), (Ok(device), Ok(pipe))) = (task, standard) else {
        return EX_TASK.into();
    };
    // So that whoever started this sees the end of the pipe when this process ends, and not before.
    let pipe = File::from(pipe);
    let channel = Arc::new(Channel::new(device));
    let (sender, told) = mpsc::channel();
    let worker = {
        let channel = Arc::clone(&channel);
        std::thread::Builder::new().spawn(move || sender.send(task.notify(&channel)))
    };
    if worker.is_err() {
        return EX_TASK.into();
    }
    let told = attend(&task, &channel, &pipe, &told);
    let code = told.map_or_else(|errno| u8::try_from(errno.raw_os_error()).unwrap_or(EX_TASK), |()| 0);
    code.into()
}

/// Waits for the kernel. When the process that started this one has gone and no successor comes, nobody will ever answer the read
/// that the kernel waits for: the connection is ended.
fn attend(task: &Task, channel: &Channel, pipe: &File, told: &mpsc::Receiver<Result<(), Errno>>) -> Result<(), Errno> {
    let mut orphaned = None;
    let mut aborted = false;
    loop {
        match told.recv_timeout(LOOK) {
            Ok(told) => return told,
            Err(RecvTimeoutError::Disconnected) => return Err(Errno::IO),
            Err(RecvTimeoutError::Timeout) => {}
        }
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = poll(&mut [PollFd::new(pipe, PollFlags::empty())], Some(&now)).is_ok_and(|gone| gone > 0);
        if !gone || aborted {
            continue;
        }
        let since = *orphaned.get_or_insert_with(Instant::now);
        if task.afterwards == Afterwards::Over || since.elapsed() >= ORPHAN_PATIENCE {
            aborted = channel.abort(task.device).is_ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_is_told_whole_and_nothing_else_is_one() {
        for afterwards in [Afterwards::Resumed, Afterwards::Over] {
            let task = Task {
                inode: u64::MAX,
                start: 4096,
                len: 1,
                device: DeviceNumber { major: 0, minor: 77 },
                afterwards,
            };
            assert_eq!(Task::from_text(&task.to_text()), Some(task));
        }
        for text in [
            "",
            "1",
            "1 2 3 4 5",
            "1 2 3 4 5 6 7",
            "1 2 3 4 -5 6",
            "1 2 3 4 4294967296 0",
            "a 2 3 4 5 6",
        ] {
            assert_eq!(Task::from_text(text), None, "{text}");
        }
    }
}
