//! The mount: configuration, the mount calls, the device's read-ahead.
//!
//! The new mount API keeps the mount detached until it is served, so nobody ever meets one that does not answer, and a
//! failure half-way leaves nothing behind. Called by [`crate::Session`].

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen, move_mount,
};
use thiserror::Error;
use tokio::runtime::Handle;

use crate::MAX_REPLY_BYTES;
use crate::passthrough::Passthrough;

/// The FUSE device.
pub(crate) const DEVICE: &str = "/dev/fuse";
/// Most worker threads of one session.
pub const WORKERS_MAX: usize = 64;

/// How a file system is mounted and served. Make one with [`MountConfig::new`] and change fields.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct MountConfig {
    /// Runtime that finishes handlers which could not answer at once. Its time driver must be enabled.
    pub runtime: Handle,
    /// First column of `mount` and `findmnt`: which layer this is.
    pub fs_name: String,
    /// Shown as `fuse.<subtype>`.
    pub subtype: String,
    /// Worker threads of a busy session, at most [`WORKERS_MAX`]; a quiet one has one. More than cores help when handlers read
    /// files in place.
    pub workers: NonZeroUsize,
    /// How long a session is quiet before the workers beyond the first leave.
    pub worker_patience: Duration,
    /// Read-ahead and other background requests the kernel has in flight at most.
    pub max_background: u16,
    /// Handlers that may be pending at once. Beyond it workers stop reading, and after 30 s without room requests fail
    /// with EIO. At least `max_background`, or read-ahead alone could fill it.
    pub max_pending: usize,
    /// Read-ahead of the mount, set through its bdi; failing to is logged only.
    pub read_ahead_kib: u32,
    /// Let others than root see the mount (containers do not run as the daemon's user).
    pub allow_other: bool,
    /// Files that the kernel may read by itself; asked for only if there are some. What a kept connection agreed to stays.
    pub passthrough: Option<Passthrough>,
    /// Whether the kernel is to enforce POSIX ACLs, which `default_permissions` alone ignores. It asks for the ACL of each inode that
    /// somebody else than its owner uses, once; a file system without any can spare itself that.
    pub posix_acl: bool,
    /// How long [`crate::Session::unmount`] lets processes with open files finish before it cuts them off.
    pub unmount_grace: Duration,
}

impl MountConfig {
    /// The defaults: one to four workers, 64 background requests, 4096 pending ones, 1 MiB read-ahead, everyone allowed,
    /// ACLs enforced, no passthrough, two seconds of grace.
    pub fn new(runtime: Handle) -> Self {
        Self {
            runtime,
            fs_name: "hullspeed".to_owned(),
            subtype: "hullspeed".to_owned(),
            workers: NonZeroUsize::MIN.saturating_add(3),
            worker_patience: Duration::from_secs(10),
            max_background: 64,
            max_pending: 4096,
            read_ahead_kib: 1024,
            allow_other: true,
            passthrough: None,
            posix_acl: true,
            unmount_grace: Duration::from_secs(2),
        }
    }

    pub(crate) fn check(&self) -> Result<(), MountError> {
        let fault = if self.workers.get() > WORKERS_MAX {
            "more workers than allowed"
        } else if self.max_background == 0 {
            "max_background is zero"
        } else if self.max_pending < usize::from(self.max_background) {
            "max_pending is below max_background"
        } else if self.read_ahead_kib > 1 << 20 {
            "read-ahead above 1 GiB"
        } else {
            return Ok(());
        };
        Err(MountError::Config(fault))
    }
}

