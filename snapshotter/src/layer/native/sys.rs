//! The unsafe calls under native mounts: fanotify, which no crate offers with ranges, and memory shared with a successor.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::AtomicU64;

use memmap2::MmapRaw;

const FAN_CLOEXEC: u32 = 0x1;
const FAN_NONBLOCK: u32 = 0x2;
const FAN_CLASS_PRE_CONTENT: u32 = 0x8;
const FAN_UNLIMITED_QUEUE: u32 = 0x10;
const FAN_UNLIMITED_MARKS: u32 = 0x20;
const FAN_MARK_ADD: u32 = 0x1;
const FAN_MARK_REMOVE: u32 = 0x2;

/// A new group for pre-content events; its queue has no limit, since an event that is lost would be a reader that waits for ever.
#[expect(unsafe_code, reason = "no crate makes groups of this class")]
pub(super) fn fanotify_init() -> io::Result<OwnedFd> {
    let flags = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS;
    let event_flags = (libc::O_RDONLY | libc::O_LARGEFILE | libc::O_CLOEXEC).cast_unsigned();
    // SAFETY: plain numbers in, a descriptor or -1 out.
    let fd = unsafe { libc::fanotify_init(flags, event_flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor, and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets or takes away `mask` on the inode of `file`.
#[expect(unsafe_code, reason = "no crate sets marks of this class")]
pub(super) fn fanotify_mark(group: BorrowedFd<'_>, file: BorrowedFd<'_>, mask: u64, set: bool) -> io::Result<()> {
    let flags = if set { FAN_MARK_ADD } else { FAN_MARK_REMOVE };
    // SAFETY: without a path the descriptor itself is marked; both outlive the call.
    let marked = unsafe { libc::fanotify_mark(group.as_raw_fd(), flags, mask, file.as_raw_fd(), ptr::null()) };
    if marked < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Closes a descriptor that the kernel put into this process with an event.
#[expect(unsafe_code, reason = "the descriptor arrives as a number")]
pub(super) fn close_event(fd: i32) {
    if fd >= 0 {
        // SAFETY: the number came with an event that this process has read and not closed; the journal gives each out once.
        drop(unsafe { OwnedFd::from_raw_fd(fd) });
    }
}

/// Memory that a successor of this process sees as this one leaves it. Words are only ever accessed whole.
#[derive(Debug)]
pub(super) struct SharedWords {
    map: MmapRaw,
    words: usize,
}

impl SharedWords {
    /// Maps the first `words` words of `file`, which has that many and never gets shorter.
    pub(super) fn map(file: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        let map = memmap2::MmapOptions::new()
            .len(words * size_of::<u64>())
            .map_raw(&file)?;
        Ok(Self { map, words })
    }

    /// All words.
    #[expect(unsafe_code, reason = "mapped memory is a pointer")]
    pub(super) fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, as long as this, writable, and lives as long as `self`; its file is sealed against
        // shrinking. Nobody accesses it but through these atomic words and by reads of the kernel into parts of them.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().cast::<AtomicU64>(), self.words) }
    }

    /// Reads from a group into so many words; how many bytes came.
    #[expect(unsafe_code, reason = "the kernel writes into memory that is shared")]
    pub(super) fn read_into(words: &[AtomicU64], group: impl AsFd) -> io::Result<usize> {
        let length = size_of_val(words);
        // SAFETY: atomic words may be written through a shared reference, and the slice is `length` bytes long.
        let read = unsafe {
            libc::read(
                group.as_fd().as_raw_fd(),
                words.as_ptr().cast_mut().cast::<libc::c_void>(),
                length,
            )
        };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }
}
