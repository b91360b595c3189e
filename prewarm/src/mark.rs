//! The secret mark of this node's hulls, kept for as long as the node's root is.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::ledger::Mark;

/// Name of the file below the root.
const FILE: &str = "mark";

/// Random bytes in a mark; it is written in hex.
const RANDOM_BYTES: usize = 16;

/// Why there is no mark.
#[derive(Debug, thiserror::Error)]
pub enum MarkError {
    /// The file cannot be read or made.
    #[error("cannot use {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is none of ours.
    #[error(
        "{} is not {} hexadecimal digits; hulls that carry its mark can be hidden no more. Stop the kubelet, remove the \
        pod sandboxes of the namespace \"hullspeed\" (crictl pods --namespace hullspeed), remove the file, and start again",
        path.display(),
        2 * RANDOM_BYTES
    )]
    Damaged {
        /// The file.
        path: PathBuf,
    },
}

/// The mark kept in `root`, or a new one if there is none. The root must be locked.
pub fn load(root: &Path) -> Result<Mark, MarkError> {
    let path = root.join(FILE);
    let failed = |source| MarkError::File {
        path: path.clone(),
        source,
    };
    let text = match read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => make(root, &path).map_err(failed)?,
        Err(error) => return Err(failed(error)),
    };
    let mark = text.trim_end();
    if mark.len() != 2 * RANDOM_BYTES || !mark.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(MarkError::Damaged { path });
    }
    Ok(Mark::new(mark.to_owned()))
}

fn read(path: &Path) -> io::Result<String> {
    let mut bytes = Vec::new();
    let limit = RANDOM_BYTES as u64 * 4;
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    // What is no text is no mark either.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Makes the file whole and durable before anything carries the mark: a hull whose mark is forgotten is a pod to the kubelet.
fn make(root: &Path, path: &Path) -> io::Result<String> {
    let mut random = [0; RANDOM_BYTES];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let text = hex::encode(random);
    let temporary = root.join(format!("{FILE}.new"));
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)?;
    writeln!(file, "{text}")?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(root)?.sync_all()?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_mark_is_made_once_and_kept() {
        let root = tempfile::tempdir().unwrap();
        let mark = load(root.path()).unwrap();
        assert_eq!(mark.value().len(), 32);
        assert_eq!(load(root.path()).unwrap(), mark);
        let mode = fs::metadata(root.path().join(FILE)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let other = tempfile::tempdir().unwrap();
        assert_ne!(load(other.path()).unwrap(), mark);
    }

    #[test]
    fn what_is_no_mark_is_refused_and_left() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(FILE);
        for content in [&b""[..], b"xyz", &[0xff; 32], &[b'a'; 31], &[b'a'; 4096]] {
            fs::write(&path, content).unwrap();
            assert!(matches!(load(root.path()), Err(MarkError::Damaged { .. })));
            assert_eq!(fs::read(&path).unwrap(), content);
        }
        let missing = root.path().join("none");
        assert!(matches!(load(&missing), Err(MarkError::File { .. })));
    }
}
