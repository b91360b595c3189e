//! Snapshot metadata in `<root>/meta.redb`.
//!
//! Every method is one transaction, and blocks: callers are on the blocking pool. The rules of containerd's metadata
//! storage are kept here (which state allows what, which error comes first), so that a model can be compared with it.
//!
//! # Layout (schema 1)
//! - `meta`: `schema`, `next_id`;
//! - `snapshots`: name → [`record::Record`] as JSON;
//! - `children`: (id of parent, id of child) → nothing;
//! - `layers`: (TOC digest, id of snapshot) → nothing, the uses of each lazy layer.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, RwLock};
use std::time::SystemTime;

use estargz::digest::Digest;
use redb::{Database, ReadTransaction, ReadableTable, TableDefinition, WriteTransaction};

use super::decisions::Fallback;
use super::{Error, Info, Kind, Labels};
use crate::layer::{LayerOrigin, Usage};
use open::open_database;
use record::{Record, StoredFallback};
use tables::{
    add_child, ancestors, committed_parent, decode, failed, find_target, new_parent, read, rebased_parent, write,
};

mod handle;
mod open;
mod record;
mod tables;
#[cfg(test)]
mod tests;

pub use open::StoreError;

/// Longest key, name or parent accepted.
pub const MAX_NAME_BYTES: usize = 4096;

/// Version of the layout that this program reads and writes.
const SCHEMA: u64 = 1;

type Names = TableDefinition<'static, &'static str, &'static [u8]>;
type LayerUses = TableDefinition<'static, (&'static [u8; 32], u64), ()>;

const META: TableDefinition<'static, &'static str, u64> = TableDefinition::new("meta");
const SNAPSHOTS: Names = TableDefinition::new("snapshots");
const CHILDREN: TableDefinition<'static, (u64, u64), ()> = TableDefinition::new("children");
const LAYERS: LayerUses = TableDefinition::new("layers");

/// A snapshot with what is above and below it, enough to make its mounts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chain {
    /// The snapshot's directory number.
    pub id: u64,
    /// State.
    pub kind: Kind,
    /// Ancestors' directory numbers, nearest first.
    pub parents: Vec<u64>,
    /// Lazy layers among the ancestors, each once.
    pub layers: Vec<LayerOrigin>,
}

/// A snapshot as found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// The snapshot's directory number.
    pub id: u64,
    /// What clients see.
    pub info: Info,
    /// Usage noted at commit.
    pub usage: Usage,
    /// The lazy layer that the snapshot is.
    pub layer: Option<LayerOrigin>,
    /// Why it is none, where the layer was offered for lazy use.
    pub fallback: Option<Fallback>,
}

/// What a removal leaves to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removed {
    /// The snapshot's directory number.
    pub id: u64,
    /// The layer that no snapshot refers to any more.
    pub unused_layer: Option<Digest>,
}

/// What to change in an update.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LabelChange {
    /// All labels are replaced.
    All,
    /// One label is set, or removed where the new labels lack it.
    One(String),
}

/// The metadata database.
#[derive(Debug)]
pub struct Store {
    /// None after it was closed and could not be opened again.
    db: RwLock<Option<Database>>,
    /// Held while a transaction writes, and while the database is opened again; locked before `db`.
    writer: Mutex<()>,
    path: PathBuf,
    /// Least directory number to give next. Numbers are not reused within a run even if a transaction fails, because
    /// the directory of the failed one may be under removal.
    floor: AtomicU64,
}

impl Store {
    /// Opens or makes the metadata at `path`. `floor` is a directory number above all that exist on disk.
    pub fn open(path: &Path, floor: u64) -> Result<Self, StoreError> {
        let store = Self {
            db: RwLock::new(Some(open_database(path)?)),
            writer: Mutex::default(),
            path: path.to_owned(),
            floor: AtomicU64::new(floor),
        };
        store.check_schema(path)?;
        store.keep_reserve();
        Ok(store)
    }

