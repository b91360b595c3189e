//! Directories in OCI image layout.
//!
//! A destination is staged in a directory of its own on the same file system. A new layout becomes visible by one rename;
//! in one that exists blobs move in first and `index.json` is replaced last, other tags kept.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hullspeed_registry::Digest;
use hullspeed_registry::limits::MAX_MANIFEST_BYTES;
use tempfile::{NamedTempFile, TempDir, TempPath};

use crate::cli::document::{BlobRef, Document, OCI_INDEX, REF_NAME};
use crate::cli::failure::{Code, Failure, Side};
use crate::cli::stream::Section;

const LAYOUT_FILE: &str = "oci-layout";
const LAYOUT_VERSION: &[u8] = br#"{"imageLayoutVersion":"1.0.0"}"#;
const INDEX_FILE: &str = "index.json";
const STAGE_PREFIX: &str = ".estargz-";

/// A layout to read from.
pub(in crate::cli) struct Layout {
    dir: PathBuf,
    tag: Option<String>,
}

impl Layout {
    pub(super) fn open(dir: &Path, tag: Option<&str>) -> Result<Self, Failure> {
        let layout = Self {
            dir: dir.to_owned(),
            tag: tag.map(str::to_owned),
        };
        fs::metadata(dir).map_err(|error| Failure::file(Side::Source, "read", dir, &error))?;
        Ok(layout)
    }

    pub(super) fn place(&self) -> String {
        format!("layout {}", self.dir.display())
    }

    pub(super) fn root(&self) -> Result<(BlobRef, String), Failure> {
        let path = self.dir.join(INDEX_FILE);
        let file = File::open(&path).map_err(|error| Failure::file(Side::Source, "read", &path, &error))?;
        let mut json = Vec::new();
        let read = file.take(MAX_MANIFEST_BYTES).read_to_end(&mut json);
        read.map_err(|error| Failure::file(Side::Source, "read", &path, &error))?;
        choose(&json, self.tag.as_deref(), &self.place())
    }

    pub(super) fn section(&self, digest: &Digest) -> Result<Option<Section>, Failure> {
        let path = self.dir.join(blob_path(digest));
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Failure::file(Side::Source, "read", &path, &error)),
        };
        let size = file
            .metadata()
            .map_err(|error| Failure::file(Side::Source, "read", &path, &error))?
            .len();
        Ok(Some(Section::new(Arc::new(file), 0, size)))
    }
}

/// Path of a blob inside a layout; digests hold nothing but letters, digits and one colon.
pub(super) fn blob_path(digest: &Digest) -> String {
    format!("blobs/{}", digest.as_str().replacen(':', "/", 1))
}

/// The entry of an `index.json` that `tag` names, or the only one.
pub(super) fn choose(json: &[u8], tag: Option<&str>, place: &str) -> Result<(BlobRef, String), Failure> {
    let bad = |error: serde_json::Error| Failure::new(Code::Runtime, format!("{INDEX_FILE} of {place}: {error}"));
    let entries: Vec<Document> = Document::parse(json)
        .and_then(|index| index.need("manifests"))
        .map_err(bad)?;
    let name = |entry: &Document| entry.annotation(REF_NAME);
    let matching: Vec<_> = entries
        .iter()
        .filter(|entry| tag.is_none() || name(entry).as_deref() == tag)
        .collect();
    let entry = match (matching.as_slice(), tag) {
        ([entry], _) => entry,
        (several, tag) => {
            let names: Vec<_> = entries.iter().filter_map(name).take(20).collect();
            let problem = match (tag, several.is_empty()) {
                (Some(tag), true) => format!("{place} has no tag {tag}"),
                (Some(tag), false) => format!("{place} has tag {tag} more than once"),
                (None, true) => format!("{place} holds no image"),
                (None, false) => format!("{place} holds {} images; add :TAG", several.len()),
            };
            let there = if names.is_empty() {
                String::new()
            } else {
                format!(" (there are: {})", names.join(", "))
            };
            return Err(Failure::new(Code::Source, format!("{problem}{there}")));
        }
    };
    let media_type = entry.find("mediaType").map_err(bad)?.unwrap_or_default();
    Ok((BlobRef::from_descriptor(entry).map_err(bad)?, media_type))
}

/// A layout being put together.
pub(in crate::cli) struct Stage {
    /// The final place.
    dir: PathBuf,
    tag: Option<String>,
    stage: TempDir,
    /// The final place exists: what is staged moves into it.
    exists: bool,
}