/// The file system could not be mounted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MountError {
    /// A value outside its range.
    #[error("invalid mount configuration: {0}")]
    Config(&'static str),
    /// No FUSE on this machine, or no right to use it.
    #[error("cannot open {DEVICE} (is the fuse module loaded, is this process root?)")]
    Device(#[source] Errno),
    /// One of the mount calls failed; needs CAP_SYS_ADMIN.
    #[error("cannot mount on {target}: {step} failed", target = .target.display())]
    Mount {
        /// The mount point.
        target: PathBuf,
        /// The call that failed.
        step: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The handshake with the kernel failed.
    #[error("handshake with the kernel failed for {target}", target = .target.display())]
    Handshake {
        /// The mount point.
        target: PathBuf,
        /// Why.
        #[source]
        source: crate::HandshakeError,
    },
    /// The kept descriptor cannot be served; what is wrong with it.
    #[error("kept descriptor cannot be served: {0}")]
    Kept(&'static str),
    /// A kept connection could not be ended: who uses it waits.
    #[error("kept connection cannot be ended")]
    End(#[source] Errno),
    /// A worker thread could not be started.
    #[error("cannot start a worker thread")]
    Thread(#[source] std::io::Error),
}

/// Device number of a mount; the minor names its connection, both its bdi.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Zero for FUSE.
    pub major: u32,
    /// Unique among mounted file systems without a block device.
    pub minor: u32,
}

impl DeviceNumber {
    /// Bytes of a stored number.
    pub const STORED_BYTES: usize = 8;

    /// For storage beside a kept descriptor.
    pub fn to_bytes(self) -> [u8; Self::STORED_BYTES] {
        let mut bytes = [0; Self::STORED_BYTES];
        let (major, minor) = bytes.split_at_mut(4);
        major.copy_from_slice(&self.major.to_le_bytes());
        minor.copy_from_slice(&self.minor.to_le_bytes());
        bytes
    }

    /// Back from [`DeviceNumber::to_bytes`]; `None` for anything of another length.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (major, minor) = bytes.split_first_chunk()?;
        Some(Self {
            major: u32::from_le_bytes(*major),
            minor: u32::from_le_bytes(minor.try_into().ok()?),
        })
    }
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(out, "{}:{}", self.major, self.minor)
    }
}

/// A mount nobody can see yet.
#[derive(Debug)]
pub(crate) struct Detached {
    mount: OwnedFd,
    pub(crate) device: DeviceNumber,
}

pub(crate) fn open_device() -> Result<OwnedFd, MountError> {
    rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(MountError::Device)
}

impl Detached {
    /// Makes the file system and its mount: read-only, without devices, with set-user-id bits in force (programs of an
    /// image need them), permissions checked by the kernel.
    pub(crate) fn create(device: BorrowedFd<'_>, target: &Path, config: &MountConfig) -> Result<Self, MountError> {
        let failed = |step| {
            move |source| MountError::Mount {
                target: target.to_owned(),
                step,
                source,
            }
        };
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("fsopen"))?;
        let options = [
            ("source", config.fs_name.clone()),
            ("subtype", config.subtype.clone()),
            ("fd", device.as_raw_fd().to_string()),
            ("rootmode", "40000".to_owned()),
            ("user_id", rustix::process::getuid().as_raw().to_string()),
            ("group_id", rustix::process::getgid().as_raw().to_string()),
            ("max_read", MAX_REPLY_BYTES.to_string()),
        ];
        for (key, value) in &options {
            fsconfig_set_string(context.as_fd(), *key, value.as_str()).map_err(failed("fsconfig"))?;
        }
        let flags: &[&str] = if config.allow_other {
            &["default_permissions", "allow_other"]
        } else {
            &["default_permissions"]
        };
        for flag in flags {
            fsconfig_set_flag(context.as_fd(), *flag).map_err(failed("fsconfig"))?;
        }
        fsconfig_set_flag(context.as_fd(), "ro").map_err(failed("fsconfig"))?;
        fsconfig_create(context.as_fd()).map_err(failed("fsconfig"))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("fsmount"))?;
        let device = device_of(mount.as_fd(), "").map_err(failed("statx"))?;
        Ok(Self { mount, device })
    }

    /// Shows the mount at `target`.
    pub(crate) fn attach(self, target: &Path) -> Result<(), MountError> {
        move_mount(
            self.mount.as_fd(),
            "",
            CWD,
            target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(|source| MountError::Mount {
            target: target.to_owned(),
            step: "move_mount",
            source,
        })
    }
}

/// Device number of the file system at `path`, without a request to it: one that hangs must not hang us.
pub(crate) fn device_of(directory: BorrowedFd<'_>, path: impl rustix::path::Arg) -> Result<DeviceNumber, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let stat = rustix::fs::statx(directory, path, flags, StatxFlags::TYPE)?;
    Ok(DeviceNumber {
        major: stat.stx_dev_major,
        minor: stat.stx_dev_minor,
    })
}

/// Raises the read-ahead of a mount. The kernel offers 128 KiB in INIT and never more, so this is the only way.
pub(crate) fn set_read_ahead(device: DeviceNumber, kib: u32) {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", device.major, device.minor);
    match std::fs::write(&path, kib.to_string()) {
        Ok(()) => tracing::debug!(path, kib, "read-ahead set"),
        Err(error) => tracing::warn!(path, kib, %error, "read-ahead stays at the kernel's default"),
    }
}
