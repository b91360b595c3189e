//! Fields of a header block, and what the records of a pax header make of them.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Block, Extensions, TarEntry, TarError, TarKind, shown};
use crate::input::pax::{self, Record, Timestamp};
use crate::input::sparse::{self, PaxSparse};

/// Records whose meaning is in the fields of [`TarEntry`], where the writer finds it. A copy among the other records would be
/// written behind the header's own fields and override them for whoever unpacks the layer.
const KEYS_IN_FIELDS: [&[u8]; 10] = [
    b"path",
    b"linkpath",
    b"size",
    b"uid",
    b"gid",
    b"uname",
    b"gname",
    b"mtime",
    b"SCHILY.devmajor",
    b"SCHILY.devminor",
];

/// What header and extensions say about an entry.
pub(super) struct Decoded {
    /// The entry, its size and records yet to come.
    pub(super) entry: TarEntry,
    /// Bytes that the archive stores for it.
    pub(super) stored: u64,
    /// How its holes are described.
    pub(super) sparseness: Sparseness,
    /// Pax records that are not in `entry` yet.
    pub(super) records: Vec<Record>,
}

/// How the holes of an entry are described.
pub(super) enum Sparseness {
    /// It has none.
    Dense,
    /// In GNU's old format: in the header and the blocks behind it.
    Old,
    /// In one of the formats that pax records announce.
    Pax(PaxSparse),
}

/// A header block together with the pax records that override it.
struct Fields<'a> {
    header: &'a Block,
    records: Vec<Record>,
    name: String,
    start: u64,
}

impl Fields<'_> {
    fn bad(&self, field: &'static str) -> TarError {
        TarError::BadField {
            name: self.name.clone(),
            offset: self.start,
            field,
        }
    }

    fn number(&self, range: Range<usize>, field: &'static str) -> Result<u64, TarError> {
        let number = numeric(&self.header[range]).and_then(|n| u64::try_from(n).ok());
        number.ok_or_else(|| self.bad(field))
    }

    fn overridden(&mut self, key: &'static str, range: Range<usize>) -> Result<u64, TarError> {
        match take(&mut self.records, key.as_bytes()) {
            Some(value) => pax::decimal(&value).ok_or_else(|| self.bad(key)),
            None => self.number(range, key),
        }
    }

    fn mtime(&mut self) -> Result<Timestamp, TarError> {
        let time = match take(&mut self.records, b"mtime") {
            Some(value) => Timestamp::parse(&value),
            None => numeric(&self.header[136..148]).map(|seconds| Timestamp { seconds, nanos: 0 }),
        };
        time.ok_or_else(|| self.bad("mtime"))
    }

    /// The old format is a type of its own; the others are plain files whose records announce them.
    fn sparseness(&self, kind: TarKind, old: bool) -> Result<Sparseness, TarError> {
        match kind {
            TarKind::Regular if old => return Ok(Sparseness::Old),
            TarKind::Regular => {}
            _ => return Ok(Sparseness::Dense),
        }
        let announced = sparse::from_records(&self.records).map_err(|()| self.bad("sparse map"))?;
        Ok(announced.map_or(Sparseness::Dense, Sparseness::Pax))
    }

    /// Whether there are the fields that version 7 did not have.
    fn is_extended(&self) -> bool {
        &self.header[257..262] == b"ustar"
    }

    fn owner(&mut self, key: &[u8], range: Range<usize>) -> Vec<u8> {
        match take(&mut self.records, key) {
            Some(name) => name,
            None if self.is_extended() => text(&self.header[range]).to_vec(),
            None => Vec::new(),
        }
    }

    fn device(&self, kind: TarKind) -> Result<(u64, u64), TarError> {
        if !matches!(kind, TarKind::Char | TarKind::Block) || !self.is_extended() {
            return Ok((0, 0));
        }
        Ok((
            self.number(329..337, "device number")?,
            self.number(337..345, "device number")?,
        ))
    }
}

/// Puts header and extensions together. `start` is where the entry begins.
pub(super) fn decode(header: &Block, start: u64, extensions: Extensions) -> Result<Decoded, TarError> {
    let mut records = extensions.records;
    // All of them leave the records, whichever is chosen: see `KEYS_IN_FIELDS`.
    let path = take(&mut records, b"path");
    let linkpath = take(&mut records, b"linkpath");
    let sparse_name = take(&mut records, b"GNU.sparse.name");
    let chosen = |long: Option<Vec<u8>>, record| long.filter(|long| !long.is_empty()).or(record);
    let mut name = chosen(extensions.long_name, path).unwrap_or_else(|| header_name(header));
    let link = chosen(extensions.long_link, linkpath).unwrap_or_else(|| text(&header[157..257]).to_vec());
    let mut fields = Fields {
        header,
        records,
        name: shown(&name),
        start,
    };
    let Some((kind, old_sparse)) = kind_of(header[156], &name) else {
        return Err(TarError::UnsupportedType {
            name: fields.name,
            offset: start,
            typeflag: header[156],
        });
    };
    let sparseness = fields.sparseness(kind, old_sparse)?;
    // The other names of such an entry are for unpackers that do not know the format. Where it is not announced, the record
    // means nothing.
    if let (Sparseness::Pax(_), Some(sparse_name)) = (&sparseness, sparse_name) {
        fields.name = shown(&sparse_name);
        name = sparse_name;
    }
    let stored = fields.overridden("size", 124..136)?;
    let mode = fields.number(100..108, "mode")? & 0o7777;
    let entry = TarEntry {
        name,
        kind,
        link: if matches!(kind, TarKind::Symlink | TarKind::Hardlink) {
            link
        } else {
            Vec::new()
        },
        size: 0,
        mode: u32::try_from(mode).map_err(|_| fields.bad("mode"))?,
        uid: fields.overridden("uid", 108..116)?,
        gid: fields.overridden("gid", 116..124)?,
        user: fields.owner(b"uname", 265..297),
        group: fields.owner(b"gname", 297..329),
        mtime: fields.mtime()?,
        device: fields.device(kind)?,
        xattrs: Vec::new(),
        records: Vec::new(),
        offset: start,
    };
    Ok(Decoded {
        entry,
        stored,
        sparseness,
        records: fields.records,
    })
}

