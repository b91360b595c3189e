//! The descriptor store: descriptors that the supervisor keeps while this process is away.
//!
//! Spoken is the `FDSTORE` part of sd_notify, which systemd has (service units with `FileDescriptorStoreMax=`) and so has
//! `hullspeed-keeper`. What is kept comes back to the next process by [`crate::activation`].
//!
//! - The store never answers. What it would refuse is refused here: names that it does not know how to hand over, more
//!   descriptors than it takes, more names than one variable of the environment may hold.
//! - Stores keep one open file once, whatever it is called: a second name for it is lost. Descriptors that were opened
//!   apart are different files, also of the same path.
//! - Messages are sent with `FDPOLL=0` (systemd ≥ 246): without it systemd drops a descriptor on which a poll says
//!   `POLLHUP` or `POLLERR`, and that of a mount must stay until it is taken back. Older ones ignore the word and poll.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hullspeed_keeper::notification::{Address, NAMES_LIMIT, Sender, is_name};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::activation::Inherited;

#[cfg(test)]
mod tests;

/// Name of the notification socket's variable.
const SOCKET: &str = "NOTIFY_SOCKET";

/// Names of the variables that may say how many descriptors are kept: systemd ≥ 254 and our keeper set the first; with an
/// older systemd the unit has to set the second to its `FileDescriptorStoreMax=`.
const CAPACITY: [&str; 2] = ["FDSTORE", "HULLSPEED_FDSTORE"];

/// A store that this process may leave descriptors in.
///
/// All calls may wait for seconds when the supervisor does not read; they are no calls for an asynchronous task.
#[derive(Debug)]
pub struct Store {
    sender: Sender,
    capacity: usize,
    ledger: Mutex<Ledger>,
}

/// What the store has, as far as this process knows.
#[derive(Debug, Default)]
struct Ledger {
    names: BTreeMap<String, usize>,
    descriptors: usize,
    bytes: usize,
}

impl Ledger {
    fn add(&mut self, name: &str) {
        *self.names.entry(name.to_owned()).or_default() += 1;
        self.descriptors += 1;
        self.bytes += cost(name);
    }

    fn remove(&mut self, name: &str) {
        let count = self.names.remove(name).unwrap_or_default();
        self.descriptors -= count;
        self.bytes -= count * cost(name);
    }
}

/// Bytes that a name takes in the variable, its separator with it.
fn cost(name: &str) -> usize {
    name.len() + 1
}

impl Store {
    /// The store that this process was started with, if its supervisor has one.
    #[must_use]
    pub fn from_environment() -> Option<Self> {
        let socket = std::env::var_os(SOCKET).filter(|socket| !socket.is_empty())?;
        let said = CAPACITY.map(std::env::var_os);
        let capacity = said.iter().flatten().find_map(|value| value.to_str()?.parse().ok())?;
        match Self::new(&socket, capacity) {
            Ok(store) => store,
            Err(error) => {
                tracing::warn!(%error, ?socket, "the descriptor store cannot be used");
                None
            }
        }
    }

    /// A store of `capacity` descriptors behind `socket`, which is what `NOTIFY_SOCKET` says; none if it keeps none.
    pub fn new(socket: &OsStr, capacity: usize) -> io::Result<Option<Self>> {
        if capacity == 0 {
            return Ok(None);
        }
        Ok(Some(Self {
            sender: Sender::new(Address::parse(socket)?)?,
            capacity,
            ledger: Mutex::default(),
        }))
    }

    /// The most descriptors that are kept.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many descriptors the store has, as far as this process knows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.lock().descriptors
    }

    /// Whether the store has nothing, as far as this process knows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes note of what came back from the store, since that is still in it. To be called before anything is taken.
    pub fn note(&self, inherited: &Inherited) {
        let mut ledger = self.lock();
        for name in inherited.kept_names() {
            ledger.add(name);
        }
    }

    /// Leaves `descriptor` under `name` in the store, beside what has that name. When this returns, the message is queued
    /// and survives this process; [`Store::barrier`] tells when it was taken in.
    pub fn keep(&self, name: &str, descriptor: BorrowedFd<'_>) -> io::Result<()> {
        check(name)?;
        let mut ledger = self.lock();
        if ledger.descriptors >= self.capacity {
            let reason = format!("the descriptor store has room for {} and is full", self.capacity);
            return Err(io::Error::new(io::ErrorKind::StorageFull, reason));
        }
        if ledger.bytes + cost(name) > NAMES_LIMIT {
            let reason = format!("the names in the descriptor store would be longer than {NAMES_LIMIT} bytes together");
            return Err(io::Error::new(io::ErrorKind::StorageFull, reason));
        }
        let message = format!("FDSTORE=1\nFDPOLL=0\nFDNAME={name}");
        self.sender.send(message.as_bytes(), Some(descriptor))?;
        ledger.add(name);
        Ok(())
    }

    /// Has everything under `name` closed by the store; nothing happens if there is no such name.
    pub fn forget(&self, name: &str) -> io::Result<()> {
        check(name)?;
        let mut ledger = self.lock();
        let message = format!("FDSTOREREMOVE=1\nFDNAME={name}");
        self.sender.send(message.as_bytes(), None)?;
        ledger.remove(name);
        Ok(())
    }

    /// Returns when the supervisor has taken in everything that was sent before, at the latest after `limit`, which is an
    /// error; so is a supervisor that has gone. systemd has this since 246; an older one closes what it does not understand, which looks the same.
    pub fn barrier(&self, limit: Duration) -> io::Result<()> {
        let end = Instant::now() + limit;
        let (ours, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        self.sender
            .send(b"BARRIER=1", Some(std::os::fd::AsFd::as_fd(&theirs)))?;
        drop(theirs);
        loop {
            let left = Timespec::try_from(end.saturating_duration_since(Instant::now()));
            let left = left.map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            // Without a flag: what is waited for is that nobody has the other end any more.
            match poll(&mut [PollFd::new(&ours, PollFlags::empty())], Some(&left)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                // It was closed because it was read, or because nobody is there any more to read it.
                Ok(_) => return self.sender.check_receiver(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Ledger> {
        // No call in between leaves the numbers in disorder.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check(name: &str) -> io::Result<()> {
    if is_name(name.as_bytes()) {
        return Ok(());
    }
    let reason = format!("{name:?} is no name for a kept descriptor (1 to 255 printable ASCII characters, no colon)");
    Err(io::Error::new(io::ErrorKind::InvalidInput, reason))
}
