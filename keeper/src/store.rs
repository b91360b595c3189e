//! The descriptors that are kept.

use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

use crate::notification::NAMES_LIMIT;
use crate::sys;

/// Device number of `/dev/fuse`.
const FUSE_DEVICE: (u32, u32) = (10, 229);

/// What the kernel calls a group of fanotify.
const GROUP: &str = "anon_inode:[fanotify]";

/// Why a descriptor is not kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It is something whose end might wait for somebody, and nothing that a mount needs.
    #[error("it is no file, no fanotify group and no /dev/fuse")]
    Kind,
    /// As many are kept as may be.
    #[error("the store has room for {capacity} descriptors and is full")]
    Full {
        /// The most that are kept.
        capacity: usize,
    },
    /// Their names would not fit into one variable of the environment.
    #[error("the names of the kept descriptors would be longer than {NAMES_LIMIT} bytes together")]
    Names,
}

/// Named descriptors, in the order in which they came. Nothing is ever done with one but to close it.
#[derive(Debug)]
pub struct Store {
    kept: Vec<(String, OwnedFd)>,
    names: usize,
    capacity: usize,
}

impl Store {
    /// An empty store for at most `capacity` descriptors.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            kept: Vec::new(),
            names: 0,
            capacity,
        }
    }

    /// Keeps `descriptor`, beside others of that name. `false` if its open file is kept already, under whatever name: it
    /// is closed then and the name that it has stays, as with systemd. What is there is never given up for what comes.
    pub fn add(&mut self, name: &str, descriptor: OwnedFd) -> Result<bool, StoreError> {
        if !is_of_use(&descriptor) {
            return Err(StoreError::Kind);
        }
        if self.kept.iter().any(|(_, kept)| sys::is_same_file(kept, &descriptor)) {
            return Ok(false);
        }
        if self.kept.len() >= self.capacity {
            return Err(StoreError::Full {
                capacity: self.capacity,
            });
        }
        if self.names + name.len() + 1 > NAMES_LIMIT {
            return Err(StoreError::Names);
        }
        self.restore(name, descriptor);
        Ok(true)
    }

    /// Keeps what was kept before, unasked.
    pub fn restore(&mut self, name: &str, descriptor: OwnedFd) {
        self.names += name.len() + 1;
        self.kept.push((name.to_owned(), descriptor));
    }

    /// Closes everything with this name, and says how many that were.
    pub fn remove(&mut self, name: &str) -> usize {
        let before = self.kept.len();
        self.kept.retain(|(kept, _)| kept != name);
        let removed = before - self.kept.len();
        self.names -= removed * (name.len() + 1);
        removed
    }

    /// How many are kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether nothing is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// The most that are kept.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Everything with its name, the oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (&str, BorrowedFd<'_>)> {
        self.kept
            .iter()
            .map(|(name, descriptor)| (name.as_str(), descriptor.as_fd()))
    }
}

/// Whether it is of a kind that is kept: a file (also one in memory), `/dev/fuse`, or a group of fanotify. Nothing is asked of
/// a file system, which might be one that nobody serves.
fn is_of_use(descriptor: &OwnedFd) -> bool {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let Ok(found) = statx(descriptor, c"", flags, StatxFlags::TYPE) else {
        return false;
    };
    match FileType::from_raw_mode(found.stx_mode.into()) {
        FileType::RegularFile => true,
        FileType::CharacterDevice => (found.stx_rdev_major, found.stx_rdev_minor) == FUSE_DEVICE,
        FileType::Unknown => {
            let link = std::fs::read_link(format!("/proc/self/fd/{}", descriptor.as_raw_fd()));
            link.is_ok_and(|link| link.as_os_str() == GROUP)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_mount_needs_is_refused() {
        let mut store = Store::new(8);
        let (pipe, _end) = std::io::pipe().unwrap();
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let directory = std::fs::File::open("/").unwrap();
        let flags = rustix::event::EventfdFlags::CLOEXEC;
        let event = rustix::event::eventfd(0, flags).unwrap();
        for other in [pipe.into(), socket.into(), null.into(), directory.into(), event] {
            assert!(matches!(store.add("a", other).unwrap_err(), StoreError::Kind));
        }
        assert!(store.is_empty());
        let memory = rustix::fs::memfd_create("a", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        assert!(store.add("a", memory).unwrap());
    }

    #[test]
    fn privileged_what_mounts_need_is_kept() {
        let mut store = Store::new(8);
        let fuse = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        assert!(store.add("fuse", fuse.into()).unwrap());
        assert!(store.add("fanotify", sys::fanotify_group().unwrap()).unwrap());
    }

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn an_open_file_is_kept_once_and_a_path_opened_twice_is_two() {
        let mut store = Store::new(8);
        let (one, place) = (file(), tempfile::NamedTempFile::new().unwrap());
        assert!(store.add("a", one.try_clone().unwrap()).unwrap());
        assert!(!store.add("a", one.try_clone().unwrap()).unwrap());
        assert!(!store.add("b", one).unwrap());
        for _ in 0..2 {
            assert!(store.add("c", place.reopen().unwrap().into()).unwrap());
        }
        assert_eq!(store.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "c", "c"]);
        assert_eq!((store.remove("c"), store.remove("c"), store.remove("b")), (2, 0, 0));
        assert_eq!(store.len(), 1);
    }

    #[test]
    fn a_full_store_refuses_what_comes_and_has_room_after_a_removal() {
        let mut store = Store::new(2);
        for name in ["a", "b"] {
            store.add(name, file()).unwrap();
        }
        assert!(matches!(
            store.add("c", file()).unwrap_err(),
            StoreError::Full { capacity: 2 }
        ));
        assert_eq!(store.iter().map(|(name, _)| name).collect::<Vec<_>>(), ["a", "b"]);
        store.remove("a");
        store.add("c", file()).unwrap();
    }

    #[test]
    fn names_are_bounded_together() {
        let mut store = Store::new(usize::MAX);
        let name = "n".repeat(255);
        let mut kept = 0;
        while store.add(&name, file()).is_ok() {
            kept += 1;
            assert!(kept * 256 <= NAMES_LIMIT);
        }
        assert!(matches!(store.add(&name, file()).unwrap_err(), StoreError::Names));
        assert_eq!(store.remove(&name), kept);
        assert_eq!(store.names, 0);
    }
}
