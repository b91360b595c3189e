//! The layer's EROFS image: made from its index when it is first mounted natively, and kept beside it.
//!
//! It is not synced, since it lies on the way to a container's start: behind the image stands a digest of it with its form and its
//! layer, so what a power failure left of it is recognised and made again.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use estargz::digest::Digest;

use super::OpenLayer;

/// Name of the file.
pub(super) const EROFS: &str = "erofs";
/// What stands behind the image: this, its form, and the digest. It fills a block, so that the file is one of whole blocks.
const MAGIC: &[u8; 8] = b"HULLEROF";
const TRAILER: usize = 4096;

/// Why a layer has no EROFS image.
#[derive(Debug, thiserror::Error)]
pub enum LayerImageError {
    /// What the layer holds cannot be expressed.
    #[error("the layer cannot be an EROFS image")]
    Image(#[from] hullspeed_erofs::ImageError),
    /// The file cannot be written.
    #[error("cannot write {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl OpenLayer {
    /// The file with the layer's EROFS image, made if it is not there or is not whole. Blocks.
    pub fn erofs_image(&self) -> Result<PathBuf, LayerImageError> {
        let path = self.dir().join(EROFS);
        let toc = self.toc_digest();
        match is_whole(&path, &toc) {
            Ok(true) => return Ok(path),
            Ok(false) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => tracing::warn!(path = %path.display(), %error, "the EROFS image is made again"),
        }
        let image = hullspeed_erofs::image(self.index())?;
        write(self.dir(), &path, &image, &toc).map_err(|source| LayerImageError::Io {
            path: path.clone(),
            source,
        })?;
        self.note_growth();
        Ok(path)
    }
}

fn trailer(image: &[u8], toc: &Digest) -> Vec<u8> {
    let mut named = Vec::with_capacity(TRAILER);
    named.extend_from_slice(Digest::of(image).as_bytes());
    named.extend_from_slice(toc.as_bytes());
    named.extend_from_slice(&hullspeed_erofs::FORMAT.to_le_bytes());
    let digest = Digest::of(&named);
    let mut trailer = MAGIC.to_vec();
    trailer.extend_from_slice(digest.as_bytes());
    trailer.resize(TRAILER, 0);
    trailer
}

fn write(dir: &Path, path: &Path, image: &[u8], toc: &Digest) -> io::Result<()> {
    // Renamed, so that a mount of the old one keeps its file.
    let temporary = dir.join(format!(".{EROFS}.tmp"));
    let written = File::create(&temporary).and_then(|mut file| {
        file.write_all(image)?;
        file.write_all(&trailer(image, toc))
    });
    let renamed = written.and_then(|()| fs::rename(&temporary, path));
    if renamed.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&temporary);
    }
    renamed
}

fn is_whole(path: &Path, toc: &Digest) -> io::Result<bool> {
    let mut bytes = Vec::new();
    let limit = hullspeed_erofs::MAX_IMAGE_BYTES + TRAILER;
    File::open(path)?.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    let Some(split) = bytes.len().checked_sub(TRAILER) else {
        return Ok(false);
    };
    let (image, found) = bytes.split_at(split);
    Ok(found == trailer(image, toc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_whole_or_made_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(EROFS);
        let (toc, other) = (Digest::of(b"toc"), Digest::of(b"other"));
        let image = vec![7; 8192];
        assert!(is_whole(&path, &toc).is_err());
        write(dir.path(), &path, &image, &toc).unwrap();
        assert!(is_whole(&path, &toc).unwrap());
        assert!(!is_whole(&path, &other).unwrap());
        let whole = fs::read(&path).unwrap();
        assert_eq!((whole.len() % 4096, fs::read_dir(dir.path()).unwrap().count()), (0, 1));
        for cut in [0, 1, 4096, whole.len() - 1] {
            fs::write(&path, &whole[..cut]).unwrap();
            assert!(!is_whole(&path, &toc).unwrap(), "{cut} bytes");
        }
        for at in [0, 5000, 8192, 8192 + 20] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, &damaged).unwrap();
            assert!(!is_whole(&path, &toc).unwrap(), "byte {at}");
        }
    }
}
