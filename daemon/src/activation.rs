//! Socket activation: listeners that the service manager made and left to this process.
//!
//! They are announced in `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES` and begin at descriptor 3. They work on while the
//! daemon is started anew, so that a client waits and is not refused; their files belong to the service manager.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixListener;

use rustix::net::{AddressFamily, SocketType, sockopt};

mod sys;
#[cfg(test)]
mod tests;

/// Descriptor of the first listener.
const FIRST: RawFd = 3;

/// Most descriptors that are looked at.
const MAX_LISTENERS: u32 = 32;

/// Why what the service manager left cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// The number of descriptors is none.
    #[error("LISTEN_FDS = {0:?} is not a number from 0 to {MAX_LISTENERS}")]
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
        "descriptor {descriptor} of the service manager is not a listening Unix socket \
        (its socket unit needs ListenStream=/… and Accept=no)"
    )]
    NotAListener {
        /// Its number.
        descriptor: RawFd,
    },
}

/// What the environment says of listeners.
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

/// Listeners that the service manager left, by name.
#[derive(Debug, Default)]
pub struct Inherited {
    listeners: Vec<(String, UnixListener)>,
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
        let number = count.parse().ok().filter(|count| *count <= MAX_LISTENERS);
        let number = number.ok_or_else(|| ActivationError::Number(count.to_owned()))?;
        let mut names = announced.names.as_deref().unwrap_or_default().split(':');
        let listeners = (first..).zip(0..number).map(|(descriptor, _)| {
            let name = names.next().unwrap_or_default().to_owned();
            Ok((name, listener(descriptor)?))
        });
        Ok(Self {
            listeners: listeners.collect::<Result<_, _>>()?,
        })
    }

    /// These listeners, which must not block.
    pub fn from_listeners(listeners: impl IntoIterator<Item = (String, UnixListener)>) -> Self {
        Self {
            listeners: listeners.into_iter().collect(),
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
}

fn listener(descriptor: RawFd) -> Result<UnixListener, ActivationError> {
    let failed = |source| ActivationError::Descriptor { descriptor, source };
    let owned = sys::take_over(descriptor).map_err(failed)?;
    if !is_listener(&owned) {
        return Err(ActivationError::NotAListener { descriptor });
    }
    let listener = UnixListener::from(owned);
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

fn is_listener(socket: &OwnedFd) -> bool {
    // What is no socket at all fails the first of these.
    sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
        && sockopt::socket_acceptconn(socket) == Ok(true)
}
