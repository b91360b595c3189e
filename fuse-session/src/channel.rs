//! The descriptor shared by all workers: one message per read, one answer per write.
//!
//! Requests read through a cloned device descriptor die with it, so there is exactly one descriptor and no clones. An
//! answer goes out through a [`Responder`], which answers EIO if it is dropped: no path leaves a caller waiting.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use zerocopy::IntoBytes;

use crate::abi::{self, OutHeader};
use crate::mount::DeviceNumber;
use crate::reply::Reply;

/// The session's device descriptor.
#[derive(Debug)]
pub(crate) struct Channel {
    fd: OwnedFd,
    /// Set when a successor is to answer what is in flight.
    silent: AtomicBool,
}

/// What one read gave.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Received {
    /// A message of so many bytes.
    Message(usize),
    /// Nothing this time: a signal, or a request that was given up while it was read.
    Retry,
    /// The file system is unmounted, or the connection was aborted.
    Ended,
    /// The read failed in another way.
    Failed(Errno),
}

impl Channel {
    pub(crate) fn new(fd: OwnedFd) -> Self {
        let silent = AtomicBool::new(false);
        Self { fd, silent }
    }

    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    /// Whether the connection is over. Its number may be another's by then, and must not be used any more.
    pub(crate) fn is_over(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut polled = [PollFd::new(&self.fd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut polled, Some(&now)), Ok(1..)) && polled[0].revents().contains(PollFlags::ERR)
    }

    /// Cuts the connection off, unless it is over.
    pub(crate) fn abort(&self, device: DeviceNumber) -> Result<(), Errno> {
        if self.is_over() {
            return Err(Errno::NOENT);
        }
        crate::control::abort(device)
    }

    /// Waits for the next message.
    pub(crate) fn receive(&self, buffer: &mut [u8]) -> Received {
        match rustix::io::read(&self.fd, buffer) {
            // The device never gives an empty message; a socket in its place does when the peer is gone.
            Ok(0) => Received::Ended,
            Ok(len) => Received::Message(len),
            Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => Received::Retry,
            Err(Errno::NODEV | Errno::CONNABORTED) => Received::Ended,
            Err(errno) => Received::Failed(errno),
        }
    }

    /// From here on nothing is answered: what is in flight is a successor's. An answer that is being written at this moment may
    /// still arrive, and is as good as any.
    pub(crate) fn silence(&self) {
        self.silent.store(true, Ordering::SeqCst);
    }

    /// Whether nothing is answered any more.
    pub(crate) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// Has the kernel queue again what was read, by whomever, and not answered. Such a request comes with the top bit of its number
    /// set and is known by that number from then on.
    pub(crate) fn resend(&self) -> Result<(), Errno> {
        self.notify(abi::NOTIFY_RESEND, &[])
    }

    /// Wakes one reader: it gets a message that wants no answer. `file` is a regular file the kernel knows.
    ///
    /// Nobody waits for anything here, unlike after a system call on the mount: a process that is killed while it waits for its own
    /// answer stays, neither dead nor alive, for as long as something else holds the descriptor.
    pub(crate) fn wake_reader(&self, file: u64) -> Result<(), Errno> {
        let record = abi::NotifyRetrieveOut {
            notify_unique: 0,
            nodeid: file,
            offset: 0,
            size: 0,
            padding: 0,
        };
        self.notify(abi::NOTIFY_RETRIEVE, record.as_bytes())
    }

    /// Answers a request, unless nothing is answered any more.
    pub(crate) fn send(&self, unique: u64, reply: &Reply) {
        if self.is_silent() {
            return;
        }
        match self.write(unique, reply) {
            Ok(()) => {}
            // The caller gave up, or the session ended: nobody is waiting.
            Err(errno @ (Errno::NOENT | Errno::NODEV | Errno::NOTCONN | Errno::CONNABORTED | Errno::PIPE)) => {
                tracing::trace!(unique, %errno, "answer not wanted any more");
            }
            Err(errno) => {
                tracing::error!(unique, %errno, len = reply.payload().len(), "kernel refused an answer");
                // If the kernel dropped the request together with the bad answer, this one is refused with ENOENT.
                let _ = self.write(unique, &Reply::Error(libc::EIO));
            }
        }
    }

    /// Tells the kernel what it did not ask for.
    pub(crate) fn notify(&self, code: i32, record: &[u8]) -> Result<(), Errno> {
        self.write_message(0, code, record)
    }

    fn write(&self, unique: u64, reply: &Reply) -> Result<(), Errno> {
        self.write_message(unique, reply.error_code(), reply.payload())
    }

    fn write_message(&self, unique: u64, error: i32, payload: &[u8]) -> Result<(), Errno> {
        let len = u32::try_from(size_of::<OutHeader>() + payload.len()).map_err(|_| Errno::INVAL)?;
        let header = OutHeader { len, error, unique };
        let parts = [IoSlice::new(header.as_bytes()), IoSlice::new(payload)];
        let parts = if payload.is_empty() { &parts[..1] } else { &parts[..] };
        loop {
            match rustix::io::writev(&self.fd, parts) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// The duty to answer one request.
#[derive(Debug)]
pub(crate) struct Responder {
    channel: Arc<Channel>,
    unique: Option<u64>,
}

impl Responder {
    pub(crate) fn new(channel: Arc<Channel>, unique: u64) -> Self {
        Self {
            channel,
            unique: Some(unique),
        }
    }

    /// For requests the kernel expects no answer to.
    pub(crate) fn silent(channel: Arc<Channel>) -> Self {
        Self { channel, unique: None }
    }

    pub(crate) fn send(mut self, reply: &Reply) {
        if let Some(unique) = self.unique.take() {
            self.channel.send(unique, reply);
        }
    }

    /// Gives the duty up: another handler has the same request.
    pub(crate) fn yield_to_other(mut self) {
        self.unique = None;
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if let Some(unique) = self.unique.take() {
            self.channel.send(unique, &Reply::Error(libc::EIO));
        }
    }
}
