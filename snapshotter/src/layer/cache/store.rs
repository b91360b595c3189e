//! The directory of all cached layers: creating a layer whole, and opening what is there.

mod opening;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use estargz::digest::Digest;
use estargz::index::{self, BlobLayout, LayerIndex};
use estargz::member::Compression;
use estargz::toc::Toc;
use serde::{Deserialize, Serialize};

use super::evict::Need;
use super::files;
use super::layer::{CachedLayer, OpenLayer, is_full};
use super::limits::Limits;
use super::reuse::{Found, Search};
use super::shelf::{Pin, Shelf, UNFINISHED};
use super::stale::{MOUNT_POINT, detach_stale, kind_at, remove_layer};
use crate::heap;
use crate::layer::Usage;
use crate::layer::fault;
use crate::metrics::Metrics;

/// Mode of the directory of all layers. A layer holds setuid programs and private files of any image, and its mount
/// honours them; containers come in through overlayfs, which looked the way up as root.
const LAYERS_MODE: u32 = 0o700;
/// Largest `origin` file read.
const MAX_ORIGIN_BYTES: u64 = 64 << 10;
/// Largest `toc` file read: the largest TOC that the library accepts, which checks it again.
const MAX_TOC_FILE_BYTES: u64 = estargz::toc::MAX_TOC_BYTES as u64;

/// Why a layer of the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file or directory cannot be read or written.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The failure.
        #[source]
        source: io::Error,
    },
    /// The TOC cannot be used; it was verified, so it is the image that is at fault.
    #[error("the TOC cannot be used")]
    Toc(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The TOC does not have the digest that names it.
    #[error("the TOC has digest {found} instead of {expected}")]
    TocDigest {
        /// Digest that names the layer.
        expected: Digest,
        /// Digest of the bytes.
        found: Digest,
    },
}

impl CacheError {
    /// Whether the disk, or the share of it that may be used, is full.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if is_full(source))
    }

    /// Whether what is on disk is at fault, so that only fetching it again helps; not a full disk, a lack of
    /// descriptors or a failing device, which may pass and must not cost what is there.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Toc(_) | Self::TocDigest { .. } => true,
            Self::Io { source, .. } => matches!(
                source.kind(),
                io::ErrorKind::NotFound
                    | io::ErrorKind::InvalidData
                    | io::ErrorKind::UnexpectedEof
                    | io::ErrorKind::FileTooLarge
                    | io::ErrorKind::IsADirectory
                    | io::ErrorKind::NotADirectory
            ),
        }
    }
}

/// Where a layer came from: enough to fetch the rest of it, and to build its index again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Reference of the image it was first mounted for.
    pub image: String,
    /// Digest of the layer's compressed blob.
    pub layer_digest: Digest,
    /// Size of the compressed blob.
    pub blob_size: u64,
    /// Where the part of the blob that holds files ends.
    pub toc_offset: u64,
    /// How the blob's members are compressed.
    #[serde(default)]
    pub compression: Compression,
}

impl Origin {
    fn layout(&self) -> BlobLayout {
        BlobLayout {
            blob_size: self.blob_size,
            toc_offset: self.toc_offset,
            compression: self.compression,
        }
    }
}

/// What an earlier process left of a layer.
#[derive(Debug)]
pub enum Inherited {
    /// Nothing that is served: what is mounted is dead.
    Nothing,
    /// Its mount, and a mark on `data` that nobody could answer for who opened it.
    Unusable,
    /// Its mount, which is to stay.
    Mount,
    /// Its mount, and `data` as it was opened before the kernel asked for it.
    ReadByKernel(File),
}

/// All layers of one cache root; clones are the same.
#[derive(Debug, Clone)]
pub struct LayerStore {
    pub(super) shelf: Arc<Shelf>,
}

impl LayerStore {
    /// Opens `<root>/layers` without limits and without anybody reading its metrics.
    pub fn open(root: &Path) -> Result<Self, CacheError> {
        Self::within(root, Limits::NONE, Metrics::unregistered())
    }

