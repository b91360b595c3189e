//! Durable small files: a reader sees the old content, the new content or no file, never a torn one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;

use crate::layer::fault;

/// Puts `bytes` at `dir/name` through a temporary file, a rename and both syncs.
pub(super) fn replace(dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = dir.join(format!(".{name}.tmp"));
    let result = write_synced(&temporary, bytes).and_then(|()| {
        fault::point("file-written");
        fs::rename(&temporary, dir.join(name))
    });
    if result.is_err() {
        // The first error is the one to report; a leftover is overwritten by the next attempt.
        let _ = fs::remove_file(&temporary);
    }
    result.and_then(|()| sync_dir(dir))
}

/// Removes `dir/name`, which need not be there, for good.
pub(super) fn remove(dir: &Path, name: &str) -> io::Result<()> {
    match fs::remove_file(dir.join(name)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Err(_) | Ok(()) => sync_dir(dir),
    }
}

/// Creates `path` with `bytes` on disk.
fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// Makes the names in `dir` durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

/// The content of a file of at most `limit` bytes; `None` if there is no such file.
pub(super) fn read_bounded(path: &Path, limit: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut bytes = Vec::new();
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("more than {limit} bytes"),
        ));
    }
    Ok(Some(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replacing_leaves_one_file_and_failing_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        replace(dir.path(), "a", b"one").unwrap();
        replace(dir.path(), "a", b"two").unwrap();
        assert_eq!(
            read_bounded(&dir.path().join("a"), 3).unwrap().as_deref(),
            Some(&b"two"[..])
        );
        assert!(read_bounded(&dir.path().join("a"), 2).is_err());
        assert_eq!(read_bounded(&dir.path().join("b"), 2).unwrap(), None);
        fs::create_dir(dir.path().join("d")).unwrap();
        assert!(replace(dir.path(), "d", b"a directory is in the way").is_err());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