impl Stage {
    /// Stages for the layout `dir`.
    pub(super) fn beside(dir: &Path, tag: Option<&str>) -> Result<Self, Failure> {
        let failed = |error: &io::Error| Failure::file(Side::Destination, "write to", dir, error);
        let exists = match fs::read_dir(dir) {
            Ok(mut entries) => {
                if entries.next().is_some() && !dir.join(LAYOUT_FILE).exists() {
                    let line = format!(
                        "{} is neither empty nor an OCI layout; choose another place",
                        dir.display()
                    );
                    return Err(Failure::new(Code::Destination, line));
                }
                true
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(failed(&error)),
        };
        let within = if exists { dir } else { parent(dir) };
        Self::within(within, dir, tag, exists).map_err(|error| failed(&error))
    }

    /// Stages in `within`, an existing directory on the destination's file system.
    pub(super) fn within(within: &Path, dir: &Path, tag: Option<&str>, exists: bool) -> io::Result<Self> {
        let stage = tempfile::Builder::new().prefix(STAGE_PREFIX).tempdir_in(within)?;
        fs::create_dir_all(stage.path().join("layout/blobs/sha256"))?;
        fs::create_dir(stage.path().join("scratch"))?;
        Ok(Self {
            dir: dir.to_owned(),
            tag: tag.map(str::to_owned),
            stage,
            exists,
        })
    }

    pub(super) fn scratch(&self) -> &Path {
        self.stage.path()
    }

    fn layout(&self) -> PathBuf {
        self.stage.path().join("layout")
    }

    fn failed(&self, error: &io::Error) -> Failure {
        Failure::file(Side::Destination, "write to", &self.dir, error)
    }

    /// Whether the blob is staged, or in the layout already.
    pub(super) fn has(&self, blob: &BlobRef) -> bool {
        let there =
            |root: &Path| fs::metadata(root.join(blob_path(&blob.digest))).is_ok_and(|file| file.len() == blob.size);
        there(&self.layout()) || (self.exists && there(&self.dir))
    }

    pub(super) fn put_file(&self, digest: &Digest, file: TempPath) -> Result<(), Failure> {
        let path = self.layout().join(blob_path(digest));
        let moved = fs::create_dir_all(parent(&path)).and_then(|()| file.persist(&path).map_err(|error| error.error));
        moved
            .and_then(|()| readable(&path))
            .map_err(|error| self.failed(&error))
    }

    pub(super) fn put_bytes(&self, bytes: &[u8]) -> Result<(), Failure> {
        let path = self.layout().join(blob_path(&Digest::of(bytes)));
        fs::write(path, bytes).map_err(|error| self.failed(&error))
    }

    /// Adds the top manifest, then makes the layout visible.
    pub(super) fn finish(self, bytes: &[u8], media_type: &str) -> Result<(), Failure> {
        self.put_bytes(bytes)?;
        if self.exists {
            return self.merge(bytes, media_type);
        }
        self.seal(bytes, media_type)?;
        let opened = || {
            sync_tree(&self.layout())?;
            // mkdtemp made the stage private; what is inside was made with the user's umask.
            fs::rename(self.layout(), &self.dir)?;
            File::open(parent(&self.dir))?.sync_all()
        };
        opened().map_err(|error| self.failed(&error))
    }

    /// Completes the staged layout with its two files and returns it.
    pub(super) fn seal(&self, bytes: &[u8], media_type: &str) -> Result<PathBuf, Failure> {
        let layout = self.layout();
        let index = self.index(None, bytes, media_type)?;
        let written = fs::write(layout.join(LAYOUT_FILE), LAYOUT_VERSION);
        let written = written.and_then(|()| fs::write(layout.join(INDEX_FILE), index));
        written.map_err(|error| self.failed(&error))?;
        Ok(layout)
    }

    fn merge(&self, bytes: &[u8], media_type: &str) -> Result<(), Failure> {
        let merge = || -> io::Result<Result<(), Failure>> {
            let marker = self.dir.join(LAYOUT_FILE);
            if !marker.exists() {
                fs::write(&marker, LAYOUT_VERSION)?;
            }
            // Two conversions into one layout must not lose each other's tag.
            let lock = File::open(&marker)?;
            lock.lock()?;
            let index_path = self.dir.join(INDEX_FILE);
            let old = match fs::read(&index_path) {
                Ok(json) => Some(json),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            };
            let index = match self.index(old.as_deref(), bytes, media_type) {
                Ok(index) => index,
                Err(failure) => return Ok(Err(failure)),
            };
            move_blobs(&self.layout().join("blobs"), &self.dir.join("blobs"))?;
            let mut file = NamedTempFile::new_in(self.stage.path())?;
            file.write_all(&index)?;
            file.as_file().sync_all()?;
            readable(file.path())?;
            file.persist(&index_path).map_err(|error| error.error)?;
            File::open(&self.dir)?.sync_all().map(Ok)
        };
        merge().map_err(|error| self.failed(&error))?
    }

    /// `index.json` with the new image under its tag, in place of the one that had it.
    fn index(&self, old: Option<&[u8]>, bytes: &[u8], media_type: &str) -> Result<Vec<u8>, Failure> {
        let build = || {
            let empty = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[]}}"#);
            let mut index = Document::parse(old.unwrap_or(empty.as_bytes()))?;
            let mut entries: Vec<Document> = index.find("manifests")?.unwrap_or_default();
            entries.retain(|entry| entry.annotation(REF_NAME) != self.tag);
            let mut entry = Document::default();
            BlobRef::of(bytes).point(&mut entry, media_type)?;
            if let Some(tag) = &self.tag {
                entry.annotate(&[(REF_NAME, tag)])?;
            }
            entries.push(entry);
            index.set("manifests", &entries)?;
            index.to_json()
        };
        let place = self.dir.display();
        build().map_err(|error| Failure::new(Code::Destination, format!("{INDEX_FILE} of layout {place}: {error}")))
    }
}

/// The directory that holds `path`.
pub(in crate::cli) fn parent(path: &Path) -> &Path {
    path.parent()
        .filter(|parent| !parent.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

/// Temporary files are private; what others are to read is not.
pub(in crate::cli) fn readable(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?
        } else {
            File::open(entry.path())?.sync_all()?
        }
    }
    File::open(dir)?.sync_all()
}

/// Moves `from/<algorithm>/<hex>` to `to`; a blob of the same name and size is there already.
fn move_blobs(from: &Path, to: &Path) -> io::Result<()> {
    for algorithm in fs::read_dir(from)? {
        let algorithm = algorithm?;
        let directory = to.join(algorithm.file_name());
        fs::create_dir_all(&directory)?;
        for blob in fs::read_dir(algorithm.path())? {
            let blob = blob?;
            let place = directory.join(blob.file_name());
            if fs::metadata(&place).is_ok_and(|there| Some(there.len()) == blob.metadata().ok().map(|new| new.len())) {
                continue;
            }
            File::open(blob.path())?.sync_all()?;
            fs::rename(blob.path(), place)?;
        }
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}
