//! The directory of one registry below containerd's `certs.d`: which one it is, and what is in it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::file::{self, FileError, HostEntry};
use crate::files::{self, Stamp};
use crate::limits::{MAX_HOST_FILES, MAX_HOSTS_FILE_BYTES};

/// What a directory says.
pub(super) struct Loaded {
    pub(super) entries: Vec<HostEntry>,
    /// Everything that was looked at, and how it was before it was read.
    pub(super) seen: Vec<(PathBuf, Stamp)>,
    /// What was wrong; `entries` are then those of a directory without a `hosts.toml`.
    pub(super) problem: Option<DirectoryError>,
}

/// Why a directory is not used as it is.
#[derive(Debug, thiserror::Error)]
pub(super) enum DirectoryError {
    #[error("{} cannot be read", .path.display())]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} cannot be used", .path.display())]
    File {
        path: PathBuf,
        #[source]
        source: FileError,
    },
}

/// Where the directory of `host` may be, in the order in which containerd looks.
pub(super) fn candidates(root: &Path, host: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Some(colon) = host.rfind(':').filter(|colon| *colon > 0) {
        let (name, port) = (&host[..colon], &host[colon + 1..]);
        found.push(root.join(format!("{name}_{port}_")));
    }
    found.push(root.join(host));
    found.push(root.join("_default"));
    found
}

/// Reads what `root` has for `host`; without a directory the registry itself is the only host.
pub(super) fn load(root: &Path, host: &str) -> Loaded {
    let mut loaded = Loaded {
        entries: vec![HostEntry::registry()],
        seen: Vec::new(),
        problem: None,
    };
    for directory in candidates(root, host) {
        let stamp = loaded.see(&directory);
        match stamp {
            Stamp::Absent => {}
            // A file where a directory should be, or one that nobody may look into: as with containerd, no other is tried.
            Stamp::Unreadable | Stamp::Seen { .. } => {
                loaded.read(&directory);
                break;
            }
        }
    }
    loaded
}

impl Loaded {
    fn see(&mut self, path: &Path) -> Stamp {
        let stamp = Stamp::of(path);
        self.seen.push((path.to_owned(), stamp));
        stamp
    }

    fn read(&mut self, directory: &Path) {
        let path = directory.join("hosts.toml");
        let found = match self.see(&path) {
            Stamp::Absent => Ok(String::new()),
            _ => files::read_text(&path, MAX_HOSTS_FILE_BYTES),
        };
        match found {
            Ok(text) if text.is_empty() => {}
            Ok(text) => match file::parse(&text, directory) {
                Ok(entries) => {
                    self.entries = entries;
                    return self.see_files();
                }
                Err(source) => self.problem = Some(DirectoryError::File { path, source }),
            },
            Err(source) => self.problem = Some(DirectoryError::Read { path, source }),
        }
        match certificates(directory) {
            Ok(entry) => self.entries = vec![entry],
            Err(source) => {
                let path = directory.to_owned();
                self.problem.get_or_insert(DirectoryError::Read { path, source });
            }
        }
        self.see_files();
    }

    /// Certificates are read later, but a change of them counts from here on.
    fn see_files(&mut self) {
        let named: BTreeSet<PathBuf> = self.entries.iter().flat_map(paths).cloned().collect();
        for path in named {
            self.see(&path);
        }
    }
}

fn paths(entry: &HostEntry) -> impl Iterator<Item = &PathBuf> {
    let identities = entry.tls.identities.iter();
    let identities = identities.flat_map(|(certificate, key)| std::iter::once(certificate).chain(key));
    entry.tls.authorities.iter().chain(identities)
}

