//! How much the kernel reads ahead of who reads in order; also the size of the pieces in which a file lies in the page cache.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags};

/// Where the kernel shows what it knows of each file system's device; those of ours are called `erofs-` and a number.
const DEVICES: &str = "/sys/class/bdi";
const DEVICE_PREFIX: &str = "erofs-";
const SETTING: &str = "read_ahead_kb";

/// The read-ahead of a mounted file system; usable as long as that is there.
#[derive(Debug, Clone)]
pub struct ReadAhead {
    /// The directory in sysfs with the settings of this file system, if it could be told from others.
    settings: Option<PathBuf>,
}

impl ReadAhead {
    /// Of the file system that appeared since `known` were listed.
    pub(crate) fn of_new(known: Option<&BTreeSet<OsString>>) -> Self {
        Self {
            settings: known.and_then(new_since),
        }
    }

    /// Sets it, 128 KiB if this is not called. A file keeps what was set when it was opened.
    ///
    /// # Errors
    /// When the kernel's directory of it is not known or is gone.
    pub fn set(&self, kib: u32) -> io::Result<()> {
        let settings = self.settings.as_ref().ok_or_else(|| {
            let text = "its device could not be told from others that appeared in /sys/class/bdi";
            io::Error::new(io::ErrorKind::NotFound, text)
        })?;
        std::fs::write(settings.join(SETTING), kib.to_string())
    }
}

/// What the kernel reads ahead of files on the disk that `file` lies on, in KiB; none where that cannot be told, as of file systems
/// that have a device number of their own.
#[must_use]
pub fn of_disk(file: BorrowedFd<'_>) -> Option<u32> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let stat = rustix::fs::statx(file, "", flags, StatxFlags::TYPE).ok()?;
    let number = format!("{}:{}", stat.stx_dev_major, stat.stx_dev_minor);
    let of_device = Path::new(DEVICES).join(&number).join(SETTING);
    // A partition has that of its disk.
    let of_partition = format!("/sys/dev/block/{number}/../bdi/{SETTING}");
    let text = std::fs::read_to_string(of_device).or_else(|_| std::fs::read_to_string(of_partition));
    text.ok()?.trim().parse().ok()
}

/// The directories in sysfs of the EROFS file systems there are.
pub(crate) fn listed() -> Option<BTreeSet<OsString>> {
    let names = std::fs::read_dir(DEVICES)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.file_name()));
    let ours = names.filter(|name| name.as_encoded_bytes().starts_with(DEVICE_PREFIX.as_bytes()));
    Some(ours.collect())
}

/// The one that was not there before, if it is one.
fn new_since(known: &BTreeSet<OsString>) -> Option<PathBuf> {
    let listed = listed()?;
    let mut new = listed.difference(known);
    let name = new.next()?;
    new.next().is_none().then(|| Path::new(DEVICES).join(name))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn what_cannot_be_told_is_an_error_and_not_a_guess() {
        let unknown = ReadAhead { settings: None };
        assert_eq!(unknown.set(128).unwrap_err().kind(), io::ErrorKind::NotFound);
        // A file in memory is on no disk.
        let memory = rustix::fs::memfd_create("nowhere", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(of_disk(memory.as_fd()), None);
    }
}
