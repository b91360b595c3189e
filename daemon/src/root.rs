//! The root directory, which one daemon at a time has for itself.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// Mode of a root that is made here. Containers in user namespaces have to pass through it.
const ROOT_MODE: u32 = 0o711;

/// Why the root cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// The directory cannot be made or written.
    #[error("cannot use {} as {key}; choose a writable directory with key {key}", path.display())]
    Unusable {
        /// The key of the configuration that names the directory.
        key: &'static str,
        /// What was tried.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another daemon has it.
    #[error(
        "another daemon (process {process}) uses {}; stop it, or give this one another {key} and socket",
        path.display()
    )]
    Running {
        /// The key of the configuration that names the directory.
        key: &'static str,
        /// The root.
        path: PathBuf,
        /// Process id of the other, as it noted it.
        process: String,
    },
}

impl RootError {
    /// Whether another daemon is the reason.
    pub fn is_running(&self) -> bool {
        matches!(self, Self::Running { .. })
    }
}

/// A locked root; dropping it gives it up. One that was made here is removed then, unless it was [kept](Self::keep).
#[derive(Debug)]
pub struct Root {
    // Removed while the lock is held, so that no other daemon has begun to use it.
    made: Made,
    _lock: File,
}

/// Directories that this start has made, the outermost first; removed if they turn out to be for nothing.
#[derive(Debug, Default)]
struct Made {
    directories: Vec<PathBuf>,
    /// The innermost is ours with all that is in it, and not only while it is empty.
    locked: bool,
}

impl Made {
    /// Makes `path` and what is missing above it.
    fn directory(&mut self, path: &Path) -> io::Result<()> {
        let missing = path
            .ancestors()
            .take_while(|path| !path.as_os_str().is_empty() && !path.exists());
        for path in missing.collect::<Vec<_>>().into_iter().rev() {
            match DirBuilder::new().mode(ROOT_MODE).create(path) {
                Ok(()) => self.directories.push(path.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
        }
        // What is there may be no directory, or one behind a dangling link.
        if fs::metadata(path)?.is_dir() {
            Ok(())
        } else {
            Err(io::ErrorKind::NotADirectory.into())
        }
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        if self.locked
            && let Some(root) = self.directories.pop()
            && let Err(error) = fs::remove_dir_all(&root)
        {
            tracing::warn!(path = %root.display(), %error, "the new root of a start that failed is not removed");
        }
        for path in self.directories.drain(..).rev() {
            // One that somebody else uses by now is not empty, and stays.
            let _ = fs::remove_dir(path);
        }
    }
}

impl Root {
    /// Makes the directory where it is missing and locks it, by way of `file` in it: daemons of different kinds can share a
    /// directory. `key` is its name in the configuration.
    pub fn lock(root: &Path, key: &'static str, file: &str) -> Result<Self, RootError> {
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| RootError::Unusable { key, path, source }
        };
        let mut made = Made::default();
        made.directory(root).map_err(unusable(root))?;
        let path = root.join(file);
        let mut lock = fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(unusable(&path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => made.locked = made.directories.last().is_some_and(|last| last == root),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut process = String::new();
                // The number is a hint only; without it the message still says what is wrong.
                let _ = lock.take(20).read_to_string(&mut process);
                let process = process.trim();
                let process = if process.is_empty() { "unknown" } else { process }.to_owned();
                return Err(RootError::Running {
                    key,
                    path: root.to_owned(),
                    process,
                });
            }
            Err(error) => return Err(unusable(&path)(error.into())),
        }
        let note = lock
            .set_len(0)
            .and_then(|()| lock.rewind())
            .and_then(|()| writeln!(lock, "{}", std::process::id()));
        note.map_err(unusable(&path))?;
        Ok(Self { made, _lock: lock })
    }

    /// The start has succeeded: the root stays.
    pub fn keep(&mut self) {
        self.made.directories.clear();
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_root_has_one_daemon_at_a_time() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a/root");
        let mut root = Root::lock(&path, "root", "lock").unwrap();
        root.keep();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, ROOT_MODE);
        let error = Root::lock(&path, "root", "lock").unwrap_err();
        assert!(error.is_running());
        let text = error.to_string();
        assert!(
            text.contains(&std::process::id().to_string()) && text.contains(path.to_str().unwrap()),
            "{text}"
        );
        drop(root);
        // Another kind of daemon has a lock of its own.
        let _other = Root::lock(&path, "state", "other.lock").unwrap();
        // What a start finds it leaves, however it ends.
        drop(Root::lock(&path, "root", "lock").unwrap());
        assert!(path.join("lock").exists());
    }

    #[test]
    fn a_root_made_for_nothing_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("a/root");
        let root = Root::lock(&path, "root", "lock").unwrap();
        fs::create_dir(path.join("layers")).unwrap();
        fs::write(path.join("layers/x"), "x").unwrap();
        assert!(Root::lock(&path, "root", "lock").unwrap_err().is_running());
        assert!(
            path.join("layers/x").exists(),
            "the refused one removed what is the other's"
        );
        drop(root);
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
        // A neighbour's directory keeps those above it.
        let root = Root::lock(&path, "root", "lock").unwrap();
        fs::write(place.path().join("a/neighbour"), "").unwrap();
        drop(root);
        assert!(!path.exists() && place.path().join("a/neighbour").exists());
        // An empty root that was there before is not ours to remove.
        fs::create_dir(&path).unwrap();
        drop(Root::lock(&path, "root", "lock").unwrap());
        assert!(path.exists());
    }

    #[test]
    fn a_root_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Root::lock(&file.path().join("root"), "root", "lock").unwrap_err();
        assert!(!error.is_running());
        assert!(error.to_string().contains(file.path().to_str().unwrap()));
    }
}
