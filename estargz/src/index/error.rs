//! What can be wrong with a TOC as a whole, or with an index file.

use super::tree::MAX_INODES;
use crate::member::MAX_MEMBER_SPAN;
use crate::toc::{MAX_CHUNK_BYTES, MAX_DEPTH, MAX_LINK_BYTES, MAX_NAME_BYTES, MAX_XATTR_VALUE_BYTES};

/// Why there is no index.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// One entry of the TOC does not make sense. Entries count from 0.
    #[error("entry {entry} of the TOC ({name:?}): {fault}")]
    Entry {
        /// Position of the entry in the TOC.
        entry: usize,
        /// Its name, at most 200 characters.
        name: String,
        /// What is wrong with it.
        fault: EntryFault,
    },
    /// The TOC is not inside the blob.
    #[error("the TOC at {toc_offset} does not lie in the blob of {blob_size} bytes")]
    Layout {
        /// Where the TOC member is said to begin.
        toc_offset: u64,
        /// Size of the blob.
        blob_size: u64,
    },
    /// The TOC names more files than any index holds.
    #[error("the TOC has more than {MAX_INODES} files and directories, parents that it implies included")]
    TooManyInodes,
    /// A table of the index outgrew its numbers.
    #[error("the {table} of the index outgrows 4 GiB")]
    TooLarge {
        /// Which table.
        table: &'static str,
    },
    /// The bytes are no index file.
    #[error("not an index file: {found}")]
    NotAnIndex {
        /// What was found instead.
        found: &'static str,
    },
    /// The index file is of another version of this software.
    #[error("the index file has format id {found}, this version reads 1 and 2")]
    Format {
        /// Id in the file.
        found: u32,
    },
    /// The index file is not what was written.
    #[error("the index file of {size} bytes is damaged: {what} at {table} {record}")]
    Damaged {
        /// Size of the file.
        size: usize,
        /// What does not fit.
        what: &'static str,
        /// Where.
        table: &'static str,
        /// Which record of the table.
        record: usize,
    },
}

