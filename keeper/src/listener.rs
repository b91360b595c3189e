//! Sockets that are made for the program, so that a client waits and is not refused while it is away. Their files stay at
//! the end; the next start replaces what nobody serves.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::umask;

/// Why a socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// Another process answers on it.
    #[error("another process serves {}", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in its place.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot make the socket {}", path.display())]
    Unusable {
        /// The path.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A listening socket with a name.
#[derive(Debug)]
pub struct Listener {
    name: String,
    socket: OwnedFd,
}

impl Listener {
    /// Makes the socket, which is open to its owner only; one that a dead process left is replaced.
    pub fn bind(name: &str, path: &Path) -> Result<Self, ListenerError> {
        let unusable = |source| ListenerError::Unusable {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(directory)
                .map_err(unusable)?;
        }
        match fs::symlink_metadata(path) {
            Ok(found) if !found.file_type().is_socket() => {
                return Err(ListenerError::NotASocket { path: path.to_owned() });
            }
            Ok(_) if is_served(path, SocketType::STREAM).map_err(unusable)? => {
                return Err(ListenerError::InUse { path: path.to_owned() });
            }
            _ => {}
        }
        // Under a name that nobody knows, and moved into place: no client meets half a socket.
        let temporary = path.with_extension(std::process::id().to_string());
        let _ = fs::remove_file(&temporary);
        let before = umask(Mode::from_raw_mode(0o177));
        let made = UnixListener::bind(&temporary);
        umask(before);
        let placed = made.and_then(|socket| fs::rename(&temporary, path).map(|()| socket));
        if placed.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        let socket = placed.map_err(unusable)?.into();
        Ok(Self {
            name: name.to_owned(),
            socket,
        })
    }

    /// One that was made before.
    #[must_use]
    pub fn resume(name: String, socket: OwnedFd) -> Self {
        Self { name, socket }
    }

    /// Its name and its number.
    #[must_use]
    pub fn handed(&self) -> (&str, BorrowedFd<'_>) {
        (&self.name, self.socket.as_fd())
    }
}

/// Whether somebody has the socket at `path`. Asked without waiting: who has it may accept nobody at the moment.
pub(crate) fn is_served(path: &Path, kind: SocketType) -> io::Result<bool> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, kind, flags, None)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        // The others: so many wait that there is no room; it is a socket of another kind; it hears somebody else only.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE | Errno::PERM) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::{UnixDatagram, UnixStream};

    use super::*;

    #[test]
    fn a_socket_that_accepts_nobody_is_in_use_and_is_not_waited_for() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s.sock");
        let busy = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&busy, 0).unwrap();
        let mut waiting = Vec::new();
        while {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::NONBLOCK, None).unwrap();
            let connected = connect(&socket, &SocketAddrUnix::new(&path).unwrap());
            waiting.push(socket);
            connected.is_ok()
        } {}
        let (sender, told) = std::sync::mpsc::channel();
        let asked = path.clone();
        std::thread::spawn(move || sender.send(Listener::bind("a", &asked).map(drop)));
        let told = told.recv_timeout(std::time::Duration::from_secs(20)).unwrap();
        assert!(matches!(told.unwrap_err(), ListenerError::InUse { .. }));
        let other = place.path().join("datagrams");
        let _socket = UnixDatagram::bind(&other).unwrap();
        assert!(matches!(
            Listener::bind("a", &other).unwrap_err(),
            ListenerError::InUse { .. }
        ));
    }

    #[test]
    fn a_live_socket_is_respected_and_a_dead_one_replaced() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("run/s.sock");
        let first = Listener::bind("a", &path).unwrap();
        assert_eq!(fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(matches!(
            Listener::bind("a", &path).unwrap_err(),
            ListenerError::InUse { .. }
        ));
        drop(first);
        let second = Listener::bind("a", &path).unwrap();
        UnixStream::connect(&path).unwrap();
        assert_eq!(fs::read_dir(place.path().join("run")).unwrap().count(), 1);
        drop(second);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert!(matches!(
            Listener::bind("a", &path).unwrap_err(),
            ListenerError::NotASocket { .. }
        ));
        let below = path.join("s");
        assert!(matches!(
            Listener::bind("a", &below).unwrap_err(),
            ListenerError::Unusable { .. }
        ));
    }
}
