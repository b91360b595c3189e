//! Files the kernel reads by itself: an open is answered with another file that has the same content (Linux 6.9).
//!
//! Reads, faults and programs that run from such a file cost no request and go on while nobody serves. The kernel lets an inode
//! have only one mode while any descriptor or mapping of it is open, and only one backing file; after a restart nobody knows what is
//! open. So the mode of an inode is decided when it is first opened and holds as long as the connection does: [`OpenModes`] has
//! it, in memory that a descriptor store can keep.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fuse3::raw::reply::ReplyOpen;
use rustix::io::Errno;
use thiserror::Error;

use crate::abi;
use crate::channel::Channel;
use crate::sys::{self, SharedWords};

mod probe;

pub use probe::{ProbeError, probe};

/// Most inodes a table of open modes has room for.
pub const INODES_MAX: usize = 1 << 26;

/// The inode was not opened yet.
const UNDECIDED: u32 = 0;
/// The inode's pages are the kernel's cache of what we answer. Every other value is a backing number.
const CACHED: u32 = u32::MAX;

/// Where a file system that may have files the kernel can read by itself says which.
pub trait Backing: Send + Sync + 'static {
    /// A regular file with exactly the content of `inode`, now and for as long as the mount lives; none if there is no such file,
    /// or not yet: asked once, when the inode is first opened.
    ///
    /// Its file system must not be stacked on others: on ext4, xfs, or EROFS, not on overlayfs. Called on a worker or in the
    /// runtime: opening a local file is right, waiting for the network is not.
    fn backing(&self, inode: u64) -> Option<OwnedFd>;
}

/// The mode in which each inode was first opened, for the life of a connection.
///
/// Keep its descriptor (`as_fd`) beside the session's and give it back by [`OpenModes::from_fd`].
#[derive(Debug)]
pub struct OpenModes {
    words: SharedWords,
}

/// The table of open modes could not be made or mapped.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenModesError {
    /// More inodes than [`INODES_MAX`].
    #[error("no table of open modes for {0} inodes")]
    TooMany(u64),
    /// The memory file could not be made.
    #[error("cannot make a table of open modes")]
    Create(#[source] Errno),
    /// The descriptor is not one of [`OpenModes::create`]; a memory file that could shrink is refused with EPERM.
    #[error("the kept descriptor is no table of open modes")]
    Kept(#[source] Errno),
}

impl OpenModes {
    /// An empty table for inodes up to `last`. Those beyond are always cached.
    ///
    /// # Errors
    /// When there is no memory for it, or none for so many.
    pub fn create(last: u64) -> Result<Self, OpenModesError> {
        let len = usize::try_from(last).ok().filter(|last| *last <= INODES_MAX);
        let len = len.ok_or(OpenModesError::TooMany(last))? + 1;
        let words = SharedWords::create("fuse-open-modes", len).map_err(OpenModesError::Create)?;
        Ok(Self { words })
    }

    /// The table a predecessor kept.
    ///
    /// # Errors
    /// When `fd` is something else.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, OpenModesError> {
        let words = SharedWords::of_file(fd, INODES_MAX + 1).map_err(OpenModesError::Kept)?;
        Ok(Self { words })
    }

    /// Whether the kernel reads `inode` by itself.
    pub fn is_direct(&self, inode: u64) -> bool {
        let word = usize::try_from(inode).ok().and_then(|inode| self.words.word(inode));
        word.is_some_and(|word| ![UNDECIDED, CACHED].contains(&word.load(Ordering::Acquire)))
    }

    /// How many inodes were first opened in either mode: by the kernel itself, through its cache.
    pub fn counts(&self) -> (usize, usize) {
        let modes = (0..self.words.len()).filter_map(|inode| self.words.word(inode));
        modes.fold((0, 0), |(direct, cached), mode| match mode.load(Ordering::Relaxed) {
            UNDECIDED => (direct, cached),
            CACHED => (direct, cached + 1),
            _ => (direct + 1, cached),
        })
    }

    /// The mode of `inode`; where it is undecided it is what `decide` says, and no other than the caller hears `decide`'s answer if
    /// somebody else was first: then `discard` gets it.
    fn settle(&self, inode: u64, decide: impl FnOnce() -> Option<u32>, discard: impl FnOnce(u32)) -> Option<u32> {
        let word = usize::try_from(inode).ok().and_then(|inode| self.words.word(inode))?;
        let known = match word.load(Ordering::Acquire) {
            UNDECIDED => {
                let ours = decide();
                let (wanted, order) = (ours.unwrap_or(CACHED), Ordering::AcqRel);
                match word.compare_exchange(UNDECIDED, wanted, order, Ordering::Acquire) {
                    Ok(_) => wanted,
                    Err(theirs) => {
                        if let Some(ours) = ours {
                            discard(ours);
                        }
                        theirs
                    }
                }
            }
            known => known,
        };
        (known != CACHED).then_some(known)
    }
}