    fn check_schema(&self, path: &Path) -> Result<(), StoreError> {
        let open = |source: redb::Error| StoreError::Open {
            path: path.to_owned(),
            source,
        };
        let tx = self.begin_write().map_err(|e| open(*e))?;
        let found = {
            let mut meta = tx.open_table(META).map_err(|e| open(e.into()))?;
            let found = meta.get("schema").map_err(|e| open(e.into()))?.map(|v| v.value());
            if found.is_none() {
                meta.insert("schema", SCHEMA).map_err(|e| open(e.into()))?;
            }
            found
        };
        match found {
            Some(SCHEMA) => tx.abort().map_err(|e| open(e.into())),
            Some(found) => Err(StoreError::Schema {
                path: path.to_owned(),
                found,
            }),
            None => {
                // Tables exist from the start, so that readers need not handle their absence.
                tx.open_table(SNAPSHOTS).map_err(|e| open(e.into()))?;
                tx.open_table(CHILDREN).map_err(|e| open(e.into()))?;
                tx.open_table(LAYERS).map_err(|e| open(e.into()))?;
                tx.commit().map_err(|e| open(e.into()))
            }
        }
    }

    /// The snapshot called `key`.
    pub fn find(&self, key: &str) -> Result<Found, Error> {
        self.reading(|tx| {
            let table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            let record = read(&table, key)?.ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
            Ok(record.into_found(key))
        })
    }

    /// The snapshot that makes a remote `target` on top of `parent` unnecessary: the one of that name, or a lazy one
    /// that was given another name because two chains with the same name have different parents.
    pub fn find_target(&self, target: &str, parent: Option<&str>) -> Result<Option<String>, Error> {
        self.reading(|tx| find_target(&tx.open_table(SNAPSHOTS).map_err(failed)?, target, parent))
    }

    /// The active or view snapshot `key` with its ancestors.
    pub fn chain(&self, key: &str) -> Result<Chain, Error> {
        self.reading(|tx| {
            let table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            let record = read(&table, key)?.ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
            if record.kind == Kind::Committed {
                return Err(Error::NoMounts { key: key.to_owned() });
            }
            let (parents, layers) = ancestors(&table, record.parent.as_deref())?;
            Ok(Chain {
                id: record.id,
                kind: record.kind,
                parents,
                layers,
            })
        })
    }

    /// What a new snapshot on `parent` would stand on; its own number is not known yet.
    pub fn ground(&self, parent: Option<&str>) -> Result<(Vec<u64>, Vec<LayerOrigin>), Error> {
        self.reading(|tx| {
            let table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            committed_parent(&table, parent)?;
            ancestors(&table, parent)
        })
    }

    /// Makes an active or view snapshot; `fallback` is kept with it and with what it is committed as. `make` makes its directory and is called before the transaction commits.
    pub fn create(
        &self,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
        fallback: Option<Fallback>,
        make: impl FnOnce(u64) -> Result<(), Error>,
    ) -> Result<Chain, Error> {
        let tx = self.growing()?;
        let id = self.next_id(&tx)?;
        let chain = {
            let mut table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            let above = committed_parent(&table, parent)?;
            if table.get(key).map_err(failed)?.is_some() {
                return Err(Error::AlreadyExists { key: key.to_owned() });
            }
            let mut record = Record::new(id, kind, parent, labels, None, SystemTime::now());
            record.fallback = fallback.map(StoredFallback::from);
            write(&mut table, key, &record)?;
            add_child(&tx, above.as_ref(), id)?;
            let (parents, layers) = ancestors(&table, parent)?;
            Chain {
                id,
                kind,
                parents,
                layers,
            }
        };
        make(id)?;
        self.commit_transaction(tx)?;
        Ok(chain)
    }

