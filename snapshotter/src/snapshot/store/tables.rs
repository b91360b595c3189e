//! Reading and writing records within a transaction, and the rules that span several of them.

use redb::{ReadableTable, WriteTransaction};

use super::record::Record;
use super::{CHILDREN, StoreError};
use crate::layer::LayerOrigin;
use crate::snapshot::{Error, Kind};

/// redb has an error type per kind of call; all of them mean the same to us.
pub(super) fn failed(error: impl Into<redb::Error>) -> Error {
    Error::Store(StoreError::Transaction(Box::new(error.into())))
}

pub(super) fn read(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    name: &str,
) -> Result<Option<Record>, Error> {
    table
        .get(name)
        .map_err(failed)?
        .map(|bytes| decode(name, bytes.value()))
        .transpose()
}

pub(super) fn decode(name: &str, bytes: &[u8]) -> Result<Record, Error> {
    serde_json::from_slice(bytes).map_err(|source| {
        Error::Store(StoreError::Record {
            name: name.to_owned(),
            source,
        })
    })
}

pub(super) fn write(
    table: &mut redb::Table<'_, &'static str, &'static [u8]>,
    name: &str,
    record: &Record,
) -> Result<(), Error> {
    let bytes = serde_json::to_vec(record).map_err(|source| {
        Error::Store(StoreError::Record {
            name: name.to_owned(),
            source,
        })
    })?;
    table.insert(name, bytes.as_slice()).map_err(failed)?;
    Ok(())
}

pub(super) fn add_child(tx: &WriteTransaction, parent: Option<&Record>, child: u64) -> Result<(), Error> {
    if let Some(parent) = parent {
        tx.open_table(CHILDREN)
            .map_err(failed)?
            .insert((parent.id, child), ())
            .map_err(failed)?;
    }
    Ok(())
}

pub(super) fn find_target(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    target: &str,
    parent: Option<&str>,
) -> Result<Option<String>, Error> {
    match read(table, target)? {
        None => return Ok(None),
        Some(record) if record.kind == Kind::Committed && record.parent.as_deref() == parent => {
            return Ok(Some(target.to_owned()));
        }
        Some(_) => {}
    }
    let prefix = format!("{target}#");
    for entry in table.range::<&str>(prefix.as_str()..).map_err(failed)? {
        let (name, bytes) = entry.map_err(failed)?;
        if !name.value().starts_with(&prefix) {
            break;
        }
        let record = decode(name.value(), bytes.value())?;
        if record.layer.is_some() && record.parent.as_deref() == parent {
            return Ok(Some(name.value().to_owned()));
        }
    }
    Ok(None)
}

/// The parent of a new snapshot.
pub(super) fn committed_parent(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    parent: Option<&str>,
) -> Result<Option<Record>, Error> {
    let Some(parent) = parent else { return Ok(None) };
    match read(table, parent)? {
        None => Err(Error::ParentNotFound {
            parent: parent.to_owned(),
        }),
        Some(record) if record.kind != Kind::Committed => Err(Error::ParentNotCommitted {
            parent: parent.to_owned(),
        }),
        Some(record) => Ok(Some(record)),
    }
}

/// The parent that a commit ends up with.
pub(super) fn new_parent(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    parent: &str,
) -> Result<Record, Error> {
    match read(table, parent)? {
        None => Err(Error::ParentNotFound {
            parent: parent.to_owned(),
        }),
        Some(record) if record.kind != Kind::Committed => Err(Error::NewParentNotCommitted {
            parent: parent.to_owned(),
        }),
        Some(record) => Ok(record),
    }
}

/// A commit may give a parent to a snapshot that has none, and may repeat the one it has.
pub(super) fn rebased_parent<'a>(
    key: &str,
    has: Option<&'a str>,
    wanted: Option<&'a str>,
) -> Result<Option<&'a str>, Error> {
    match (has, wanted) {
        (Some(has), Some(wanted)) if has != wanted => Err(Error::ParentChanged {
            key: key.to_owned(),
            parent: wanted.to_owned(),
        }),
        (has, wanted) => Ok(has.or(wanted)),
    }
}

/// Numbers and lazy layers of the chain that ends at `parent`, nearest first.
pub(super) fn ancestors(
    table: &impl ReadableTable<&'static str, &'static [u8]>,
    parent: Option<&str>,
) -> Result<(Vec<u64>, Vec<LayerOrigin>), Error> {
    let mut ids = Vec::new();
    let mut layers: Vec<LayerOrigin> = Vec::new();
    let mut next = parent.map(str::to_owned);
    while let Some(name) = next {
        let record =
            read(table, &name)?.ok_or_else(|| Error::Store(StoreError::Inconsistent { name: name.clone() }))?;
        // Numbers fall towards the root except after a rebase; a repeated one would be an endless loop.
        if ids.contains(&record.id) {
            return Err(Error::Store(StoreError::Inconsistent { name }));
        }
        ids.push(record.id);
        if let Some(origin) = record.layer
            && !layers.iter().any(|known| known.toc_digest == origin.toc_digest)
        {
            layers.push(origin.into());
        }
        next = record.parent;
    }
    Ok((ids, layers))
}
