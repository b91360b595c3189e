//! `<root>/snapshots`: the directories of snapshots.
//!
//! `<id>/fs` is an ordinary snapshot's upper directory, `<id>/work` overlayfs's scratch directory of an active one. A
//! lazy layer's snapshot has a symbolic link `fs` to the layer's mount instead: overlayfs resolves it when it mounts,
//! so lower directories keep short names (128 of them must fit in one page), and the link is relative, so the root
//! can be moved. Everything here blocks.

use std::collections::HashSet;
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use super::{Error, Kind};

/// Modes and places as containerd's overlayfs snapshotter has them.
const SNAPSHOTS_MODE: u32 = 0o700;
const SNAPSHOT_MODE: u32 = 0o700;
const UPPER_MODE: u32 = 0o755;
const WORK_MODE: u32 = 0o711;

/// The directories of all snapshots below one root.
#[derive(Debug, Clone)]
pub struct Directories {
    root: PathBuf,
}

impl Directories {
    /// Opens the directories below `root`, which exists.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let directories = Self { root: root.to_owned() };
        let all = directories.all();
        match DirBuilder::new().mode(SNAPSHOTS_MODE).create(&all) {
            Ok(()) => Ok(directories),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(directories),
            Err(error) => Err(Error::directory("make", all)(error)),
        }
    }

    fn all(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// The snapshot's own directory.
    pub fn snapshot(&self, id: u64) -> PathBuf {
        self.all().join(id.to_string())
    }

    /// The snapshot's content.
    pub fn upper(&self, id: u64) -> PathBuf {
        self.snapshot(id).join("fs")
    }

    /// The scratch directory of an active snapshot.
    pub fn work(&self, id: u64) -> PathBuf {
        self.snapshot(id).join("work")
    }

    /// Owner of a snapshot's content; a child's upper directory gets the same one.
    pub fn owner(&self, id: u64) -> Result<(u32, u32), Error> {
        let path = self.upper(id);
        let metadata = fs::metadata(&path).map_err(Error::directory("read the owner of", path))?;
        Ok((metadata.uid(), metadata.gid()))
    }

    /// Makes the directories of an active or view snapshot; leaves nothing behind when it fails.
    pub fn make(&self, id: u64, kind: Kind, owner: Option<(u32, u32)>) -> Result<(), Error> {
        self.make_or_clear(id, |place| {
            let upper = place.join("fs");
            make_directory(&upper, UPPER_MODE)?;
            if let Some((uid, gid)) = owner {
                lchown(&upper, Some(uid), Some(gid))?;
            }
            if kind == Kind::Active {
                make_directory(&place.join("work"), WORK_MODE)?;
            }
            Ok(())
        })
    }

    /// Makes the directory of a lazy layer's snapshot, whose content is the mount at `layer`.
    pub fn make_link(&self, id: u64, layer: &Path) -> Result<(), Error> {
        let target = match layer.strip_prefix(&self.root) {
            Ok(below) => Path::new("../..").join(below),
            Err(_) => layer.to_owned(),
        };
        self.make_or_clear(id, |place| symlink(&target, place.join("fs")))
    }

    fn make_or_clear(&self, id: u64, fill: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), Error> {
        let place = self.snapshot(id);
        let made = make_directory(&place, SNAPSHOT_MODE).and_then(|()| fill(&place));
        made.map_err(|error| {
            if error.kind() != io::ErrorKind::AlreadyExists {
                // What is left here is an orphan that the next cleanup finds.
                let _ = fs::remove_dir_all(&place);
            }
            Error::directory("make", place)(error)
        })
    }

    /// Whether the content of a lazy layer's snapshot is a link that leads somewhere, without touching the mount.
    pub fn has_content(&self, id: u64) -> bool {
        fs::symlink_metadata(self.upper(id)).is_ok()
    }

    /// Removes a snapshot's directory, or one of [`Directories::orphans`]; one that is gone already is fine.
    pub fn remove_path(&self, path: &Path) -> Result<(), Error> {
        remove_tree(path)
    }

    /// Everything in the snapshots directory that is not the directory of a snapshot in `ids`.
    pub fn orphans(&self, ids: &HashSet<u64>) -> Result<Vec<PathBuf>, Error> {
        let mut orphans = Vec::new();
        self.for_each_entry(|name, path| {
            if name.and_then(number).is_none_or(|id| !ids.contains(&id)) {
                orphans.push(path);
            }
        })?;
        Ok(orphans)
    }

    /// A number above that of every directory that exists.
    pub fn floor(&self) -> Result<u64, Error> {
        let mut highest = 0;
        self.for_each_entry(|name, _| highest = highest.max(name.and_then(number).unwrap_or(0)))?;
        Ok(highest.saturating_add(1))
    }

    fn for_each_entry(&self, mut each: impl FnMut(Option<&str>, PathBuf)) -> Result<(), Error> {
        let all = self.all();
        let failed = |error| Error::directory("list", all.clone())(error);
        for entry in fs::read_dir(&all).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            each(entry.file_name().to_str(), entry.path());
        }
        Ok(())
    }
}

