//! Whole file trees compared: every attribute that a program in a container can see.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::fs::{self, Metadata};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use sha2::{Digest as _, Sha256};

/// The longest list of extended attribute names, and the longest value; the kernel's own limits.
const MAX_XATTR: usize = 64 * 1024;

/// How many differences a report lists.
const MAX_DIFFERENCES: usize = 20;

/// What a path is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file: size and digest of its content.
    Regular(u64, String),
    /// A symbolic link and its target.
    Symlink(PathBuf),
    /// A character device: major, minor.
    CharDevice(u32, u32),
    /// A block device: major, minor.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// One path of a tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Type, and what belongs to it.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, i64),
    /// Number of names.
    pub links: u64,
    /// The first path, in order, of the same inode.
    pub same_as: PathBuf,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// A tree, by path from its root (the root itself is the empty path).
pub type Tree = BTreeMap<PathBuf, Node>;

/// Reads a whole tree, without crossing into other file systems mounted below it.
pub fn read(root: &Path) -> Result<Tree> {
    let mut tree = Tree::new();
    let mut inodes = HashMap::new();
    let mounts = crate::sweep::mounts_below(root)?;
    let mut stack = vec![PathBuf::new()];
    while let Some(relative) = stack.pop() {
        let path = if relative.as_os_str().is_empty() {
            root.to_path_buf()
        } else {
            root.join(&relative)
        };
        if path != root && mounts.contains(&path) {
            continue;
        }
        let metadata = fs::symlink_metadata(&path).with_context(|| format!("cannot stat {}", path.display()))?;
        if metadata.is_dir() {
            let children = fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))?;
            for child in children {
                let name = child
                    .with_context(|| format!("cannot list {}", path.display()))?
                    .file_name();
                stack.push(relative.join(name));
            }
        }
        tree.insert(relative, node(&path, &metadata)?);
        inodes.insert(path, (metadata.dev(), metadata.ino()));
    }
    name_hardlinks(root, &mut tree, &inodes);
    Ok(tree)
}

fn name_hardlinks(root: &Path, tree: &mut Tree, inodes: &HashMap<PathBuf, (u64, u64)>) {
    let mut first = HashMap::new();
    for (relative, node) in tree.iter_mut() {
        let path = if relative.as_os_str().is_empty() {
            root.to_path_buf()
        } else {
            root.join(relative)
        };
        if let Some(inode) = inodes.get(&path) {
            node.same_as = first.entry(*inode).or_insert_with(|| relative.clone()).clone();
        }
    }
}

fn node(path: &Path, metadata: &Metadata) -> Result<Node> {
    Ok(Node {
        kind: kind(path, metadata)?,
        mode: metadata.mode() & 0o7777,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec()),
        links: metadata.nlink(),
        same_as: PathBuf::new(),
        xattrs: xattrs(path).with_context(|| format!("cannot read the extended attributes of {}", path.display()))?,
    })
}

