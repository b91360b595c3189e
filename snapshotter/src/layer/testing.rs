//! Layers made for tests: a blob with everything that the format allows, and the tree that it must give.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;

use bytes::Bytes;
use estargz::digest::Digest;
use estargz::footer::{self, FooterKind};
use estargz::index::ROOT_INO;
use estargz::member::Compression;
use estargz::toc::{EntryType, PREFETCH_LANDMARK, Toc, TocEntry, encode_member};
use flate2::write::GzEncoder;

use super::cache::{CachedLayer, LayerStore, Origin};
use super::fs::LayerFs;

/// A layer and the contents of its files.
pub(super) struct Sample {
    pub(super) blob: Bytes,
    pub(super) toc_json: Vec<u8>,
    pub(super) toc_digest: Digest,
    pub(super) toc_offset: u64,
    pub(super) compression: Compression,
    /// The TOC as the blob, or its TOC image, has it.
    pub(super) compressed_toc: Bytes,
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

/// The footer that says that the TOC is in another image.
const EXTERNAL_TOC_FOOTER: &[u8] =
    b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x15\0SG\x11\0STARGZEXTERNALTOC\x01\0\0\xff\xff\0\0\0\0\0\0\0\0";

#[derive(Default)]
struct Packer {
    compression: Compression,
    blob: Vec<u8>,
    /// Uncompressed bytes of the open member, and its chunks.
    member: Vec<u8>,
    chunks: usize,
}

impl Packer {
    fn close(&mut self) {
        if !self.member.is_empty() {
            let member = std::mem::take(&mut self.member);
            self.blob.extend(compressed(self.compression, &member));
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

fn compressed(compression: Compression, bytes: &[u8]) -> Vec<u8> {
    match compression {
        Compression::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
        // As a stream, which is how writers do it.
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
    }
}

impl Sample {
    pub(super) fn new(files: Vec<(String, Vec<u8>)>, packing: Packing) -> Self {
        Self::with_entries(files, packing, Vec::new())
    }

    /// A layer of `files` and of `others`, entries without content.
    pub(super) fn with_entries(files: Vec<(String, Vec<u8>)>, packing: Packing, others: Vec<TocEntry>) -> Self {
        Self::build(files, packing, others, FooterKind::Gzip)
    }

    /// Like [`Self::uniform`], in another form of the format.
    pub(super) fn of_form(form: FooterKind, count: usize, length: usize, packing: Packing) -> Self {
        Self::build(Self::uniform_files(count, length), packing, Vec::new(), form)
    }

    fn build(files: Vec<(String, Vec<u8>)>, packing: Packing, others: Vec<TocEntry>, form: FooterKind) -> Self {
        let compression = form.compression();
        let mut packer = Packer {
            compression,
            ..Packer::default()
        };
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
        let compressed_toc = match compression {
            Compression::Gzip => compressed(compression, &encode_member(&toc_json)),
            Compression::Zstd => compressed(compression, &toc_json),
        };
        match form {
            FooterKind::ExternalToc => packer.blob.extend_from_slice(EXTERNAL_TOC_FOOTER),
            FooterKind::ZstdChunked => {
                let raw_length = toc_json.len() as u64;
                let end = footer::zstd::encode(toc_offset, &compressed_toc, raw_length);
                packer.blob.extend(end.unwrap());
            }
            FooterKind::Gzip | FooterKind::LegacyGzip => {
                packer.blob.extend_from_slice(&compressed_toc);
                packer.blob.extend_from_slice(&footer::encode(toc_offset));
            }
        }
        let toc_digest = Digest::of(&toc_json);
        Self {
            blob: packer.blob.into(),
            toc_json,
            toc_digest,
            toc_offset,
            compression,
            compressed_toc: compressed_toc.into(),
            files: files.into_iter().collect(),
        }
    }

    /// The same layer as a manifest of containers/storage names it: by its compressed TOC.
    pub(super) fn named_by_frame(mut self) -> Self {
        self.toc_json = self.compressed_toc.to_vec();
        self.toc_digest = Digest::of(&self.toc_json);
        self
    }

    /// `count` files of `length` bytes of noise, and one of zeros.
    pub(super) fn uniform(count: usize, length: usize, packing: Packing) -> Self {
        Self::new(Self::uniform_files(count, length), packing)
    }

    fn uniform_files(count: usize, length: usize) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = (0..count)
            .map(|n| (format!("dir{}/file{n:04}", n % 7), noise(n as u64 + 1, length)))
            .collect();
        files.push(("zeros".to_owned(), vec![0; length]));
        files
    }

    pub(super) fn origin(&self) -> Origin {
        Origin {
            image: "registry.test/image:1".to_owned(),
            layer_digest: Digest::of(&self.blob),
            blob_size: self.blob.len() as u64,
            toc_offset: self.toc_offset,
            compression: self.compression,
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
        let piece = fs.read(ino, content.len() as u64, 128 << 10, 0).await.unwrap();
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

/// A tmpfs on a directory of its own, gone at the end however the test ends.
pub(crate) struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    pub(crate) fn new(options: &std::ffi::CStr) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("tmpfs", directory.path(), "tmpfs", flags, Some(options)).unwrap();
        Self(directory)
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.0.path()
    }

    /// Somebody else takes all that is free.
    pub(crate) fn fill(&self) {
        let mut ballast = std::fs::File::create(self.path().join("ballast")).unwrap();
        while ballast.write_all(&[1; 4096]).is_ok() {}
    }

    /// And gives it back.
    pub(crate) fn empty(&self) {
        std::fs::remove_file(self.path().join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.path(), rustix::mount::UnmountFlags::DETACH);
    }
}
