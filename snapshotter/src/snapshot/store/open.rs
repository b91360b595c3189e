//! Opening the file, and what can be wrong with it.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use redb::Database;

use super::SCHEMA;

/// Why the metadata cannot be used. None of these is the fault of a request.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: redb::Error,
    },
    /// The file is not a metadata file, or is damaged.
    #[error(
        "{} is damaged or not a metadata file; restore it, or move it away together with the directory snapshots and \
         remove all snapshots of this snapshotter from containerd",
        path.display()
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        detail: String,
    },
    /// The file was written by another version.
    #[error("{} has schema {found}, this program reads schema {SCHEMA}", path.display())]
    Schema {
        /// The file.
        path: PathBuf,
        /// Version found.
        found: u64,
    },
    /// A transaction failed.
    #[error("a transaction failed")]
    Transaction(#[source] Box<redb::Error>),
    /// A record cannot be decoded.
    #[error("the record of snapshot {name:?} cannot be decoded")]
    Record {
        /// Name of the snapshot.
        name: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// Records contradict each other.
    #[error("the records contradict each other at snapshot {name:?}")]
    Inconsistent {
        /// Name of the snapshot.
        name: String,
    },
}

impl StoreError {
    /// Whether the disk is full.
    pub fn is_storage_full(&self) -> bool {
        let error = match self {
            Self::Transaction(error) => error.as_ref(),
            Self::Open { source, .. } => source,
            _ => return false,
        };
        matches!(error, redb::Error::Io(error) if error.kind() == io::ErrorKind::StorageFull)
    }

    /// Whether what is stored cannot be right.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. } | Self::Schema { .. } | Self::Record { .. } | Self::Inconsistent { .. } => true,
            Self::Transaction(error) => matches!(error.as_ref(), redb::Error::Corrupted(_)),
            Self::Open { .. } => false,
        }
    }
}

/// Makes an empty file under another name first: a process killed while redb writes its first pages would leave a file
/// that the next start has to take for a damaged one.
fn create_whole(path: &Path) -> Result<(), redb::Error> {
    let unfinished = path.with_extension("redb.new");
    match fs::remove_file(&unfinished) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    drop(Database::create(&unfinished)?);
    File::open(&unfinished)?.sync_all()?;
    fs::rename(&unfinished, path)?;
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    Ok(())
}

/// Opens and checks the whole file, which is as small as there are few snapshots: redb trusts its pages later on.
pub(super) fn open_database(path: &Path) -> Result<Database, StoreError> {
    let damaged = |detail: String| StoreError::Damaged {
        path: path.to_owned(),
        detail,
    };
    // On some damage redb fails an assertion, which must not be how the daemon ends.
    let opened = std::panic::catch_unwind(|| {
        if !path.try_exists()? {
            create_whole(path)?;
        }
        let mut db = Database::create(path)?;
        let sound = db.check_integrity()?;
        Ok::<_, redb::Error>((db, sound))
    });
    match opened {
        Ok(Ok((db, sound))) => {
            if !sound {
                tracing::warn!(path = %path.display(), "the metadata was damaged and is repaired");
            }
            Ok(db)
        }
        Ok(Err(redb::Error::Corrupted(detail))) => Err(damaged(detail)),
        Ok(Err(redb::Error::Io(error))) if error.kind() == io::ErrorKind::InvalidData => {
            Err(damaged(error.to_string()))
        }
        Ok(Err(source)) => Err(StoreError::Open {
            path: path.to_owned(),
            source,
        }),
        Err(_) => Err(damaged("its pages contradict each other".to_owned())),
    }
}
