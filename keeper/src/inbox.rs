//! The socket that the program's messages come to: a file in a directory that only the keeper's user may enter. An abstract
//! socket would be open to every process of the network namespace, and with it the keeper's time.

use std::ffi::OsString;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, fstat, open};
use rustix::io::Errno;
use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::process::{Pid, geteuid, getpgid, umask};

use crate::listener::is_served;
use crate::protocol::MESSAGE_LIMIT;
use crate::sys;

/// What the name of a socket begins with; the rest is random, so that no two keepers have the same.
const PREFIX: &str = "notify-";

/// Random digits of a name.
const DIGITS: usize = 16;

/// The longest path of a directory whose sockets' paths fit into an address of 108 bytes with a zero at its end.
pub const DIRECTORY_LIMIT: usize = 107 - 1 - PREFIX.len() - DIGITS;

/// Most files that are looked at for what killed keepers left.
const SWEEP_LIMIT: usize = 4096;

/// How long another keeper may take to make its socket.
const LOCK_LIMIT: Duration = Duration::from_secs(5);

/// Pause before the next look at that.
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// Why there is no socket for messages.
#[derive(Debug, thiserror::Error)]
pub enum InboxError {
    /// The directory cannot be made or opened.
    #[error("cannot use the directory {} for the notification socket", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than the keeper's user may enter the directory.
    #[error("{} must be the keeper's user's own, with mode 0700", path.display())]
    NotPrivate {
        /// The directory.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot make the notification socket {}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What came.
#[derive(Debug)]
pub enum Incoming {
    /// Nothing is there.
    Nothing,
    /// A message from somebody who has no business here; thrown away, and its descriptors never opened.
    Stranger {
        /// The process, as far as it is visible from here.
        process: i32,
    },
    /// A message that is too long; thrown away.
    TooLong,
    /// A message of the program.
    Message {
        /// How long it is.
        length: usize,
        /// What came with it.
        descriptors: Vec<OwnedFd>,
        /// More came with it, and could not be opened.
        lost: bool,
    },
}

/// A socket whose file is removed at the end.
#[derive(Debug)]
pub struct Inbox {
    path: String,
    socket: OwnedFd,
}

impl Inbox {
    /// Makes the socket in `directory`, which is made if it is not there, and removes those that killed keepers left.
    pub fn bind(directory: &Path) -> Result<Self, InboxError> {
        let failed = |source| InboxError::Directory {
            path: directory.to_owned(),
            source,
        };
        let opened = private(directory).map_err(failed)?;
        let opened = opened.ok_or_else(|| InboxError::NotPrivate {
            path: directory.to_owned(),
        })?;
        // Until the end of this function, so that no other keeper takes a socket away that is not bound yet.
        lock(&opened).map_err(failed)?;
        sweep(directory).map_err(failed)?;
        let random = format!("{:032x}", sys::random().map_err(failed)?);
        let name = format!("{PREFIX}{}", random.get(..DIGITS).unwrap_or_default());
        let path = directory.join(name);
        let socket = make(&path).map_err(|source| InboxError::Socket {
            path: path.clone(),
            source,
        })?;
        let path = path.to_string_lossy().into_owned();
        Ok(Self { path, socket })
    }

    /// One that was made before.
    #[must_use]
    pub fn resume(path: String, socket: OwnedFd) -> Self {
        Self { path, socket }
    }

    /// Its path and the socket.
    #[must_use]
    pub fn handed(&self) -> (&str, BorrowedFd<'_>) {
        (&self.path, self.socket.as_fd())
    }

    /// What `NOTIFY_SOCKET` has to say.
    #[must_use]
    pub fn variable(&self) -> OsString {
        self.path.clone().into()
    }

    /// The next message, if `child` or a process of its group sent it; as the keeper's user, and as the kernel says.
    pub fn receive(&self, child: Option<Pid>, buffer: &mut [u8; MESSAGE_LIMIT]) -> io::Result<Incoming> {
        let sender = match sys::peek_sender(self.socket.as_fd()) {
            Ok(sender) => sender,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Incoming::Nothing),
            Err(error) => return Err(error),
        };
        let is_known = sender.is_some_and(|sender| is_of(child, sender));
        let received = sys::receive(self.socket.as_fd(), buffer, is_known)?;
        Ok(match sender {
            _ if !is_known => Incoming::Stranger {
                process: sender.map_or(0, |sender| sender.process),
            },
            _ if received.cut => Incoming::TooLong,
            _ => Incoming::Message {
                length: received.length,
                descriptors: received.descriptors,
                lost: received.lost,
            },
        })
    }
}

impl Drop for Inbox {
    fn drop(&mut self) {
        // What stays is removed by the next keeper.
        let _ = fs::remove_file(&self.path);
    }
}

/// Makes the directory if it is not there, and opens it; `None` if others may enter it.
fn private(path: &Path) -> io::Result<Option<OwnedFd>> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = open(path, flags, Mode::empty())?;
    let found = fstat(&opened)?;
    let is_private = found.st_uid == geteuid().as_raw() && found.st_mode & 0o077 == 0;
    Ok(is_private.then_some(opened))
}

