//! Which chunks of a layer are in `data`: a bitmap in memory and its checkpointed form on disk.
//!
//! A bit is set only after its chunk's verified bytes were written, and is cleared only when the disk lost them or before they are
//! given up. The file form names the layer and the
//! layout that its bits belong to and ends in a checksum, so a torn, foreign or damaged file is recognised and dropped as a whole:
//! losing bits costs another fetch, a wrong bit would serve zeros.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use estargz::digest::Digest;

const MAGIC: [u8; 8] = *b"HULLRSDT";
const FORMAT: u32 = 1;
const DIGEST: usize = 32;
const HEADER: usize = MAGIC.len() + 4 + 4 + DIGEST + DIGEST;

/// Why a residency file was not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ResidencyError {
    /// Not as long as a bitmap for this many chunks is.
    #[error("residency file has {found} bytes instead of {expected}")]
    Length {
        /// Bytes that a bitmap of this layer has.
        expected: usize,
        /// Bytes that were there.
        found: usize,
    },
    /// Torn or damaged.
    #[error("residency file does not match its checksum")]
    Checksum,
    /// Not written for this layer, this layout or by this format.
    #[error("residency file belongs to another layer, layout or format")]
    Foreign,
}

/// The resident chunks of one layer.
#[derive(Debug)]
pub struct Residency {
    words: Box<[AtomicU64]>,
    chunks: u32,
    resident: AtomicU32,
}

/// The bits of a [`Residency`] at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot(Box<[u64]>);

impl Snapshot {
    /// Number of resident chunks.
    pub fn count(&self) -> u32 {
        self.0.iter().map(|word| word.count_ones()).sum()
    }

    /// Whether the chunk was resident.
    pub fn contains(&self, chunk: u32) -> bool {
        let (word, mask) = position(chunk);
        self.0.get(word).is_some_and(|bits| bits & mask != 0)
    }

    /// Forgets a chunk.
    pub fn remove(&mut self, chunk: u32) {
        let (word, mask) = position(chunk);
        if let Some(bits) = self.0.get_mut(word) {
            *bits &= !mask;
        }
    }
}

/// What ties a bitmap to its layer: the TOC, and the exact index that says where in `data` each chunk lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Binding {
    /// Digest of the layer's TOC.
    pub toc: Digest,
    /// Digest of the layer's index file.
    pub index: Digest,
}

impl Residency {
    /// A bitmap of `chunks` chunks, none of them resident.
    pub fn empty(chunks: u32) -> Self {
        Self {
            words: (0..word_count(chunks)).map(|_| AtomicU64::new(0)).collect(),
            chunks,
            resident: AtomicU32::new(0),
        }
    }

    /// The bitmap in the file form `bytes`.
    pub fn decode(bytes: &[u8], binding: &Binding, chunks: u32) -> Result<Self, ResidencyError> {
        let expected = HEADER + word_count(chunks) * 8 + DIGEST;
        if bytes.len() != expected {
            return Err(ResidencyError::Length {
                expected,
                found: bytes.len(),
            });
        }
        let (body, checksum) = bytes.split_at(expected - DIGEST);
        if Digest::of(body).as_bytes() != checksum {
            return Err(ResidencyError::Checksum);
        }
        let (header, bitmap) = body.split_at(HEADER);
        if header != encode_header(binding, chunks) {
            return Err(ResidencyError::Foreign);
        }
        let words: Box<[AtomicU64]> = bitmap
            .chunks_exact(8)
            .map(|word| AtomicU64::new(u64::from_le_bytes(word.try_into().unwrap_or_default())))
            .collect();
        // Bits past the last chunk would make the count, and with it "complete", wrong.
        if let (Some(last), used @ 1..) = (words.last(), chunks % 64)
            && last.load(Ordering::Relaxed) >> used != 0
        {
            return Err(ResidencyError::Checksum);
        }
        let resident = words.iter().map(|word| word.load(Ordering::Relaxed).count_ones()).sum();
        Ok(Self {
            words,
            chunks,
            resident: AtomicU32::new(resident),
        })
    }

