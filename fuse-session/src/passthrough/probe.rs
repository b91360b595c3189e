//! Whether files can be passed through here: found out by doing it.
//!
//! A mount of two directories and one file, whose every read request fails: what is read from it, the kernel has read by itself.

use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use fuse3::raw::reply::{FileAttr, ReplyAttr, ReplyEntry, ReplyInit, ReplyOpen, ReplyStatFs, ReplyXAttr};
use fuse3::raw::{Filesystem, Request};
use fuse3::{FileType, Timestamp};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};
use thiserror::Error;
use tokio::runtime::Handle;

use super::{Backing, OpenModes, OpenModesError, Passthrough};
use crate::mount::{MountConfig, MountError};
use crate::session::Session;
use crate::sys;

/// How much of the backing file is compared.
const COMPARED_BYTES: u64 = 256 * 1024;
/// Node ids: the root is 1.
const LOWER: u64 = 2;
const OTHER: u64 = 3;
const FILE: u64 = 4;

/// Why files cannot be passed through here.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The file to try it with cannot be read, or is empty.
    #[error("cannot read the file to try passthrough with")]
    Sample(#[source] Errno),
    /// No table of open modes.
    #[error("cannot try passthrough")]
    Modes(#[source] OpenModesError),
    /// The mount to try it on could not be made.
    #[error("cannot mount to try passthrough")]
    Mount(#[source] Box<MountError>),
    /// A kernel before 6.9, or built without it.
    #[error("the kernel does not offer passthrough")]
    NotOffered,
    /// The kernel does not take the file: ELOOP when its file system is stacked on another, EPERM without CAP_SYS_ADMIN.
    #[error("the kernel does not take the backing file")]
    Refused(#[source] Errno),
    /// A step failed on what was passed through.
    #[error("passthrough: {step} failed")]
    Step {
        /// What was done.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// Other bytes than those of the backing file.
    #[error("passthrough: {0} gave wrong bytes")]
    Wrong(&'static str),
}

/// Finds out whether a file like `sample` can be passed through, read and mapped, directly and through an overlayfs on top.
///
/// Mounts on the empty directory `scratch` for the moment and needs what [`Session::mount`] needs. Blocks. The sample must stay as it
/// is meanwhile; a few KiB are enough.
///
/// # Errors
/// See [`ProbeError`]; in every case nothing is left behind.
pub fn probe(sample: BorrowedFd<'_>, scratch: &Path, runtime: &Handle) -> Result<(), ProbeError> {
    let size = rustix::fs::fstat(sample).map_err(ProbeError::Sample)?.st_size;
    let size = u64::try_from(size).unwrap_or(0).min(COMPARED_BYTES);
    let expected = read(sample, size).map_err(ProbeError::Sample)?;
    if expected.is_empty() {
        return Err(ProbeError::Sample(Errno::NODATA));
    }
    let held = sample.try_clone_to_owned().map_err(|error| {
        let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
        ProbeError::Sample(errno)
    })?;
    let modes = Arc::new(OpenModes::create(FILE).map_err(ProbeError::Modes)?);
    let mut config = MountConfig::new(runtime.clone());
    config.fs_name = "passthrough-probe".to_owned();
    config.passthrough = Some(Passthrough::new(Arc::new(Sample(held)), modes));
    let session =
        Session::mount(Probed { size }, scratch, config).map_err(|error| ProbeError::Mount(Box::new(error)))?;
    let outcome = try_all(&session, sample, scratch, &expected);
    if let Err(error) = session.unmount() {
        tracing::warn!(%error, "the mount of a probe did not end cleanly");
    }
    outcome
}

fn try_all(session: &Session, sample: BorrowedFd<'_>, mount: &Path, expected: &[u8]) -> Result<(), ProbeError> {
    if !session.negotiated().passes_through() {
        return Err(ProbeError::NotOffered);
    }
    let id = sys::backing_open(session.as_fd(), sample).map_err(ProbeError::Refused)?;
    sys::backing_close(session.as_fd(), id).map_err(failed("closing a backing file"))?;
    let direct = open(CWD, &mount.join("lower/file")).map_err(failed("open"))?;
    compare(direct.as_fd(), expected, ["read", "a mapping"])?;
    let overlay = overlay(mount).map_err(failed("an overlayfs on top"))?;
    let above = open(overlay.as_fd(), Path::new("file")).map_err(failed("open through overlayfs"))?;
    compare(
        above.as_fd(),
        expected,
        ["read through overlayfs", "a mapping through overlayfs"],
    )
}

fn failed(step: &'static str) -> impl FnOnce(Errno) -> ProbeError {
    move |source| ProbeError::Step { step, source }
}

fn compare(file: BorrowedFd<'_>, expected: &[u8], [by_read, mapped]: [&'static str; 2]) -> Result<(), ProbeError> {
    let len = u64::try_from(expected.len()).unwrap_or(u64::MAX);
    if read(file, len).map_err(failed(by_read))? != expected {
        return Err(ProbeError::Wrong(by_read));
    }
    if sys::read_mapped(file, expected.len()).map_err(failed(mapped))? != expected {
        return Err(ProbeError::Wrong(mapped));
    }
    Ok(())
}

fn open(directory: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// The first `len` bytes, or fewer at the end of the file.
fn read(file: BorrowedFd<'_>, len: u64) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; usize::try_from(len).map_err(|_| Errno::FBIG)?];
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pread(file, &mut bytes[done..], u64::try_from(done).unwrap_or(u64::MAX))? {
            0 => break,
            more => done += more,
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

/// A read-only overlayfs of the mount's two directories that nobody else sees.
fn overlay(mount: &Path) -> Result<OwnedFd, Errno> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for lower in ["lower", "other"] {
        fsconfig_set_string(context.as_fd(), "lowerdir+", mount.join(lower))?;
    }
    fsconfig_create(context.as_fd())?;
    fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY,
    )
}

/// The backing file of the one file there is.
struct Sample(OwnedFd);

impl Backing for Sample {
    fn backing(&self, inode: u64) -> Option<OwnedFd> {
        (inode == FILE).then(|| self.0.try_clone().ok()).flatten()
    }
}

/// What is mounted; `read` is left at its default, an error.
struct Probed {
    size: u64,
}

impl Probed {
    fn attr(&self, ino: u64) -> FileAttr {
        let (kind, perm, size) = match ino {
            FILE => (FileType::RegularFile, 0o444, self.size),
            _ => (FileType::Directory, 0o555, 0),
        };
        let never = Timestamp::new(0, 0);
        FileAttr {
            ino,
            size,
            blocks: 0,
            atime: never,
            mtime: never,
            ctime: never,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
        }
    }
}

impl Filesystem for Probed {
    async fn init(&self, _req: Request) -> fuse3::Result<ReplyInit> {
        Ok(ReplyInit::new(std::num::NonZeroU32::MIN.saturating_add(4095)))
    }

    async fn destroy(&self, _req: Request) {}

    async fn lookup(&self, _req: Request, parent: u64, name: &OsStr) -> fuse3::Result<ReplyEntry> {
        let ino = match (parent, name.as_encoded_bytes()) {
            (1, b"lower") => LOWER,
            (1, b"other") => OTHER,
            (LOWER, b"file") => FILE,
            _ => return Err(libc::ENOENT.into()),
        };
        Ok(ReplyEntry {
            ttl: Duration::from_secs(60),
            attr: self.attr(ino),
            generation: 0,
        })
    }

    async fn getattr(&self, _req: Request, ino: u64, _fh: Option<u64>, _flags: u32) -> fuse3::Result<ReplyAttr> {
        Ok(ReplyAttr {
            ttl: Duration::from_secs(60),
            attr: self.attr(ino),
        })
    }

    async fn open(&self, _req: Request, _inode: u64, _flags: u32) -> fuse3::Result<ReplyOpen> {
        Ok(ReplyOpen { fh: 0, flags: 0 })
    }

    async fn statfs(&self, _req: Request, _inode: u64) -> fuse3::Result<ReplyStatFs> {
        Ok(ReplyStatFs {
            blocks: 1,
            bfree: 0,
            bavail: 0,
            files: FILE,
            ffree: 0,
            bsize: 4096,
            namelen: 255,
            frsize: 4096,
        })
    }

    async fn getxattr(&self, _: Request, _: u64, _: &OsStr, _: u32) -> fuse3::Result<ReplyXAttr> {
        Err(libc::ENODATA.into())
    }
}
