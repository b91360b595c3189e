//! Opens one layer from its directory: index, data, and which of it is resident.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use estargz::digest::Digest;
use estargz::index::LayerIndex;

use super::{CacheError, MAX_TOC_FILE_BYTES, build_index, io_error, read_origin, verify};
use crate::layer::cache::kernel::Note;
use crate::layer::cache::layer::{OpenLayer, Parts, RESIDENT};
use crate::layer::cache::residency::{Binding, Residency};
use crate::layer::cache::shelf::Shelf;
use crate::layer::cache::stale::MOUNT_POINT;
use crate::layer::cache::{files, kernel};
use crate::layer::sys::{self, Mapped};

/// Opens a layer that is there.
pub(super) fn open_layer(shelf: &Arc<Shelf>, toc_digest: &Digest) -> Result<OpenLayer, CacheError> {
    let dir = shelf.path(toc_digest);
    let (index, map, index_digest) = match map_index(&dir, toc_digest) {
        Ok(mapped) => mapped,
        Err(reason) => {
            tracing::warn!(dir = %dir.display(), reason, "building the layer's index again");
            rebuild_index(&dir, toc_digest)?;
            map_index(&dir, toc_digest).map_err(|reason| CacheError::Toc(reason.into()))?
        }
    };
    let binding = Binding {
        toc: *toc_digest,
        index: index_digest,
    };
    let path = dir.join("data");
    let kept = shelf.kept_data(toc_digest).map_err(io_error("open", &path))?;
    let kept = kept.filter(|kept| is_same(kept, &path));
    let is_kept = kept.is_some();
    let data = match kept {
        Some(kept) => kept,
        None => open_data(&path)?,
    };
    let note = kernel::noted(&data).map_err(io_error("look at", &path))?;
    let read_by_kernel = is_kept || note != Note::None;
    if matches!(note, Note::Unknown) || matches!(note, Note::Layout(noted) if noted != kernel::layout(&index)) {
        // It would fill other places than those where the kernel looks. Cleared away as a whole, as below.
        let fault = "the kernel reads it by another layout than the index has";
        return Err(io_error("use", &path)(io::Error::new(
            io::ErrorKind::InvalidData,
            fault,
        )));
    }
    let length = data.metadata().map_err(io_error("stat", &path))?.len();
    let residency = if length == index.data_size() {
        load_residency(&dir, &binding, index.chunk_count())?
    } else if read_by_kernel {
        // Cleared away as a whole; those who have it in use keep it.
        let fault = format!("has {length} bytes instead of {}", index.data_size());
        return Err(io_error("use", &path)(io::Error::new(
            io::ErrorKind::InvalidData,
            fault,
        )));
    } else {
        tracing::warn!(path = %path.display(), length, expected = index.data_size(), "data has a wrong length; starting empty");
        reset_data(&dir, &data, index.data_size())?;
        Residency::empty(index.chunk_count())
    };
    let mount_point = dir.join(MOUNT_POINT);
    match fs::create_dir(&mount_point) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(io_error("create", &mount_point)(error)),
        _ => {
            let parts = Parts {
                dir,
                binding,
                index,
                map,
                data,
                residency,
                read_by_kernel,
            };
            let layer = OpenLayer::new(shelf.clone(), parts);
            // What the kernel may read stays, known or not.
            if !read_by_kernel && let Err(error) = layer.trim() {
                tracing::warn!(dir = %layer.dir().display(), %error, "what an unclean stop left stays");
            }
            Ok(layer)
        }
    }
}

fn open_data(path: &Path) -> Result<File, CacheError> {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .map_err(io_error("open", path))
}

/// Whether the descriptor is of the file that has this name now.
fn is_same(file: &File, path: &Path) -> bool {
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(file), Ok(named)) => identity(file) == identity(named),
        (Err(_), _) | (_, Err(_)) => false,
    }
}

fn reset_data(dir: &Path, data: &File, size: u64) -> Result<(), CacheError> {
    files::remove(dir, RESIDENT).map_err(io_error("remove", &dir.join(RESIDENT)))?;
    data.set_len(0)
        .and_then(|()| data.set_len(size))
        .map_err(io_error("resize", &dir.join("data")))
}

fn rebuild_index(dir: &Path, toc_digest: &Digest) -> Result<(), CacheError> {
    let origin = read_origin(dir)?;
    let path = dir.join("toc");
    let toc = files::read_bounded(&path, MAX_TOC_FILE_BYTES)
        .and_then(|toc| toc.ok_or_else(|| io::ErrorKind::NotFound.into()))
        .map_err(io_error("read", &path))?;
    verify(toc_digest, &toc)?;
    let index = build_index(&toc, &origin, toc_digest)?;
    files::replace(dir, "index", &index).map_err(io_error("write", &dir.join("index")))
}

/// Maps and validates the index, with the digest of its bytes; the reason in words if it has to be built again.
fn map_index(dir: &Path, toc_digest: &Digest) -> Result<(LayerIndex<Mapped>, Mapped, Digest), String> {
    let file = File::open(dir.join("index")).map_err(|error| error.to_string())?;
    let map = sys::map_read_only(&file).map_err(|error| error.to_string())?;
    let digest = Digest::of(map.as_ref());
    let index = LayerIndex::open(map.clone()).map_err(|error| error.to_string())?;
    if index.toc_digest() != *toc_digest {
        return Err(format!("it is of the layer with TOC {}", index.toc_digest()));
    }
    Ok((index, map, digest))
}

/// The checkpointed bitmap; empty, with a log line, where it cannot be believed.
fn load_residency(dir: &Path, binding: &Binding, chunks: u32) -> Result<Residency, CacheError> {
    let path = dir.join(RESIDENT);
    // Anything longer than the bitmap of this layer is not one.
    let limit = u64::from(chunks) / 8 + 4096;
    match files::read_bounded(&path, limit) {
        Ok(None) => Ok(Residency::empty(chunks)),
        Ok(Some(bytes)) => Ok(Residency::decode(&bytes, binding, chunks).unwrap_or_else(|reason| {
            tracing::warn!(path = %path.display(), %reason, "the layer's content has to be fetched again");
            Residency::empty(chunks)
        })),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
            tracing::warn!(path = %path.display(), %error, "the layer's content has to be fetched again");
            Ok(Residency::empty(chunks))
        }
        Err(error) => Err(io_error("read", &path)(error)),
    }
}
