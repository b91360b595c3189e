//! Descriptors that this program was started with.

use std::io;
use std::os::fd::{OwnedFd, RawFd};

use crate::sys;

/// Takes `inherited` over, and hides it from child processes. It fails if that number was not left to this program: what
/// came over exec has no close-on-exec flag, and what a Rust program opens or has taken over has it.
pub fn take_over(inherited: RawFd) -> io::Result<OwnedFd> {
    sys::take_over(inherited)
}
