//! The table of contents of an eStargz layer: its JSON form and its limits.
//!
//! Source of the format: stargz-snapshotter's `docs/estargz.md` and the bytes that its writer emits.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

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
/// Layer descriptor annotation with the size of the uncompressed layer in bytes.
pub const UNCOMPRESSED_SIZE_ANNOTATION: &str = "io.containers.estargz.uncompressed-size";

/// The TOC document.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Toc {
    /// Format version; 1 is the only one.
    pub version: u32,
    /// Entries in the order of the tar stream, each large file's further chunks right behind it.
    pub entries: Vec<TocEntry>,
}

/// What a TOC entry describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
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
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TocEntry {
    /// Name as it stands in the tar stream.
    pub name: String,
    /// What the entry describes.
    #[serde(rename = "type")]
    pub kind: EntryType,
    /// Size of a regular file in bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub size: u64,
    /// Modification time, RFC 3339 in UTC; empty for the epoch.
    #[serde(default, rename = "modtime", skip_serializing_if = "String::is_empty")]
    pub mod_time: String,
    /// Target of a symbolic or hard link.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub link_name: String,
    /// Permission bits with setuid, setgid and sticky; file type bits are not to be relied on.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub mode: u64,
    /// Owner.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub uid: u64,
    /// Group.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub gid: u64,
    /// Owner's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub user_name: String,
    /// Group's name.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub group_name: String,
    /// Offset in the blob of the compressed member that holds the chunk.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub offset: u64,
    /// Offset of the chunk in the uncompressed member.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub inner_offset: u64,
    /// Major number of a device.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dev_major: u64,
    /// Minor number of a device.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dev_minor: u64,
    /// Extended attributes, values in base64.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub xattrs: BTreeMap<String, String>,
    /// Digest of the whole regular file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<Digest>,
    /// Offset of the chunk in its file.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub chunk_offset: u64,
    /// Size of the chunk in bytes; 0 is "up to the end of the file".
    #[serde(default, skip_serializing_if = "is_zero")]
    pub chunk_size: u64,
    /// Digest of the chunk's uncompressed bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk_digest: Option<Digest>,
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}
