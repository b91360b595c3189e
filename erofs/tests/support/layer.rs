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

/// Where an index file's inode table begins, behind its header, and bytes of a record in it.
pub(crate) const INODES_AT: usize = 184;
pub(crate) const INODE_BYTES: usize = 88;

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
            layer.offset += 100;
            let offset = layer.offset;
            layer.offset += chunk_size / 1000;
            (offset, Some(Digest::of(offset.to_le_bytes())))
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

/// A layer with one of everything.
pub(crate) fn everything() -> Layer {
    let mut layer = Layer::default();
    let selinux = |entry: &mut TocEntry| set_xattr(entry, "security.selinux", b"system_u:object_r:bin_t:s0\0");
    layer
        .add("./", EntryType::Dir, |root| {
            root.mode = 0o751;
            root.mod_time = "2024-05-06T07:08:09.123456789Z".into();
            selinux(root);
        })
        .dir("bin")
        .file("bin/tool", 5000, |file| {
            file.mode = 0o6755;
            (file.uid, file.gid) = (1000, u64::from(u32::MAX - 1));
            file.mod_time = "1969-12-31T23:59:58.25Z".into();
            selinux(file);
            set_xattr(file, "security.capability", &capability(1 << 13));
            set_xattr(file, "user.comment", b"");
            set_xattr(file, "user.large", &[7; 5000]);
            set_xattr(file, "system.unknown", b"left out");
        })
        .file("bin/aligned", 8192, |file| selinux(file))
        .file("bin/empty", 0, |file| {
            file.mod_time = "1901-12-13T20:45:51.999999999Z".into()
        })
        .file("bin/one", 1, |file| file.mod_time = "2514-05-30T01:53:04Z".into())
        .hard_link("other-name", "bin/tool")
        .add("acl", EntryType::Dir, |dir| {
            dir.mode = 0o1777;
            set_xattr(dir, "system.posix_acl_access", &acl(7, 1000, 5, 7, 5, 7));
            set_xattr(dir, "system.posix_acl_default", &acl(7, 1000, 5, 7, 5, 7));
        })
        .hard_link("acl/third-name", "other-name")
        .symlink("short", "bin/tool")
        .symlink("inline", &"i/".repeat(2016))
        .symlink("long", &"l/".repeat(2017))
        .symlink("longest", &"x".repeat(4095))
        .add("null", EntryType::Char, |entry| {
            (entry.dev_major, entry.dev_minor) = (1, 3)
        })
        .add("disk", EntryType::Block, |entry| {
            (entry.dev_major, entry.dev_minor, entry.mode) = (4095, 1_048_575, 0o660);
        })
        .add("pipe", EntryType::Fifo, |entry| {
            entry.mod_time = "2038-01-19T03:14:08.000000001Z".into()
        })
        .file("bin/.wh.gone", 0, |_| {})
        .dir("opaque")
        .file("opaque/.wh..wh..opq", 0, |_| {})
        .file("opaque/new", 100, |_| {})
        .dir("sorted");
    for name in [
        "!",
        "-",
        ".-",
        ".a",
        "..a",
        "a",
        "A",
        "\u{7f}",
        "ä",
        "...",
        &"n".repeat(255),
    ] {
        layer.file(&format!("sorted/{name}"), 3, |_| {});
    }
    // A directory of a few blocks, one whose last block is full to the last byte, and a deep one.
    for at in 0..300 {
        layer.file(&format!("blocks/{at:04}-{}", "x".repeat(at % 40)), 10, |_| {});
    }
    for (at, length) in [196; 19].into_iter().chain([105]).enumerate() {
        layer.file(&format!("full/{at:03}{}", "f".repeat(length - 3)), 0, |_| {});
    }
    layer.file(&format!("{}/file", ["deep"; 100].join("/")), 20, |_| {});
    layer
}

/// A few files of every kind, so that most bytes of the index mean something.
pub(crate) fn small() -> Layer {
    let mut layer = Layer::default();
    layer
        .file("d/f", 10, |file| set_xattr(file, "user.a", b"value"))
        .file("d/g", 5000, |file| set_xattr(file, "user.a", b"value"))
        .hard_link("h", "d/f")
        .symlink("s", "d/g")
        .dir("d/e/e")
        .add("c", EntryType::Char, |entry| entry.dev_minor = 3)
        .add("p", EntryType::Fifo, |_| {});
    layer
}

/// An index whose bytes are changed, with the checksum made right.
pub(crate) fn changed(mut bytes: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut bytes);
    let checksum = libdeflater::crc32(&bytes[16..]);
    bytes[12..16].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A file capability of version 2: these are permitted and in effect.
pub(crate) fn capability(permitted: u32) -> Vec<u8> {
    [0x0200_0001, permitted, 0, 0, 0]
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect()
}

/// An access control list with rights for one more user.
pub(crate) fn acl(owner: u16, user: u32, rights: u16, group: u16, mask: u16, other: u16) -> Vec<u8> {
    let mut list = 2u32.to_le_bytes().to_vec();
    let entries = [
        (1, owner, u32::MAX),
        (2, rights, user),
        (4, group, u32::MAX),
        (0x10, mask, u32::MAX),
        (0x20, other, u32::MAX),
    ];
    for (tag, rights, id) in entries {
        list.extend_from_slice(&u16::to_le_bytes(tag));
        list.extend_from_slice(&rights.to_le_bytes());
        list.extend_from_slice(&u32::to_le_bytes(id));
    }
    list
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

/// Writes the contents of all files into a data file.
pub(crate) fn fill_data<B: AsRef<[u8]>>(data: &File, index: &LayerIndex<B>) {
    for ino in 1..=u64::from(index.inode_count()) {
        let inode = index.inode(ino).unwrap();
        if inode.kind == FileKind::Regular {
            let bytes = content(ino, 0, usize::try_from(inode.size).unwrap());
            data.write_all_at(&bytes, inode.data_offset).unwrap();
        }
    }
}
