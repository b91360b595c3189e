//! The open database, and how it comes back after the disk was full.
//!
//! redb refuses everything after one failed write, until it is opened anew. A full disk must not end that way: so a database that
//! refuses is closed and opened again, which is a repair of what is on disk and takes milliseconds. And the file has blocks in reserve,
//! which nothing new may take, so that snapshots can be removed when others have filled the disk.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::{MutexGuard, PoisonError};

use redb::{Database, ReadTransaction, ReadableDatabase as _, WriteTransaction};
use rustix::fs::FallocateFlags;

use super::open::open_database;
use super::tables::failed;
use super::{Error, Store, StoreError};

/// What the file has beyond its end, at least; else as much as it is long, because redb doubles small files.
const LEAST_SPARE: u64 = 1 << 20;
/// And at most: as much as tens of thousands of snapshots take.
const MOST_SPARE: u64 = 32 << 20;
/// Unit of `st_blocks`.
const BLOCK: u64 = 512;

/// A transaction that writes, the only one; the database is not opened again as long as it lives.
pub(super) struct Writing<'a> {
    // Dropped first.
    tx: WriteTransaction,
    _alone: MutexGuard<'a, ()>,
}

impl Deref for Writing<'_> {
    type Target = WriteTransaction;

    fn deref(&self) -> &WriteTransaction {
        &self.tx
    }
}

impl Writing<'_> {
    pub(super) fn commit(self) -> Result<(), redb::CommitError> {
        self.tx.commit()
    }

    pub(super) fn abort(self) -> Result<(), redb::StorageError> {
        self.tx.abort()
    }
}

/// Whether the database has to be opened again before anything else will succeed.
fn refuses(error: &redb::Error) -> bool {
    matches!(error, redb::Error::PreviousIo | redb::Error::DatabaseClosed)
}

fn is_refused(error: &Error) -> bool {
    matches!(error, Error::Store(StoreError::Transaction(error)) if refuses(error))
}

impl Store {
    /// Runs what only reads in a transaction.
    pub(super) fn reading<T>(&self, read: impl Fn(&ReadTransaction) -> Result<T, Error>) -> Result<T, Error> {
        let result = self.begin_read().and_then(|tx| read(&tx));
        // What is in redb's memory is read all the same, so that this may come late.
        if result.as_ref().is_err_and(is_refused) {
            self.open_again()?;
            return self.begin_read().and_then(|tx| read(&tx));
        }
        result
    }

    pub(super) fn begin_read(&self) -> Result<ReadTransaction, Error> {
        let begin = || self.with(|db| db.begin_read().map_err(|error| Box::new(error.into())));
        let begun = self.or_again(begin)?;
        begun.map_err(|error| failed(*error))
    }

    /// Begins to write what is more than before. It is refused where the file has nothing in reserve, since what is there is for
    /// removals.
    pub(super) fn growing(&self) -> Result<Writing<'_>, Error> {
        match reserve(&self.path) {
            // Where a filesystem knows no reserves it must do without.
            Err(error) if error.kind() == io::ErrorKind::StorageFull => Err(failed(error)),
            _ => self.writing(),
        }
    }

    /// Begins to write.
    pub(super) fn writing(&self) -> Result<Writing<'_>, Error> {
        let begin = || self.begin_write();
        let begun = self.or_again(begin)?;
        begun.map_err(|error| failed(*error))
    }

    pub(super) fn begin_write(&self) -> Result<Writing<'_>, Box<redb::Error>> {
        let alone = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let tx = self.with(|db| db.begin_write().map_err(|error| Box::new(error.into())))?;
        Ok(Writing { tx, _alone: alone })
    }

    /// Commits what was written. That may cut the file, and what it had in reserve with it.
    pub(super) fn commit_transaction(&self, tx: Writing<'_>) -> Result<(), Error> {
        tx.commit().map_err(failed)?;
        self.keep_reserve();
        Ok(())
    }

    /// Gets back what was in reserve, if others have not taken it.
    pub(super) fn keep_reserve(&self) {
        if let Err(error) = reserve(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "the metadata has no blocks in reserve");
        }
    }

    fn with<T>(&self, work: impl Fn(&Database) -> Result<T, Box<redb::Error>>) -> Result<T, Box<redb::Error>> {
        let db = self.db.read().unwrap_or_else(PoisonError::into_inner);
        db.as_ref().map_or(Err(Box::new(redb::Error::DatabaseClosed)), work)
    }

    /// Once more on a database that was opened anew, if the first answer is that it refuses.
    fn or_again<T>(
        &self,
        begin: impl Fn() -> Result<T, Box<redb::Error>>,
    ) -> Result<Result<T, Box<redb::Error>>, Error> {
        let begun = begin();
        if begun.as_ref().is_err_and(|error| refuses(error)) {
            self.open_again()?;
            return Ok(begin());
        }
        Ok(begun)
    }

    /// Closes the database and opens it, unless somebody else just did.
    fn open_again(&self) -> Result<(), Error> {
        // A transaction under way would keep the file locked after the database is closed.
        let _alone = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let mut slot = self.db.write().unwrap_or_else(PoisonError::into_inner);
        let works = |db: &Database| db.begin_write().is_ok_and(|tx| tx.abort().is_ok());
        if slot.as_ref().is_some_and(works) {
            return Ok(());
        }
        drop(slot.take());
        tracing::warn!(path = %self.path.display(), "the metadata refuses everything after a failed write; opening it again");
        *slot = Some(open_database(&self.path)?);
        Ok(())
    }
}

/// Gives the file blocks of its own, and as many again to grow into.
fn reserve(path: &Path) -> io::Result<()> {
    let file = File::options().write(true).open(path)?;
    let metadata = file.metadata()?;
    let wanted = metadata
        .len()
        .saturating_add(metadata.len().clamp(LEAST_SPARE, MOST_SPARE));
    if metadata.blocks().saturating_mul(BLOCK) < wanted {
        rustix::fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 0, wanted)?;
    }
    Ok(())
}
