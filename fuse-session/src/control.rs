//! Control of a connection beside its device: the kernel's FUSE control file system, and what `/proc` says of the descriptor.
//!
//! Needed to end a session whose mount is still in use (closing the descriptor does not wake workers that read from it), and to
//! change limits after the handshake. The control file system is mounted detached, so this depends on nothing the host has mounted
//! and shows nothing.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen};

use crate::mount::DeviceNumber;
use crate::negotiate::congestion_threshold;

/// Ends a connection: fails every request, waiting or in flight, and wakes its readers, in whatever process they are.
/// `ENOENT` when there is no such connection.
pub(crate) fn abort(device: DeviceNumber) -> Result<(), Errno> {
    write(device, "abort", b"1")
}

/// Sets how many background requests the kernel has in flight at most.
pub(crate) fn set_max_background(device: DeviceNumber, limit: u16) -> Result<(), Errno> {
    write(device, "max_background", limit.to_string().as_bytes())?;
    let threshold = congestion_threshold(limit);
    write(device, "congestion_threshold", threshold.to_string().as_bytes())
}

fn write(device: DeviceNumber, name: &str, value: &[u8]) -> Result<(), Errno> {
    let file = open(device, name)?;
    rustix::io::write(file.as_fd(), value).map(drop)
}

fn open(device: DeviceNumber, name: &str) -> Result<OwnedFd, Errno> {
    let context = fsopen("fusectl", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(context.as_fd())?;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    // The kernel names connections by its internal device number, which is the minor where the major is zero.
    let path = format!("{}/{name}", device.minor);
    rustix::fs::openat(root.as_fd(), path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
}

/// The minor device number of the connection that a descriptor of the FUSE device belongs to. Kernels say it since 6.18.
pub(crate) fn connection_of(device: BorrowedFd<'_>) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", device.as_raw_fd())).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("fuse_connection:"))?;
    line.trim().parse().ok()
}
