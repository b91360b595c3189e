//! Cutting a connection off: through the kernel's FUSE control file system.
//!
//! Needed to end a session whose mount is still in use: closing the descriptor does not wake workers that read from it.
//! The control file system is mounted detached, so this depends on nothing the host has mounted and shows nothing.

use std::os::fd::AsFd;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::mount::DeviceNumber;

/// Fails every request of the connection, waiting or in flight, and ends its readers.
pub(crate) fn abort(device: DeviceNumber) -> Result<(), Errno> {
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    // The kernel names connections by its internal device number, which is the minor where the major is zero.
    let path = format!("{}/abort", device.minor);
    let switch = rustix::fs::openat(root.as_fd(), path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::io::write(switch.as_fd(), b"1").map(drop)
}
