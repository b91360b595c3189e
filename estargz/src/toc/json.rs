//! The JSON form of the TOC: a reader that knows which entry and field it is at when something is wrong, and a writer
//! that spells every byte as Go does.
//!
//! The reader is by hand because a derived one can neither stop at a limit while it reads nor name the field whose
//! value it refuses. Like Go's decoder it ignores unknown keys, takes keys in any case, the last of repeated keys, and
//! null for nothing.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fmt;
use std::io;

use serde::Serialize as _;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::ser::{Formatter, PrettyFormatter};

use super::{
    EntryType, MAX_ENTRIES, MAX_LINK_BYTES, MAX_PATH_BYTES, MAX_TOC_BYTES, MAX_XATTR_LIST_BYTES, MAX_XATTR_NAME_BYTES,
    MAX_XATTR_VALUE_BYTES, Toc, TocEntry, TocError, VERSION,
};
use crate::digest::Digest;

/// Base64 spends four characters on three bytes.
const MAX_XATTR_TEXT_BYTES: usize = MAX_XATTR_VALUE_BYTES.div_ceil(3) * 4;

pub(super) fn parse(json: &[u8]) -> Result<Toc, TocError> {
    if json.len() > MAX_TOC_BYTES {
        return Err(TocError::TooLarge {
            limit: MAX_TOC_BYTES as u64,
            form: "uncompressed",
        });
    }
    let place = Place::default();
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let document = deserializer
        .deserialize_map(DocumentVisitor(&place))
        .and_then(|document| deserializer.end().map(|()| document))
        .map_err(|source| place.locate(source))?;
    if document.version != u64::from(VERSION) {
        return Err(TocError::Version {
            found: document.version,
        });
    }
    Ok(Toc {
        version: VERSION,
        entries: document.entries,
    })
}

pub(super) fn write(toc: &Toc) -> Vec<u8> {
    let mut json = Vec::with_capacity(toc.entries.len() * 400 + 64);
    let mut serializer = serde_json::Serializer::with_formatter(&mut json, GoFormatter::default());
    toc.serialize(&mut serializer)
        .expect("a Vec takes every byte and all map keys are strings");
    json
}

/// Where the reader is.
#[derive(Default)]
struct Place {
    entry: Cell<Option<usize>>,
    field: Cell<&'static str>,
}

impl Place {
    fn locate(&self, source: serde_json::Error) -> TocError {
        match self.entry.get() {
            Some(entry) => TocError::Entry {
                entry,
                field: self.field.get(),
                source,
            },
            None => TocError::Document { source },
        }
    }
}

#[derive(Default)]
struct Document {
    version: u64,
    entries: Vec<TocEntry>,
}

struct DocumentVisitor<'a>(&'a Place);

impl<'de> Visitor<'de> for DocumentVisitor<'_> {
    type Value = Document;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `version` and `entries`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
        let mut document = Document::default();
        while let Some(key) = map.next_key::<String>()? {
            if key.eq_ignore_ascii_case("version") {
                document.version = map.next_value::<Option<u64>>()?.unwrap_or_default();
            } else if key.eq_ignore_ascii_case("entries") {
                document.entries = map.next_value_seed(EntriesSeed(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(document)
    }
}

/// The array of entries, or null.
#[derive(Clone, Copy)]
struct EntriesSeed<'a>(&'a Place);

impl<'de> DeserializeSeed<'de> for EntriesSeed<'_> {
    type Value = Vec<TocEntry>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'de> Visitor<'de> for EntriesSeed<'_> {
    type Value = Vec<TocEntry>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of entries")
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(Vec::new())
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        loop {
            self.0.entry.set(Some(entries.len()));
            self.0.field.set("name");
            let Some(entry) = seq.next_element_seed(EntrySeed(self.0))? else {
                break;
            };
            if entries.len() == MAX_ENTRIES {
                return Err(A::Error::custom(format_args!("more than {MAX_ENTRIES} entries")));
            }
            entries.push(entry);
        }
        self.0.entry.set(None);
        Ok(entries)
    }
}

