//! The table of contents of an eStargz layer: its JSON form, the gzip member or zstd frame that carries it, and its limits.
//!
//! [`Toc::parse`] is the only way in for bytes from outside. It checks the form and the limits below; what the entries
//! mean together (the tree, the chunks) is checked where it is used, by [`crate::index::build`]. The digest that
//! identifies a layer is over the exact JSON bytes, so [`Toc::to_json`] writes them as the reference writer does.
//!
//! Source of the format: stargz-snapshotter's `docs/estargz.md` and the bytes that its writer emits; docs/format.md.

mod frame;
mod json;
mod member;
pub mod time;

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::Serialize;

use crate::digest::Digest;
use crate::footer;

pub use frame::parse_frame;
pub use member::{TocDocument, encode_member, parse_member};

/// Name of the tar entry that holds the TOC.
pub const TOC_TAR_NAME: &str = "stargz.index.json";
/// First in a layer whose prioritized files end here.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// First in a layer that has no prioritized files.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
/// The one byte that both landmarks contain.
pub const LANDMARK_CONTENTS: &[u8] = &[0x0f];
/// Layer descriptor annotation and snapshot label that bind a layer to its TOC.
pub const TOC_DIGEST_ANNOTATION: &str = "containerd.io/snapshot/stargz/toc.digest";
/// Layer descriptor annotations that bind a layer to its TOC; the first that is there counts. The first has the digest of the
/// JSON form, the others (of zstd:chunked) that of the compressed TOC.
pub const BINDING_ANNOTATIONS: [&str; 3] = [
    TOC_DIGEST_ANNOTATION,
    footer::zstd::CHECKSUM_ANNOTATION,
    footer::zstd::STARGZ_CHECKSUM_ANNOTATION,
];
/// Annotation of a layer of a TOC image: the digest of the layer whose TOC it is.
pub const TOC_OF_LAYER_ANNOTATION: &str = "containerd.io/snapshot/stargz/layer.digest";
/// What the tag of an image's TOC image has behind the image's own.
pub const TOC_IMAGE_SUFFIX: &str = "-esgztoc";
/// Layer descriptor annotation with the size of the uncompressed layer in bytes.
pub const UNCOMPRESSED_SIZE_ANNOTATION: &str = "io.containers.estargz.uncompressed-size";
/// Layer descriptor annotation with the offset of the TOC's member in the blob: who has it asks for that much of the blob's end and no
/// more. A hint; the footer says what is true.
pub const TOC_OFFSET_ANNOTATION: &str = "io.hullspeed.estargz.toc-offset";

/// The format version that is read and written.
pub const VERSION: u32 = 1;

/// Largest TOC in bytes of JSON, 256 MiB: room for 600 000 regular files at the 420 bytes that the reference writer
/// spends on one. The largest layers seen in the field have a tenth of that.
pub const MAX_TOC_BYTES: usize = 256 << 20;
/// Largest TOC member in compressed bytes, 96 MiB. A file costs 60 to 100 bytes compressed (its digests do not
/// compress), so a TOC of [`MAX_TOC_BYTES`] fits.
pub const MAX_TOC_MEMBER_BYTES: u64 = 96 << 20;
/// Most entries in a TOC, 2^20. An entry in memory takes about 350 bytes, so this also bounds parsing to some 600 MB.
pub const MAX_ENTRIES: usize = 1 << 20;
/// Longest name of an entry in bytes; the kernel's PATH_MAX.
pub const MAX_PATH_BYTES: usize = 4096;
/// Longest single name in a path in bytes; the kernel's NAME_MAX.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest link target in bytes; the kernel's PATH_MAX without its NUL.
pub const MAX_LINK_BYTES: usize = 4095;
/// Longest name of an extended attribute in bytes; the kernel's XATTR_NAME_MAX.
pub const MAX_XATTR_NAME_BYTES: usize = 255;
/// Largest value of an extended attribute in bytes; the kernel's XATTR_SIZE_MAX.
pub const MAX_XATTR_VALUE_BYTES: usize = 64 << 10;
/// Most bytes of attribute names on one file, a NUL behind each; the kernel's XATTR_LIST_MAX.
pub const MAX_XATTR_LIST_BYTES: usize = 64 << 10;
/// Largest chunk in bytes, 64 MiB: 16 times what the reference writer uses by default. A chunk is the unit of verification, so it
/// has to fit in memory several times over.
pub const MAX_CHUNK_BYTES: u64 = 64 << 20;
/// Deepest path in components. Bounds every walk from a file up to the root.
pub const MAX_DEPTH: usize = 1024;

/// The TOC document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Toc {
    /// Format version; 1 is the only one.
    pub version: u32,
    /// Entries in the order of the tar stream, each large file's further chunks right behind it.
    pub entries: Vec<TocEntry>,
}

/// What a TOC entry describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EntryType {
    /// Directory.
    Dir,
    /// Regular file, and its first chunk.
    Reg,
    /// Symbolic link.
    Symlink,
    /// Another name of a file in the same layer.
    Hardlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// A further chunk of the regular file before it.
    Chunk,
}

