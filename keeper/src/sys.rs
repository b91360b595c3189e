//! The system calls that need unsafe code.

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd, RawFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

pub(crate) fn take_over(inherited: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: no memory is involved; a number that is no descriptor gives an error.
    #[expect(unsafe_code, reason = "rustix takes only descriptors that are known to be open")]
    let flags = check(unsafe { libc::fcntl(inherited, libc::F_GETFD) })?;
    if flags & libc::FD_CLOEXEC != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is this process's own"));
    }
    // SAFETY: as above.
    #[expect(unsafe_code, reason = "rustix takes only descriptors that are known to be open")]
    check(unsafe { libc::fcntl(inherited, libc::F_SETFD, flags | libc::FD_CLOEXEC) })?;
    // SAFETY: it is open and was left to this program, and nobody else here has it: the flag would show it.
    #[expect(unsafe_code, reason = "the descriptor is only a number until here")]
    Ok(unsafe { OwnedFd::from_raw_fd(inherited) })
}
