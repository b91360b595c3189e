//! Mounts an image from its file, with the data file as its device.
//!
//! The new mount API makes the file system without showing it to anyone, so that it is complete when it appears, and it
//! never puts a loop device in between (`mount(8)` does: reads through one pass by the fanotify mark on the data file and
//! give zeros).
//!
//! The data file is handed over as a descriptor: the kernel is told `/proc/self/fd/N` and opens the very inode that the
//! caller has marked, whatever its path names by now. The image is named by its path, because that is what `findmnt`
//! shows as the source and nothing else can be shown; `/proc/self/fd/N` works there as well (see [`path_of`]).

use std::num::NonZeroU64;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use rustix::fs::{Advice, AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, move_mount,
};
use thiserror::Error;

use crate::read_ahead::{self, ReadAhead};

/// `MOVE_MOUNT_BENEATH`.
const BENEATH: MoveMountFlags = MoveMountFlags::from_bits_retain(0x200);
/// Most messages of the kernel that an error shows; its log holds eight.
const MESSAGES_MAX: usize = 8;
/// Most bytes of one of them.
const MESSAGE_BYTES: usize = 512;
/// Longest source that the mount call takes; an image with a longer path is named by its descriptor.
const SOURCE_BYTES: usize = 255;
/// How much of an image is read ahead of use, 16 MiB: all of one with 100 000 files.
const WARM_BYTES: u64 = 16 << 20;

/// An image could not be mounted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MountError {
    /// The kernel has no EROFS.
    #[error("this kernel has no EROFS")]
    Unsupported(#[source] Errno),
    /// One of the mount calls failed; needs CAP_SYS_ADMIN. What is wrong with an image (EINVAL) Linux 6.18 says in its log only.
    #[error("cannot mount {image}: {step} failed{messages}", image = .image.display())]
    Create {
        /// The image.
        image: PathBuf,
        /// The call that failed.
        step: &'static str,
        /// What the kernel says about it: empty, or ` (…)`.
        messages: String,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The mount could not be shown.
    #[error("cannot attach the mount at {target}", target = .target.display())]
    Attach {
        /// Where it was to be seen.
        target: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// Makes mounts, one after the other: the kernel tells nobody which entry in sysfs belongs to a new file system, so it has
/// to be the only new one. A process needs one of these; with two the read-ahead of mounts made at once cannot be set.
#[derive(Debug, Default)]
pub struct Mounter {
    making: Mutex<()>,
}

impl Mounter {
    /// Makes the file system of an image whose contents are in `data`, and its mount: read-only, without devices, with
    /// set-user-id bits in force (programs of an image need them). A fanotify mark on `data` must be there before this
    /// call: what is opened without one raises no events later.
    ///
    /// Blocks until the kernel has read the superblock and the root.
    pub fn create(&self, image: &Path, data: BorrowedFd<'_>) -> Result<Detached, MountError> {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(|source| match source {
            Errno::NODEV => MountError::Unsupported(source),
            _ => failed(image, "fsopen", None, source),
        })?;
        let failed = |step| {
            let context = &context;
            move |source| failed(image, step, Some(context), source)
        };
        let opened =
            rustix::fs::open(image, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(failed("open"))?;
        warm(opened.as_fd());
        let source = if image.as_os_str().len() > SOURCE_BYTES {
            path_of(opened.as_fd())
        } else {
            image.to_owned()
        };
        fsconfig_set_string(context.as_fd(), "source", source).map_err(failed("fsconfig source"))?;
        fsconfig_set_string(context.as_fd(), "device", path_of(data)).map_err(failed("fsconfig device"))?;
        fsconfig_set_flag(context.as_fd(), "ro").map_err(failed("fsconfig ro"))?;
        let read_ahead = {
            let _one = self.making.lock().unwrap_or_else(PoisonError::into_inner);
            let known = read_ahead::listed();
            fsconfig_create(context.as_fd()).map_err(failed("fsconfig create"))?;
            ReadAhead::of_new(known.as_ref())
        };
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))?;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let stat = rustix::fs::statx(mount.as_fd(), "", flags, StatxFlags::TYPE).map_err(failed("statx"))?;
        Ok(Detached {
            mount,
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            read_ahead,
        })
    }
}

/// A mount that nobody can see yet. Dropping it takes it away.
#[derive(Debug)]
pub struct Detached {
    mount: OwnedFd,
    device: (u32, u32),
    read_ahead: ReadAhead,
}

impl Detached {
    /// How much the kernel reads ahead; set it before [`Detached::attach`], since a file keeps what was set when it was opened.
    pub fn read_ahead(&self) -> &ReadAhead {
        &self.read_ahead
    }

    /// Shows the mount at `target`.
    pub fn attach(self, target: &Path) -> Result<(), MountError> {
        self.put(target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    }

    /// Puts the mount below the one that is at `target`, where it is seen once that is taken away: at no moment is there none.
    /// Needs Linux 6.5, as file-backed EROFS needs 6.12.
    pub fn attach_beneath(self, target: &Path) -> Result<(), MountError> {
        self.put(target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | BENEATH)
    }

    fn put(self, target: &Path, flags: MoveMountFlags) -> Result<(), MountError> {
        move_mount(self.mount.as_fd(), "", CWD, target, flags).map_err(|source| MountError::Attach {
            target: target.to_owned(),
            source,
        })
    }

    /// Major and minor number of the file system, as `stat` and `/proc/self/mountinfo` show them.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }
}

impl AsFd for Detached {
    /// The mount's root directory: files can be opened below it before anyone else sees them.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

/// A path that names what a descriptor of this process has open, as long as it is open.
pub fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Whether this kernel has EROFS at all, as a module perhaps. Whether it mounts images from files only a mount can tell.
pub fn is_supported() -> bool {
    // Asking for a file system loads its module. Without the right to ask, the list says what is loaded.
    fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).is_ok()
        || std::fs::read_to_string("/proc/filesystems")
            .is_ok_and(|list| list.lines().any(|line| line.split('\t').next_back() == Some("erofs")))
}

/// Starts reading an image into memory, in large pieces: the kernel reads metadata a block at a time, each when it is
/// asked for. An image just written is there already, and one that is not is only slower.
fn warm(image: BorrowedFd<'_>) {
    let _ = rustix::fs::fadvise(image, 0, NonZeroU64::new(WARM_BYTES), Advice::WillNeed);
}

fn failed(image: &Path, step: &'static str, context: Option<&OwnedFd>, source: Errno) -> MountError {
    let messages = context.map(messages_of).unwrap_or_default();
    MountError::Create {
        image: image.to_owned(),
        step,
        messages: if messages.is_empty() {
            String::new()
        } else {
            format!(" ({})", messages.join("; "))
        },
        source,
    }
}

/// What the kernel has to say about a file system that did not come to be; one message for each read.
fn messages_of(context: &OwnedFd) -> Vec<String> {
    let mut messages = Vec::new();
    let mut buffer = [0; MESSAGE_BYTES];
    while messages.len() < MESSAGES_MAX {
        match rustix::io::read(context, &mut buffer) {
            Ok(0) => break,
            Ok(read) => {
                let text = String::from_utf8_lossy(buffer.get(..read).unwrap_or_default());
                messages.push(text.trim_end().to_owned());
            }
            Err(error) if error == Errno::INTR => {}
            // ENODATA: there are no more.
            Err(_) => break,
        }
    }
    messages
}