impl AsFd for OpenModes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.words.as_fd()
    }
}

/// What a mount needs to let the kernel read files by itself.
#[derive(Clone)]
pub struct Passthrough {
    files: Arc<dyn Backing>,
    modes: Arc<OpenModes>,
}

impl Passthrough {
    /// `files` has the backing files; `modes` is a new table for a new mount, the kept one for a resumed mount.
    pub fn new(files: Arc<dyn Backing>, modes: Arc<OpenModes>) -> Self {
        Self { files, modes }
    }
}

impl fmt::Debug for Passthrough {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Passthrough")
            .field("modes", &self.modes)
            .finish_non_exhaustive()
    }
}

/// Answers the opens of one session.
#[derive(Debug)]
pub(crate) struct Opener {
    channel: Arc<Channel>,
    passthrough: Passthrough,
    /// Whether a refusal was reported already.
    reported: AtomicBool,
}

impl Opener {
    pub(crate) fn new(channel: Arc<Channel>, passthrough: Passthrough) -> Self {
        Self {
            channel,
            passthrough,
            reported: AtomicBool::new(false),
        }
    }

    /// The answer to an open of `inode` that the file system agreed to. What it says is remembered before the kernel hears it.
    ///
    /// Direct I/O is ours to answer: a backing file may refuse it (EROFS on a file does), and the kernel would make EIO of that. Where
    /// the kernel reads the file by itself already it is refused with EINVAL, from which programs conclude that there is none here.
    pub(crate) fn answer(&self, inode: u64, flags: u32, reply: &ReplyOpen) -> Result<abi::OpenOut, Errno> {
        let is_direct = flags & libc::O_DIRECT.cast_unsigned() != 0;
        let decide = || if is_direct { None } else { self.register(inode) };
        let discard = |id| self.discard(id);
        match self.passthrough.modes.settle(inode, decide, discard).map(i32::try_from) {
            Some(Ok(_)) if is_direct => Err(Errno::INVAL),
            Some(Ok(backing_id)) => Ok(abi::OpenOut {
                fh: reply.fh,
                open_flags: abi::OPEN_PASSTHROUGH | abi::OPEN_NOFLUSH,
                backing_id,
            }),
            // What is no number the kernel gives was written by somebody else.
            Some(Err(_)) | None => Ok(abi::OpenOut::cached(reply)),
        }
    }

    fn register(&self, inode: u64) -> Option<u32> {
        let file = self.passthrough.files.backing(inode)?;
        match sys::backing_open(self.channel.fd().as_fd(), file.as_fd()) {
            Ok(id) => Some(id),
            Err(errno) => {
                if !self.reported.swap(true, Ordering::Relaxed) {
                    tracing::warn!(inode, %errno, "the kernel does not take a backing file; files are read through the daemon");
                }
                None
            }
        }
    }

    fn discard(&self, id: u32) {
        if let Err(errno) = sys::backing_close(self.channel.fd().as_fd(), id) {
            tracing::debug!(id, %errno, "a backing file stays registered");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_decision_holds_for_all_and_for_successors() {
        let modes = OpenModes::create(10).unwrap();
        let never = || -> Option<u32> { panic!("decided already") };
        let none = |id: u32| panic!("nothing to discard, {id}");
        assert_eq!(modes.settle(3, || Some(17), none), Some(17));
        assert_eq!(modes.settle(3, never, none), Some(17));
        assert_eq!(modes.settle(4, || None, none), None);
        assert_eq!(modes.settle(4, never, none), None);
        assert_eq!(modes.settle(11, never, none), None, "beyond the table");
        let kept = OpenModes::from_fd(modes.as_fd().try_clone_to_owned().unwrap()).unwrap();
        drop(modes);
        assert_eq!(kept.settle(3, never, none), Some(17));
        assert_eq!(kept.settle(4, never, none), None);
        assert_eq!(kept.counts(), (1, 1));
        assert!(kept.is_direct(3) && ![2, 4, 11].iter().any(|inode| kept.is_direct(*inode)));
    }

    #[test]
    fn whoever_comes_second_discards_what_he_made() {
        let modes = OpenModes::create(10).unwrap();
        let mut discarded = None;
        let slow = || {
            assert_eq!(modes.settle(3, || Some(1), |_| ()), Some(1));
            Some(2)
        };
        assert_eq!(modes.settle(3, slow, |id| discarded = Some(id)), Some(1));
        assert_eq!(discarded, Some(2));
    }

    #[test]
    fn tables_are_bounded() {
        assert!(matches!(OpenModes::create(u64::MAX), Err(OpenModesError::TooMany(_))));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(OpenModes::from_fd(file.into()), Err(OpenModesError::Kept(_))));
    }
}