    /// Opens `<root>/layers`, making it if it is not there, removes what an interrupted creation or removal left, and detaches what a
    /// process that was killed left mounted.
    pub fn within(root: &Path, limits: Limits, metrics: Metrics) -> Result<Self, CacheError> {
        Self::inheriting(root, limits, metrics, |_| Inherited::Nothing)
    }

    /// Like [`Self::within`], where an earlier process has left layers mounted that are served still.
    pub fn inheriting(
        root: &Path,
        limits: Limits,
        metrics: Metrics,
        mut inherited: impl FnMut(&Digest) -> Inherited,
    ) -> Result<Self, CacheError> {
        let root = root.join("layers");
        let (mut kept, mut unusable) = (Vec::new(), Vec::new());
        fs::create_dir_all(&root).map_err(io_error("create", &root))?;
        // Also of one that is there already: it may have been made by hand, or with another umask.
        fs::set_permissions(&root, fs::Permissions::from_mode(LAYERS_MODE))
            .map_err(io_error("set the mode of", &root))?;
        let mut found = Vec::new();
        for entry in fs::read_dir(&root).map_err(io_error("list", &root))? {
            let entry = entry.map_err(io_error("list", &root))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(UNFINISHED) {
                let path = entry.path();
                // In nobody's way but the disk's: names of new ones differ.
                if let Err(error) = remove_layer(&path) {
                    tracing::warn!(path = %path.display(), %error, "an unfinished layer stays until the next start");
                }
            } else if let Ok(layer) = Digest::from_str(&format!("sha256:{name}")) {
                match inherited(&layer) {
                    // It needs nobody, or it is taken over when the layer is mounted: at no moment is there nothing.
                    Inherited::Nothing
                        if kind_at(&entry.path().join(MOUNT_POINT))
                            .is_ok_and(|kind| kind.as_deref() == Some("erofs")) => {}
                    Inherited::Unusable => unusable.push(layer),
                    Inherited::Nothing => {
                        // Of one that no snapshot refers to nobody would.
                        if let Err(error) = detach_stale(&entry.path().join(MOUNT_POINT)) {
                            tracing::warn!(path = %entry.path().display(), %error, "what an earlier process mounted here stays");
                        }
                    }
                    Inherited::Mount => {}
                    Inherited::ReadByKernel(data) => kept.push((layer, data)),
                }
                found.push(layer);
            } else {
                tracing::warn!(path = %entry.path().display(), "this is no layer and is left alone");
            }
        }
        let shelf = Shelf::new(root, limits, metrics, &found);
        for (layer, data) in kept {
            shelf.keep_data(&layer, data);
        }
        unusable.iter().for_each(|layer| shelf.set_unusable(layer));
        Ok(Self { shelf })
    }

    /// Whether all of a layer can be here, without giving any of it up: that is asked of one that the kernel reads by itself.
    pub fn fits(&self, layer: &OpenLayer) -> bool {
        self.shelf.fits(&layer.toc_digest(), layer.whole_bytes())
    }

    /// Leaves a layer to the kernel until the next boot, if all of it can be here with all others that cannot go: those that were promised at the
    /// same time too.
    pub fn leave_for_good(&self, layer: &OpenLayer) -> io::Result<bool> {
        let _one = self.shelf.promising();
        let fits = self.fits(layer);
        if fits {
            layer.leave_for_good()?;
        }
        Ok(fits)
    }

    /// Directory of a layer, there or not.
    pub fn path(&self, toc_digest: &Digest) -> PathBuf {
        self.shelf.path(toc_digest)
    }

    /// Where a layer is to be mounted, there or not.
    pub fn mount_point(&self, toc_digest: &Digest) -> PathBuf {
        self.path(toc_digest).join(MOUNT_POINT)
    }

    /// Whether the layer's TOC is here, so that mounting it needs no request.
    pub fn contains(&self, toc_digest: &Digest) -> bool {
        self.path(toc_digest).is_dir()
    }

