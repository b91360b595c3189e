//! What is known of all layers of the cache: which are open, which must stay, how many bytes they take and may take.
//!
//! A layer stays as long as it is open, as somebody is about to open it ([`Pin`]), or as a snapshot refers to it ([`Shelf::keep`]).
//! Until it is known what snapshots refer to, all stay. What else is there is given up when room is needed; see [`super::evict`].

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use estargz::digest::Digest;

use super::evict::Need;
use super::image::EROFS;
use super::layer::{CachedLayer, OpenLayer, RESIDENT};
use super::limits::{Bounds, Limits};
use super::reuse::digests::Digests;
use super::room::Room;
use crate::layer::Usage;
use crate::metrics::Metrics;

/// Files of a layer, besides its directory and `mnt`, which is asked nothing: that would be asking the mounted filesystem.
const FILES: [&str; 6] = ["toc", "index", "data", RESIDENT, "origin", EROFS];
/// Unit of `st_blocks`.
const BLOCK: u64 = 512;
/// Where the last use of a layer is kept while it is not open: the time of change of this file.
const LAST_USE: &str = "origin";

/// The layers of one cache root, as all parts of the cache see them.
pub(super) struct Shelf {
    /// `<root>/layers`.
    pub(super) root: PathBuf,
    pub(super) metrics: Metrics,
    pub(super) digests: Digests,
    /// Whether a copy can share its blocks with what it is a copy of.
    pub(super) cloning: bool,
    limits: Limits,
    /// The limits in bytes, as they were lately.
    quota: AtomicU64,
    min_free: AtomicU64,
    /// Bytes of all layers as last counted, with what was stored since.
    used: AtomicU64,
    /// Bytes of those that may go as a whole.
    spare: AtomicU64,
    layers: Mutex<HashMap<Digest, Entry>>,
    /// Whether all that snapshots refer to is marked.
    settled: AtomicBool,
    /// Whether it was told that there is no room for what nobody waits for.
    pub(super) short: AtomicBool,
    /// Held while room is made; when that brought nothing last, and what was used then.
    pub(super) making_room: Mutex<Option<(Instant, u64)>>,
    /// `data` of layers that the kernel reads by itself since before this process: opened anew it would raise events.
    kept: Mutex<HashMap<Digest, File>>,
    /// Held while a layer is promised that all of it may stay.
    promising: Mutex<()>,
    /// Layers that cannot be opened.
    unusable: Mutex<HashSet<Digest>>,
    /// Held while a layer's directory is opened; layers share them.
    opening: Vec<Mutex<()>>,
    began: Instant,
    /// Makes the names of unfinished directories distinct within this process.
    unfinished: AtomicU64,
}

/// A layer on disk.
#[derive(Debug, Default)]
struct Entry {
    open: Weak<OpenLayer>,
    pins: usize,
    kept: bool,
    /// Whether it was open since its bytes were counted with nobody having it open.
    uncounted: bool,
    bytes: u64,
    /// Seconds of the shelf's clock; below zero for what was used before it began.
    last_use: i64,
}

impl Entry {
    /// A layer that is new here.
    fn used_at(now: i64) -> Self {
        Self {
            last_use: now,
            ..Self::default()
        }
    }

    fn may_go(&self) -> bool {
        !self.kept && self.pins == 0 && self.open.strong_count() == 0
    }
}

/// Layers that open at once without waiting for each other.
const OPENING_LOCKS: usize = 16;
/// Prefix of directories that are not layers yet, or no longer; removed when the store is opened.
pub(super) const UNFINISHED: &str = ".new-";

/// Keeps a layer, there or not, from being given up as long as it lives.
pub struct Pin {
    shelf: Arc<Shelf>,
    layer: Digest,
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut layers = self.shelf.layers();
        if let Some(entry) = layers.get_mut(&self.layer) {
            entry.pins = entry.pins.saturating_sub(1);
        }
    }
}

impl std::fmt::Debug for Shelf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shelf")
            .field("root", &self.root)
            .finish_non_exhaustive()
    }
}