/// The number that a directory's name is in its only spelling. Numbers near the end of the range are no numbers of
/// ours, and must not push the next one over it.
fn number(name: &str) -> Option<u64> {
    let id: u64 = name.parse().ok()?;
    (id.to_string() == name && id < u64::MAX / 2).then_some(id)
}

/// Makes a directory with exactly this mode, whatever the umask.
fn make_directory(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().mode(mode).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

fn remove_tree(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::directory("remove", path)(error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn directories_have_containerds_modes_and_the_parents_owner() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::open(root.path()).unwrap();
        directories.make(1, Kind::Active, Some((12, 34))).unwrap();
        assert_eq!(mode(&directories.snapshot(1)), 0o700);
        assert_eq!(mode(&directories.upper(1)), 0o755);
        assert_eq!(mode(&directories.work(1)), 0o711);
        assert_eq!(directories.owner(1).unwrap(), (12, 34));
        directories.make(2, Kind::View, None).unwrap();
        assert!(!directories.work(2).exists());
        // The kernel needs the directory of one run only; a repeated number is a fault, not something to overwrite.
        assert!(matches!(
            directories.make(2, Kind::View, None),
            Err(Error::Directory { .. })
        ));
        assert!(directories.upper(2).exists());
    }

    #[test]
    fn a_layers_link_is_relative_and_its_removal_spares_the_layer() {
        let root = tempfile::tempdir().unwrap();
        let layer = root.path().join("layers/abc/mnt");
        fs::create_dir_all(&layer).unwrap();
        fs::write(layer.join("file"), "content").unwrap();
        let directories = Directories::open(root.path()).unwrap();
        directories.make_link(7, &layer).unwrap();
        assert_eq!(
            fs::read_link(directories.upper(7)).unwrap(),
            Path::new("../../layers/abc/mnt")
        );
        assert_eq!(
            fs::read_to_string(directories.upper(7).join("file")).unwrap(),
            "content"
        );
        directories.remove_path(&directories.snapshot(7)).unwrap();
        directories.remove_path(&directories.snapshot(7)).unwrap();
        assert!(layer.join("file").exists() && !directories.snapshot(7).exists());
    }

    #[test]
    fn orphans_are_all_names_but_the_known_numbers() {
        let root = tempfile::tempdir().unwrap();
        let directories = Directories::open(root.path()).unwrap();
        for id in [3, 9] {
            directories.make(id, Kind::View, None).unwrap();
        }
        for name in ["new-1", "03", "18446744073709551615"] {
            fs::create_dir(root.path().join("snapshots").join(name)).unwrap();
        }
        fs::write(root.path().join("snapshots/file"), "").unwrap();
        let orphans = directories.orphans(&HashSet::from([3])).unwrap();
        assert_eq!(orphans.len(), 5);
        assert_eq!(directories.floor().unwrap(), 10);
        for orphan in &orphans {
            directories.remove_path(orphan).unwrap();
        }
        assert!(directories.orphans(&HashSet::from([3])).unwrap().is_empty());
        assert!(directories.upper(3).exists());
    }
}
