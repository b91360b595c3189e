//! Mounts that a process which was killed left on the mount points of layers: they are dead, and keep a directory from being removed.

use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// Where a layer is mounted, in its directory.
pub(super) const MOUNT_POINT: &str = "mnt";
/// Mounts stacked on one mount point that are cleared away; more than one only after crashes in between.
const MAX_STALE_MOUNTS: usize = 16;

/// Detaches what a predecessor that was killed left on the mount point.
pub fn detach_stale(path: &Path) -> io::Result<()> {
    for _ in 0..MAX_STALE_MOUNTS {
        match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => tracing::info!(path = %path.display(), "detached a mount left by an earlier process"),
            // Not a mount point: nothing is left. And who may not detach has not mounted.
            Err(Errno::INVAL | Errno::NOENT | Errno::NOTDIR | Errno::PERM) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
    Err(io::Error::other(format!(
        "more than {MAX_STALE_MOUNTS} mounts are stacked there"
    )))
}

/// Detaches what is mounted in a layer's directory, and removes the directory with all that is in it.
pub(super) fn remove_layer(dir: &Path) -> io::Result<()> {
    detach_stale(&dir.join(MOUNT_POINT))?;
    std::fs::remove_dir_all(dir)
}
