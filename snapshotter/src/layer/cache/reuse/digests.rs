//! Which layer has a chunk of this digest: sorted runs in nameless files, of which memory holds one key per block.
//!
//! A layer adds a run of its own; eight runs of a size are merged into one. So there are few runs, whatever the number of
//! layers, and a lookup reads one block of each. The files have no name and end with the process: what they say follows from the
//! indexes, and every answer is checked against the layer that it names.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use estargz::digest::Digest;

use crate::layer::cache::layer::OpenLayer;

/// Bytes of an entry: eight of the digest, the layer's number, the chunk's.
const ENTRY: usize = 16;
/// Entries read at once.
const BLOCK: usize = 256;
/// Runs of one size that are merged into one of the next.
const FAN_IN: usize = 8;
/// Places looked at for one digest; what is in more layers than this is in the first of them most likely.
const MAX_PLACES: usize = 16;

/// Where each digest is.
#[derive(Debug)]
pub(in crate::layer::cache) struct Digests {
    dir: PathBuf,
    /// Held while a run is added, which may merge others.
    adding: Mutex<()>,
    table: Mutex<Table>,
}

#[derive(Debug, Default)]
struct Table {
    /// Layers by their number; none for those that are gone.
    layers: Vec<Option<Digest>>,
    numbers: HashMap<Digest, u32>,
    runs: Vec<Arc<Run>>,
}

/// Entries sorted by digest.
#[derive(Debug)]
struct Run {
    file: File,
    entries: u64,
    /// The first key of each block.
    fences: Box<[u64]>,
    /// How often what is in it was merged.
    level: u32,
}

/// The first bytes of a digest, the number of a layer, the number of a chunk.
type Entry = (u64, u32, u32);

fn key(digest: &Digest) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = *digest.as_bytes();
    u64::from_be_bytes([a, b, c, d, e, f, g, h])
}

impl Digests {
    pub(in crate::layer::cache) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            adding: Mutex::default(),
            table: Mutex::default(),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change leaves it whole.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a layer's chunks, once. Where the disk has no room for it, they are not found, which costs fetches.
    pub(in crate::layer::cache) fn add(&self, layer: &OpenLayer) {
        let _one = self.adding.lock().unwrap_or_else(PoisonError::into_inner);
        let digest = layer.toc_digest();
        let number = {
            let mut table = self.table();
            if table.numbers.contains_key(&digest) {
                return;
            }
            let Ok(number) = u32::try_from(table.layers.len()) else {
                return;
            };
            table.layers.push(Some(digest));
            table.numbers.insert(digest, number);
            number
        };
        let chunks = 0..layer.residency().chunks();
        let entries = chunks.filter_map(|id| layer.chunk(id).map(|chunk| (key(&chunk.digest), number, id)));
        let mut entries: Vec<Entry> = entries.collect();
        entries.sort_unstable();
        if entries.is_empty() {
            return;
        }
        let added = self.write(0, entries.into_iter().map(Ok)).and_then(|run| {
            self.table().runs.push(Arc::new(run));
            self.merge()
        });
        if let Err(error) = added {
            tracing::warn!(toc = %digest, %error, "chunks of a layer will not be found by others");
        }
    }

    /// A layer is gone.
    pub(in crate::layer::cache) fn forget(&self, layer: &Digest) {
        let mut table = self.table();
        if let Some(number) = table.numbers.remove(layer)
            && let Some(place) = table.layers.get_mut(number as usize)
        {
            *place = None;
        }
    }

    /// Layers and chunks in them that may have this digest.
    pub(in crate::layer::cache) fn find(&self, digest: &Digest) -> Vec<(Digest, u32)> {
        let runs = self.table().runs.clone();
        let key = key(digest);
        let mut entries = Vec::new();
        for run in &runs {
            if let Err(error) = run.find(key, &mut entries) {
                tracing::debug!(%error, "cannot look for a chunk");
            }
            if entries.len() >= MAX_PLACES {
                break;
            }
        }
        let table = self.table();
        let place = |(_, layer, chunk): Entry| Some((table.layers.get(layer as usize).copied()??, chunk));
        entries.into_iter().filter_map(place).collect()
    }

    #[cfg(test)]
    pub(in crate::layer::cache) fn runs(&self) -> usize {
        self.table().runs.len()
    }

