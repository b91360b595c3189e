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
    Ok(stack_at(path)?.into_iter().next())
}

/// Types of the file systems that are mounted at `path`, the one that is shown first.
pub fn stack_at(path: &Path) -> io::Result<Vec<String>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(stacked(&table, path.as_os_str().as_bytes()))
}

/// A mount in the table.
struct Listed {
    number: u64,
    parent: u64,
    kind: String,
}

/// The mounts at `wanted`, from the top. The table is in the order in which they were made, and one may have been put below another:
/// who is on top of whom only the parents tell.
fn stacked(table: &[u8], wanted: &[u8]) -> Vec<String> {
    let mut there: Vec<_> = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| listed(line, wanted))
        .collect();
    let mut stack = Vec::with_capacity(there.len());
    while let Some(top) = there
        .iter()
        .rposition(|mount| there.iter().all(|other| other.parent != mount.number))
    {
        stack.push(there.remove(top).kind);
    }
    stack
}

/// The mount in a line of the table, if it is mounted at `wanted`.
fn listed(line: &[u8], wanted: &[u8]) -> Option<Listed> {
    let mut fields = line.split(|byte| *byte == b' ');
    let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
    let (number, parent) = (number()?, number()?);
    let target = fields.nth(2)?;
    if unescaped(target) != wanted {
        return None;
    }
    let kind = fields.skip_while(|field| *field != b"-").nth(1)?;
    Some(Listed {
        number,
        parent,
        kind: String::from_utf8_lossy(kind).into_owned(),
    })
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
        assert_eq!(stacked(line, b"/a b/mnt"), ["erofs"]);
        for (line, wanted) in [
            (&line[..], "/a"),
            (b"36 35 98:0 / /x rw -", "/x"),
            (b"", ""),
            (b"x y 0 / /x rw - a", "/x"),
        ] {
            assert!(stacked(line, wanted.as_bytes()).is_empty());
        }
        assert_eq!(unescaped(b"\\134\\0\\999"), b"\\\\0\\999");
        assert_eq!(kind_at(Path::new("/proc")).unwrap().as_deref(), Some("proc"));
        assert_eq!(kind_at(Path::new("/proc/self")).unwrap(), None);
    }

    #[test]
    fn what_is_shown_is_what_nothing_is_mounted_on() {
        // 42 was made last and put below 41, which is on top of it for that.
        let table = b"40 1 8:1 / / rw - ext4 /dev/a rw\n41 42 0:5 / /x ro - fuse.hullspeed h ro\n42 40 0:6 / /x ro - erofs /i ro\n\
            43 40 0:7 / /y ro - erofs /i ro\n";
        assert_eq!(stacked(table, b"/x"), ["fuse.hullspeed", "erofs"]);
        // As mount(8) stacks them.
        let table = b"41 40 0:5 / /x ro - fuse.hullspeed h ro\n42 41 0:6 / /x ro - erofs /i ro\n";
        assert_eq!(stacked(table, b"/x"), ["erofs", "fuse.hullspeed"]);
        // No table has a circle; this one ends all the same.
        assert!(stacked(b"1 2 0:1 / /x ro - a b c\n2 1 0:1 / /x ro - a b c\n", b"/x").is_empty());
    }
}