/// The kind of an entry, and whether it is in GNU's old sparse format.
pub(super) fn kind_of(typeflag: u8, name: &[u8]) -> Option<(TarKind, bool)> {
    Some((
        match typeflag {
            // Version 7 had no type for directories.
            0 if name.ends_with(b"/") => TarKind::Directory,
            // '7' asks for contiguous storage, which nothing honours any more.
            0 | b'0' | b'7' => TarKind::Regular,
            b'S' => return Some((TarKind::Regular, true)),
            b'1' => TarKind::Hardlink,
            b'2' => TarKind::Symlink,
            b'3' => TarKind::Char,
            b'4' => TarKind::Block,
            b'5' => TarKind::Directory,
            b'6' => TarKind::Fifo,
            _ => return None,
        },
        false,
    ))
}

/// The name in the header itself, with the prefix of ustar and star.
pub(super) fn header_name(header: &Block) -> Vec<u8> {
    let name = text(&header[..100]);
    if &header[257..263] != b"ustar\0" {
        return name.to_vec();
    }
    let end = if &header[508..512] == b"tar\0" { 476 } else { 500 };
    match text(&header[345..end]) {
        [] => name.to_vec(),
        prefix => [prefix, b"/", name].concat(),
    }
}

/// Takes the last value of a key out of the records. An empty value means "as if absent".
pub(super) fn take(records: &mut Vec<Record>, key: &[u8]) -> Option<Vec<u8>> {
    let value = records.iter().rev().find(|(k, _)| k == key).map(|(_, v)| v.clone());
    records.retain(|(k, _)| k != key);
    value.filter(|v| !v.is_empty())
}

/// Extended attributes, and what is left: each sorted, the last of a repeated key kept.
pub(super) fn sort_records(records: Vec<Record>) -> (Vec<Record>, Vec<Record>) {
    let mut xattrs = BTreeMap::new();
    let mut rest = BTreeMap::new();
    for (key, value) in records {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            xattrs.insert(name.to_vec(), value);
        } else if !key.starts_with(b"GNU.sparse.")
            && key != b"hdrcharset"
            && key != b"SCHILY.realsize"
            && !KEYS_IN_FIELDS.contains(&key.as_slice())
        {
            rest.insert(key, value);
        }
    }
    rest.retain(|_, value| !value.is_empty());
    (xattrs.into_iter().collect(), rest.into_iter().collect())
}

/// The bytes before the first NUL.
pub(super) fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|&b| b == 0).unwrap_or(field.len())]
}

/// A numeric header field: octal text, or two's complement with the top bit of the first byte set.
pub(in crate::input) fn numeric(field: &[u8]) -> Option<i64> {
    let (&first, rest) = field.split_first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let top = if negative {
            i64::from(first) - 0x100
        } else {
            i64::from(first & 0x7f)
        };
        return rest
            .iter()
            .try_fold(top, |value, &b| value.checked_mul(256)?.checked_add(i64::from(b)));
    }
    let blank = |b: &u8| *b == b' ' || *b == 0;
    let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    let (digits, behind) = digits.split_at(end);
    if !behind.iter().all(blank) && !behind.starts_with(b"\0") {
        return None;
    }
    digits.iter().try_fold(0_i64, |value, &b| match b {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(b - b'0')),
        _ => None,
    })
}

/// Writers have summed signed and unsigned bytes; both are accepted, as everywhere.
pub(super) fn checksum_matches(block: &Block) -> bool {
    let Some(stated) = numeric(&block[148..156]) else {
        return false;
    };
    let counted = |i: usize, b: u8| if (148..156).contains(&i) { b' ' } else { b };
    let unsigned: i64 = block.iter().enumerate().map(|(i, &b)| i64::from(counted(i, b))).sum();
    let signed: i64 = block
        .iter()
        .enumerate()
        .map(|(i, &b)| i64::from(counted(i, b).cast_signed()))
        .sum();
    stated == unsigned || stated == signed
}

pub(super) fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|&b| b == 0)
}
