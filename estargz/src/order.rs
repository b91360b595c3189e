//! What a layer consists of once its tar stream has been read to the end, and in which order it is written.
//!
//! The writer feeds [`Tree::add`] every entry in stream order. The tree holds what *sequential extraction* of the stream
//! would leave on a disk, which is what containerd does with an ordinary layer:
//! - a later entry replaces an earlier one of the same name; a directory over a directory only replaces its metadata;
//! - a file over a directory removes everything below it;
//! - hard links share content with their target as it was *then*: if the target is replaced later, the first link that
//!   is left becomes the regular file;
//! - a path below a symbolic link of the same layer is a path below the link's target.
//!
//! One thing is more lenient: a hard link may precede its target, because the reference writer emits such layers when it
//! removes duplicates. [`arrange`] then puts the target first.

use std::collections::{BTreeMap, HashMap};

use crate::input::tar::{TarKind, shown};

/// Longest path of an entry, Linux's `PATH_MAX` without its NUL.
pub(crate) const MAX_PATH_BYTES: usize = 4095;
/// Longest part of a path, Linux's `NAME_MAX`.
pub(crate) const MAX_NAME_BYTES: usize = 255;
/// Symbolic links followed on the way to one entry, Linux's limit.
const MAX_SYMLINKS: usize = 40;

/// Why entries do not make a file tree.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// A name that cannot name anything in a layer.
    #[error("entry {name:?}: {fault}")]
    BadName {
        /// The name as it is in the stream.
        name: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// An entry below something that is not a directory.
    #[error("entry {name:?} lies below {parent:?}, which is not a directory")]
    NotBelowDirectory {
        /// The entry.
        name: String,
        /// What should be a directory.
        parent: String,
    },
    /// An entry below symbolic links that lead in circles.
    #[error("entry {name:?} lies below more than {MAX_SYMLINKS} symbolic links")]
    SymlinkLoop {
        /// The entry.
        name: String,
    },
    /// A hard link to nothing.
    #[error("hard link {name:?}: its target {target:?} is not in the layer")]
    MissingTarget {
        /// The link.
        name: String,
        /// Its target.
        target: String,
    },
    /// A hard link that cannot exist.
    #[error("hard link {name:?}: its target {target:?} {fault}")]
    BadTarget {
        /// The link.
        name: String,
        /// Its target.
        target: String,
        /// What is wrong with it.
        fault: &'static str,
    },
}

/// Splits a name as it is in a tar stream into its clean form: no `.`, no doubled, leading or trailing slashes.
/// The root is the empty path. `..` is refused, because it could only reach out of the layer or hide a name.
pub(crate) fn clean(name: &[u8]) -> Result<Vec<u8>, OrderError> {
    let bad = |fault| OrderError::BadName {
        name: shown(name),
        fault,
    };
    let mut path = Vec::with_capacity(name.len());
    for part in name.split(|&b| b == b'/') {
        match part {
            b"" | b"." => continue,
            b".." => return Err(bad("\"..\" is not allowed in a name")),
            _ if part.len() > MAX_NAME_BYTES => return Err(bad("a part of the name is longer than 255 bytes")),
            _ => {}
        }
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(part);
    }
    if name.is_empty() {
        return Err(bad("the name is empty"));
    }
    if path.len() > MAX_PATH_BYTES {
        return Err(bad("the name is longer than 4095 bytes"));
    }
    if path.contains(&0) {
        return Err(bad("the name contains a NUL"));
    }
    Ok(path)
}

/// A surviving entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    /// Clean path.
    pub(crate) path: Vec<u8>,
    /// Which entry of the stream has its metadata and content.
    pub(crate) source: usize,
    /// If it is a hard link: the position of its target among the surviving entries.
    pub(crate) target: Option<usize>,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    names: Vec<Name>,
    by_path: BTreeMap<Vec<u8>, usize>,
}

#[derive(Debug)]
struct Name {
    path: Vec<u8>,
    kind: Kind,
    /// Not a hard link.
    original: bool,
    /// Not replaced or removed by a later entry.
    alive: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    Directory { source: usize },
    Symlink { source: usize, target: Vec<u8> },
    Other { source: usize },
    // A hard link to a path that the stream has not had yet.
    Pending { target: Vec<u8> },
}

impl Kind {
    fn source(&self) -> Option<usize> {
        match self {
            Self::Directory { source } | Self::Symlink { source, .. } | Self::Other { source } => Some(*source),
            Self::Pending { .. } => None,
        }
    }
}