fn kind(path: &Path, metadata: &Metadata) -> Result<Kind> {
    let device = || (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let kind = metadata.file_type();
    Ok(if kind.is_dir() {
        Kind::Directory
    } else if kind.is_file() {
        let mut hash = Sha256::new();
        let mut file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        let size = std::io::copy(&mut file, &mut HashWriter(&mut hash))
            .with_context(|| format!("cannot read {}", path.display()))?;
        // A file that reads longer or shorter than it says shows as a difference.
        let suffix = if size == metadata.len() {
            String::new()
        } else {
            format!(" after {size} bytes")
        };
        Kind::Regular(metadata.len(), hex::encode(hash.finalize()) + &suffix)
    } else if kind.is_symlink() {
        Kind::Symlink(fs::read_link(path).with_context(|| format!("cannot read the link {}", path.display()))?)
    } else if kind.is_char_device() {
        Kind::CharDevice(device().0, device().1)
    } else if kind.is_block_device() {
        Kind::BlockDevice(device().0, device().1)
    } else if kind.is_fifo() {
        Kind::Fifo
    } else {
        Kind::Socket
    })
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// All extended attributes of a path, links not followed.
pub fn xattrs(path: &Path) -> std::io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut buffer = vec![0_u8; MAX_XATTR];
    let length = rustix::fs::llistxattr(path, &mut buffer[..])?;
    let names: Vec<Vec<u8>> = buffer[..length]
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
        .map(<[u8]>::to_vec)
        .collect();
    let mut found = BTreeMap::new();
    for name in names {
        let length = rustix::fs::lgetxattr(path, std::ffi::OsStr::from_bytes(&name), &mut buffer[..])?;
        found.insert(name, buffer[..length].to_vec());
    }
    Ok(found)
}

/// The differences between two trees, a line each, the first so many in full; `None` when they are equal.
#[must_use]
pub fn differences(left: &Tree, right: &Tree) -> Option<String> {
    let mut lines = Vec::new();
    for (path, node) in left {
        match right.get(path) {
            None => lines.push(format!("/{}: only on the left ({:?})", path.display(), node.kind)),
            Some(other) => lines.extend(fields(node, other).map(|field| format!("/{}: {field}", path.display()))),
        }
    }
    for (path, node) in right {
        if !left.contains_key(path) {
            lines.push(format!("/{}: only on the right ({:?})", path.display(), node.kind));
        }
    }
    if lines.is_empty() {
        return None;
    }
    let mut text = format!("{} differences:", lines.len());
    for line in lines.iter().take(MAX_DIFFERENCES) {
        // Writing to a String cannot fail.
        let _ = write!(text, "\n  {line}");
    }
    Some(text)
}

fn fields(left: &Node, right: &Node) -> impl Iterator<Item = String> {
    fn differs<T: PartialEq + std::fmt::Debug>(name: &str, left: &T, right: &T) -> Option<String> {
        (left != right).then(|| format!("{name} {left:?} ≠ {right:?}"))
    }
    let mode = (left.mode != right.mode).then(|| format!("mode {:04o} ≠ {:04o}", left.mode, right.mode));
    let differences = [
        differs("kind", &left.kind, &right.kind),
        mode,
        differs("uid", &left.uid, &right.uid),
        differs("gid", &left.gid, &right.gid),
        differs("mtime", &left.mtime, &right.mtime),
        differs("links", &left.links, &right.links),
        differs("hardlink of", &left.same_as, &right.same_as),
        differs("xattrs", &left.xattrs, &right.xattrs),
    ];
    differences.into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn sample() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("d")).unwrap();
        fs::write(root.path().join("d/a"), "content").unwrap();
        fs::hard_link(root.path().join("d/a"), root.path().join("d/b")).unwrap();
        symlink("d/a", root.path().join("link")).unwrap();
        let times = fs::FileTimes::new().set_modified(std::time::UNIX_EPOCH);
        for path in ["d/a", "d", ""] {
            fs::File::open(root.path().join(path))
                .unwrap()
                .set_times(times)
                .unwrap();
        }
        root
    }

    #[test]
    fn a_tree_equals_itself_and_names_hardlinks_by_their_first_path() {
        let root = sample();
        let tree = read(root.path()).unwrap();
        assert_eq!(tree.len(), 5);
        assert_eq!(tree[Path::new("d/b")].same_as, Path::new("d/a"));
        assert_eq!(tree[Path::new("d/b")].links, 2);
        assert_eq!(differences(&tree, &read(root.path()).unwrap()), None);
    }

    #[test]
    fn every_attribute_counts() {
        let root = sample();
        let before = read(root.path()).unwrap();
        let mut after = before.clone();
        let node = after.get_mut(Path::new("d/a")).unwrap();
        node.kind = Kind::Regular(7, "other".into());
        (node.mode, node.uid, node.gid, node.mtime, node.links) = (0o4755, 9, 9, (0, 1), 3);
        node.xattrs.insert(b"user.x".to_vec(), b"y".to_vec());
        after.remove(Path::new("link"));
        let report = differences(&before, &after).unwrap();
        for word in [
            "8 differences",
            "kind",
            "mode",
            "uid",
            "gid",
            "mtime",
            "links",
            "xattrs",
            "/link: only on the left",
        ] {
            assert!(report.contains(word), "{word} is missing in {report}");
        }
        assert!(differences(&after, &before).unwrap().contains("only on the right"));
    }
}
