//! Tar files of OCI layouts (`oci-archive:`), read in place and written deterministically.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use hullspeed_registry::Digest;
use hullspeed_registry::limits::MAX_MANIFEST_BYTES;
use tempfile::NamedTempFile;

use super::oci_layout::{Stage, blob_path, choose, parent, readable};
use crate::cli::document::BlobRef;
use crate::cli::failure::{Code, Failure, Side};
use crate::cli::stream::Section;

/// Most files of an archive that is read.
const MAX_FILES: usize = 100_000;

/// An archive to read from.
pub(in crate::cli) struct Archive {
    path: PathBuf,
    tag: Option<String>,
    file: Arc<File>,
    /// Name to offset and size.
    files: HashMap<String, (u64, u64)>,
}

impl Archive {
    pub(super) fn open(path: &Path, tag: Option<&str>) -> Result<Self, Failure> {
        let failed = |error: &io::Error| Failure::file(Side::Source, "read", path, error);
        let file = File::open(path).map_err(|error| failed(&error))?;
        let files = list(&file, path)?;
        Ok(Self {
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
            file: Arc::new(file),
            files,
        })
    }

    pub(super) fn place(&self) -> String {
        format!("archive {}", self.path.display())
    }

    pub(super) fn root(&self) -> Result<(BlobRef, String), Failure> {
        let Some(mut section) = self.find("index.json") else {
            let hint = if self.files.contains_key("manifest.json") {
                " (is it from docker save?)"
            } else {
                ""
            };
            let line = format!(
                "{} is no archive of an OCI layout: it has no index.json{hint}",
                self.path.display()
            );
            return Err(Failure::new(Code::Source, line));
        };
        let mut json = Vec::new();
        let read = section.by_ref().take(MAX_MANIFEST_BYTES).read_to_end(&mut json);
        read.map_err(|error| Failure::file(Side::Source, "read", &self.path, &error))?;
        choose(&json, self.tag.as_deref(), &self.place())
    }

    #[expect(clippy::unnecessary_wraps, reason = "the layout's twin can fail")]
    pub(super) fn section(&self, digest: &Digest) -> Result<Option<Section>, Failure> {
        Ok(self.find(&blob_path(digest)))
    }

    fn find(&self, name: &str) -> Option<Section> {
        let (start, size) = self.files.get(name)?;
        Some(Section::new(Arc::clone(&self.file), *start, *size))
    }
}

/// Where each regular file of the archive lies.
fn list(file: &File, path: &Path) -> Result<HashMap<String, (u64, u64)>, Failure> {
    let bad = |error: &io::Error| {
        let line = format!(
            "{} is not a plain tar file: {error}; decompress it first if it is compressed",
            path.display()
        );
        Failure::new(Code::Runtime, line)
    };
    let mut files = HashMap::new();
    let mut archive = tar::Archive::new(file);
    for entry in archive.entries_with_seek().map_err(|error| bad(&error))? {
        let entry = entry.map_err(|error| bad(&error))?;
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let name = String::from_utf8_lossy(&entry.path_bytes())
            .trim_start_matches("./")
            .to_owned();
        files.insert(name, (entry.raw_file_position(), entry.size()));
        if files.len() > MAX_FILES {
            return Err(bad(&io::Error::other(format!("it has more than {MAX_FILES} files"))));
        }
    }
    Ok(files)
}

/// An archive being put together.
pub(in crate::cli) struct Output {
    path: PathBuf,
    pub(super) stage: Stage,
}

impl Output {
    pub(super) fn open(path: &Path, tag: Option<&str>) -> Result<Self, Failure> {
        let failed = |error: &io::Error| Failure::file(Side::Destination, "write to", path, error);
        if path.is_dir() {
            return Err(failed(&io::Error::other("it is a directory")));
        }
        let stage = Stage::within(parent(path), path, tag, false).map_err(|error| failed(&error))?;
        Ok(Self {
            path: path.to_owned(),
            stage,
        })
    }

    /// Packs the staged layout and puts it in its place in one step.
    pub(super) fn finish(self, bytes: &[u8], media_type: &str) -> Result<(), Failure> {
        self.stage.put_bytes(bytes)?;
        let layout = self.stage.seal(bytes, media_type)?;
        let pack = || {
            let mut file = NamedTempFile::new_in(self.stage.scratch())?;
            pack(&layout, BufWriter::new(file.as_file_mut()))?;
            file.as_file().sync_all()?;
            readable(file.path())?;
            file.persist(&self.path).map_err(|error| error.error)?;
            File::open(parent(&self.path))?.sync_all()
        };
        pack().map_err(|error| Failure::file(Side::Destination, "write to", &self.path, &error))
    }
}

/// A tar of `layout` that depends on nothing but its contents: names in order, no owners, no times.
fn pack(layout: &Path, out: impl Write) -> io::Result<()> {
    let mut names = vec!["index.json".to_owned(), "oci-layout".to_owned()];
    for algorithm in fs::read_dir(layout.join("blobs"))? {
        let algorithm = algorithm?.file_name();
        for blob in fs::read_dir(layout.join("blobs").join(&algorithm))? {
            names.push(format!("blobs/{}/{}", algorithm.display(), blob?.file_name().display()));
        }
    }
    names.sort_unstable();
    let mut tar = tar::Builder::new(out);
    for name in names {
        let file = File::open(layout.join(&name))?;
        let mut header = tar::Header::new_gnu();
        header.set_size(file.metadata()?.len());
        header.set_mode(0o644);
        header.set_mtime(0);
        tar.append_data(&mut header, &name, file)?;
    }
    tar.into_inner()?.flush()
}
