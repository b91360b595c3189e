//! Disk usage of an ordinary snapshot's directory, counted as containerd counts it: allocated blocks of every file and
//! directory, files with several links once. Blocks.
//!
//! A lazy layer is on disk once, however many snapshots it has in chains of different images. Clients add up what all snapshots
//! use (CRI does for its image filesystem), so it counts for one of them, the oldest, and the others use nothing. Numbers of snapshots
//! grow and are kept, so this is the same after a restart. When that snapshot is removed the next oldest takes it over.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::Error;
use crate::layer::Usage;

/// Size of the unit of `st_blocks`.
const BLOCK: u64 = 512;

/// Usage of the tree at `path`. Files that disappear meanwhile (a container may be running in it) are not counted.
pub fn disk_usage(path: &Path) -> Result<Usage, Error> {
    let mut usage = Usage::default();
    let mut linked = HashSet::new();
    let top = fs::symlink_metadata(path).map_err(Error::directory("measure", path))?;
    count(&top, &mut linked, &mut usage);
    if !top.is_dir() {
        return Ok(usage);
    }
    // A stack of directories to read, not recursion: the depth is a container's choice.
    let mut pending = vec![path.to_owned()];
    while let Some(directory) = pending.pop() {
        let entries = match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries.map_err(Error::directory("measure", &directory))?,
        };
        for entry in entries {
            let entry = entry.map_err(Error::directory("measure", &directory))?;
            let metadata = match entry.metadata() {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                metadata => metadata.map_err(Error::directory("measure", entry.path()))?,
            };
            count(&metadata, &mut linked, &mut usage);
            if metadata.is_dir() {
                pending.push(entry.path());
            }
        }
    }
    Ok(usage)
}

fn count(metadata: &fs::Metadata, linked: &mut HashSet<(u64, u64)>, usage: &mut Usage) {
    // Only what has further links can be met again.
    let again = !metadata.is_dir() && metadata.nlink() > 1 && !linked.insert((metadata.dev(), metadata.ino()));
    if !again {
        usage.inodes += 1;
        usage.bytes += metadata.blocks() * BLOCK;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_counted_and_hard_links_once() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("fs");
        fs::create_dir_all(top.join("a/b")).unwrap();
        let before = disk_usage(&top).unwrap();
        assert_eq!(before.inodes, 3);
        fs::write(top.join("a/file"), vec![1; 10_000]).unwrap();
        fs::hard_link(top.join("a/file"), top.join("a/b/link")).unwrap();
        std::os::unix::fs::symlink("/nowhere", top.join("symlink")).unwrap();
        let sparse = fs::File::create(top.join("sparse")).unwrap();
        sparse.set_len(1 << 30).unwrap();
        let after = disk_usage(&top).unwrap();
        assert_eq!(after.inodes, 6);
        assert!(
            (10_000..100_000).contains(&(after.bytes - before.bytes)),
            "{after:?} {before:?}"
        );
        assert!(matches!(
            disk_usage(&root.path().join("none")),
            Err(Error::Directory { .. })
        ));
    }

    #[test]
    fn usage_agrees_with_du() {
        let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let du = std::process::Command::new("du")
            .args(["-s", "-B512"])
            .arg(&top)
            .output()
            .unwrap();
        let blocks: u64 = String::from_utf8(du.stdout)
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap();
        assert_eq!(disk_usage(&top).unwrap().bytes, blocks * BLOCK);
    }
}