    /// The number of chunks and of resident ones in the file form `bytes`, whichever layer it belongs to. For reports only.
    pub fn peek(bytes: &[u8]) -> Option<(u32, u32)> {
        let (body, checksum) = bytes.split_at_checked(bytes.len().checked_sub(DIGEST)?)?;
        let (header, bitmap) = body.split_at_checked(HEADER)?;
        let at = MAGIC.len() + 4;
        let chunks = u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?);
        let is_sound = header.starts_with(&MAGIC)
            && bitmap.len() == word_count(chunks) * 8
            && Digest::of(body).as_bytes() == checksum;
        let resident = bitmap.iter().map(|byte| byte.count_ones()).sum();
        is_sound.then_some((chunks, resident))
    }

    /// The bits as they are now.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot(self.words.iter().map(|word| word.load(Ordering::Acquire)).collect())
    }

    /// Forgets every bit that is not in `snapshot`: their chunks have to be fetched again.
    pub fn fall_back(&self, snapshot: &Snapshot) {
        for (word, kept) in self.words.iter().zip(&snapshot.0) {
            let lost = word.fetch_and(*kept, Ordering::AcqRel) & !kept;
            self.resident.fetch_sub(lost.count_ones(), Ordering::AcqRel);
        }
    }

    /// The file form of `snapshot`.
    pub fn encode(&self, snapshot: &Snapshot, binding: &Binding) -> Vec<u8> {
        let mut bytes = encode_header(binding, self.chunks);
        for word in &snapshot.0 {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let checksum = Digest::of(&bytes);
        bytes.extend_from_slice(checksum.as_bytes());
        bytes
    }

    /// Whether the chunk is in `data`. A chunk that the layer does not have is not.
    pub fn contains(&self, chunk: u32) -> bool {
        let (word, mask) = position(chunk);
        self.words
            .get(word)
            .is_some_and(|bits| bits.load(Ordering::Acquire) & mask != 0)
    }

    /// Whether all of `chunks` are in `data`.
    pub fn contains_all(&self, mut chunks: Range<u32>) -> bool {
        chunks.all(|chunk| self.contains(chunk))
    }

    /// Marks a chunk whose verified bytes have just been written; false if it was marked already.
    pub fn insert(&self, chunk: u32) -> bool {
        debug_assert!(chunk < self.chunks, "chunk {chunk} of {}", self.chunks);
        let (word, mask) = position(chunk);
        let Some(bits) = self.words.get(word) else { return false };
        let fresh = bits.fetch_or(mask, Ordering::AcqRel) & mask == 0;
        if fresh {
            self.resident.fetch_add(1, Ordering::AcqRel);
        }
        fresh
    }

    /// Forgets a chunk whose bytes are about to be given up; false if it was not marked.
    pub fn remove(&self, chunk: u32) -> bool {
        let (word, mask) = position(chunk);
        let Some(bits) = self.words.get(word) else { return false };
        let was = bits.fetch_and(!mask, Ordering::AcqRel) & mask != 0;
        if was {
            self.resident.fetch_sub(1, Ordering::AcqRel);
        }
        was
    }

    /// Number of chunks, resident or not.
    pub fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Number of resident chunks.
    pub fn count(&self) -> u32 {
        self.resident.load(Ordering::Acquire)
    }

    /// Whether every chunk is resident.
    pub fn is_complete(&self) -> bool {
        self.count() == self.chunks
    }
}

fn word_count(chunks: u32) -> usize {
    chunks.div_ceil(64) as usize
}

fn position(chunk: u32) -> (usize, u64) {
    ((chunk / 64) as usize, 1 << (chunk % 64))
}

fn encode_header(binding: &Binding, chunks: u32) -> Vec<u8> {
    let mut header = Vec::with_capacity(HEADER + word_count(chunks) * 8 + DIGEST);
    header.extend_from_slice(&MAGIC);
    header.extend_from_slice(&FORMAT.to_le_bytes());
    header.extend_from_slice(&chunks.to_le_bytes());
    header.extend_from_slice(binding.toc.as_bytes());
    header.extend_from_slice(binding.index.as_bytes());
    header
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn binding() -> Binding {
        Binding {
            toc: Digest::of(b"toc"),
            index: Digest::of(b"index"),
        }
    }

    proptest! {
        #[test]
        fn file_form_round_trips(chunks in 0u32..400, picks in prop::collection::vec(any::<u32>(), 0..100)) {
            let residency = Residency::empty(chunks);
            let mut model = std::collections::BTreeSet::new();
            for pick in picks {
                if chunks > 0 {
                    prop_assert_eq!(residency.insert(pick % chunks), model.insert(pick % chunks));
                }
            }
            let back = Residency::decode(&residency.encode(&residency.snapshot(), &binding()), &binding(), chunks).unwrap();
            prop_assert_eq!(back.count() as usize, model.len());
            prop_assert_eq!(back.is_complete(), model.len() == chunks as usize);
            let peeked = Residency::peek(&residency.encode(&residency.snapshot(), &binding()));
            prop_assert_eq!(peeked, Some((chunks, back.count())));
            for chunk in 0..chunks + 70 {
                prop_assert_eq!(back.contains(chunk), model.contains(&chunk));
            }
        }

        #[test]
        fn a_damaged_file_is_never_believed(chunks in 1u32..300, at in any::<prop::sample::Index>(), flip in 1u8.., cut in any::<bool>()) {
            let residency = Residency::empty(chunks);
            residency.insert(0);
            let mut bytes = residency.encode(&residency.snapshot(), &binding());
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
            prop_assert!(Residency::decode(&bytes, &binding(), chunks).is_err());
            prop_assert_eq!(Residency::peek(&bytes), None);
        }
    }

    #[test]
    fn falling_back_forgets_what_came_after_the_snapshot() {
        let residency = Residency::empty(130);
        residency.insert(3);
        residency.insert(64);
        let snapshot = residency.snapshot();
        for chunk in [3, 4, 65, 129] {
            residency.insert(chunk);
        }
        assert_eq!((snapshot.count(), residency.count()), (2, 5));
        residency.fall_back(&snapshot);
        assert_eq!(residency.snapshot(), snapshot);
        assert_eq!(residency.count(), 2);
        assert!(residency.contains(64) && !residency.contains(65));
    }

    #[test]
    fn bits_of_another_layer_or_layout_are_refused() {
        let residency = Residency::empty(9);
        let bytes = residency.encode(&residency.snapshot(), &binding());
        for other in [
            Binding {
                toc: Digest::of(b"x"),
                ..binding()
            },
            Binding {
                index: Digest::of(b"x"),
                ..binding()
            },
        ] {
            assert_eq!(
                Residency::decode(&bytes, &other, 9).unwrap_err(),
                ResidencyError::Foreign
            );
        }
        assert_eq!(
            Residency::decode(&bytes, &binding(), 10).unwrap_err(),
            ResidencyError::Foreign
        );
        assert!(matches!(
            Residency::decode(&bytes, &binding(), 65),
            Err(ResidencyError::Length { .. })
        ));
    }
}
