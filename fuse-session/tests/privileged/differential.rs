//! Our session and fuse3's own on the same file system: user space must not be able to tell them apart.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::SeekFrom;

use super::memory::{Content, Kind, MemoryFs, Tree, pattern};
use super::{Mounted, directory, runtime};

fn sample() -> MemoryFs {
    let mut tree = Tree::default();
    for len in [0, 1, 4095, 4096, 4097, 131_072, 1_048_577] {
        tree.file(1, &format!("file-{len}"), pattern(len));
    }
    tree.file(1, "large", pattern(64 << 20));
    let deep = (0..40).fold(1, |parent, level| {
        tree.add(parent, &format!("d{level}"), Kind::Directory(vec![]), 0o2750)
    });
    let decorated = tree.file(deep, "decorated", &b"x"[..]);
    tree.node(decorated).mode = 0o6755;
    tree.node(decorated).uid = 4_000_000_000;
    let long = "v".repeat(3000);
    tree.node(decorated).xattrs = vec![
        ("user.plain".into(), Bytes::from_static(b"value")),
        ("user.empty".into(), Bytes::new()),
        ("trusted.overlay.opaque".into(), Bytes::from_static(b"y")),
        (
            "security.capability".into(),
            Bytes::from_static(&[1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        ),
        ("user.long".into(), Bytes::from(long)),
    ];
    for (name, len) in [("short", 1), ("page", 4094), ("most", 4095)] {
        tree.add(1, name, Kind::Symlink(Bytes::from("t".repeat(len))), 0o777);
    }
    tree.add(
        1,
        "dangling",
        Kind::Symlink(Bytes::from_static(b"/nowhere/at all")),
        0o777,
    );
    tree.add(1, "device", Kind::Device, 0o600);
    tree.add(1, "empty", Kind::Directory(vec![]), 0o1777);
    let many = tree.add(1, "many", Kind::Directory(vec![]), 0o755);
    for index in 0..10_000 {
        tree.file(
            many,
            &format!("entry-{index:05}-{}", "n".repeat(index % 200)),
            Bytes::new(),
        );
    }
    tree.file(1, &"n".repeat(255), &b"long name"[..]);
    tree.file(1, "na\u{ef}ve \u{1F980}\n", &b"odd name"[..]);
    tree.add(1, "too-much", Kind::File(Content::TooMuch(pattern(2 << 20))), 0o644);
    tree.build()
}

/// Everything user space can learn about one path, in one string.
fn describe(path: &Path) -> String {
    let meta = path.symlink_metadata().unwrap();
    let stat = (
        meta.ino(),
        meta.mode(),
        meta.nlink(),
        meta.uid(),
        meta.gid(),
        meta.rdev(),
        meta.size(),
        meta.blocks(),
    );
    let times = (
        meta.atime(),
        meta.atime_nsec(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
    );
    let link = std::fs::read_link(path).map_err(|error| error.raw_os_error());
    let mut list = vec![0_u8; 4096];
    let listed = rustix::fs::llistxattr(path, &mut list[..]);
    list.truncate(*listed.as_ref().unwrap_or(&0));
    let mut values = Vec::new();
    for name in list
        .split(|byte| *byte == 0)
        .chain([&b"user.missing"[..]])
        .filter(|name| !name.is_empty())
    {
        for room in [0, 4, 4096] {
            let mut value = vec![0_u8; room];
            let got = rustix::fs::lgetxattr(path, name, &mut value[..]);
            values.push(format!("{name:?} {room} {got:?} {value:?}"));
        }
    }
    format!(
        "{stat:?} {times:?} blksize {} {link:?} {listed:?} {list:?} {values:?}",
        meta.blksize()
    )
}

fn walk(root: &Path, directory: &Path, found: &mut BTreeMap<PathBuf, (Vec<OsString>, String)>) {
    let names: Vec<OsString> = directory
        .read_dir()
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    for name in &names {
        let path = directory.join(name);
        if path.symlink_metadata().unwrap().is_dir() {
            walk(root, &path, found);
        } else {
            found.insert(path.strip_prefix(root).unwrap().to_owned(), (vec![], describe(&path)));
        }
    }
    found.insert(
        directory.strip_prefix(root).unwrap().to_owned(),
        (names, describe(directory)),
    );
}

fn reads(path: &Path) -> Vec<(usize, Vec<u8>)> {
    let file = File::open(path).unwrap();
    let len = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut results = Vec::new();
    for (offset, size) in [
        (0, 1),
        (len / 2, 5000),
        (len, 10),
        (len + 1, 10),
        (len.saturating_sub(3), 4096),
    ] {
        let mut buffer = vec![0; size];
        let got = file.read_at(&mut buffer, offset as u64).unwrap();
        buffer.truncate(got);
        results.push((offset, buffer));
    }
    let seeks = [SeekFrom::Hole(0), SeekFrom::Data(0), SeekFrom::End(0)];
    results.extend(seeks.map(|from| (0, format!("{:?}", rustix::fs::seek(&file, from)).into_bytes())));
    results.push((0, std::fs::read(path).unwrap()));
    results
}

#[test]
fn privileged_both_sessions_show_the_same_tree() {
    let fs = sample();
    let ours = Mounted::new(fs.clone());
    let runtime = runtime();
    let directory = directory();
    let mut options = fuse3::MountOptions::default();
    options
        .allow_other(true)
        .default_permissions(true)
        .read_only(true)
        .fs_name("oracle");
    // fuse3's default is not octal 40000 but the kernel parses it as such.
    let theirs = runtime
        .block_on(fuse3::raw::Session::new(options).mount(fs, directory.path()))
        .unwrap();

    let (mut left, mut right) = (BTreeMap::new(), BTreeMap::new());
    walk(ours.root(), ours.root(), &mut left);
    walk(directory.path(), directory.path(), &mut right);
    assert!(left.len() > 10_050);
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
    for (path, description) in &left {
        assert_eq!(description, &right[path], "{}", path.display());
    }
    let regular = left
        .keys()
        .filter(|path| path.components().count() == 1 && ours.root().join(path).is_file());
    let mut compared = 0;
    for path in regular.filter(|path| path.as_os_str().as_bytes() != b"too-much") {
        assert!(
            reads(&ours.root().join(path)) == reads(&directory.path().join(path)),
            "contents of {}",
            path.display()
        );
        compared += 1;
    }
    assert_eq!(compared, 10);
    for missing in ["nothing", "file-1/below", "many/nothing"] {
        let error = |root: &Path| root.join(missing).metadata().unwrap_err().raw_os_error();
        assert_eq!(error(ours.root()), error(directory.path()), "{missing}");
    }
    let statfs = |path| {
        let found = rustix::fs::statvfs(path).unwrap();
        (
            found.f_blocks,
            found.f_bfree,
            found.f_bavail,
            found.f_files,
            found.f_ffree,
            found.f_bsize,
            found.f_namemax,
        )
    };
    assert_eq!(statfs(ours.root()), statfs(directory.path()));
    runtime.block_on(theirs.unmount()).unwrap();
}
