//! Lists: hulls drop out, adopted sandboxes appear as their pods, and labels are selected after that.

use std::collections::HashMap;

use super::identity::{Identities, Sight};
use super::overlay;
use super::parts::{inner, map, matches, put_text, text, with_inner, without};
use crate::wire::{Edit, WireError, edit, fields};

/// Field of every list request that holds its filter, and of every filter that holds an id.
const FILTER: u32 = 1;
const FILTER_ID: u32 = 1;

/// Field of every list answer that holds its items.
const ITEMS: u32 = 1;

/// Which list; their filters and items differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum List {
    /// `PodSandbox`es.
    Sandboxes,
    /// `PodSandboxStats`.
    Stats,
}

impl List {
    /// Field of the filter's label selector.
    fn selector(self) -> u32 {
        match self {
            Self::Sandboxes => 3,
            Self::Stats => 2,
        }
    }
}

/// A list request, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Asked {
    /// The id, or the beginning of one; may be empty.
    pub(crate) id: String,
    /// The labels to select by.
    pub(crate) selector: HashMap<String, String>,
    /// Whether there is a filter at all, if only an empty one.
    pub(crate) has_filter: bool,
    list: List,
}

impl Asked {
    pub(crate) fn of(list: List, request: &[u8]) -> Result<Self, WireError> {
        let filter = inner(request, FILTER)?;
        let has_filter = filter.is_some();
        let filter = filter.unwrap_or_default();
        Ok(Self {
            has_filter,
            id: text(&filter, FILTER_ID)?,
            selector: map(&filter, list.selector())?,
            list,
        })
    }

    /// The request for containerd: all labels, and `id` if that is to be another. Everything else stays.
    pub(crate) fn forwarded(&self, request: &[u8], id: Option<&str>) -> Result<Vec<u8>, WireError> {
        let Some(filter) = inner(request, FILTER)? else {
            return Ok(request.to_vec());
        };
        let mut kept = without(&filter, &[self.list.selector()])?;
        if let Some(id) = id {
            kept = without(&kept, &[FILTER_ID])?;
            put_text(&mut kept, FILTER_ID, id);
        }
        with_inner(request, FILTER, &kept)
    }
}

/// An answer with each item as `see` makes it; `None` drops it.
pub(crate) fn items<E: From<WireError>>(
    answer: &[u8],
    mut see: impl FnMut(&[u8]) -> Result<Option<Vec<u8>>, E>,
) -> Result<Vec<u8>, E> {
    edit(answer, |field| match (field.number, field.value.bytes()) {
        (ITEMS, Some(item)) => Ok(see(item)?.map_or(Edit::Drop, Edit::Bytes)),
        _ => Ok(Edit::Keep),
    })
}

/// Whether an answer has any item.
pub(crate) fn is_empty(answer: &[u8]) -> bool {
    !fields(answer).flatten().any(|field| field.number == ITEMS)
}

/// A `PodSandbox`, as it may be seen.
pub(crate) fn sandbox(
    item: &[u8],
    identities: &Identities,
    selector: &HashMap<String, String>,
) -> Result<Option<Vec<u8>>, WireError> {
    let labels = map(item, 5)?;
    Ok(match identities.sight(&text(item, 1)?, &labels) {
        Sight::Hidden => None,
        Sight::Adopted(adoption) if matches(selector, &adoption.config.labels) => {
            Some(overlay::sandbox(item, &adoption)?)
        }
        Sight::Native if matches(selector, &labels) => Some(item.to_vec()),
        Sight::Adopted(_) | Sight::Native => None,
    })
}

/// Ids of the sandboxes in a `ListPodSandboxResponse` that may be seen.
pub(crate) fn visible(answer: &[u8], identities: &Identities) -> Result<Vec<String>, WireError> {
    let mut ids = Vec::new();
    for field in fields(answer) {
        let field = field?;
        if let (ITEMS, Some(item)) = (field.number, field.value.bytes()) {
            let id = text(item, 1)?;
            if !matches!(identities.sight(&id, &map(item, 5)?), Sight::Hidden) {
                ids.push(id);
            }
        }
    }
    Ok(ids)
}
