//! Descriptors that the service manager left to this process: listeners that it made, and what a process before this one
//! put in its descriptor store ([`crate::fdstore`]).
//!
//! They are announced in `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` and begin at descriptor 3. Listeners work on while
//! the daemon is started anew, so that a client waits and is not refused; their files belong to the service manager.
//! A listening Unix socket is a listener; everything else is something that was kept.
//!
//! What the environment says is not believed further than this: a number in the announced range is taken over only if
//! the descriptor was open when this program started, which shows in its close-on-exec flag. Everything that a Rust
//! program opens itself has that flag.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use hullspeed_keeper::inheritance::take_over;
use rustix::net::{AddressFamily, SocketType, sockopt};

#[cfg(test)]
mod tests;

/// The first descriptor.
const FIRST: RawFd = 3;

/// Most descriptors that are looked at: more than names for them go through the environment.
const MAX_DESCRIPTORS: u32 = 1 << 16;

/// Name of what has none, as systemd has it for what is kept.
const UNNAMED: &str = "stored";

/// Why what the service manager left cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The number of descriptors is none.
    #[error("LISTEN_FDS = {0:?} is not a number from 0 to {MAX_DESCRIPTORS}")]
    Number(String),
    /// A descriptor cannot be looked at.
    #[error("descriptor {descriptor} of the service manager cannot be used")]
    Descriptor {
        /// Its number.
        descriptor: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A descriptor is something else than expected.
    #[error(
        "descriptor {name:?} of the service manager is not a listening Unix socket \
        (its socket unit needs ListenStream=/… and Accept=no)"
    )]
    NotAListener {
        /// Its name.
        name: String,
    },
}

/// What the environment says of descriptors.
#[derive(Debug, Clone, Default)]
pub struct Announced {
    /// `LISTEN_PID`
    pub process: Option<String>,
    /// `LISTEN_FDS`
    pub count: Option<String>,
    /// `LISTEN_FDNAMES`
    pub names: Option<String>,
}

impl Announced {
    /// What the environment of this process says.
    #[must_use]
    pub fn to_this_process() -> Self {
        let variable = |name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned());
        Self {
            process: variable("LISTEN_PID"),
            count: variable("LISTEN_FDS"),
            names: variable("LISTEN_FDNAMES"),
        }
    }
}

/// What the service manager left, by name.
#[derive(Debug, Default)]
pub struct Inherited {
    listeners: Vec<(String, UnixListener)>,
    kept: Vec<(String, OwnedFd)>,
}

impl Inherited {
    /// Takes what was announced to this process over; nothing if there is no such thing, or it was meant for another.
    pub fn take(announced: &Announced) -> Result<Self, ActivationError> {
        Self::starting_at(FIRST, announced)
    }

    fn starting_at(first: RawFd, announced: &Announced) -> Result<Self, ActivationError> {
        let meant = announced.process.as_deref() == Some(&std::process::id().to_string());
        let Some(count) = announced.count.as_deref().filter(|_| meant) else {
            return Ok(Self::default());
        };
        let number = count.parse().ok().filter(|count| *count <= MAX_DESCRIPTORS);
        let number = number.ok_or_else(|| ActivationError::Number(count.to_owned()))?;
        let mut names = announced.names.as_deref().unwrap_or_default().split(':');
        let mut inherited = Self::default();
        for (descriptor, _) in (first..).zip(0..number) {
            let name = names.next().filter(|name| !name.is_empty()).unwrap_or(UNNAMED);
            inherited.add(name, descriptor)?;
        }
        Ok(inherited)
    }

    fn add(&mut self, name: &str, descriptor: RawFd) -> Result<(), ActivationError> {
        let failed = |source| ActivationError::Descriptor { descriptor, source };
        let owned = take_over(descriptor).map_err(failed)?;
        if is_listener(&owned) {
            let listener = UnixListener::from(owned);
            listener.set_nonblocking(true).map_err(failed)?;
            self.listeners.push((name.to_owned(), listener));
        } else {
            self.kept.push((name.to_owned(), owned));
        }
        Ok(())
    }

    /// These listeners, which must not block.
    pub fn from_listeners(listeners: impl IntoIterator<Item = (String, UnixListener)>) -> Self {
        Self {
            listeners: listeners.into_iter().collect(),
            kept: Vec::new(),
        }
    }

    /// For a daemon that keeps nothing: an error if there is anything but listeners.
    pub fn only_listeners(self) -> Result<Self, ActivationError> {
        match self.kept.into_iter().next() {
            None => Ok(Self::from_listeners(self.listeners)),
            Some((name, _)) => Err(ActivationError::NotAListener { name }),
        }
    }

    /// The listener with this name; or the only one there is, since the name is the unit's where nobody gave one.
    pub fn listener(&mut self, name: &str) -> Option<UnixListener> {
        let named = self.listeners.iter().position(|(found, _)| found == name);
        let only = (self.listeners.len() == 1).then_some(0);
        named.or(only).map(|index| self.listeners.remove(index).1)
    }

    /// Names of the listeners that nobody has asked for.
    pub fn left(&self) -> impl Iterator<Item = &str> {
        self.listeners.iter().map(|(name, _)| name.as_str())
    }

    /// The first kept descriptor with this name; the next one when it is asked for again. In which order descriptors of
    /// one name come is the supervisor's affair. The store has it still, until it is told to forget it.
    pub fn take_kept(&mut self, name: &str) -> Option<OwnedFd> {
        let found = self.kept.iter().position(|(found, _)| found == name)?;
        Some(self.kept.remove(found).1)
    }

    /// Names of the kept descriptors that nobody has asked for, as often as there are such. What is in nobody's use at the
    /// end should be forgotten by [`crate::fdstore::Store::forget`], or the store fills up.
    pub fn kept_names(&self) -> impl Iterator<Item = &str> {
        self.kept.iter().map(|(name, _)| name.as_str())
    }
}

fn is_listener(socket: &OwnedFd) -> bool {
    // What is no socket at all fails the first of these.
    sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
        && sockopt::socket_acceptconn(socket) == Ok(true)
}