    /// Makes the committed snapshot of a mounted lazy layer and gives the name it got: `target`, or a longer one if
    /// that belongs to a chain with another parent. Fails with [`Error::TargetExists`] if it is there already.
    pub fn create_remote(
        &self,
        target: &str,
        parent: Option<&str>,
        labels: &Labels,
        origin: &LayerOrigin,
        make: impl FnOnce(u64) -> Result<(), Error>,
    ) -> Result<String, Error> {
        let tx = self.growing()?;
        let id = self.next_id(&tx)?;
        let name = {
            let mut table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            if find_target(&table, target, parent)?.is_some() {
                return Err(Error::TargetExists {
                    target: target.to_owned(),
                });
            }
            let above = committed_parent(&table, parent)?;
            let taken = table.get(target).map_err(failed)?.is_some();
            let name = if taken {
                format!("{target}#{id}")
            } else {
                target.to_owned()
            };
            let record = Record::new(id, Kind::Committed, parent, labels, Some(origin), SystemTime::now());
            write(&mut table, &name, &record)?;
            add_child(&tx, above.as_ref(), id)?;
            let mut layers = tx.open_table(LAYERS).map_err(failed)?;
            layers.insert((origin.toc_digest.as_bytes(), id), ()).map_err(failed)?;
            name
        };
        make(id)?;
        self.commit_transaction(tx)?;
        Ok(name)
    }

    /// Makes the active snapshot `key`, whose directory number must still be `id`, the committed snapshot `name`.
    pub fn commit(
        &self,
        id: u64,
        key: &str,
        name: &str,
        parent: Option<&str>,
        labels: &Labels,
        usage: Usage,
    ) -> Result<(), Error> {
        let tx = self.growing()?;
        {
            let mut table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            let record = read(&table, key)?
                .filter(|record| record.id == id)
                .ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
            if table.get(name).map_err(failed)?.is_some() {
                return Err(Error::AlreadyExists { key: name.to_owned() });
            }
            if record.kind != Kind::Active {
                return Err(Error::NotActive { key: key.to_owned() });
            }
            let parent = rebased_parent(key, record.parent.as_deref(), parent)?;
            let above = match parent {
                None => None,
                Some(parent) => Some(new_parent(&table, parent)?),
            };
            let mut committed = Record::new(id, Kind::Committed, parent, labels, None, SystemTime::now());
            committed.usage = usage.into();
            committed.fallback = record.fallback;
            table.remove(key).map_err(failed)?;
            write(&mut table, name, &committed)?;
            add_child(&tx, above.as_ref(), id)?;
        }
        self.commit_transaction(tx)
    }

    /// Removes a snapshot without children.
    pub fn remove(&self, key: &str) -> Result<Removed, Error> {
        let tx = self.writing()?;
        let removed = {
            let mut table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            let record = read(&table, key)?.ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
            let mut children = tx.open_table(CHILDREN).map_err(failed)?;
            if children
                .range((record.id, 0)..=(record.id, u64::MAX))
                .map_err(failed)?
                .next()
                .is_some()
            {
                return Err(Error::HasChildren { key: key.to_owned() });
            }
            if let Some(parent) = record.parent.as_deref() {
                let above = read(&table, parent)?
                    .ok_or_else(|| Error::Store(StoreError::Inconsistent { name: key.to_owned() }))?;
                children.remove((above.id, record.id)).map_err(failed)?;
            }
            table.remove(key).map_err(failed)?;
            let mut unused_layer = None;
            if let Some(origin) = &record.layer {
                let toc = origin.toc_digest;
                let mut layers = tx.open_table(LAYERS).map_err(failed)?;
                layers.remove((toc.as_bytes(), record.id)).map_err(failed)?;
                let mut uses = layers
                    .range((toc.as_bytes(), 0)..=(toc.as_bytes(), u64::MAX))
                    .map_err(failed)?;
                unused_layer = uses.next().is_none().then_some(toc);
            }
            Removed {
                id: record.id,
                unused_layer,
            }
        };
        self.commit_transaction(tx)?;
        Ok(removed)
    }

