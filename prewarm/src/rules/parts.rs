//! Parts of messages, looked at as containerd's decoder does: the last text counts, occurrences of a message merge.

use std::borrow::Cow;
use std::collections::HashMap;

use crate::wire::{Edit, Value, WireError, edit, fields, last_bytes, put_bytes};

/// Text; empty if it is not there. What is not UTF-8 is nobody's id and matches no label that we look for.
pub(crate) fn text(message: &[u8], number: u32) -> Result<String, WireError> {
    let bytes = last_bytes(message, number)?.unwrap_or_default();
    Ok(String::from_utf8_lossy(bytes).into_owned())
}

/// A number; `None` if it is not there.
pub(crate) fn number(message: &[u8], number: u32) -> Result<Option<u64>, WireError> {
    let mut found = None;
    for field in fields(message) {
        let field = field?;
        if let (true, Value::Varint(value)) = (field.number == number, field.value) {
            found = Some(value);
        }
    }
    Ok(found)
}

/// An inner message. Several occurrences merge, which is what their concatenation decodes to.
pub(crate) fn inner(message: &[u8], number: u32) -> Result<Option<Cow<'_, [u8]>>, WireError> {
    let mut found: Option<Cow<'_, [u8]>> = None;
    for field in fields(message) {
        let field = field?;
        if let (true, Some(bytes)) = (field.number == number, field.value.bytes()) {
            found = Some(match found {
                None => Cow::Borrowed(bytes),
                Some(before) => Cow::Owned([&before, bytes].concat()),
            });
        }
    }
    Ok(found)
}

/// A map of texts.
pub(crate) fn map(message: &[u8], number: u32) -> Result<HashMap<String, String>, WireError> {
    let mut found = HashMap::new();
    for field in fields(message) {
        let field = field?;
        if let (true, Some(entry)) = (field.number == number, field.value.bytes()) {
            found.insert(text(entry, 1)?, text(entry, 2)?);
        }
    }
    Ok(found)
}

/// The message with field `number` as `content`: in its first place, or at the end.
pub(crate) fn with_inner(message: &[u8], number: u32, content: &[u8]) -> Result<Vec<u8>, WireError> {
    let mut placed = false;
    let mut out = edit::<WireError>(message, |field| {
        if field.number != number {
            return Ok(Edit::Keep);
        }
        Ok(if std::mem::replace(&mut placed, true) {
            Edit::Drop
        } else {
            Edit::Bytes(content.to_vec())
        })
    })?;
    if !placed {
        put_bytes(&mut out, number, content);
    }
    Ok(out)
}

/// The message without these fields.
pub(crate) fn without(message: &[u8], numbers: &[u32]) -> Result<Vec<u8>, WireError> {
    edit(message, |field| {
        Ok(if numbers.contains(&field.number) {
            Edit::Drop
        } else {
            Edit::Keep
        })
    })
}

/// Appends text, unless it is empty, which protobuf 3 leaves out.
pub(crate) fn put_text(out: &mut Vec<u8>, number: u32, text: &str) {
    if !text.is_empty() {
        put_bytes(out, number, text.as_bytes());
    }
}

/// Appends a map, its keys in order.
pub(crate) fn put_map(out: &mut Vec<u8>, number: u32, map: &HashMap<String, String>) {
    let mut entries: Vec<_> = map.iter().collect();
    entries.sort_unstable();
    for (key, value) in entries {
        let mut entry = Vec::with_capacity(key.len() + value.len() + 8);
        // Key and value are written even if empty, as every encoder does.
        put_bytes(&mut entry, 1, key.as_bytes());
        put_bytes(&mut entry, 2, value.as_bytes());
        put_bytes(out, number, &entry);
    }
}

/// Whether containerd would say that labels match a selector.
pub(crate) fn matches(selector: &HashMap<String, String>, labels: &HashMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}