    /// Merges runs of one size as long as there are too many.
    fn merge(&self) -> io::Result<()> {
        let mut level = 0;
        loop {
            let (runs, gone) = {
                let table = self.table();
                let of_level = table.runs.iter().filter(|run| run.level == level).cloned();
                let gone: Vec<bool> = table.layers.iter().map(Option::is_none).collect();
                (of_level.collect::<Vec<_>>(), gone)
            };
            if runs.len() < FAN_IN {
                return Ok(());
            }
            let is_left = |entry: &Entry| !gone.get(entry.1 as usize).copied().unwrap_or(true);
            let merged = Merge::of(&runs)?.filter(|entry| entry.as_ref().map_or(true, is_left));
            let merged = self.write(level + 1, merged)?;
            let mut table = self.table();
            table.runs.retain(|run| run.level != level);
            table.runs.push(Arc::new(merged));
            drop(table);
            level += 1;
        }
    }

    fn write(&self, level: u32, entries: impl Iterator<Item = io::Result<Entry>>) -> io::Result<Run> {
        let mut file = BufWriter::new(tempfile::tempfile_in(&self.dir)?);
        let (mut count, mut fences) = (0, Vec::new());
        for entry in entries {
            let entry = entry?;
            if count % BLOCK as u64 == 0 {
                fences.push(entry.0);
            }
            file.write_all(&encode(entry))?;
            count += 1;
        }
        Ok(Run {
            file: file.into_inner().map_err(io::IntoInnerError::into_error)?,
            entries: count,
            fences: fences.into(),
            level,
        })
    }
}

fn encode((key, layer, chunk): Entry) -> [u8; ENTRY] {
    let mut bytes = [0; ENTRY];
    bytes[..8].copy_from_slice(&key.to_le_bytes());
    bytes[8..12].copy_from_slice(&layer.to_le_bytes());
    bytes[12..].copy_from_slice(&chunk.to_le_bytes());
    bytes
}

fn decode(bytes: &[u8]) -> Option<Entry> {
    let (key, rest) = bytes.split_first_chunk()?;
    let (layer, rest) = rest.split_first_chunk()?;
    let chunk = rest.first_chunk()?;
    Some((
        u64::from_le_bytes(*key),
        u32::from_le_bytes(*layer),
        u32::from_le_bytes(*chunk),
    ))
}

impl Run {
    /// Adds the entries with this key, until there are [`MAX_PLACES`].
    fn find(&self, key: u64, found: &mut Vec<Entry>) -> io::Result<()> {
        // The block before the first that begins with the key, or beyond it, may end with it.
        let first = self.fences.partition_point(|fence| *fence < key).saturating_sub(1);
        for block in first..self.fences.len() {
            if self.fences[block] > key {
                break;
            }
            let start = block as u64 * BLOCK as u64;
            let length = usize::try_from(self.entries - start).unwrap_or(BLOCK).min(BLOCK);
            let mut bytes = [0; BLOCK * ENTRY];
            let bytes = &mut bytes[..length * ENTRY];
            self.file.read_exact_at(bytes, start * ENTRY as u64)?;
            let entries = bytes.chunks_exact(ENTRY).filter_map(decode);
            for entry in entries.filter(|entry| entry.0 == key) {
                if found.len() >= MAX_PLACES {
                    return Ok(());
                }
                found.push(entry);
            }
        }
        Ok(())
    }
}

/// The entries of several runs in order.
struct Merge {
    inputs: Vec<BufReader<FileFrom>>,
    next: BinaryHeap<Reverse<(Entry, usize)>>,
}

/// A file read from its start, whatever its position is.
struct FileFrom {
    run: Arc<Run>,
    at: u64,
}

impl Read for FileFrom {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.run.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

impl Merge {
    fn of(runs: &[Arc<Run>]) -> io::Result<Self> {
        let input = |run: &Arc<Run>| {
            BufReader::with_capacity(
                64 << 10,
                FileFrom {
                    run: run.clone(),
                    at: 0,
                },
            )
        };
        let mut merge = Self {
            inputs: runs.iter().map(input).collect(),
            next: BinaryHeap::new(),
        };
        for input in 0..merge.inputs.len() {
            merge.advance(input)?;
        }
        Ok(merge)
    }

    fn advance(&mut self, input: usize) -> io::Result<()> {
        let mut bytes = [0; ENTRY];
        match self.inputs[input].read_exact(&mut bytes) {
            Ok(()) => {
                self.next.extend(decode(&bytes).map(|entry| Reverse((entry, input))));
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
            Err(error) => Err(error),
        }
    }
}

impl Iterator for Merge {
    type Item = io::Result<Entry>;

    fn next(&mut self) -> Option<Self::Item> {
        let Reverse((entry, input)) = self.next.pop()?;
        Some(self.advance(input).map(|()| entry))
    }
}
