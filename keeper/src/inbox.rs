//! The socket that the program's messages come to.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::net::sockopt::set_socket_passcred;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, socket_with};
use rustix::process::{Pid, geteuid, getpgid};

use crate::protocol::MESSAGE_LIMIT;
use crate::sys;

/// What came.
#[derive(Debug)]
pub enum Incoming {
    /// Nothing is there.
    Nothing,
    /// A message from somebody who has no business here; thrown away, and its descriptors never opened.
    Stranger {
        /// The process, as far as it is visible from here.
        process: i32,
    },
    /// A message that is too long, or came with more descriptors than there was room for; thrown away.
    Damaged,
    /// A message of the program.
    Message {
        /// How long it is.
        length: usize,
        /// What came with it.
        descriptors: Vec<OwnedFd>,
    },
}

/// An abstract socket with a random name.
#[derive(Debug)]
pub struct Inbox {
    name: String,
    socket: OwnedFd,
}

impl Inbox {
    /// Makes the socket.
    pub fn bind() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
        set_socket_passcred(&socket, true)?;
        let name = format!("hullspeed-keeper-{:032x}", sys::random()?);
        bind(&socket, &SocketAddrUnix::new_abstract_name(name.as_bytes())?)?;
        Ok(Self { name, socket })
    }

    /// One that was made before.
    #[must_use]
    pub fn resume(name: String, socket: OwnedFd) -> Self {
        Self { name, socket }
    }

    /// Its name and the socket.
    #[must_use]
    pub fn handed(&self) -> (&str, BorrowedFd<'_>) {
        (&self.name, self.socket.as_fd())
    }

    /// What `NOTIFY_SOCKET` has to say.
    #[must_use]
    pub fn variable(&self) -> OsString {
        format!("@{}", self.name).into()
    }

    /// The next message, if `child` or a process of its group sent it; as the keeper's user, and as the kernel says.
    pub fn receive(&self, child: Option<Pid>, buffer: &mut [u8; MESSAGE_LIMIT]) -> io::Result<Incoming> {
        let sender = match sys::peek_sender(self.socket.as_fd()) {
            Ok(sender) => sender,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Incoming::Nothing),
            Err(error) => return Err(error),
        };
        let is_known = sender.is_some_and(|sender| is_of(child, sender));
        let received = sys::receive(self.socket.as_fd(), buffer, is_known)?;
        Ok(match sender {
            _ if !is_known => Incoming::Stranger {
                process: sender.map_or(0, |sender| sender.process),
            },
            _ if received.cut => Incoming::Damaged,
            _ => Incoming::Message {
                length: received.length,
                descriptors: received.descriptors,
            },
        })
    }
}

fn is_of(child: Option<Pid>, sender: sys::Sender) -> bool {
    let process = Pid::from_raw(sender.process);
    let (Some(child), Some(process)) = (child, process) else {
        return false;
    };
    // The child itself may be dead already; its number is not given away before it is reaped.
    sender.user == geteuid().as_raw() && (process == child || getpgid(Some(process)) == Ok(child))
}
