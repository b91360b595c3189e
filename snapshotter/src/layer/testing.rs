//! Layers made for tests: a blob with everything that the format allows, and the tree that it must give.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use estargz::digest::Digest;
use estargz::footer;
use estargz::index::ROOT_INO;
use estargz::toc::{EntryType, PREFETCH_LANDMARK, Toc, TocEntry, encode_member};
use flate2::Compression;
use flate2::write::GzEncoder;

use super::cache::{CachedLayer, LayerStore, Origin};
use super::fs::LayerFs;

/// A layer and the contents of its files.
pub(super) struct Sample {
    pub(super) blob: Bytes,
    pub(super) toc_json: Vec<u8>,
    pub(super) toc_digest: Digest,
    pub(super) toc_offset: u64,
    pub(super) files: BTreeMap<String, Vec<u8>>,
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Packing {
    /// Uncompressed bytes per chunk.
    pub(super) chunk: usize,
    /// Chunks packed into one member.
    pub(super) per_member: usize,
    /// Files before the landmark; none without one.
    pub(super) prioritized: Option<usize>,
}

impl Default for Packing {
    fn default() -> Self {
        Self {
            chunk: 64 << 10,
            per_member: 1,
            prioritized: None,
        }
    }
}

/// Bytes that hardly compress, different for each seed.
pub(super) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[2]
    };
    (0..length).map(|_| next()).collect()
}

#[derive(Default)]
struct Packer {
    blob: Vec<u8>,
    /// Uncompressed bytes of the open member, and its chunks.
    member: Vec<u8>,
    chunks: usize,
}

impl Packer {
    fn close(&mut self) {
        if !self.member.is_empty() {
            let mut encoder = GzEncoder::new(&mut self.blob, Compression::fast());
            encoder.write_all(&self.member).unwrap();
            encoder.finish().unwrap();
            self.member.clear();
        }
        self.chunks = 0;
    }

    /// Adds a chunk; where its member and the chunk in it begin.
    fn add(&mut self, chunk: &[u8], per_member: usize) -> (u64, u64) {
        if self.chunks == per_member {
            // What follows a payload in a real layer: the next file's tar header.
            self.member.extend_from_slice(&[0; 700]);
            self.close();
        }
        let place = (self.blob.len() as u64, self.member.len() as u64);
        self.member.extend_from_slice(chunk);
        self.chunks += 1;
        place
    }
}

impl Sample {
    pub(super) fn new(files: Vec<(String, Vec<u8>)>, packing: Packing) -> Self {
        Self::with_entries(files, packing, Vec::new())
    }

    /// A layer of `files` and of `others`, entries without content.
    pub(super) fn with_entries(files: Vec<(String, Vec<u8>)>, packing: Packing, others: Vec<TocEntry>) -> Self {
        let mut packer = Packer::default();
        let mut entries = others;
        // In a real layer the first member holds the first tar header.
        packer.member.extend_from_slice(&[0; 512]);
        packer.close();
        for (number, (name, content)) in files.iter().enumerate() {
            if packing.prioritized == Some(number) {
                push_landmark(&mut packer, &mut entries);
            }
            push_file(&mut packer, &mut entries, name, content, packing);
        }
        if packing.prioritized == Some(files.len()) {
            push_landmark(&mut packer, &mut entries);
        }
        packer.close();
        let toc_json = Toc { version: 1, entries }.to_json();
        let toc_offset = packer.blob.len() as u64;
        packer.member = encode_member(&toc_json);
        packer.close();
        packer.blob.extend_from_slice(&footer::encode(toc_offset));
        let toc_digest = Digest::of(&toc_json);
        Self {
            blob: packer.blob.into(),
            toc_json,
            toc_digest,
            toc_offset,
            files: files.into_iter().collect(),
        }
    }

    /// `count` files of `length` bytes of noise, and one of zeros.
    pub(super) fn uniform(count: usize, length: usize, packing: Packing) -> Self {
        let mut files: Vec<_> = (0..count)
            .map(|n| (format!("dir{}/file{n:04}", n % 7), noise(n as u64 + 1, length)))
            .collect();
        files.push(("zeros".to_owned(), vec![0; length]));
        Self::new(files, packing)
    }

