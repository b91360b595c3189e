//! The journal of adoptions: written before a hull is touched, read after a crash.
//!
//! One file on a tmpfs, so nothing is synced: it has to outlive this process, and is to be gone after a reboot, as are
//! the sandboxes. Records are appended; [`codec`] says how they look. A record that was cut off, and all behind it, is
//! dropped. The file is rewritten, under another name first, when it is opened and when most of it is history.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub mod codec;

pub use codec::{AdoptRecord, Record};

/// A journal larger than this is read to here only: thousands of times what a full node needs.
const MAX_BYTES: u64 = 64 << 20;

/// History that is kept before the file is rewritten.
const SLACK_BYTES: u64 = 1 << 20;

/// Aborted adoptions that are remembered; the oldest are forgotten.
const MAX_ABORTED: usize = 4096;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file operation failed.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A record is too long.
    #[error("a record of {bytes} bytes is too long for the journal")]
    TooLong {
        /// Its length.
        bytes: usize,
    },
    /// An earlier failure could not be undone, so the file's end is in doubt.
    #[error("the journal's end is in doubt after an earlier failure")]
    Broken,
}

/// An adoption that the journal holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// What was adopted as what.
    pub adopt: AdoptRecord,
    /// Whether the hull was made the pod's completely. Before that nobody was told of it.
    pub whole: bool,
    /// Whether containerd's record says so, too.
    pub branded: bool,
}

/// What the records of a journal come to.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Contents {
    /// Adoptions that stand, by sandbox.
    pub adopted: BTreeMap<String, Entry>,
    /// Sandboxes whose adoption was given up, the oldest first: neither a hull nor a pod's.
    pub aborted: VecDeque<String>,
}

impl Contents {
    fn apply(&mut self, record: Record) {
        match record {
            Record::Adopt(adopt) => {
                let id = adopt.id.clone();
                self.aborted.retain(|aborted| *aborted != id);
                let entry = Entry {
                    adopt,
                    whole: false,
                    branded: false,
                };
                self.adopted.insert(id, entry);
            }
            Record::Aborted(id) => {
                self.adopted.remove(&id);
                if !self.aborted.contains(&id) {
                    self.aborted.push_back(id);
                }
                while self.aborted.len() > MAX_ABORTED {
                    self.aborted.pop_front();
                }
            }
            Record::Whole(id) => {
                if let Some(entry) = self.adopted.get_mut(&id) {
                    entry.whole = true;
                }
            }
            Record::Branded(id) => {
                if let Some(entry) = self.adopted.get_mut(&id) {
                    (entry.whole, entry.branded) = (true, true);
                }
            }
            Record::Forgotten(id) => {
                self.adopted.remove(&id);
                self.aborted.retain(|aborted| *aborted != id);
            }
        }
    }

    fn records(&self) -> impl Iterator<Item = Record> {
        let adopted = self.adopted.values().flat_map(|entry| {
            let id = &entry.adopt.id;
            let state = match (entry.whole, entry.branded) {
                (_, true) => Some(Record::Branded(id.clone())),
                (true, false) => Some(Record::Whole(id.clone())),
                (false, false) => None,
            };
            std::iter::once(Record::Adopt(entry.adopt.clone())).chain(state)
        });
        adopted.chain(self.aborted.iter().cloned().map(Record::Aborted))
    }
}

#[derive(Debug)]
struct Open {
    file: File,
    bytes: u64,
    /// Length after the last rewriting.
    compacted: u64,
    broken: bool,
    contents: Contents,
}

/// The journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    open: Mutex<Open>,
    /// Whether adoptions may be missing in it.
    lost: AtomicBool,
}

