//! One fanotify group: the kernel's questions about one layer's `data`, and the answers.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::event::PRE_ACCESS;
use super::sys;

/// `FAN_ALLOW`.
const ALLOW: u32 = 1;
/// `FAN_DENY`, with EIO for the reader instead of EPERM.
const DENY: u32 = 2 | (libc::EIO.cast_unsigned() << 24);

/// What a reader that waits is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The range is resident.
    Allow,
    /// It cannot be had.
    Deny,
}

/// A group.
#[derive(Debug)]
pub struct Group(OwnedFd);

impl Group {
    /// A group without marks.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN, EMFILE beyond `fs.fanotify.max_user_groups`, EINVAL on a kernel without pre-content events.
    pub fn new() -> io::Result<Self> {
        sys::fanotify_init().map(Self)
    }

    /// One that a predecessor made.
    pub fn kept(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// From now on whoever opens `data` and reads of it asks first. Who has it open already does not.
    ///
    /// # Errors
    /// EOPNOTSUPP where the filesystem has no pre-content events (only ext4, XFS and btrfs have).
    pub fn mark(&self, data: &File) -> io::Result<()> {
        sys::fanotify_mark(self.0.as_fd(), data.as_fd(), PRE_ACCESS, true)
    }

    /// Nobody asks any more. No mark is no error.
    pub fn unmark(&self, data: &File) -> io::Result<()> {
        match sys::fanotify_mark(self.0.as_fd(), data.as_fd(), PRE_ACCESS, false) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Answers the event of this number; whether there was one.
    pub fn answer(&self, number: i32, answer: Answer) -> io::Result<bool> {
        let response = match answer {
            Answer::Allow => ALLOW,
            Answer::Deny => DENY,
        };
        let mut record = [0; 8];
        record[..4].copy_from_slice(&number.to_ne_bytes());
        record[4..].copy_from_slice(&response.to_ne_bytes());
        loop {
            match rustix::io::write(&self.0, &record) {
                Ok(_) => return Ok(true),
                Err(rustix::io::Errno::INTR) => {}
                // Its reader was killed, or a predecessor had answered it and had no time to note it.
                Err(rustix::io::Errno::NOENT) => return Ok(false),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Group {
    fn as_raw_fd(&self) -> i32 {
        self.0.as_raw_fd()
    }
}
