//! Layers made entry by entry, and data files with contents that say where they belong.

use std::fs::File;
use std::os::unix::fs::FileExt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use estargz::digest::Digest;
use estargz::index::{self, BlobLayout, FileKind, LayerIndex};
use estargz::member::Compression;
use estargz::toc::{EntryType, MAX_CHUNK_BYTES, Toc, TocEntry};

/// A layer whose blob is as large as it takes.
const LAYOUT: BlobLayout = BlobLayout {
    blob_size: 1 << 50,
    toc_offset: 1 << 49,
    compression: Compression::Gzip,
};

/// The entries of a layer so far.
#[derive(Debug, Default, Clone)]
pub(crate) struct Layer {
    entries: Vec<TocEntry>,
    offset: u64,
}

impl Layer {
    /// Adds an entry of any kind but a regular file with content, with changes to it.
    pub(crate) fn add(&mut self, name: &str, kind: EntryType, change: impl FnOnce(&mut TocEntry)) -> &mut Self {
        let mut entry = TocEntry::new(name, kind);
        entry.mode = if kind == EntryType::Dir { 0o755 } else { 0o644 };
        change(&mut entry);
        self.entries.push(entry);
        self
    }

    /// Adds a directory.
    pub(crate) fn dir(&mut self, name: &str) -> &mut Self {
        self.add(name, EntryType::Dir, |_| {})
    }

    /// Adds a regular file, in chunks of at most the largest size.
    pub(crate) fn file(&mut self, name: &str, size: u64, change: impl FnOnce(&mut TocEntry)) -> &mut Self {
        let chunk = |layer: &mut Self, chunk_size: u64| {
            // A member may not unfold to more than deflate can say.
            layer.offset += chunk_size / 1000 + 100;
            (layer.offset, Some(Digest::of(layer.offset.to_le_bytes())))
        };
        let mut file = TocEntry::new(name, EntryType::Reg);
        file.mode = 0o644;
        file.size = size;
        change(&mut file);
        if size == 0 {
            self.entries.push(file);
            return self;
        }
        file.chunk_size = size.min(MAX_CHUNK_BYTES);
        (file.offset, file.chunk_digest) = chunk(self, file.chunk_size);
        self.entries.push(file);
        let mut at = MAX_CHUNK_BYTES;
        while at < size {
            let mut entry = TocEntry::new(name, EntryType::Chunk);
            entry.chunk_offset = at;
            entry.chunk_size = (size - at).min(MAX_CHUNK_BYTES);
            (entry.offset, entry.chunk_digest) = chunk(self, entry.chunk_size);
            self.entries.push(entry);
            at += MAX_CHUNK_BYTES;
        }
        self
    }

    /// Adds a symbolic link.
    pub(crate) fn symlink(&mut self, name: &str, target: &str) -> &mut Self {
        self.add(name, EntryType::Symlink, |entry| entry.link_name = target.into())
    }

    /// Adds another name of a file.
    pub(crate) fn hard_link(&mut self, name: &str, target: &str) -> &mut Self {
        self.add(name, EntryType::Hardlink, |entry| entry.link_name = target.into())
    }

    /// Bytes of the index file.
    pub(crate) fn index_bytes(&self) -> Vec<u8> {
        let toc = Toc {
            version: 1,
            entries: self.entries.clone(),
        };
        index::build(&toc, LAYOUT, Digest::of("a layer")).unwrap()
    }

    /// The index.
    pub(crate) fn index(&self) -> LayerIndex<Vec<u8>> {
        LayerIndex::open(self.index_bytes()).unwrap()
    }
}

/// Gives an entry an attribute.
pub(crate) fn set_xattr(entry: &mut TocEntry, name: &str, value: &[u8]) {
    entry.xattrs.insert(name.into(), BASE64.encode(value));
}

/// What file `ino` has at `offset`.
pub(crate) fn content(ino: u64, offset: u64, size: usize) -> Vec<u8> {
    let words = (offset / 8..).flat_map(|word| {
        let mixed = (word ^ ino << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 29 | 1).to_le_bytes()
    });
    let skip = usize::try_from(offset % 8).unwrap();
    words.skip(skip).take(size).collect()
}

/// Writes the contents of all files up to `most` bytes of each into a data file.
pub(crate) fn fill_data<B: AsRef<[u8]>>(data: &File, index: &LayerIndex<B>, most: u64) {
    data.set_len(index.data_size()).unwrap();
    for ino in 1..=u64::from(index.inode_count()) {
        let inode = index.inode(ino).unwrap();
        if inode.kind == FileKind::Regular {
            let bytes = content(ino, 0, usize::try_from(inode.size.min(most)).unwrap());
            data.write_all_at(&bytes, inode.data_offset).unwrap();
        }
    }
}
