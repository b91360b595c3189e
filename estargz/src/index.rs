//! The compact index of a layer.

/// What the index needs to know about the blob besides its TOC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlobLayout {
    /// Size of the whole blob in bytes.
    pub blob_size: u64,
    /// Offset of the TOC member, where the last member with file content ends.
    pub toc_offset: u64,
}