impl Tree {
    /// Adds entry number `source` of the stream. `link` is the target of a symbolic link verbatim, of a hard link clean.
    pub(crate) fn add(&mut self, path: &[u8], kind: TarKind, link: &[u8], source: usize) -> Result<(), OrderError> {
        let path = self.resolve(path)?;
        if path.is_empty() && kind != TarKind::Directory {
            return Err(OrderError::BadName {
                name: "/".into(),
                fault: "the root is not a directory",
            });
        }
        let directory = kind == TarKind::Directory;
        match self.by_path.get(&path) {
            Some(&index) if directory && matches!(self.names[index].kind, Kind::Directory { .. }) => {
                self.names[index].kind = Kind::Directory { source };
                return Ok(());
            }
            None if directory => {}
            _ => self.remove(&path),
        }
        let original = kind != TarKind::Hardlink;
        let kind = match kind {
            TarKind::Directory => Kind::Directory { source },
            TarKind::Symlink => Kind::Symlink {
                source,
                target: link.to_vec(),
            },
            TarKind::Hardlink => self.link(&path, link)?,
            TarKind::Regular | TarKind::Char | TarKind::Block | TarKind::Fifo => Kind::Other { source },
        };
        self.by_path.insert(path.clone(), self.names.len());
        self.names.push(Name {
            path,
            kind,
            original,
            alive: true,
        });
        Ok(())
    }

    /// Follows the symbolic links of this layer among the parents of `path`.
    fn resolve(&self, path: &[u8]) -> Result<Vec<u8>, OrderError> {
        let mut resolved = path.to_vec();
        let mut followed = 0;
        let mut from = 0;
        while let Some(slash) = resolved[from..].iter().position(|&b| b == b'/').map(|i| i + from) {
            from = slash + 1;
            let Some(&parent) = self.by_path.get(&resolved[..slash]) else {
                continue;
            };
            match &self.names[parent].kind {
                Kind::Directory { .. } => {}
                Kind::Symlink { target, .. } => {
                    followed += 1;
                    let long = resolved.len() + target.len() > 2 * MAX_PATH_BYTES;
                    if followed > MAX_SYMLINKS || long {
                        return Err(OrderError::SymlinkLoop { name: shown(path) });
                    }
                    resolved = redirect(&resolved, slash, target);
                    from = 0;
                }
                Kind::Other { .. } | Kind::Pending { .. } => {
                    let parent = shown(&resolved[..slash]);
                    return Err(OrderError::NotBelowDirectory {
                        name: shown(path),
                        parent,
                    });
                }
            }
        }
        if resolved.len() > MAX_PATH_BYTES {
            return Err(OrderError::BadName {
                name: shown(path),
                fault: "the name is longer than 4095 bytes",
            });
        }
        Ok(resolved)
    }

    /// The kind of a new hard link: that of its target.
    fn link(&self, path: &[u8], target: &[u8]) -> Result<Kind, OrderError> {
        let target = self.resolve(target)?;
        let bad = |fault| OrderError::BadTarget {
            name: shown(path),
            target: shown(&target),
            fault,
        };
        if target == path {
            return Err(bad("is itself"));
        }
        match self.by_path.get(&target).map(|&index| &self.names[index].kind) {
            Some(Kind::Directory { .. }) => Err(bad("is a directory")),
            Some(kind) => Ok(kind.clone()),
            None => Ok(Kind::Pending { target }),
        }
    }

    fn remove(&mut self, path: &[u8]) {
        if let Some(index) = self.by_path.remove(path) {
            self.names[index].alive = false;
        }
        let below = [path, b"/"].concat();
        let doomed: Vec<_> = self
            .by_path
            .range(below.clone()..)
            .take_while(|(name, _)| name.starts_with(&below))
            .collect();
        let doomed: Vec<_> = doomed.into_iter().map(|(name, &index)| (name.clone(), index)).collect();
        for (name, index) in doomed {
            self.by_path.remove(&name);
            self.names[index].alive = false;
        }
    }

    /// Settles links to later entries and returns the survivors in the order of the stream.
    pub(crate) fn finish(mut self) -> Result<Vec<Placed>, OrderError> {
        for index in 0..self.names.len() {
            self.settle(index)?;
        }
        // Links point to the entry that brought the content or, if that is gone, to the first link left.
        let mut survivors = Vec::new();
        let mut primary: HashMap<usize, usize> = HashMap::new();
        for name in self.names.into_iter().filter(|name| name.alive) {
            let source = name.kind.source().expect("settle has left no pending link alive");
            let position = survivors.len();
            if name.original {
                primary.insert(source, position);
            } else {
                primary.entry(source).or_insert(position);
            }
            survivors.push(Placed {
                path: name.path,
                source,
                target: None,
            });
        }
        for (position, entry) in survivors.iter_mut().enumerate() {
            entry.target = primary.get(&entry.source).copied().filter(|&target| target != position);
        }
        Ok(survivors)
    }