/// The registry with the certificates of a directory as docker lays it out: `*.crt` are authorities, `*.cert` client certificates
/// and `*.key` of the same name their keys.
fn certificates(directory: &Path) -> io::Result<HostEntry> {
    let mut entry = HostEntry::registry();
    let listing = match fs::read_dir(directory) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(entry),
        Err(error) => return Err(error),
    };
    let mut names = BTreeSet::new();
    for item in listing.take(MAX_LISTED) {
        let item = item?;
        if !item.file_type()?.is_dir() {
            names.insert(item.path());
        }
    }
    let has_extension = |path: &Path, wanted: &str| path.extension().is_some_and(|extension| extension == wanted);
    let of = |wanted: &'static str| {
        names
            .iter()
            .filter(move |path| has_extension(path, wanted))
            .take(MAX_HOST_FILES)
    };
    entry.tls.authorities = of("crt").cloned().collect();
    let with_key = |certificate: &PathBuf| {
        let key = certificate.with_extension("key");
        (certificate.clone(), names.contains(&key).then_some(key))
    };
    entry.tls.identities = of("cert").map(with_key).collect();
    Ok(entry)
}

/// Names of a directory that are looked at.
const MAX_LISTED: usize = 1024;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directories_are_looked_for_as_containerd_does() {
        let names = |host: &str| {
            let name = |path: PathBuf| path.strip_prefix("/certs").unwrap().display().to_string();
            candidates(Path::new("/certs"), host)
                .into_iter()
                .map(name)
                .collect::<Vec<_>>()
                .join(" ")
        };
        assert_eq!(names("r.io"), "r.io _default");
        assert_eq!(names("r.io:5000"), "r.io_5000_ r.io:5000 _default");
        assert_eq!(names("[::1]:5000"), "[::1]_5000_ [::1]:5000 _default");
    }

    #[test]
    fn the_first_directory_that_is_there_counts_even_if_it_is_empty() {
        let root = tempfile::tempdir().unwrap();
        let write = |directory: &str, text: &str| {
            let directory = root.path().join(directory);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("hosts.toml"), text).unwrap();
        };
        let first = |host: &str| {
            let loaded = load(root.path(), host);
            assert!(loaded.problem.is_none());
            loaded.entries[0].api.as_ref().map(ToString::to_string)
        };
        assert_eq!(first("r.io:5000"), None);
        write("_default", "server = 'default'");
        assert_eq!(first("r.io:5000").as_deref(), Some("https://default/v2/"));
        write("r.io:5000", "server = 'colon'");
        assert_eq!(first("r.io:5000").as_deref(), Some("https://colon/v2/"));
        write("r.io_5000_", "server = 'underscore'");
        assert_eq!(first("r.io:5000").as_deref(), Some("https://underscore/v2/"));
        assert_eq!(first("r.io").as_deref(), Some("https://default/v2/"));
        fs::create_dir(root.path().join("r.io")).unwrap();
        assert_eq!(first("r.io"), None);
    }

    #[test]
    fn a_directory_as_docker_has_it_gives_certificates() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("r.io");
        fs::create_dir_all(directory.join("dir.crt")).unwrap();
        for name in ["b.crt", "a.crt", "x.cert", "x.key", "y.cert", "z.key", "readme"] {
            fs::write(directory.join(name), "").unwrap();
        }
        let loaded = load(root.path(), "r.io");
        let tls = &loaded.entries[0].tls;
        assert_eq!(tls.authorities, [directory.join("a.crt"), directory.join("b.crt")]);
        assert_eq!(
            tls.identities,
            [
                (directory.join("x.cert"), Some(directory.join("x.key"))),
                (directory.join("y.cert"), None)
            ]
        );
        assert!(loaded.seen.iter().any(|(path, _)| path.ends_with("x.key")));
        // One that makes no sense is told of, and the certificates still count, as with containerd.
        fs::write(directory.join("hosts.toml"), "server = 1").unwrap();
        let loaded = load(root.path(), "r.io");
        let problem = loaded.problem.unwrap();
        assert!(problem.to_string().contains("r.io/hosts.toml"), "{problem}");
        assert!(
            std::error::Error::source(&problem)
                .unwrap()
                .to_string()
                .contains("server")
        );
        assert_eq!(loaded.entries[0].tls.authorities.len(), 2);
    }
}