    /// Changes labels and gives the snapshot as it is then. A label without a value is removed, as containerd does.
    pub fn update(&self, key: &str, labels: &Labels, changes: &[LabelChange]) -> Result<Info, Error> {
        let tx = self.growing()?;
        let info = {
            let mut table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            let mut record = read(&table, key)?.ok_or_else(|| Error::NotFound { key: key.to_owned() })?;
            for change in changes {
                match change {
                    LabelChange::All => record.labels = labels.clone(),
                    LabelChange::One(name) => {
                        let value = labels.get(name).cloned().unwrap_or_default();
                        record.labels.insert(name.clone(), value);
                    }
                }
            }
            record.labels.retain(|_, value| !value.is_empty());
            record.touch(SystemTime::now());
            write(&mut table, key, &record)?;
            record.into_found(key).info
        };
        self.commit_transaction(tx)?;
        Ok(info)
    }

    /// An unchanging view of all snapshots, to be read in pages.
    pub fn listing(&self) -> Result<Listing, Error> {
        let tx = self.begin_read()?;
        Ok(Listing { tx, last: None })
    }

    /// Directory numbers of all snapshots. While `with` runs no snapshot is made, so that a directory seen by it
    /// without a snapshot is garbage.
    pub fn with_ids<T>(&self, with: impl FnOnce(&std::collections::HashSet<u64>) -> T) -> Result<T, Error> {
        let tx = self.writing()?;
        let ids = {
            let table = tx.open_table(SNAPSHOTS).map_err(failed)?;
            let mut ids = std::collections::HashSet::new();
            for entry in table.iter().map_err(failed)? {
                let (name, bytes) = entry.map_err(failed)?;
                ids.insert(decode(name.value(), bytes.value())?.id);
            }
            ids
        };
        let result = with(&ids);
        tx.abort().map_err(failed)?;
        Ok(result)
    }

    /// The oldest of the snapshots that refer to the layer; none if it is not in use.
    pub fn first_user(&self, toc: &Digest) -> Result<Option<u64>, Error> {
        self.reading(|tx| {
            let layers = tx.open_table(LAYERS).map_err(failed)?;
            let mut uses = layers
                .range((toc.as_bytes(), 0)..=(toc.as_bytes(), u64::MAX))
                .map_err(failed)?;
            let first = uses.next().transpose().map_err(failed)?;
            Ok(first.map(|(used, _)| used.value().1))
        })
    }

    /// Writes a record as it is, or removes it.
    #[cfg(test)]
    pub(super) fn put_for_test(&self, name: &str, bytes: Option<&[u8]>) {
        let tx = self.writing().unwrap();
        let mut table = tx.open_table(SNAPSHOTS).unwrap();
        match bytes {
            Some(bytes) => drop(table.insert(name, bytes).unwrap()),
            None => drop(table.remove(name).unwrap()),
        }
        drop(table);
        tx.commit().unwrap();
    }

    fn next_id(&self, tx: &WriteTransaction) -> Result<u64, Error> {
        let mut meta = tx.open_table(META).map_err(failed)?;
        let stored = meta.get("next_id").map_err(failed)?.map_or(1, |v| v.value());
        let id = stored.max(self.floor.load(Ordering::Relaxed)).max(1);
        self.floor.store(id + 1, Ordering::Relaxed);
        meta.insert("next_id", id + 1).map_err(failed)?;
        Ok(id)
    }
}

/// An unchanging view of all snapshots in order of their names.
pub struct Listing {
    tx: ReadTransaction,
    last: Option<String>,
}

impl Listing {
    /// The next `limit` snapshots, or none after the last.
    pub fn page(&mut self, limit: usize) -> Result<Option<Vec<Found>>, Error> {
        use std::ops::Bound;
        let table = self.tx.open_table(SNAPSHOTS).map_err(failed)?;
        let from = self.last.as_deref().map_or(Bound::Unbounded, Bound::Excluded);
        let mut page = Vec::new();
        for entry in table
            .range::<&str>((from, Bound::Unbounded))
            .map_err(failed)?
            .take(limit)
        {
            let (name, bytes) = entry.map_err(failed)?;
            page.push(decode(name.value(), bytes.value())?.into_found(name.value()));
        }
        let Some(last) = page.last() else { return Ok(None) };
        self.last = Some(last.info.name.clone());
        Ok(Some(page))
    }
}