    /// Gives a pending link, and every pending link on the way, the content of the entry at its end.
    fn settle(&mut self, start: usize) -> Result<(), OrderError> {
        let mut chain = Vec::new();
        let mut index = start;
        let kind = loop {
            let name = &self.names[index];
            let Kind::Pending { target } = &name.kind else {
                break name.kind.clone();
            };
            if !self.names[start].alive {
                return Ok(());
            }
            let (link, shown_target) = (shown(&name.path), shown(target));
            if chain.len() > self.names.len() {
                return Err(OrderError::BadTarget {
                    name: link,
                    target: shown_target,
                    fault: "leads back to it",
                });
            }
            chain.push(index);
            index = match self.by_path.get(target) {
                Some(&next) => next,
                None => {
                    return Err(OrderError::MissingTarget {
                        name: link,
                        target: shown_target,
                    });
                }
            };
            if matches!(self.names[index].kind, Kind::Directory { .. }) {
                let fault = "is a directory";
                return Err(OrderError::BadTarget {
                    name: link,
                    target: shown_target,
                    fault,
                });
            }
        };
        for link in chain {
            self.names[link].kind = kind.clone();
        }
        Ok(())
    }
}

/// `path` with its first `slash` bytes, a symbolic link to `target`, replaced. `..` stops at the root.
fn redirect(path: &[u8], slash: usize, target: &[u8]) -> Vec<u8> {
    let parent: &[u8] = match (target.starts_with(b"/"), path[..slash].iter().rposition(|&b| b == b'/')) {
        (true, _) | (false, None) => b"",
        (false, Some(end)) => &path[..end],
    };
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in parent
        .split(|&b| b == b'/')
        .chain(target.split(|&b| b == b'/'))
        .chain(path[slash..].split(|&b| b == b'/'))
    {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            _ => parts.push(part),
        }
    }
    parts.join(&b'/')
}

/// The order of writing.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Arrangement {
    /// Positions of surviving entries: first the prioritized ones, then the rest in the order of the stream.
    pub(crate) order: Vec<usize>,
    /// How many of them are prioritized.
    pub(crate) prioritized: usize,
    /// Prioritized paths that the layer does not have, as they were given.
    pub(crate) missing: Vec<Vec<u8>>,
}

/// Orders the surviving entries. Directories above a prioritized entry come with it, and so do targets of hard links.
pub(crate) fn arrange(placed: &[Placed], prioritized: &[Vec<u8>]) -> Arrangement {
    let by_path: HashMap<&[u8], usize> = match prioritized {
        [] => HashMap::new(),
        _ => placed
            .iter()
            .enumerate()
            .map(|(index, entry)| (entry.path.as_slice(), index))
            .collect(),
    };
    let mut line = Line {
        order: Vec::with_capacity(placed.len()),
        taken: vec![false; placed.len()],
    };
    let mut missing = Vec::new();
    for path in prioritized {
        let Some(&index) = clean(path).ok().as_deref().and_then(|path| by_path.get(path)) else {
            missing.push(path.clone());
            continue;
        };
        let target = placed[index].target;
        for index in target.into_iter().chain([index]) {
            let path = placed[index].path.as_slice();
            let slashes = path.iter().enumerate().filter(|&(_, &b)| b == b'/').map(|(i, _)| i);
            let root = (!path.is_empty()).then_some(0);
            for end in root.into_iter().chain(slashes) {
                if let Some(&parent) = by_path.get(&path[..end]) {
                    line.push(parent);
                }
            }
            line.push(index);
        }
    }
    let prioritized = line.order.len();
    for (index, entry) in placed.iter().enumerate() {
        if let Some(target) = entry.target {
            line.push(target);
        }
        line.push(index);
    }
    Arrangement {
        order: line.order,
        prioritized,
        missing,
    }
}

struct Line {
    order: Vec<usize>,
    taken: Vec<bool>,
}

impl Line {
    fn push(&mut self, index: usize) {
        if !std::mem::replace(&mut self.taken[index], true) {
            self.order.push(index);
        }
    }
}

#[cfg(test)]
mod tests;