    pub(super) fn origin(&self) -> Origin {
        Origin {
            image: "registry.test/image:1".to_owned(),
            layer_digest: Digest::of(&self.blob),
            blob_size: self.blob.len() as u64,
            toc_offset: self.toc_offset,
        }
    }

    pub(super) fn create(&self, store: &LayerStore) -> CachedLayer {
        store.create(&self.toc_digest, &self.toc_json, &self.origin()).unwrap()
    }

    /// Compressed bytes of all members that hold chunks.
    pub(super) fn member_bytes(&self, layer: &CachedLayer) -> u64 {
        let index = layer.index();
        (0..index.member_count())
            .filter_map(|member| index.member(member))
            .map(|member| member.end - member.start)
            .sum()
    }
}

fn push_landmark(packer: &mut Packer, entries: &mut Vec<TocEntry>) {
    // A landmark always begins a member.
    packer.close();
    push_file(
        packer,
        entries,
        PREFETCH_LANDMARK,
        &[0xf],
        Packing {
            chunk: 1,
            per_member: 1,
            prioritized: None,
        },
    );
    packer.close();
}

fn push_file(packer: &mut Packer, entries: &mut Vec<TocEntry>, name: &str, content: &[u8], packing: Packing) {
    let mut file = TocEntry::new(name, EntryType::Reg);
    file.size = content.len() as u64;
    file.mode = 0o644;
    file.digest = Some(Digest::of(content));
    if content.is_empty() {
        entries.push(file);
        return;
    }
    for (number, chunk) in content.chunks(packing.chunk).enumerate() {
        let (offset, inner_offset) = packer.add(chunk, packing.per_member);
        let mut entry = if number == 0 {
            file.clone()
        } else {
            TocEntry::new(name, EntryType::Chunk)
        };
        entry.offset = offset;
        entry.inner_offset = inner_offset;
        entry.chunk_offset = (number * packing.chunk) as u64;
        if content.len() > packing.chunk {
            entry.chunk_size = chunk.len() as u64;
        }
        entry.chunk_digest = Some(Digest::of(chunk));
        entries.push(entry);
    }
}

/// Inode of a path without a leading slash.
pub(super) fn resolve(fs: &LayerFs, path: &str) -> u64 {
    path.split('/')
        .fold(ROOT_INO, |dir, name| fs.lookup(dir, name.as_bytes()).unwrap().unwrap())
}

/// Reads a whole file through `fs`.
pub(super) async fn read_file(fs: &LayerFs, path: &str) -> Vec<u8> {
    let ino = resolve(fs, path);
    let size = fs.attributes(ino).unwrap().size;
    let mut content = Vec::new();
    while (content.len() as u64) < size {
        let piece = fs.read(ino, content.len() as u64, 128 << 10).await.unwrap();
        assert!(!piece.is_empty());
        content.extend_from_slice(&piece);
    }
    content
}

/// What `data` holds outside resident chunks; nothing but zeros, or something unverified got in.
pub(super) fn assert_only_verified(layer: &CachedLayer) {
    let mut data = std::fs::read(layer.dir().join("data")).unwrap();
    let index = layer.index();
    for id in (0..index.chunk_count()).filter(|&id| layer.residency().contains(id)) {
        let chunk = index.chunk(id).unwrap();
        let start = usize::try_from(chunk.data_offset).unwrap();
        let bytes = &mut data[start..start + chunk.size as usize];
        assert_eq!(Digest::of(&*bytes), chunk.digest, "chunk {id} is marked resident");
        bytes.fill(0);
    }
    assert!(data.iter().all(|&byte| byte == 0), "bytes outside resident chunks");
}

/// A store in a directory of its own.
pub(super) struct TestStore {
    pub(super) dir: tempfile::TempDir,
    pub(super) store: LayerStore,
}

impl TestStore {
    pub(super) fn new() -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        let store = LayerStore::open(dir.path()).unwrap();
        Arc::new(Self { dir, store })
    }
}
