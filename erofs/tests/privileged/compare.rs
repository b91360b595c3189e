//! Compares a mounted tree with the index it was made from: everything that `lstat`, `readlink`, `readdir`, `read` and
//! the attribute calls tell.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, OsStr};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use estargz::index::{FileKind, Inode, LayerIndex, ROOT_INO};

use super::layer::content;

/// What a tree is compared for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    /// Everything.
    Mount,
    /// What `fsck.erofs --extract` keeps: no attributes, no links between files.
    Extracted,
}

/// Panics at the first difference; gives the number of files.
pub(crate) fn same_tree<B: AsRef<[u8]>>(index: &LayerIndex<B>, root: &Path, what: What) -> usize {
    let mut numbers = BTreeMap::new();
    let mut stack = vec![(ROOT_INO, root.to_owned())];
    let mut files = 0;
    while let Some((ino, path)) = stack.pop() {
        files += 1;
        let inode = index.inode(ino).unwrap();
        let seen = same_inode(&inode, &path, what);
        if what == What::Mount {
            assert_eq!(
                *numbers.entry(ino).or_insert(seen),
                seen,
                "{path:?}: other names are another file"
            );
            same_xattrs(&inode, &path);
        }
        if inode.kind == FileKind::Directory {
            let names: BTreeSet<_> = fs::read_dir(&path)
                .unwrap()
                .map(|entry| entry.unwrap().file_name())
                .collect();
            let expected: BTreeSet<_> = index
                .entries(ino, 0)
                .map(|entry| OsStr::from_bytes(entry.name).to_owned())
                .collect();
            assert!(names == expected, "{path:?}: {names:?} instead of {expected:?}");
            stack.extend(
                index
                    .entries(ino, 0)
                    .map(|entry| (entry.ino, path.join(OsStr::from_bytes(entry.name)))),
            );
        }
    }
    if what == What::Mount {
        let distinct: BTreeSet<_> = numbers.values().collect();
        assert_eq!(distinct.len(), numbers.len(), "files share an inode number");
        assert_eq!(numbers.len(), index.inode_count() as usize);
    }
    files
}

fn same_inode(inode: &Inode<'_>, path: &Path, what: What) -> u64 {
    let seen = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let kind = seen.file_type();
    let same_kind = match inode.kind {
        FileKind::Directory => kind.is_dir(),
        FileKind::Regular => kind.is_file(),
        FileKind::Symlink => kind.is_symlink(),
        FileKind::CharDevice => kind.is_char_device(),
        FileKind::BlockDevice => kind.is_block_device(),
        FileKind::Fifo => kind.is_fifo(),
    };
    assert!(same_kind, "{path:?} is {kind:?}");
    assert_eq!((seen.uid(), seen.gid()), (inode.uid, inode.gid), "{path:?}");
    // Changing the owner takes set-user-id bits away, and the tool sets owners last.
    let bits = if what == What::Mount { 0o7777 } else { 0o1777 };
    let (mode, expected) = (seen.mode() & bits, inode.mode & bits);
    assert_eq!(mode, expected, "{path:?}: {mode:o} instead of {expected:o}");
    if matches!(inode.kind, FileKind::CharDevice | FileKind::BlockDevice) {
        let device = (rustix::fs::major(seen.rdev()), rustix::fs::minor(seen.rdev()));
        assert_eq!(device, inode.rdev, "{path:?}");
    }
    if what == What::Mount {
        assert_eq!(seen.nlink(), u64::from(inode.nlink), "{path:?}");
        let time = (seen.mtime(), seen.mtime_nsec());
        assert_eq!(time, (inode.mtime_sec, i64::from(inode.mtime_nsec)), "{path:?}");
    }
    if inode.kind == FileKind::Symlink {
        assert_eq!(seen.len(), inode.size, "{path:?}");
        let target = fs::read_link(path).unwrap();
        assert_eq!(
            target.as_os_str().as_bytes(),
            inode.symlink_target().unwrap(),
            "{path:?}"
        );
    }
    if inode.kind == FileKind::Regular {
        assert_eq!(seen.len(), inode.size, "{path:?}");
        assert!(
            fs::read(path).unwrap() == content(inode.ino, 0, usize::try_from(inode.size).unwrap()),
            "{path:?}"
        );
    }
    seen.ino()
}

fn same_xattrs(inode: &Inode<'_>, path: &Path) {
    let name_of = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut buffer = vec![0; 1 << 17];
    let size = rustix::fs::llistxattr(&name_of, &mut buffer).unwrap_or_else(|error| panic!("{path:?}: {error}"));
    let listed: BTreeSet<&[u8]> = buffer[..size]
        .split(|b| *b == 0)
        .filter(|name| !name.is_empty())
        .collect();
    let prefixes: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_"];
    let known = inode
        .xattrs()
        .filter(|(name, _)| prefixes.iter().any(|prefix| name.starts_with(prefix)));
    let expected: BTreeMap<_, _> = known.collect();
    assert!(
        listed.iter().eq(expected.keys()),
        "{path:?} has {} attributes, not {}",
        listed.len(),
        expected.len()
    );
    for (name, value) in expected {
        let mut seen = vec![0; (64 << 10) + 1];
        let name = CString::new(name).unwrap();
        let size = rustix::fs::lgetxattr(&name_of, &name, &mut seen);
        let size = size.unwrap_or_else(|error| panic!("{path:?} {name:?}: {error}"));
        assert!(&seen[..size] == value, "{path:?}: another {name:?}");
    }
}
