//! The two system calls on descriptors that this process was started with.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

/// A descriptor of our own for what `inherited` refers to. `inherited` itself stays open, since nobody can know that it is
/// not somebody else's, but no child process gets it.
pub(super) fn take_over(inherited: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved; a number that is no descriptor gives an error.
    #[expect(unsafe_code, reason = "rustix takes only descriptors that are known to be open")]
    let duplicate = unsafe { libc::fcntl(inherited, libc::F_DUPFD_CLOEXEC, 0) };
    if duplicate < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call before has just made it, and nobody else knows of it.
    #[expect(unsafe_code, reason = "the descriptor is only a number until here")]
    let owned = unsafe { OwnedFd::from_raw_fd(duplicate) };
    // SAFETY: as the first.
    #[expect(unsafe_code, reason = "rustix takes only descriptors that are known to be open")]
    let hidden = unsafe { libc::fcntl(inherited, libc::F_SETFD, libc::FD_CLOEXEC) };
    if hidden < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(owned)
}