struct EntrySeed<'a>(&'a Place);

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = TocEntry;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

/// The keys that mean something; the reader falls back to a comparison without case.
const KEYS: [&str; 19] = [
    "name",
    "type",
    "size",
    "modtime",
    "linkName",
    "mode",
    "uid",
    "gid",
    "userName",
    "groupName",
    "offset",
    "innerOffset",
    "devMajor",
    "devMinor",
    "xattrs",
    "digest",
    "chunkOffset",
    "chunkSize",
    "chunkDigest",
];

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = TocEntry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an entry object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TocEntry, A::Error> {
        let mut entry = TocEntry::new("", EntryType::Chunk);
        let mut kind = None;
        while let Some(key) = map.next_key::<Key>()? {
            let Key(Some(field)) = key else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            self.0.field.set(field);
            if field == "type" {
                kind = map.next_value::<Option<String>>()?;
            } else {
                set_field(&mut entry, field, &mut map)?;
            }
        }
        self.0.field.set("type");
        let text = kind.ok_or_else(|| A::Error::missing_field("type"))?;
        entry.kind = entry_type(&text).ok_or_else(|| unknown_type(&text))?;
        Ok(entry)
    }
}

fn set_field<'de, A: MapAccess<'de>>(entry: &mut TocEntry, field: &str, map: &mut A) -> Result<(), A::Error> {
    let number = |map: &mut A| Ok::<_, A::Error>(map.next_value::<Option<Number>>()?.map_or(0, |n| n.0));
    match field {
        "name" => entry.name = text(map, MAX_PATH_BYTES)?,
        "size" => entry.size = number(map)?,
        "modtime" => entry.mod_time = text(map, MAX_PATH_BYTES)?,
        "linkName" => entry.link_name = text(map, MAX_LINK_BYTES)?,
        "mode" => entry.mode = number(map)?,
        "uid" => entry.uid = number(map)?,
        "gid" => entry.gid = number(map)?,
        "userName" => entry.user_name = text(map, MAX_PATH_BYTES)?,
        "groupName" => entry.group_name = text(map, MAX_PATH_BYTES)?,
        "offset" => entry.offset = number(map)?,
        "innerOffset" => entry.inner_offset = number(map)?,
        "devMajor" => entry.dev_major = number(map)?,
        "devMinor" => entry.dev_minor = number(map)?,
        "xattrs" => entry.xattrs = xattrs(map)?,
        "digest" => entry.digest = digest(map)?,
        "chunkOffset" => entry.chunk_offset = number(map)?,
        "chunkSize" => entry.chunk_size = number(map)?,
        _ => entry.chunk_digest = digest(map)?,
    }
    Ok(())
}

fn entry_type(text: &str) -> Option<EntryType> {
    Some(match text {
        "dir" => EntryType::Dir,
        "reg" => EntryType::Reg,
        "symlink" => EntryType::Symlink,
        "hardlink" => EntryType::Hardlink,
        "char" => EntryType::Char,
        "block" => EntryType::Block,
        "fifo" => EntryType::Fifo,
        "chunk" => EntryType::Chunk,
        _ => return None,
    })
}

fn unknown_type<E: serde::de::Error>(text: &str) -> E {
    E::custom(format_args!(
        "{:?} is no entry type",
        text.chars().take(40).collect::<String>()
    ))
}

fn text<'de, A: MapAccess<'de>>(map: &mut A, limit: usize) -> Result<String, A::Error> {
    let text = map.next_value::<Option<String>>()?.unwrap_or_default();
    if text.len() > limit {
        return Err(A::Error::custom(format_args!(
            "{} bytes of text, the limit is {limit}",
            text.len()
        )));
    }
    Ok(text)
}

