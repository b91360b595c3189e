//! The crate's only unsafe calls: two ioctls of the FUSE device, and memory shared by a descriptor.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

/// Argument of FUSE_DEV_IOC_BACKING_OPEN.
#[repr(C)]
struct BackingMap {
    fd: i32,
    flags: u32,
    padding: u64,
}

/// `_IOW(229, 1, struct fuse_backing_map)`
const BACKING_OPEN: libc::Ioctl = 0x4010_e501_u32 as libc::Ioctl;
/// `_IOW(229, 2, uint32_t)`
const BACKING_CLOSE: libc::Ioctl = 0x4004_e502_u32 as libc::Ioctl;

/// Gives the connection of `device` a file that opened ones may be read through; its number on that connection.
#[expect(unsafe_code, reason = "an ioctl whose result is a value")]
pub(crate) fn backing_open(device: BorrowedFd<'_>, file: BorrowedFd<'_>) -> Result<u32, Errno> {
    let map = BackingMap {
        fd: file.as_raw_fd(),
        flags: 0,
        padding: 0,
    };
    // SAFETY: the kernel reads one BackingMap and keeps nothing of it.
    let id = unsafe { libc::ioctl(device.as_raw_fd(), BACKING_OPEN, &raw const map) };
    match u32::try_from(id) {
        Ok(id) if id > 0 => Ok(id),
        Ok(_) => Err(Errno::INVAL),
        Err(_) => Err(last_error()),
    }
}

/// Takes such a file away again. Those opened through it stay open.
#[expect(unsafe_code, reason = "an ioctl")]
pub(crate) fn backing_close(device: BorrowedFd<'_>, id: u32) -> Result<(), Errno> {
    // SAFETY: the kernel reads one u32.
    match unsafe { libc::ioctl(device.as_raw_fd(), BACKING_CLOSE, &raw const id) } {
        0 => Ok(()),
        _ => Err(last_error()),
    }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Numbers in memory that other processes may map too.
#[derive(Debug)]
pub(crate) struct SharedWords {
    words: NonNull<AtomicU32>,
    len: usize,
    fd: OwnedFd,
}

/// What a shared file must not do any more: become smaller under a mapping.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

impl SharedWords {
    /// `len` zeros in a memory file of their own.
    pub(crate) fn create(name: &str, len: usize) -> Result<Self, Errno> {
        let bytes = len.checked_mul(size_of::<AtomicU32>()).ok_or(Errno::FBIG)?;
        let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, u64::try_from(bytes).map_err(|_| Errno::FBIG)?)?;
        rustix::fs::fcntl_add_seals(&fd, SEALS)?;
        Self::map(fd, len)
    }

    /// All numbers of a memory file made by [`SharedWords::create`], at most `most`. What could shrink while it is mapped is refused.
    pub(crate) fn of_file(fd: OwnedFd, most: usize) -> Result<Self, Errno> {
        if !rustix::fs::fcntl_get_seals(&fd)?.contains(SEALS) {
            return Err(Errno::PERM);
        }
        let bytes = usize::try_from(rustix::fs::fstat(&fd)?.st_size).map_err(|_| Errno::FBIG)?;
        let len = bytes / size_of::<AtomicU32>();
        if len > most {
            return Err(Errno::FBIG);
        }
        Self::map(fd, len)
    }

    #[expect(unsafe_code, reason = "mapping memory")]
    fn map(fd: OwnedFd, len: usize) -> Result<Self, Errno> {
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
        // SAFETY: a new mapping at an address of the kernel's choice, which no other memory has.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len * size_of::<AtomicU32>(),
                access,
                flags,
                &fd,
                0,
            )
        }?;
        let words = NonNull::new(start.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { words, len, fd })
    }

    #[expect(unsafe_code, reason = "looking into a mapping")]
    pub(crate) fn word(&self, index: usize) -> Option<&AtomicU32> {
        // SAFETY: inside the mapping, which is page-aligned, lives as long as self, and cannot lose pages: the file is sealed. Any
        // bytes are a number, and whoever else writes them does so atomically or gets what he deserves: another number.
        (index < self.len).then(|| unsafe { self.words.add(index).as_ref() })
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl AsFd for SharedWords {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Drop for SharedWords {
    #[expect(unsafe_code, reason = "unmapping memory")]
    fn drop(&mut self) {
        // SAFETY: mapped by this value with this length; references to words borrow it.
        let _ = unsafe { rustix::mm::munmap(self.words.as_ptr().cast(), self.len * size_of::<AtomicU32>()) };
    }
}

#[expect(unsafe_code, reason = "the mapping belongs to no thread")]
// SAFETY: only atomic numbers are behind the pointer.
unsafe impl Send for SharedWords {}
#[expect(unsafe_code, reason = "the mapping belongs to no thread")]
// SAFETY: only atomic numbers are behind the pointer.
unsafe impl Sync for SharedWords {}

/// Copies the first `len` bytes of `file` out of a mapping of it. The kernel does the looking: a page that cannot be had is an error
/// here, not a signal.
#[expect(unsafe_code, reason = "mapping a file")]
pub(crate) fn read_mapped(file: BorrowedFd<'_>, len: usize) -> Result<Vec<u8>, Errno> {
    if len == 0 {
        return Ok(Vec::new());
    }
    let copy = rustix::fs::memfd_create("mapped", MemfdFlags::CLOEXEC)?;
    // SAFETY: a new mapping at an address of the kernel's choice; only the kernel looks into it, by `write`.
    unsafe {
        let start = rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ, MapFlags::PRIVATE, file, 0)?;
        let written = libc::write(copy.as_raw_fd(), start, len);
        let failed = (written < 0).then(last_error);
        rustix::mm::munmap(start, len)?;
        if let Some(errno) = failed {
            return Err(errno);
        }
    }
    let mut bytes = vec![0; len];
    let read = rustix::io::pread(&copy, &mut bytes[..], 0)?;
    bytes.truncate(read);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn shared_words_are_seen_through_every_mapping_and_kept_by_the_descriptor() {
        let words = SharedWords::create("test", 3000).unwrap();
        assert!(words.word(3000).is_none());
        words.word(2999).unwrap().store(7, Ordering::Release);
        let kept = words.as_fd().try_clone_to_owned().unwrap();
        let other = SharedWords::of_file(kept.try_clone().unwrap(), 3000).unwrap();
        assert_eq!(other.word(2999).unwrap().load(Ordering::Acquire), 7);
        drop((words, other));
        let third = SharedWords::of_file(kept.try_clone().unwrap(), 3000).unwrap();
        assert_eq!(third.word(2999).unwrap().load(Ordering::Acquire), 7);
        assert_eq!(SharedWords::of_file(kept, 2999).unwrap_err(), Errno::FBIG);
    }

    #[test]
    fn files_that_could_shrink_are_not_mapped() {
        let open = rustix::fs::memfd_create("open", MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&open, 4096).unwrap();
        assert_eq!(SharedWords::of_file(open, 4096).unwrap_err(), Errno::PERM);
        let plain = tempfile::tempfile().unwrap();
        assert!(SharedWords::of_file(plain.into(), 4096).is_err());
    }
}
