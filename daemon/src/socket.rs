//! A Unix socket: made under a temporary name with its mode set, then moved into place, so that nobody ever meets
//! one that is open to others; removed at the end if it is still ours. One that the service manager made is served in
//! place, and its file stays.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

use crate::activation::Inherited;

const SOCKET_MODE: u32 = 0o600;
const DIRECTORY_MODE: u32 = 0o700;

/// Why the socket cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Another process answers on it.
    #[error("another process serves {}; stop it, or choose another socket in the configuration", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is not a socket is in its place.
    #[error("{} exists and is not a socket; remove it, or choose another socket in the configuration", path.display())]
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

impl SocketError {
    /// Whether another process is the reason.
    pub fn is_running(&self) -> bool {
        matches!(self, Self::InUse { .. })
    }
}

/// The name under which a process binds a socket before it moves it to `path`; the kernel's table goes on showing it.
#[must_use]
pub fn bound_name(path: &Path, process: u32) -> PathBuf {
    path.with_extension(process.to_string())
}

/// A listening socket in the file system.
#[derive(Debug)]
pub struct Socket {
    /// The file, if it is ours to remove.
    _made: Option<Made>,
    listener: Option<UnixListener>,
}

/// A socket's file that was made here.
#[derive(Debug)]
struct Made {
    path: PathBuf,
    identity: (u64, u64),
}

impl Socket {
    /// Takes over what the service manager left under `name`, or makes the socket at `path`.
    pub async fn open(inherited: &mut Inherited, name: &str, path: &Path) -> Result<Self, SocketError> {
        let Some(listener) = inherited.listener(name) else {
            return Self::bind(path).await;
        };
        let found = listener.local_addr().ok();
        let found = found.as_ref().and_then(|address| address.as_pathname());
        if found == Some(path) {
            tracing::info!(socket = %path.display(), "the socket is the service manager's");
        } else {
            tracing::warn!(configured = %path.display(), served = ?found,
                "the service manager's socket is not the one of the configuration; it is served nevertheless");
        }
        let listener = UnixListener::from_std(listener).map_err(|source| SocketError::Unusable {
            path: found.unwrap_or(path).to_owned(),
            source,
        })?;
        Ok(Self {
            _made: None,
            listener: Some(listener),
        })
    }

    /// Makes the socket; one that a dead process left is replaced.
    pub async fn bind(path: &Path) -> Result<Self, SocketError> {
        let unusable = |source| SocketError::Unusable {
            path: path.to_owned(),
            source,
        };
        if let Some(directory) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(DIRECTORY_MODE)
                .create(directory)
                .map_err(unusable)?;
        }
        match fs::symlink_metadata(path) {
            Ok(metadata) if !metadata.file_type().is_socket() => {
                return Err(SocketError::NotASocket { path: path.to_owned() });
            }
            Ok(_) => match UnixStream::connect(path).await {
                Ok(_) => return Err(SocketError::InUse { path: path.to_owned() }),
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    tracing::info!(socket = %path.display(), "a socket without a server is replaced");
                }
                Err(error) => return Err(unusable(error)),
            },
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(unusable(error)),
        }
        let temporary = bound_name(path, std::process::id());
        let made = Self::make(&temporary, path);
        if made.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        made.map_err(unusable)
    }

    fn make(temporary: &Path, path: &Path) -> io::Result<Self> {
        match fs::remove_file(temporary) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(temporary)?;
        fs::set_permissions(temporary, fs::Permissions::from_mode(SOCKET_MODE))?;
        let identity = identity(temporary)?;
        fs::rename(temporary, path)?;
        Ok(Self {
            _made: Some(Made {
                path: path.to_owned(),
                identity,
            }),
            listener: Some(listener),
        })
    }

    /// The listener, once.
    ///
    /// # Panics
    /// When it is taken a second time, which is a defect of the caller.
    pub fn take_listener(&mut self) -> UnixListener {
        self.listener.take().expect("the one caller takes it once")
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(socket = %self.path.display(), %error, "the socket is not removed");
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|metadata| (metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_live_socket_is_respected_and_a_dead_one_replaced() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("run/s.sock");
        let mode = |path: &Path| fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777;
        let mut socket = Socket::bind(&path).await.unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert!(Socket::bind(&path).await.unwrap_err().is_running());
        // The server dies without removing its socket.
        drop(socket.take_listener());
        let next = Socket::bind(&path).await.unwrap();
        // What is left of the first must not take the second's socket away.
        drop(socket);
        assert!(path.exists());
        drop(next);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn the_service_managers_socket_is_served_and_never_removed() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s.sock");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut inherited = Inherited::from_listeners([("cri".to_owned(), listener)]);
        let mut socket = Socket::open(&mut inherited, "cri", &path).await.unwrap();
        let listener = socket.take_listener();
        let _client = UnixStream::connect(&path).await.unwrap();
        listener.accept().await.unwrap();
        drop((socket, listener));
        assert!(path.exists());
        // Nothing is left to inherit, so the next one is made.
        let made = Socket::open(&mut inherited, "cri", &place.path().join("t.sock"))
            .await
            .unwrap();
        drop(made);
        assert!(!place.path().join("t.sock").exists());
    }

    #[tokio::test]
    async fn what_is_not_a_socket_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Socket::bind(file.path()).await.unwrap_err();
        assert!(matches!(error, SocketError::NotASocket { .. }));
        let error = Socket::bind(&file.path().join("s.sock")).await.unwrap_err();
        assert!(matches!(error, SocketError::Unusable { .. }));
        assert!(file.path().exists());
    }
}