    /// Keeps a layer from being given up as long as the pin lives, whether it is there yet or not.
    pub fn pin(&self, toc_digest: &Digest) -> Pin {
        self.shelf.pin(toc_digest)
    }

    /// A snapshot refers to the layer from now on.
    pub fn keep(&self, toc_digest: &Digest) {
        self.shelf.keep(toc_digest, true);
    }

    /// No snapshot refers to the layer any more: it may be given up when room is needed.
    pub fn let_go(&self, toc_digest: &Digest) {
        self.shelf.keep(toc_digest, false);
        self.shelf.note_used(toc_digest);
    }

    /// The layer was used until now.
    pub fn note_used(&self, toc_digest: &Digest) {
        self.shelf.note_used(toc_digest);
    }

    /// All layers that snapshots refer to are kept: from now on others may be given up.
    pub fn settle(&self) {
        self.shelf.settle();
    }

    /// Keeps the cache within its limits, and gives memory back that is not needed now. Called every now and then; blocks.
    pub fn tidy(&self) {
        self.shelf.tidy();
        let rested = self.shelf.all_open().iter().filter(|layer| layer.rest()).count();
        if rested > 0 {
            heap::give_back();
        }
    }

    #[cfg(test)]
    pub(super) fn shelf_for_test(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// Where on the node a chunk with this digest is.
    pub fn find_elsewhere(&self, digest: &Digest, size: u32) -> Option<Found> {
        Search::new(&self.shelf).find(digest, size)
    }

    /// Creates a layer from its TOC, all of it or nothing. On a full disk room is made once: a layer that cannot be here is unpacked
    /// whole on the same disk.
    pub fn create(&self, toc_digest: &Digest, toc_json: &[u8], origin: &Origin) -> Result<CachedLayer, CacheError> {
        verify(toc_digest, toc_json)?;
        let _pin = self.pin(toc_digest);
        let index = build_index(toc_json, origin, toc_digest)?;
        let write = || {
            let temporary = self.shelf.unfinished(toc_digest);
            let written =
                write_layer(&temporary, toc_json, &index, origin).and_then(|()| self.publish(&temporary, toc_digest));
            if written.is_err() {
                // What failed is what is reported; the next start removes the rest.
                let _ = fs::remove_dir_all(&temporary);
            }
            written
        };
        let bytes = (toc_json.len() as u64).saturating_add(index.len() as u64);
        match write() {
            Err(error) if error.is_full() && self.shelf.make_room_on_disk(bytes, Need::Reader) => write()?,
            written => written?,
        }
        let path = self.path(toc_digest);
        load(&self.shelf, toc_digest)?.ok_or_else(|| io_error("open", &path)(io::ErrorKind::NotFound.into()))
    }

    fn publish(&self, temporary: &Path, toc_digest: &Digest) -> Result<(), CacheError> {
        let path = self.path(toc_digest);
        fault::point("layer-written");
        match fs::rename(temporary, &path) {
            Ok(()) => files::sync_dir(&self.shelf.root).map_err(io_error("sync", &self.shelf.root)),
            // Somebody else finished the same layer; what a TOC digest names is always the same.
            // XFS says so with another error than the rest.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) && path.is_dir() =>
            {
                fs::remove_dir_all(temporary).map_err(io_error("remove", temporary))
            }
            Err(error) => Err(io_error("rename", temporary)(error)),
        }
    }

    /// Opens a layer that is on disk, or joins those who have it open; `None` if it is not there.
    ///
    /// An index that is damaged or of another version is built again from the TOC, whose digest is compared first.
    pub fn load(&self, toc_digest: &Digest) -> Result<Option<CachedLayer>, CacheError> {
        load(&self.shelf, toc_digest)
    }

    /// Bytes allocated for a layer's files and their number; zero for a layer that is not here.
    pub fn usage(&self, toc_digest: &Digest) -> Usage {
        self.shelf.usage(toc_digest)
    }

    /// Removes a layer that cannot be used; it must not be mounted.
    pub fn discard(&self, toc_digest: &Digest) -> Result<(), CacheError> {
        let path = self.path(toc_digest);
        let temporary = self.shelf.unfinished(toc_digest);
        // Renamed first: half a layer must never be found under the layer's name.
        fs::rename(&path, &temporary).map_err(io_error("rename", &path))?;
        self.shelf.forget(toc_digest);
        remove_layer(&temporary).map_err(io_error("remove", &temporary))
    }

    /// Where a cached layer came from.
    pub fn origin(&self, toc_digest: &Digest) -> Result<Origin, CacheError> {
        read_origin(&self.path(toc_digest))
    }
}

/// Opens a layer that is on disk, unless it is open; `None` if it is not there.
pub(super) fn load(shelf: &Arc<Shelf>, toc_digest: &Digest) -> Result<Option<CachedLayer>, CacheError> {
    shelf.open(toc_digest, || {
        if !shelf.path(toc_digest).is_dir() {
            return Ok(None);
        }
        if shelf.is_unusable(toc_digest) {
            let fault = io::Error::other("its descriptor was not kept, and the kernel asks for it until the next boot");
            return Err(io_error("open", &shelf.path(toc_digest).join("data"))(fault));
        }
        let opened = opening::open_layer(shelf, toc_digest)?;
        shelf.forget_data(toc_digest);
        Ok(Some(opened))
    })
}

fn write_layer(dir: &Path, toc: &[u8], index: &[u8], origin: &Origin) -> Result<(), CacheError> {
    fs::create_dir(dir).map_err(io_error("create", dir))?;
    let data_size = open_index_bytes(index)?.data_size();
    let data = dir.join("data");
    File::create(&data)
        .and_then(|file| file.set_len(data_size))
        .map_err(io_error("create", &data))?;
    for (name, bytes) in [("toc", toc), ("index", index), ("origin", &encode_origin(origin))] {
        fs::write(dir.join(name), bytes).map_err(io_error("write", &dir.join(name)))?;
    }
    let mount_point = dir.join(MOUNT_POINT);
    fs::create_dir(&mount_point).map_err(io_error("create", &mount_point))?;
    // All files first, so that the first sync takes most of the others along.
    for name in ["toc", "index", "origin", "data"] {
        let path = dir.join(name);
        File::open(&path)
            .and_then(|file| file.sync_all())
            .map_err(io_error("sync", &path))?;
    }
    files::sync_dir(dir).map_err(io_error("sync", dir))
}

fn read_origin(dir: &Path) -> Result<Origin, CacheError> {
    let path = dir.join("origin");
    let bytes = files::read_bounded(&path, MAX_ORIGIN_BYTES)
        .and_then(|bytes| bytes.ok_or_else(|| io::ErrorKind::NotFound.into()));
    bytes
        .and_then(|bytes| serde_json::from_slice(&bytes).map_err(io::Error::from))
        .map_err(io_error("read", &path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CacheError {
    let path = path.to_owned();
    move |source| CacheError::Io { action, path, source }
}

fn encode_origin(origin: &Origin) -> Vec<u8> {
    serde_json::to_vec(origin).expect("texts and numbers always have a JSON form")
}

fn verify(toc_digest: &Digest, toc_json: &[u8]) -> Result<(), CacheError> {
    let found = Digest::of(toc_json);
    if found == *toc_digest {
        Ok(())
    } else {
        Err(CacheError::TocDigest {
            expected: *toc_digest,
            found,
        })
    }
}

fn build_index(toc_json: &[u8], origin: &Origin, toc_digest: &Digest) -> Result<Vec<u8>, CacheError> {
    let toc = Toc::parse_verified(toc_json).map_err(|error| CacheError::Toc(Box::new(error)))?;
    index::build(&toc, origin.layout(), *toc_digest).map_err(|error| CacheError::Toc(Box::new(error)))
}

fn open_index_bytes(bytes: &[u8]) -> Result<LayerIndex<&[u8]>, CacheError> {
    LayerIndex::open(bytes).map_err(|error| CacheError::Toc(Box::new(error)))
}