/// One entry of the TOC, its fields in the order in which the reference writer emits them.
///
/// Absent numbers are 0 and absent texts are empty, as the format has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct TocEntry {
    /// Name as it stands in the tar stream.
    pub name: String,
    /// What the entry describes.
    #[serde(rename = "type")]
    pub kind: EntryType,
    /// Size of a regular file in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub size: u64,
    /// Modification time, RFC 3339 in UTC; empty for the epoch.
    #[serde(rename = "modtime", skip_serializing_if = "String::is_empty")]
    pub mod_time: String,
    /// Target of a symbolic or hard link.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub link_name: String,
    /// Permission bits with setuid, setgid and sticky; file type bits are not to be relied on.
    #[serde(skip_serializing_if = "is_zero")]
    pub mode: u64,
    /// Owner.
    #[serde(skip_serializing_if = "is_zero")]
    pub uid: u64,
    /// Group.
    #[serde(skip_serializing_if = "is_zero")]
    pub gid: u64,
    /// Owner's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub user_name: String,
    /// Group's name.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group_name: String,
    /// Offset in the blob of the compressed member that holds the chunk.
    #[serde(skip_serializing_if = "is_zero")]
    pub offset: u64,
    /// Offset of the chunk in the uncompressed member.
    #[serde(skip_serializing_if = "is_zero")]
    pub inner_offset: u64,
    /// Major number of a device.
    #[serde(skip_serializing_if = "is_zero")]
    pub dev_major: u64,
    /// Minor number of a device.
    #[serde(skip_serializing_if = "is_zero")]
    pub dev_minor: u64,
    /// Extended attributes, values in base64; see [`encode_xattr`].
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, String>,
    /// Digest of the whole regular file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Offset of the chunk in its file.
    #[serde(skip_serializing_if = "is_zero")]
    pub chunk_offset: u64,
    /// Size of the chunk in bytes; 0 is "up to the end of the file".
    #[serde(skip_serializing_if = "is_zero")]
    pub chunk_size: u64,
    /// Digest of the chunk's uncompressed bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk_digest: Option<Digest>,
}

impl TocEntry {
    /// An entry of which everything but name and type is absent.
    pub fn new(name: impl Into<String>, kind: EntryType) -> Self {
        Self {
            name: name.into(),
            kind,
            size: 0,
            mod_time: String::new(),
            link_name: String::new(),
            mode: 0,
            uid: 0,
            gid: 0,
            user_name: String::new(),
            group_name: String::new(),
            offset: 0,
            inner_offset: 0,
            dev_major: 0,
            dev_minor: 0,
            xattrs: BTreeMap::new(),
            digest: None,
            chunk_offset: 0,
            chunk_size: 0,
            chunk_digest: None,
        }
    }
}

/// Why bytes are not a TOC that can be used.
#[derive(Debug, thiserror::Error)]
pub enum TocError {
    /// The document is larger than any that is read.
    #[error("the TOC is larger than the limit of {limit} bytes ({form})")]
    TooLarge {
        /// The limit that was met.
        limit: u64,
        /// "compressed" or "uncompressed".
        form: &'static str,
    },
    /// The document as a whole is not what it should be.
    #[error("the TOC is not a JSON document of the expected form")]
    Document {
        /// What the parser says, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// One entry is not what it should be. Entries count from 0.
    #[error("entry {entry} of the TOC is not valid at field `{field}`")]
    Entry {
        /// Position of the entry in the TOC.
        entry: usize,
        /// JSON key at which the entry fails, "type" also if that is missing.
        field: &'static str,
        /// What the parser says, with line and column.
        #[source]
        source: serde_json::Error,
    },
    /// A version of the format that this library does not know.
    #[error("the TOC is of version {found}; only version {VERSION} is known")]
    Version {
        /// The version in the document.
        found: u64,
    },
    /// The TOC member does not unfold to a tar stream.
    #[error("the TOC member of {compressed} bytes is not a sound gzip member that holds a tar entry")]
    Member {
        /// Compressed bytes at hand.
        compressed: usize,
        /// What the inflater or the tar reader says.
        #[source]
        source: std::io::Error,
    },
    /// The TOC's frame does not unfold.
    #[error("the {compressed} bytes of the TOC are not a sound zstd frame")]
    Frame {
        /// Compressed bytes at hand.
        compressed: usize,
        /// What the decompressor says.
        #[source]
        source: std::io::Error,
    },
    /// The first tar entry in the TOC member is not the TOC.
    #[error("the TOC member begins with the tar entry {found:?} instead of {TOC_TAR_NAME:?}")]
    WrongEntry {
        /// Name of the entry, made printable; empty if there is none.
        found: String,
    },
}

impl Toc {
    /// Reads the JSON form. Unknown keys are ignored, absent and null values are zero.
    pub fn parse(json: &[u8]) -> Result<Self, TocError> {
        json::parse(json)
    }

    /// Reads a TOC in the form that was verified: the JSON form, or the zstd frame that holds it, which is what some manifests
    /// name.
    pub fn parse_verified(document: &[u8]) -> Result<Self, TocError> {
        if document.starts_with(&crate::member::FRAME_MAGIC) {
            json::parse(&parse_frame(document)?.json)
        } else {
            json::parse(document)
        }
    }

    /// Writes the JSON form, byte for byte as the reference writer does (Go's `json.MarshalIndent` with tabs).
    pub fn to_json(&self) -> Vec<u8> {
        json::write(self)
    }
}

/// The value of an extended attribute as the TOC has it.
pub fn encode_xattr(value: &[u8]) -> String {
    BASE64.encode(value)
}

/// The value of an extended attribute from its form in the TOC; `None` if that is not base64.
pub fn decode_xattr(text: &str) -> Option<Vec<u8>> {
    BASE64.decode(text).ok()
}

/// The components of a name or hard link target: no empty ones, no `.`, and `..` resolved without leaving the root.
pub fn clean_path(name: &str) -> Vec<&str> {
    let mut components = Vec::new();
    for component in name.split('/') {
        match component {
            "" | "." => {}
            ".." => {
                components.pop();
            }
            _ => components.push(component),
        }
    }
    components
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

#[cfg(test)]
mod tests;
