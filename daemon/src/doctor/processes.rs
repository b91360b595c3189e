//! Other processes, as `/proc` shows them: who listens where, and how somebody was started.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::socket::bound_name;

/// Of larger files only the beginning is read.
const MAX_FILE_BYTES: u64 = 4 << 20;

/// Flag of a listening socket in the kernel's table.
const ACCEPTS: u32 = 1 << 16;

/// The beginning of a file.
#[must_use]
pub fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(path)
        .ok()?
        .take(MAX_FILE_BYTES)
        .read_to_end(&mut bytes)
        .ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// All processes: their numbers and directories.
pub fn all(proc: &Path) -> impl Iterator<Item = (u32, PathBuf)> + use<> {
    let entries = fs::read_dir(proc).into_iter().flatten().filter_map(Result::ok);
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// What a process was started with, its program first.
#[must_use]
pub fn arguments(process: &Path) -> Option<Vec<String>> {
    let text = read(&process.join("cmdline"))?;
    Some(text.split('\0').map(str::to_owned).collect())
}

/// The value of the last such flag, in either of its forms.
#[must_use]
pub fn flag(arguments: &[String], name: &str) -> Option<String> {
    let next = arguments.iter().skip(1).map(Some).chain([None]);
    let values = arguments.iter().zip(next).filter_map(|(argument, next)| {
        let rest = argument.strip_prefix(name)?;
        match rest.strip_prefix('=') {
            Some(value) => Some(value.to_owned()),
            None if rest.is_empty() => next.cloned(),
            None => None,
        }
    });
    values.last()
}

/// Processes (with their names) that hold a listener of this path. Found without connecting, since a connection would
/// start a daemon with socket activation.
#[must_use]
pub fn listeners(socket: &Path, proc: &Path) -> Vec<(u32, String)> {
    let table = read(&proc.join("net/unix")).unwrap_or_default();
    // Num RefCount Protocol Flags Type St Inode Path
    let listeners = table.lines().filter_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?;
        let path = Path::new(fields.next()?);
        let same = path.file_stem() == socket.file_stem() && path.parent() == socket.parent();
        (flags & ACCEPTS != 0 && same).then(|| (format!("socket:[{inode}]"), path))
    });
    let listeners: HashMap<_, _> = listeners.collect();
    if listeners.is_empty() {
        return Vec::new();
    }
    let holds = |number: u32, process: &Path| {
        let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten();
        let targets = descriptors.filter_map(|descriptor| fs::read_link(descriptor.ok()?.path()).ok());
        let mut paths = targets.filter_map(|target| listeners.get(target.to_str()?));
        paths.any(|path| *path == socket || *path == bound_name(socket, number))
    };
    all(proc)
        .filter(|(number, process)| holds(*number, process))
        .map(|(number, process)| {
            let name = read(&process.join("comm")).unwrap_or_default();
            (number, name.trim_end().to_owned())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn flags_have_two_forms_and_the_last_one_counts() {
        let arguments = ["x", "-c", "a", "--config=b", "--configure=c", "-c"].map(str::to_owned);
        assert_eq!(flag(&arguments, "--config").as_deref(), Some("b"));
        assert_eq!(flag(&arguments, "-c").as_deref(), Some("a"));
        assert_eq!(flag(&arguments, "-d"), None);
        assert!(
            arguments_of_this_process()
                .iter()
                .all(|argument| !argument.contains('\0'))
        );
    }

    fn arguments_of_this_process() -> Vec<String> {
        arguments(Path::new("/proc/self")).unwrap()
    }

    #[tokio::test]
    async fn who_listens_is_found_without_a_connection() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s.sock");
        let proc = Path::new("/proc");
        let is_found = || {
            let found = listeners(&path, proc);
            assert!(found.iter().all(|(_, name)| !name.is_empty() && !name.ends_with('\n')));
            found.iter().map(|(process, _)| *process).collect::<Vec<_>>() == [std::process::id()]
        };
        assert_eq!(listeners(&path, proc), []);
        // As a service manager makes it.
        let listener = UnixListener::bind(&path).unwrap();
        assert!(is_found());
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        drop(listener);
        assert_eq!(listeners(&path, proc), []);
        // As the daemon makes it.
        let socket = crate::socket::Socket::bind(&path).await.unwrap();
        assert!(is_found());
        drop(socket);
        let other = UnixListener::bind(place.path().join("s.7")).unwrap();
        assert_eq!(listeners(&path, proc), [], "a socket of another name");
        drop(other);
    }
}
