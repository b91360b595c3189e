//! Messages of the sd_notify protocol, as the supervised side sends them: one datagram each, descriptors beside it.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags, SocketType,
};

/// Most bytes of a descriptor's name, as systemd has it.
pub const NAME_LIMIT: usize = 255;

/// Most bytes that the names of all descriptors together may have, one separator each: they are handed over in one
/// variable of the environment, and the kernel refuses to start a program with a longer one (`MAX_ARG_STRLEN`, 128 KiB).
/// A store that held more would make every later start fail. The rest is for the variable's name and the listeners'.
pub const NAMES_LIMIT: usize = 127 * 1024;

/// How long a message may wait for room before sending fails.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// Pause before the next attempt when the kernel is short of something.
const PAUSE: Duration = Duration::from_millis(5);

/// Whether a descriptor may have this name: not empty, at most [`NAME_LIMIT`] bytes, printable ASCII without a colon.
#[must_use]
pub fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= NAME_LIMIT && name.iter().all(|byte| matches!(byte, b' '..=b'~') && *byte != b':')
}

/// The socket that `NOTIFY_SOCKET` names: a path, or the name of an abstract socket after `@`.
#[derive(Debug, Clone)]
pub struct Address(SocketAddrUnix);

impl Address {
    /// Reads the variable's value.
    pub fn parse(value: &OsStr) -> io::Result<Self> {
        let address = match value.as_bytes() {
            [b'@', name @ ..] if !name.is_empty() => SocketAddrUnix::new_abstract_name(name),
            [b'/', ..] => SocketAddrUnix::new(value.as_bytes()),
            _ => Err(Errno::INVAL),
        };
        Ok(Self(address?))
    }
}

/// Sends messages to one address.
#[derive(Debug)]
pub struct Sender {
    socket: OwnedFd,
    address: Address,
}

impl Sender {
    /// A sender to `address`.
    pub fn new(address: Address) -> io::Result<Self> {
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&socket, Timeout::Send, Some(SEND_LIMIT))?;
        Ok(Self { socket, address })
    }

    /// Sends `message`, and `descriptor` with it. When this returns, the message is in the receiver's queue and outlives
    /// this process. Waits a bounded time for room in the queue.
    pub fn send(&self, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let end = Instant::now() + SEND_LIMIT;
        loop {
            match self.attempt(message, descriptor, SendFlags::NOSIGNAL) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) if Instant::now() < end => {}
                // Memory, or descriptors under way to some receiver: both end by themselves.
                Err(Errno::NOBUFS | Errno::NOMEM | Errno::TOOMANYREFS) if Instant::now() < end => {
                    std::thread::sleep(PAUSE);
                }
                Err(Errno::AGAIN) => return Err(io::ErrorKind::TimedOut.into()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Sends `message` if there is room for it, and fails otherwise.
    pub fn send_at_once(&self, message: &[u8]) -> io::Result<()> {
        Ok(self.attempt(message, None, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
    }

    /// Fails if nobody has the socket that messages go to. It may be left at any moment after that.
    pub fn check_receiver(&self) -> io::Result<()> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        Ok(rustix::net::connect(&socket, &self.address.0)?)
    }

    fn attempt(&self, message: &[u8], descriptor: Option<BorrowedFd<'_>>, flags: SendFlags) -> Result<(), Errno> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor]);
        if let Some(descriptors) = &descriptors
            && !control.push(SendAncillaryMessage::ScmRights(descriptors))
        {
            return Err(Errno::NOBUFS);
        }
        let parts = [IoSlice::new(message)];
        let sent = rustix::net::sendmsg_addr(self.socket.as_fd(), &self.address.0, &parts, &mut control, flags)?;
        // Datagrams go as a whole or not at all.
        if sent == message.len() {
            Ok(())
        } else {
            Err(Errno::MSGSIZE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_the_variable_can_carry() {
        for name in ["fanotify", "data-0a", " ", "~", &"n".repeat(255)] {
            assert!(is_name(name.as_bytes()), "{name}");
        }
        for name in ["", "a:b", "a\nb", "a\u{7f}", "ä", "\0", &"n".repeat(256)] {
            assert!(!is_name(name.as_bytes()), "{name:?}");
        }
    }

    #[test]
    fn addresses_are_paths_or_abstract_names() {
        for value in ["@x", "/run/systemd/notify"] {
            assert!(Address::parse(OsStr::new(value)).is_ok(), "{value}");
        }
        let long = format!("/{}", "x".repeat(200));
        for value in ["", "@", "relative", "vsock:2:1", "/a\0b", &long] {
            assert!(Address::parse(OsStr::new(value)).is_err(), "{value:?}");
        }
    }
}
