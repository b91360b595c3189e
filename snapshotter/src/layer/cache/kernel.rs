//! The note on a layer's `data` that the kernel reads it by itself.
//!
//! Containers keep a file system that no process of ours knows of any more. So it is noted on the file, with the boot in which it is so,
//! and whoever opens the layer later punches no holes into it either.

use std::fs::{self, File};
use std::io;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

/// Name of the attribute. Only root sees it.
const NAME: &str = "trusted.hullspeed.read_by_kernel";
/// What tells one boot from another.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
/// Longest value that is looked at.
const MAX_VALUE: usize = 64;

fn boot() -> io::Result<Vec<u8>> {
    Ok(fs::read_to_string(BOOT)?.trim().as_bytes().to_vec())
}

/// Notes it.
pub(super) fn note(data: &File) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(data, NAME, &boot()?, XattrFlags::empty())?)
}

/// Takes the note away.
pub(super) fn clear(data: &File) -> io::Result<()> {
    match rustix::fs::fremovexattr(data, NAME) {
        Ok(()) | Err(Errno::NODATA) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether it was noted since the machine was booted.
pub(super) fn is_noted(data: &File) -> io::Result<bool> {
    let mut value = [0; MAX_VALUE];
    match rustix::fs::fgetxattr(data, NAME, &mut value) {
        Ok(length) => Ok(value.get(..length) == Some(&boot()?[..])),
        // Nothing noted, or a file system that can note nothing.
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileged_a_note_is_of_this_boot() {
        let data = tempfile::tempfile().unwrap();
        assert!(!is_noted(&data).unwrap());
        note(&data).unwrap();
        assert!(is_noted(&data).unwrap());
        rustix::fs::fsetxattr(&data, NAME, b"another", XattrFlags::empty()).unwrap();
        assert!(!is_noted(&data).unwrap());
        clear(&data).unwrap();
        clear(&data).unwrap();
        assert!(!is_noted(&data).unwrap());
    }
}