impl Shelf {
    /// The shelf of `root`, with those layers on it whose directories are named in `found`.
    pub(super) fn new(root: PathBuf, limits: Limits, metrics: Metrics, found: &[Digest]) -> Arc<Self> {
        let shelf = Self {
            digests: Digests::new(root.clone()),
            cloning: Self::can_clone(&root),
            root,
            metrics,
            limits,
            quota: AtomicU64::new(u64::MAX),
            min_free: AtomicU64::new(0),
            used: AtomicU64::new(0),
            spare: AtomicU64::new(0),
            layers: Mutex::default(),
            settled: AtomicBool::new(false),
            short: AtomicBool::new(false),
            making_room: Mutex::default(),
            kept: Mutex::default(),
            promising: Mutex::default(),
            unusable: Mutex::default(),
            opening: std::iter::repeat_with(Mutex::default).take(OPENING_LOCKS).collect(),
            began: Instant::now(),
            unfinished: AtomicU64::new(0),
        };
        let entries = found.iter().map(|layer| {
            let entry = Entry {
                bytes: shelf.usage(layer).bytes,
                last_use: shelf.last_use_on_disk(layer),
                ..Entry::default()
            };
            (*layer, entry)
        });
        let entries = entries.collect();
        *shelf.layers() = entries;
        shelf.count();
        Arc::new(shelf)
    }

    /// Nobody is to open the layer: he would ask himself, and wait for ever.
    pub(super) fn set_unusable(&self, layer: &Digest) {
        let mut unusable = self.unusable.lock().unwrap_or_else(PoisonError::into_inner);
        unusable.insert(*layer);
    }

    pub(super) fn is_unusable(&self, layer: &Digest) -> bool {
        let unusable = self.unusable.lock().unwrap_or_else(PoisonError::into_inner);
        unusable.contains(layer)
    }

