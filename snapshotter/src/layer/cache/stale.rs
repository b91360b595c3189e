//! Mounts that a process which was killed left on the mount points of layers: they are dead, and keep a directory from being removed.

use std::io;
use std::os::unix::ffi::OsStrExt;
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

/// Type of the file system that is shown at `path`, as the mount table has it; `None` if nothing is mounted there.
pub fn kind_at(path: &Path) -> io::Result<Option<String>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let wanted = path.as_os_str().as_bytes();
    // The last one is on top.
    Ok(table
        .split(|byte| *byte == b'\n')
        .rev()
        .find_map(|line| shown(line, wanted)))
}

/// Type of the file system in a line of the mount table, if it is mounted at `wanted`.
fn shown(line: &[u8], wanted: &[u8]) -> Option<String> {
    let mut fields = line.split(|byte| *byte == b' ');
    let target = fields.nth(4)?;
    if unescaped(target) != wanted {
        return None;
    }
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(String::from_utf8_lossy(kind).into_owned())
}

/// The mount table writes some bytes as a backslash and three octal digits.
fn unescaped(text: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let byte = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &tail[3..] } else { tail };
    }
    bytes
}

/// Detaches what is mounted in a layer's directory, and removes the directory with all that is in it.
pub(super) fn remove_layer(dir: &Path) -> io::Result<()> {
    detach_stale(&dir.join(MOUNT_POINT))?;
    std::fs::remove_dir_all(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_table_is_read_as_it_is_written() {
        let line = b"36 35 98:0 /mnt1 /a\\040b/mnt rw,noatime master:1 shared:2 - erofs /dev/root rw";
        assert_eq!(shown(line, b"/a b/mnt").as_deref(), Some("erofs"));
        assert_eq!(shown(line, b"/a"), None);
        assert_eq!(shown(b"36 35 98:0 / /x rw -", b"/x"), None);
        assert_eq!(shown(b"", b""), None);
        assert_eq!(unescaped(b"\\134\\0\\999"), b"\\\\0\\999");
        assert_eq!(kind_at(Path::new("/proc")).unwrap().as_deref(), Some("proc"));
        assert_eq!(kind_at(Path::new("/proc/self")).unwrap(), None);
    }
}
