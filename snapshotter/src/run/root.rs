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
    #[error("cannot use {} as root; choose a writable directory with --root or key root", path.display())]
    Unusable {
        /// What was tried.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Another daemon has it.
    #[error(
        "another hullspeed-snapshotter (process {process}) uses {}; stop it, or give this one another root and socket",
        path.display()
    )]
    Running {
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

/// A locked root; dropping it gives it up.
#[derive(Debug)]
pub(super) struct Root {
    _lock: File,
}

impl Root {
    /// Makes the directory where it is missing and locks it.
    pub(super) fn lock(root: &Path) -> Result<Self, RootError> {
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| RootError::Unusable { path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(ROOT_MODE)
            .create(root)
            .map_err(unusable(root))?;
        let path = root.join("lock");
        let mut lock = fs::File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(unusable(&path))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut process = String::new();
                // The number is a hint only; without it the message still says what is wrong.
                let _ = lock.take(20).read_to_string(&mut process);
                let process = process.trim();
                let process = if process.is_empty() { "unknown" } else { process }.to_owned();
                return Err(RootError::Running {
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
        Ok(Self { _lock: lock })
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
        let root = Root::lock(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, ROOT_MODE);
        let error = Root::lock(&path).unwrap_err();
        assert!(error.is_running());
        let text = error.to_string();
        assert!(
            text.contains(&std::process::id().to_string()) && text.contains(path.to_str().unwrap()),
            "{text}"
        );
        drop(root);
        Root::lock(&path).unwrap();
    }

    #[test]
    fn a_root_that_cannot_be_made_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Root::lock(&file.path().join("root")).unwrap_err();
        assert!(!error.is_running());
        assert!(error.to_string().contains(file.path().to_str().unwrap()));
    }
}