fn digest<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Option<Digest>, A::Error> {
    let text = map.next_value::<Option<String>>()?.unwrap_or_default();
    if text.is_empty() {
        return Ok(None);
    }
    text.parse().map(Some).map_err(A::Error::custom)
}

fn xattrs<'de, A: MapAccess<'de>>(map: &mut A) -> Result<BTreeMap<String, String>, A::Error> {
    let xattrs = map
        .next_value::<Option<BTreeMap<String, Option<String>>>>()?
        .unwrap_or_default();
    let mut list_bytes = 0;
    for (name, value) in &xattrs {
        list_bytes += name.len() + 1;
        let value_bytes = value.as_ref().map_or(0, String::len);
        if name.len() > MAX_XATTR_NAME_BYTES || value_bytes > MAX_XATTR_TEXT_BYTES || list_bytes > MAX_XATTR_LIST_BYTES
        {
            return Err(A::Error::custom(format_args!(
                "beyond the limits of {MAX_XATTR_NAME_BYTES} bytes for a name, {MAX_XATTR_VALUE_BYTES} for a value and \
                 {MAX_XATTR_LIST_BYTES} for all names of a file"
            )));
        }
    }
    Ok(xattrs
        .into_iter()
        .map(|(name, value)| (name, value.unwrap_or_default()))
        .collect())
}

/// A key of an entry: one of [`KEYS`], or nothing that is known.
struct Key(Option<&'static str>);

impl<'de> serde::Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_identifier(KeyVisitor)
    }
}

struct KeyVisitor;

impl Visitor<'_> for KeyVisitor {
    type Value = Key;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E>(self, key: &str) -> Result<Key, E> {
        let known = KEYS
            .iter()
            .find(|k| **k == key)
            .or_else(|| KEYS.iter().find(|k| k.eq_ignore_ascii_case(key)));
        Ok(Key(known.copied()))
    }
}

/// A whole number in 0..=i64::MAX, the range that the reference writer can have meant.
struct Number(u64);

impl<'de> serde::Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_u64(NumberVisitor)
    }
}

struct NumberVisitor;

impl Visitor<'_> for NumberVisitor {
    type Value = Number;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number from 0 to 9223372036854775807")
    }

    fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<Number, E> {
        i64::try_from(n).map_err(|_| E::invalid_value(serde::de::Unexpected::Unsigned(n), &self))?;
        Ok(Number(n))
    }

    fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Number, E> {
        u64::try_from(n)
            .map(Number)
            .map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(n), &self))
    }
}

/// Tab-indented, with the escapes of Go's encoder: it also escapes what HTML and JavaScript would stumble over.
struct GoFormatter(PrettyFormatter<'static>);

impl Default for GoFormatter {
    fn default() -> Self {
        Self(PrettyFormatter::with_indent(b"\t"))
    }
}

impl Formatter for GoFormatter {
    fn begin_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_array(writer)
    }

    fn end_array<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array(writer)
    }

    fn begin_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(writer, first)
    }

    fn end_array_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_array_value(writer)
    }

    fn begin_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object(writer)
    }

    fn end_object<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object(writer)
    }

    fn begin_object_key<W: ?Sized + io::Write>(&mut self, writer: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(writer, first)
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.begin_object_value(writer)
    }

    fn end_object_value<W: ?Sized + io::Write>(&mut self, writer: &mut W) -> io::Result<()> {
        self.0.end_object_value(writer)
    }

    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let mut rest = fragment;
        while let Some(at) = rest.find(['<', '>', '&', '\u{2028}', '\u{2029}']) {
            let (plain, tail) = rest.split_at(at);
            writer.write_all(plain.as_bytes())?;
            let mut chars = tail.chars();
            if let Some(special) = chars.next() {
                write!(writer, "\\u{:04x}", u32::from(special))?;
            }
            rest = chars.as_str();
        }
        writer.write_all(rest.as_bytes())
    }
}