    /// `data` of a layer, as an earlier process had it open.
    pub(super) fn keep_data(&self, layer: &Digest, data: File) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.insert(*layer, data);
    }

    /// What [`Self::keep_data`] was told of a layer, as another handle of the same.
    pub(super) fn kept_data(&self, layer: &Digest) -> io::Result<Option<File>> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.get(layer).map(File::try_clone).transpose()
    }

    /// The layer is open, and has its own.
    pub(super) fn forget_data(&self, layer: &Digest) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.remove(layer);
    }

    /// Held while a layer is looked at and promised that all of it may stay.
    pub(super) fn promising(&self) -> MutexGuard<'_, ()> {
        self.promising.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether all of `layer`, which has `whole` bytes, fits into the quota with all that cannot go, and onto the disk.
    pub(super) fn fits(&self, layer: &Digest, whole: u64) -> bool {
        let room = self.room();
        let (mut there, mut others) = (0, 0_u64);
        for (digest, entry) in self.layers().iter() {
            if digest == layer {
                there = entry.bytes;
            } else if !entry.may_go() {
                // Of what the kernel reads by itself nothing can be given up, and all of it may come.
                let read_by_kernel = entry.open.upgrade().filter(|open| open.is_read_by_kernel());
                let promised = read_by_kernel.map_or(0, |open| open.whole_bytes());
                others = others.saturating_add(entry.bytes.max(promised));
            }
        }
        let missing = whole.saturating_sub(there);
        others.saturating_add(whole) <= room.quota && missing <= room.free.saturating_add(room.spare)
    }

    fn layers(&self) -> MutexGuard<'_, HashMap<Digest, Entry>> {
        // Every change is one insert, remove or assignment.
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Seconds since the shelf was set up.
    pub(super) fn now(&self) -> i64 {
        i64::try_from(self.began.elapsed().as_secs()).unwrap_or(i64::MAX)
    }

    fn last_use_on_disk(&self, layer: &Digest) -> i64 {
        let changed = fs::symlink_metadata(self.path(layer).join(LAST_USE)).and_then(|metadata| metadata.modified());
        let ago = changed
            .ok()
            .and_then(|time| SystemTime::now().duration_since(time).ok());
        let ago = ago.map_or(0, |ago| i64::try_from(ago.as_secs()).unwrap_or(i64::MAX));
        self.now().saturating_sub(ago)
    }

    /// Directory of a layer, there or not.
    pub(super) fn path(&self, layer: &Digest) -> PathBuf {
        self.root.join(layer.hex())
    }

    /// A name for a directory that is not a layer.
    pub(super) fn unfinished(&self, layer: &Digest) -> PathBuf {
        let number = self.unfinished.fetch_add(1, Ordering::Relaxed);
        let name = format!("{UNFINISHED}{}-{}-{number}", layer.hex(), std::process::id());
        self.root.join(name)
    }

    /// Keeps a layer from being given up for a while.
    pub(super) fn pin(self: &Arc<Self>, layer: &Digest) -> Pin {
        let now = self.now();
        self.layers().entry(*layer).or_insert_with(|| Entry::used_at(now)).pins += 1;
        Pin {
            shelf: self.clone(),
            layer: *layer,
        }
    }

    /// Notes whether snapshots refer to a layer.
    pub(super) fn keep(&self, layer: &Digest, kept: bool) {
        let now = self.now();
        self.layers().entry(*layer).or_insert_with(|| Entry::used_at(now)).kept = kept;
    }

    /// Everything that snapshots refer to was told.
    pub(super) fn settle(&self) {
        self.settled.store(true, Ordering::Relaxed);
        self.count();
    }

    /// The open layer, or what `open` makes of its directory, and the only one of it.
    pub(super) fn open<E>(
        self: &Arc<Self>,
        layer: &Digest,
        open: impl FnOnce() -> Result<Option<OpenLayer>, E>,
    ) -> Result<Option<CachedLayer>, E> {
        let lock = &self.opening[usize::from(layer.as_bytes()[0]) % self.opening.len()];
        let _alone = lock.lock().unwrap_or_else(PoisonError::into_inner);
        let _pin = self.pin(layer);
        if let Some(open) = self.open_one(layer) {
            return Ok(Some(open));
        }
        let Some(opened) = open()? else { return Ok(None) };
        let opened = Arc::new(opened);
        {
            let (mut layers, now) = (self.layers(), self.now());
            let entry = layers.entry(*layer).or_insert_with(|| Entry::used_at(now));
            // Being opened is no use: a verification opens every layer.
            opened.last_use.store(entry.last_use, Ordering::Relaxed);
            entry.open = Arc::downgrade(&opened);
            entry.uncounted = true;
        }
        self.digests.add(&opened);
        Ok(Some(CachedLayer(opened)))
    }

    /// The layer, if it is open.
    pub(super) fn open_one(&self, layer: &Digest) -> Option<CachedLayer> {
        let layers = self.layers();
        layers
            .get(layer)
            .and_then(|entry| entry.open.upgrade())
            .map(CachedLayer)
    }

    /// All open layers, the one that was used longest ago first.
    pub(super) fn all_open(&self) -> Vec<CachedLayer> {
        let mut open: Vec<_> = self
            .layers()
            .values()
            .filter_map(|entry| entry.open.upgrade())
            .map(CachedLayer)
            .collect();
        open.sort_by_key(|layer| layer.last_use.load(Ordering::Relaxed));
        open
    }

    /// A layer was used until now: remembers when, on disk too.
    pub(super) fn note_used(&self, layer: &Digest) {
        let used = SystemTime::now();
        // What is lost is a place in a queue.
        let _ = File::options()
            .write(true)
            .open(self.path(layer).join(LAST_USE))
            .and_then(|file| file.set_modified(used));
        let now = self.now();
        if let Some(entry) = self.layers().get_mut(layer) {
            entry.last_use = now;
            if let Some(open) = entry.open.upgrade() {
                open.last_use.store(now, Ordering::Relaxed);
            }
        }
    }

    /// Takes the layer that may go and was used longest ago out of the cache's sight: where its files are now, and their size.
    pub(super) fn take_least(&self) -> io::Result<Option<(Digest, PathBuf, u64)>> {
        if !self.settled.load(Ordering::Relaxed) {
            return Ok(None);
        }
        let mut layers = self.layers();
        loop {
            let least = layers
                .iter_mut()
                .filter(|(_, entry)| entry.may_go() && entry.bytes > 0)
                .min_by_key(|(_, entry)| entry.last_use);
            let Some((&layer, entry)) = least else { return Ok(None) };
            let (bytes, path) = (entry.bytes, self.unfinished(&layer));
            // With the table held, so that nobody opens it meanwhile; and whole, so that half a layer is never found under its name.
            match fs::rename(self.path(&layer), &path) {
                Ok(()) => {
                    layers.remove(&layer);
                    return Ok(Some((layer, path, bytes)));
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    layers.remove(&layer);
                }
                Err(error) => {
                    // It still counts, and the others come before it the next time.
                    entry.last_use = self.now();
                    return Err(error);
                }
            }
        }
    }

    /// Forgets what is on disk of a layer whose directory is gone; who pins it, or refers to it, does so still.
    pub(super) fn forget(&self, layer: &Digest) {
        let mut layers = self.layers();
        if let Some(entry) = layers.get_mut(layer) {
            (entry.bytes, entry.uncounted) = (0, false);
            if entry.may_go() {
                layers.remove(layer);
            }
        }
        drop(layers);
        self.digests.forget(layer);
    }

    /// Bytes allocated for a layer's files and their number; zero for a layer that is not here.
    pub(super) fn usage(&self, layer: &Digest) -> Usage {
        let path = self.path(layer);
        let of = |path: &Path| fs::symlink_metadata(path).ok();
        let files = std::iter::once(of(&path)).chain(FILES.iter().map(|name| of(&path.join(name))));
        files.flatten().fold(Usage::default(), |sum, metadata| Usage {
            bytes: sum.bytes + metadata.blocks() * BLOCK,
            inodes: sum.inodes + 1,
        })
    }

    /// Counts anew what changed, and looks at the limits again.
    pub(super) fn count(&self) {
        let grown: Vec<_> = {
            let mut layers = self.layers();
            let changed = layers.iter_mut().filter_map(|(layer, entry)| {
                let changed = match entry.open.upgrade() {
                    Some(open) => open.grown.swap(false, Ordering::Relaxed),
                    // Written to and closed since the last time.
                    None => std::mem::take(&mut entry.uncounted),
                };
                changed.then_some(*layer)
            });
            changed.collect()
        };
        let counted: Vec<_> = grown
            .into_iter()
            .map(|layer| (layer, self.usage(&layer).bytes))
            .collect();
        let (mut used, mut spare) = (0, 0);
        {
            let mut layers = self.layers();
            for (layer, bytes) in counted {
                if let Some(entry) = layers.get_mut(&layer) {
                    entry.bytes = bytes;
                }
            }
            layers.retain(|_, entry| entry.bytes > 0 || entry.uncounted || !entry.may_go());
            for entry in layers.values_mut() {
                if let Some(open) = entry.open.upgrade() {
                    entry.last_use = open.last_use.load(Ordering::Relaxed);
                }
                used += entry.bytes;
                spare += if entry.may_go() { entry.bytes } else { 0 };
            }
        }
        let spare = if self.settled.load(Ordering::Relaxed) { spare } else { 0 };
        self.used.store(used, Ordering::Relaxed);
        self.spare.store(spare, Ordering::Relaxed);
        if let Some(disk) = self.disk() {
            let Bounds { quota, min_free } = self.limits.on(disk.size);
            self.quota.store(quota, Ordering::Relaxed);
            self.min_free.store(min_free, Ordering::Relaxed);
        }
        self.metrics.cache_bytes.set(signed(used));
        let quota = self.quota.load(Ordering::Relaxed);
        self.metrics
            .cache_quota_bytes
            .set(if quota == u64::MAX { 0 } else { signed(quota) });
    }

    /// Bytes were stored.
    pub(super) fn add(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What is used, may be used, and must be left.
    pub(super) fn room(&self) -> Room {
        Room {
            used: self.used.load(Ordering::Relaxed),
            spare: self.spare.load(Ordering::Relaxed),
            quota: self.quota.load(Ordering::Relaxed),
            min_free: self.min_free.load(Ordering::Relaxed),
            free: self.disk().map_or(u64::MAX, |disk| disk.free),
        }
    }

    /// Makes sure that so many bytes more fit into the quota.
    pub(super) fn admit(&self, bytes: u64, need: Need) -> io::Result<()> {
        let fits = || self.used.load(Ordering::Relaxed).saturating_add(bytes) <= self.quota.load(Ordering::Relaxed);
        if fits() {
            return Ok(());
        }
        self.make_room_in_quota(bytes, need);
        if fits() {
            return Ok(());
        }
        Err(io::Error::from_raw_os_error(libc::ENOSPC))
    }

    fn disk(&self) -> Option<Disk> {
        let stat = rustix::fs::statvfs(&self.root).ok()?;
        Some(Disk {
            size: stat.f_blocks.saturating_mul(stat.f_frsize),
            free: stat.f_bavail.saturating_mul(stat.f_frsize),
        })
    }
}

/// The filesystem under the cache, in bytes.
struct Disk {
    size: u64,
    free: u64,
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

/// How long nobody tries to make room again after there was nothing to give up.
pub(super) const FRUITLESS: Duration = Duration::from_secs(1);