impl Journal {
    /// Opens the journal at `path`, or begins it; damage at its end is dropped with a warning.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let (contents, is_whole) = read(path)?;
        let (file, bytes) = rewrite(path, &contents)?;
        let open = Open {
            file,
            bytes,
            compacted: bytes,
            broken: false,
            contents,
        };
        Ok(Self {
            path: path.to_owned(),
            open: Mutex::new(open),
            lost: AtomicBool::new(!is_whole),
        })
    }

    /// Whether there was no journal, or a damaged one: what it does not call a pod's may have been one's.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// What might have been missing in it is in it now.
    pub fn completed(&self) {
        self.lost.store(false, Ordering::Relaxed);
    }

    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it holds.
    #[must_use]
    pub fn contents(&self) -> Contents {
        self.lock().contents.clone()
    }

    /// Whether it knows that containerd's record of this adopted sandbox is the pod's.
    #[must_use]
    pub fn is_branded(&self, id: &str) -> bool {
        self.lock().contents.adopted.get(id).is_some_and(|entry| entry.branded)
    }

    /// Whether it knows that this adopted sandbox is its pod's completely.
    #[must_use]
    pub fn is_whole(&self, id: &str) -> bool {
        self.lock().contents.adopted.get(id).is_some_and(|entry| entry.whole)
    }

    /// Writes a record. When this returns, it outlives this process.
    pub fn append(&self, record: Record) -> Result<(), JournalError> {
        let mut encoded = Vec::new();
        codec::encode(&record, &mut encoded).map_err(|bytes| JournalError::TooLong { bytes })?;
        let mut open = self.lock();
        if open.broken {
            return Err(JournalError::Broken);
        }
        if let Err(source) = open.file.write_all(&encoded) {
            // What is cut off here would hide all that is appended behind it.
            let before = open.bytes;
            open.broken = open.file.set_len(before).is_err();
            return Err(self.failed("append to")(source));
        }
        open.bytes += encoded.len() as u64;
        open.contents.apply(record);
        Ok(())
    }

    /// Rewrites the file if most of it is history. For the background: it takes as long as writing what stands.
    pub fn compact(&self) -> Result<(), JournalError> {
        let mut open = self.lock();
        if !open.broken && open.bytes < open.compacted * 2 + SLACK_BYTES {
            return Ok(());
        }
        let (file, bytes) = rewrite(&self.path, &open.contents)?;
        open.file = file;
        open.bytes = bytes;
        open.compacted = bytes;
        open.broken = false;
        Ok(())
    }

    fn failed(&self, what: &'static str) -> impl Fn(std::io::Error) -> JournalError {
        failed(&self.path, what)
    }
}

fn failed(path: &Path, what: &'static str) -> impl Fn(std::io::Error) -> JournalError {
    let path = path.to_owned();
    move |source| JournalError::Io {
        what,
        path: path.clone(),
        source,
    }
}

/// What the file says, and whether that is all that was written.
fn read(path: &Path) -> Result<(Contents, bool), JournalError> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file
            .take(MAX_BYTES)
            .read_to_end(&mut bytes)
            .map_err(failed(path, "read"))?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok((Contents::default(), false)),
        Err(error) => return Err(failed(path, "open")(error)),
    };
    let (records, damage) = codec::decode(&bytes);
    if let Some(damage) = damage {
        let (path, lost) = (path.display(), bytes.len() - damage.at);
        tracing::warn!(%path, at = damage.at, lost, reason = damage.reason, "the journal's end is dropped");
    }
    let mut contents = Contents::default();
    records.into_iter().for_each(|record| contents.apply(record));
    Ok((contents, damage.is_none() && !bytes.is_empty()))
}

/// Replaces the file by one with nothing but `contents`.
fn rewrite(path: &Path, contents: &Contents) -> Result<(File, u64), JournalError> {
    let mut bytes = codec::MAGIC.to_vec();
    for record in contents.records() {
        codec::encode(&record, &mut bytes).map_err(|bytes| JournalError::TooLong { bytes })?;
    }
    let next = path.with_extension("next");
    match std::fs::remove_file(&next) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(&next, "remove")(error)),
        _ => {}
    }
    // Configurations may hold what only the kubelet is to know.
    let mut options = OpenOptions::new();
    options.append(true).create_new(true).mode(0o600);
    let mut file = options.open(&next).map_err(failed(&next, "create"))?;
    file.write_all(&bytes).map_err(failed(&next, "write"))?;
    std::fs::rename(&next, path).map_err(failed(path, "replace"))?;
    Ok((file, bytes.len() as u64))
}

#[cfg(test)]
mod tests;