fn lock(directory: &OwnedFd) -> io::Result<()> {
    let end = Instant::now() + LOCK_LIMIT;
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::AGAIN) if Instant::now() < end => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Removes sockets that nobody has.
fn sweep(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)?.take(SWEEP_LIMIT) {
        let entry = entry?;
        let is_ours = entry.file_name().to_string_lossy().starts_with(PREFIX) && entry.file_type()?.is_socket();
        // One that cannot be asked stays, which costs a name.
        if is_ours && matches!(is_served(&entry.path(), SocketType::DGRAM), Ok(false)) {
            let _ = fs::remove_file(entry.path());
        }
    }
    Ok(())
}

fn make(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    set_socket_passcred(&socket, true)?;
    let address = SocketAddrUnix::new(path)?;
    let before = umask(Mode::from_raw_mode(0o177));
    let bound = bind(&socket, &address);
    umask(before);
    bound?;
    Ok(socket)
}

fn is_of(child: Option<Pid>, sender: sys::Sender) -> bool {
    let process = Pid::from_raw(sender.process);
    let (Some(child), Some(process)) = (child, process) else {
        return false;
    };
    // The child itself may be dead already; its number is not given away before it is reaped.
    sender.user == geteuid().as_raw() && (process == child || getpgid(Some(process)) == Ok(child))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn mode(path: impl AsRef<Path>) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_socket_is_in_a_directory_of_the_keepers_own_and_goes_with_it() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("run/keeper");
        let first = Inbox::bind(&directory).unwrap();
        assert_eq!((mode(&directory), mode(first.variable())), (0o700, 0o600));
        let path = PathBuf::from(first.variable());
        assert!(path.is_absolute() && path.parent() == Some(&directory));
        // Another keeper has another one, and leaves those alone that somebody has.
        let second = Inbox::bind(&directory).unwrap();
        assert_ne!(first.variable(), second.variable());
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
        drop((first, second));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn what_a_killed_keeper_left_is_replaced() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("run");
        let living = Inbox::bind(&directory).unwrap();
        // Its socket ends without the file, as with SIGKILL.
        drop(make(&directory.join("notify-dead")).unwrap());
        fs::write(directory.join("notify-file"), "").unwrap();
        let next = Inbox::bind(&directory).unwrap();
        let mut left: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        let mut expected = [
            living.variable().into(),
            next.variable().into(),
            directory.join("notify-file"),
        ];
        left.sort();
        expected.sort();
        assert_eq!(left, expected);
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused_and_the_longest_fits() {
        let place = tempfile::tempdir().unwrap();
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let error = Inbox::bind(place.path()).unwrap_err();
        assert!(matches!(error, InboxError::NotPrivate { .. }), "{error}");
        assert_eq!(mode(place.path()), 0o755);
        let length = DIRECTORY_LIMIT - place.path().as_os_str().len() - 1;
        let longest = place.path().join("d".repeat(length));
        assert_eq!(longest.as_os_str().len(), DIRECTORY_LIMIT);
        Inbox::bind(&longest).unwrap();
        let error = Inbox::bind(&place.path().join("d".repeat(length + 2))).unwrap_err();
        assert!(matches!(error, InboxError::Socket { .. }), "{error}");
    }
}
