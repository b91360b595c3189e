//! Which CNI configurations are active, and what stands in them. The rules are those of containerd's CNI library: files
//! ending in `.conf`, `.conflist` or `.json`, in the order of their names, the first so many of them; one that cannot be
//! read spoils all.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::Network;

/// Larger files are no configurations.
const MAX_BYTES: u64 = 1 << 20;

/// More files in a directory are not looked at.
pub(in super::super) const MAX_FILES: usize = 1024;

/// More plugins in one network, likewise.
const MAX_PLUGINS: usize = 64;

/// Why the configurations cannot be told.
#[derive(Debug, thiserror::Error)]
pub(super) enum FilesError {
    /// There is none.
    #[error("{} has no CNI configuration", directory.display())]
    None {
        /// Where it should be.
        directory: PathBuf,
    },
    /// The directory cannot be listed.
    #[error("cannot list {}", directory.display())]
    List {
        /// The directory.
        directory: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There are too many files.
    #[error("{} has more than {MAX_FILES} entries", directory.display())]
    TooMany {
        /// The directory.
        directory: PathBuf,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is not JSON.
    #[error("{} is not JSON", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A file is no CNI configuration.
    #[error("{} is no CNI configuration: {what}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Whether a file of this name is a configuration.
pub(in super::super) fn is_configuration(name: &Path) -> bool {
    let extension = name.extension().and_then(|extension| extension.to_str());
    // Go's idea of an extension counts a name that is nothing else.
    let bare = name
        .to_str()
        .is_some_and(|name| matches!(name, ".conf" | ".conflist" | ".json"));
    bare || matches!(extension, Some("conf" | "conflist" | "json"))
}

/// The first `max` networks of `directory`; all for 0.
pub(super) fn active(directory: &Path, max: usize) -> Result<Vec<Network>, FilesError> {
    let mut paths = listing(directory, is_configuration)?;
    paths.sort_by(|a, b| a.as_os_str().as_encoded_bytes().cmp(b.as_os_str().as_encoded_bytes()));
    if max > 0 {
        paths.truncate(max);
    }
    if paths.is_empty() {
        return Err(FilesError::None {
            directory: directory.to_owned(),
        });
    }
    paths.iter().map(|path| network(path)).collect()
}

fn listing(directory: &Path, wanted: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>, FilesError> {
    let failed = |source| FilesError::List {
        directory: directory.to_owned(),
        source,
    };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut paths = Vec::new();
    for (count, entry) in entries.enumerate() {
        if count >= MAX_FILES {
            return Err(FilesError::TooMany {
                directory: directory.to_owned(),
            });
        }
        let entry = entry.map_err(failed)?;
        let is_directory = entry.file_type().map_err(failed)?.is_dir();
        if !is_directory && wanted(Path::new(&entry.file_name())) {
            paths.push(entry.path());
        }
    }
    Ok(paths)
}

fn network(path: &Path) -> Result<Network, FilesError> {
    let wrong = |what| FilesError::Content {
        path: path.to_owned(),
        what,
    };
    let mut map = read(path)?;
    let name = map.get("name").and_then(Value::as_str).unwrap_or_default().to_owned();
    // The name becomes part of paths.
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Err(wrong("its name is missing or strange"));
    }
    let is_list = path.as_os_str().as_encoded_bytes().ends_with(b".conflist");
    let mut plugins = if is_list {
        match map.remove("plugins") {
            None => Vec::new(),
            Some(Value::Array(items)) => items
                .into_iter()
                .map(|item| match item {
                    Value::Object(plugin) => Ok(plugin),
                    _ => Err(wrong("a plugin is not an object")),
                })
                .collect::<Result<_, _>>()?,
            Some(_) => return Err(wrong("its plugins are not a list")),
        }
    } else {
        vec![map]
    };
    if is_list {
        plugins.extend(of_directory(path, &name)?);
    }
    if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
        return Err(wrong("it has no plugins, or too many"));
    }
    Ok(Network {
        name,
        plugins,
        addresses: None,
        inputs: Vec::new(),
    })
}

/// containerd 2.x adds the plugins in a directory that is named after the network. Older ones do not; whatever is there
/// is checked all the same.
fn of_directory(path: &Path, name: &str) -> Result<Vec<Map<String, Value>>, FilesError> {
    let directory = path.parent().unwrap_or(Path::new("/")).join(name);
    let mut paths = listing(&directory, |file| {
        file.extension().is_some_and(|extension| extension == "conf")
    })?;
    paths.sort();
    paths.iter().map(|path| read(path)).collect()
}

fn read(path: &Path) -> Result<Map<String, Value>, FilesError> {
    let failed = |source| FilesError::Read {
        path: path.to_owned(),
        source,
    };
    // Asked before it is opened: opening a FIFO would wait.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(FilesError::Content {
            path: path.to_owned(),
            what: "it is not a file",
        });
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(FilesError::Content {
            path: path.to_owned(),
            what: "it is larger than 1 MiB",
        });
    }
    serde_json::from_slice(&text).map_err(|source| FilesError::Syntax {
        path: path.to_owned(),
        source,
    })
}
