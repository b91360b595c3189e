//! Why there is no image of a layer.

use crate::format::BLOCK;

/// Largest image in bytes, 1 GiB. The largest TOC that is read gives less than half of that; an index made up by hand,
/// whose files share names and attributes in the index but cannot in an image, gives whatever it likes.
pub const MAX_IMAGE_BYTES: usize = 1 << 30;
/// Largest data file in bytes, a block less than 16 TiB: blocks have 32-bit numbers, and the last one means a hole.
pub const MAX_DATA_BYTES: u64 = u32::MAX as u64 * BLOCK as u64;
/// Most extended attributes in a layer, a file's counted for each file: 8 for each of as many files as an index holds.
pub const MAX_ATTRIBUTES: usize = 1 << 24;
/// Most bytes of a path that a message shows.
const SHOWN_PATH_BYTES: usize = 200;

/// Why there is no image of a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The contents need more block numbers than there are.
    #[error("the data file of {size} bytes is larger than EROFS can address ({MAX_DATA_BYTES} bytes)")]
    DataTooLarge {
        /// Size of the data file.
        size: u64,
    },
    /// The metadata need too much room.
    #[error("the image would have more than {MAX_IMAGE_BYTES} bytes")]
    TooLarge,
    /// Too many extended attributes in the whole layer.
    #[error("the layer has more than {MAX_ATTRIBUTES} extended attributes")]
    TooManyAttributes,
    /// An attribute's value is one byte too long for its length field.
    #[error("attribute {name:?} of {path:?} has {size} bytes, EROFS has room for 65535")]
    ValueTooLong {
        /// The file.
        path: String,
        /// The attribute.
        name: String,
        /// Size of the value.
        size: usize,
    },
    /// A file has more attributes than fit behind its inode.
    #[error("the attributes of {path:?} take {size} bytes, EROFS has room for 262148")]
    AttributesTooLong {
        /// The file.
        path: String,
        /// What they would take.
        size: usize,
    },
    /// A device number that Linux has no room for.
    #[error("{path:?} is device {major}:{minor}, the limits are 4095:1048575")]
    Device {
        /// The file.
        path: String,
        /// Its major number.
        major: u32,
        /// Its minor number.
        minor: u32,
    },
    /// The index is not what it was when it was opened.
    #[error("the index does not fit together at inode {ino}: it changed while it was used")]
    Changed {
        /// Where it was seen.
        ino: u64,
    },
}

/// A path or name as messages show it.
pub(crate) fn shown(bytes: &[u8]) -> String {
    let shown = bytes.get(..SHOWN_PATH_BYTES).unwrap_or(bytes);
    String::from_utf8_lossy(shown).into_owned()
}
