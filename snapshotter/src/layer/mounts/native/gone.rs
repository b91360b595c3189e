//! Tells when a file system has ended: its mount may be gone, and others (overlays over it) still have it in use.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::inotify;

/// How often it is looked whether one has ended that is waited for.
const LOOK: Duration = Duration::from_millis(5);
/// Room for what one look brings; more comes with the next.
const BUFFER: usize = 4096;

/// Watches of the roots of file systems. One for the process: a user may have few.
#[derive(Debug, Clone)]
pub(super) struct Watches(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    inotify: OwnedFd,
    ends: Mutex<HashMap<i32, Arc<AtomicBool>>>,
}

impl Watches {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(Arc::new(Shared {
            inotify: inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?,
            ends: Mutex::default(),
        })))
    }

    /// Watches the file system whose root is at `root`.
    pub(super) fn watch(&self, root: &Path) -> io::Result<Gone> {
        let end = Arc::new(AtomicBool::new(false));
        // Locked before, so that the end is not told before it is known whose it is.
        let mut ends = self.0.ends.lock().unwrap_or_else(PoisonError::into_inner);
        // What is asked for never happens on a read-only file system; the end is told in any case.
        let flags = inotify::WatchFlags::MODIFY | inotify::WatchFlags::ONLYDIR;
        let watch = inotify::add_watch(&self.0.inotify, root, flags)?;
        ends.insert(watch, end.clone());
        drop(ends);
        Ok(Gone {
            watches: Some(self.clone()),
            end,
        })
    }

    /// Notes what has ended.
    fn look(&self) {
        let mut ends = self.0.ends.lock().unwrap_or_else(PoisonError::into_inner);
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut reader = inotify::Reader::new(&self.0.inotify, &mut buffer);
        while let Ok(event) = reader.next() {
            // Nothing is watched but roots, and nothing is news but their end.
            if event
                .events()
                .intersects(inotify::ReadFlags::UNMOUNT | inotify::ReadFlags::IGNORED)
                && let Some(end) = ends.remove(&event.wd())
            {
                end.store(true, Ordering::Release);
            }
        }
    }
}

/// Whether one file system has ended.
#[derive(Debug)]
pub(super) struct Gone {
    watches: Option<Watches>,
    end: Arc<AtomicBool>,
}

impl Gone {
    /// Of a file system that cannot be watched: never.
    pub(super) fn unknown() -> Self {
        Self {
            watches: None,
            end: Arc::default(),
        }
    }

    pub(super) fn is_so(&self) -> bool {
        if let Some(watches) = &self.watches {
            watches.look();
        }
        self.end.load(Ordering::Acquire)
    }

    pub(super) fn within(&self, patience: Duration) -> bool {
        if self.watches.is_none() {
            return false;
        }
        let until = Instant::now() + patience;
        while !self.is_so() {
            if Instant::now() > until {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }
}
