//! Maps of sparse files in the four encodings GNU tar has used.
//!
//! A map lists the stretches of a file that the archive stores; everything between them is zeros. The writer expands
//! sparse files, because eStargz has no notion of a hole.

use super::pax::{self, Record};
use super::tar::numeric;

/// Stored stretches of one file. GNU tar's own maps have one per hole; a million holes is an attack.
pub(super) const MAX_SEGMENTS: usize = 1 << 16;

/// A stored stretch of a sparse file: offset in the file and length.
pub(super) type Segment = (u64, u64);

/// A parsed map.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Map {
    /// Size of the expanded file.
    pub size: u64,
    /// Stored stretches by offset, not overlapping.
    pub segments: Vec<Segment>,
}

impl Map {
    /// Checks order and bounds, and that the segments account for all `stored` bytes.
    pub(super) fn checked(size: u64, segments: Vec<Segment>, stored: u64) -> Option<Self> {
        let mut end = 0;
        let mut total = 0_u64;
        for &(offset, length) in &segments {
            if offset < end {
                return None;
            }
            end = offset.checked_add(length)?;
            total = total.checked_add(length)?;
        }
        (end <= size && total == stored && segments.len() <= MAX_SEGMENTS).then_some(Self { size, segments })
    }
}

/// Entries of 24 bytes, offset and length, up to the first empty one.
pub(super) fn binary_segments(table: &[u8], segments: &mut Vec<Segment>) -> Option<()> {
    for entry in table.chunks_exact(24) {
        if entry[0] == 0 {
            break;
        }
        let offset = u64::try_from(numeric(&entry[..12])?).ok()?;
        let length = u64::try_from(numeric(&entry[12..])?).ok()?;
        segments.push((offset, length));
    }
    Some(())
}

/// What a pax header says about sparseness.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum PaxSparse {
    /// Formats 0.0 and 0.1: the map is in the header.
    Listed { size: u64, segments: Vec<Segment> },
    /// Format 1.0: the map is in front of the content.
    InContent { size: u64 },
}

/// The sparse format that the records announce: `Ok(None)` for none, `Err(())` for a broken or unknown one.
///
/// What counts as an announcement is what Go's reader takes for one: other readers must not see another file under another
/// name. Where Go guesses (an unknown version is a plain file to it), the entry is refused.
pub(super) fn from_records(records: &[Record]) -> Result<Option<PaxSparse>, ()> {
    let last = |key: &[u8]| {
        let value = records.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.as_slice());
        value.filter(|value| !value.is_empty())
    };
    let number = |key: &[u8]| last(key).map(|value| pax::decimal(value).ok_or(())).transpose();
    let listed = last(b"GNU.sparse.map").is_some()
        || records
            .iter()
            .any(|(key, _)| key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes");
    let in_content = match (last(b"GNU.sparse.major"), last(b"GNU.sparse.minor")) {
        (Some(b"1"), Some(b"0")) => true,
        (Some(b"0"), Some(b"0" | b"1")) => false,
        (None, None) if listed => false,
        (None, None) => return Ok(None),
        _ => return Err(()),
    };
    let size = number(b"GNU.sparse.size")?
        .or(number(b"GNU.sparse.realsize")?)
        .ok_or(())?;
    if in_content {
        return Ok(Some(PaxSparse::InContent { size }));
    }
    let mut numbers = Vec::new();
    if let Some(map) = last(b"GNU.sparse.map") {
        for text in map.split(|&b| b == b',') {
            numbers.push(pax::decimal(text).ok_or(())?);
        }
    } else {
        for (key, value) in records {
            if key == b"GNU.sparse.offset" || key == b"GNU.sparse.numbytes" {
                let expected: &[u8] = if numbers.len() % 2 == 0 {
                    b"GNU.sparse.offset"
                } else {
                    b"GNU.sparse.numbytes"
                };
                if key != expected {
                    return Err(());
                }
                numbers.push(pax::decimal(value).ok_or(())?);
            }
        }
    }
    if numbers.len() % 2 != 0 || numbers.len() > 2 * MAX_SEGMENTS {
        return Err(());
    }
    let segments = numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect();
    Ok(Some(PaxSparse::Listed { size, segments }))
}

/// Reader of the map in front of the content of a format 1.0 file: decimal numbers, each on a line.
#[derive(Debug, Default)]
pub(super) struct ContentMap {
    numbers: Vec<u64>,
    line: Vec<u8>,
}

impl ContentMap {
    /// Takes one block; the segments once the map is complete, `None` if it is broken.
    pub(super) fn block(&mut self, block: &[u8]) -> Option<Option<Vec<Segment>>> {
        for &byte in block {
            if byte != b'\n' {
                self.line.push(byte);
                // No number is longer; without a limit a block without line ends would pile up.
                if self.line.len() > 20 {
                    return None;
                }
                continue;
            }
            self.numbers.push(pax::decimal(&self.line)?);
            self.line.clear();
            let wanted = usize::try_from(self.numbers[0]).ok().filter(|&n| n <= MAX_SEGMENTS)?;
            if self.numbers.len() == 1 + 2 * wanted {
                return Some(Some(
                    self.numbers[1..]
                        .chunks_exact(2)
                        .map(|pair| (pair[0], pair[1]))
                        .collect(),
                ));
            }
        }
        Some(None)
    }
}