/// What can be wrong with one entry of a TOC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryFault {
    /// A number that the file system has no room for.
    #[error("{field} is {value}, the limit is {limit}")]
    Number {
        /// JSON key of the number.
        field: &'static str,
        /// Its value.
        value: u64,
        /// The largest value.
        limit: u64,
    },
    /// A modification time that is none.
    #[error("modtime {0:?} is not an RFC 3339 time")]
    Time(String),
    /// A name of the path is too long.
    #[error("a name in the path has {0} bytes, the limit is {MAX_NAME_BYTES}")]
    NameTooLong(usize),
    /// The path has too many components.
    #[error("the path has {0} components, the limit is {MAX_DEPTH}")]
    TooDeep(usize),
    /// A NUL byte where the kernel knows none.
    #[error("{field} contains a NUL byte")]
    Nul {
        /// JSON key of the text.
        field: &'static str,
    },
    /// A whiteout that names no file.
    #[error("the whiteout names no file that could be removed")]
    Whiteout,
    /// The root is something else than a directory.
    #[error("the root of the layer is not a directory")]
    Root,
    /// The entry lies in something else than a directory.
    #[error("its parent {parent:?} (entry {parent_entry}) is not a directory")]
    ParentNotDirectory {
        /// Position of the parent in the TOC.
        parent_entry: usize,
        /// The parent's name.
        parent: String,
    },
    /// A hard link to nothing.
    #[error("hard link to {0:?}, which is not in the layer")]
    LinkTargetMissing(String),
    /// A hard link to a directory.
    #[error("hard link to {0:?}, which is a directory")]
    LinkToDirectory(String),
    /// A hard link that leads back to itself.
    #[error("hard link to {0:?}, which leads back to itself")]
    LinkLoop(String),
    /// A symbolic link without a target, or with one that is too long.
    #[error("symbolic link with a target of {0} bytes, 1 to {MAX_LINK_BYTES} are possible")]
    SymlinkLength(usize),
    /// An extended attribute that cannot be one.
    #[error(
        "extended attribute {name:?} has no name, or a value that is not base64 of at most {MAX_XATTR_VALUE_BYTES} bytes"
    )]
    Xattr {
        /// Name of the attribute.
        name: String,
    },
    /// A chunk that continues no file.
    #[error("a chunk must follow the regular file it belongs to")]
    StrayChunk,
    /// The chunks of a file do not follow each other.
    #[error("the chunk at file offset {found} should begin at {expected}: the file's chunks leave a gap or overlap")]
    ChunkPlace {
        /// Where the chunk begins in its file.
        found: u64,
        /// Where the chunk before it ended.
        expected: u64,
    },
    /// A chunk that is empty or leaves its file.
    #[error("the chunk at file offset {offset} has {size} bytes, but the file has {file_size}")]
    ChunkSize {
        /// Where the chunk begins in its file.
        offset: u64,
        /// Its size.
        size: u64,
        /// Size of the file.
        file_size: u64,
    },
    /// The chunks of a file end before the file does.
    #[error("the file's chunks end at {end}, but the file has {file_size} bytes")]
    ChunksMissing {
        /// Where the last chunk ends.
        end: u64,
        /// Size of the file.
        file_size: u64,
    },
    /// A chunk that is too large to be verified in memory.
    #[error("the chunk at file offset {offset} has {size} bytes, the limit is {MAX_CHUNK_BYTES}")]
    ChunkTooLarge {
        /// Where the chunk begins in its file.
        offset: u64,
        /// Its size.
        size: u64,
    },
    /// A chunk whose contents nothing vouches for.
    #[error("no chunk digest for the chunk at file offset {offset}")]
    NoChunkDigest {
        /// Where the chunk begins in its file.
        offset: u64,
    },
    /// A chunk outside the part of the blob that holds files.
    #[error("offset {offset} is not before the TOC at {toc_offset}")]
    Offset {
        /// Offset of the chunk's member.
        offset: u64,
        /// Where the TOC member begins.
        toc_offset: u64,
    },
    /// A chunk too far inside its member.
    #[error("the chunk ends {end} bytes into its member, the limit is {MAX_MEMBER_SPAN}")]
    MemberSpan {
        /// Where the chunk ends in the uncompressed member.
        end: u64,
    },
    /// A member that would have to hold more than its compression can say in so few bytes.
    #[error("the chunk ends {end} bytes into a member of {compressed} compressed bytes, which cannot hold that much")]
    Expansion {
        /// Where the chunk ends in the uncompressed member.
        end: u64,
        /// Compressed bytes up to the next member.
        compressed: u64,
    },
    /// A member whose chunks lie apart in the TOC.
    #[error("the member at offset {offset} also holds chunks of files that are not next to this one in the TOC")]
    ScatteredMember {
        /// Offset of the member.
        offset: u64,
    },
}

impl IndexError {
    /// Whether the TOC makes sense and is only beyond a limit.
    pub fn is_limit(&self) -> bool {
        match self {
            Self::TooManyInodes | Self::TooLarge { .. } => true,
            Self::Entry { fault, .. } => matches!(
                fault,
                EntryFault::NameTooLong(_)
                    | EntryFault::TooDeep(_)
                    | EntryFault::ChunkTooLarge { .. }
                    | EntryFault::MemberSpan { .. }
            ),
            Self::Layout { .. } | Self::NotAnIndex { .. } | Self::Format { .. } | Self::Damaged { .. } => false,
        }
    }

    pub(super) fn entry(entry: usize, name: &str, fault: EntryFault) -> Self {
        Self::Entry {
            entry,
            name: shortened(name),
            fault,
        }
    }
}

pub(super) fn shortened(text: &str) -> String {
    text.chars().take(200).collect()
}
