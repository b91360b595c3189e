//! Directories: their entries in the order of the format, cut into blocks.
//!
//! A block begins with fixed-size entries, their names follow in the same order; no entry crosses blocks. Names are
//! sorted by their bytes through the whole directory, `.` and `..` among them, because the kernel searches in halves.

use estargz::index::{DirEntry, FileKind, Inode, LayerIndex};
use zerocopy::IntoBytes;

use crate::format::{BLOCK, Dirent, file_type};

const DIRENT: usize = size_of::<Dirent>();

/// The entries of a directory with `.` and `..`, sorted.
pub(crate) fn entries<'a, B: AsRef<[u8]>>(
    index: &'a LayerIndex<B>,
    dir: &Inode<'_>,
) -> impl Iterator<Item = DirEntry<'a>> {
    let dot = |name: &'static [u8], ino| DirEntry {
        name,
        ino,
        kind: FileKind::Directory,
    };
    // "-" sorts before ".", and ".-" before "..".
    let mut dots = [dot(b".", dir.ino), dot(b"..", dir.parent)].into_iter().peekable();
    let mut names = index.entries(dir.ino, 0).peekable();
    std::iter::from_fn(move || match (dots.peek(), names.peek()) {
        (Some(dot), Some(entry)) if entry.name < dot.name => names.next(),
        (Some(_), _) => dots.next(),
        (None, _) => names.next(),
    })
}

/// Size of a directory in bytes: whole blocks, and what the last one needs.
pub(crate) fn size<'a>(entries: impl Iterator<Item = DirEntry<'a>>) -> usize {
    let (mut full, mut used) = (0, 0);
    for entry in entries {
        let takes = DIRENT + entry.name.len();
        if used + takes > BLOCK {
            full += BLOCK;
            used = 0;
        }
        used += takes;
    }
    full + used
}

/// Cuts a directory into blocks and hands each to `emit`, the last one without what it does not need. `nid` gives an
/// inode's number in the image.
pub(crate) fn write<'a, E>(
    entries: impl Iterator<Item = DirEntry<'a>>,
    nid: impl Fn(u64) -> Result<u64, E>,
    mut emit: impl FnMut(&[u8]) -> Result<(), E>,
) -> Result<(), E> {
    let mut block = Vec::with_capacity(BLOCK);
    let mut pending: Vec<DirEntry<'a>> = Vec::new();
    let mut used = 0;
    for entry in entries {
        let takes = DIRENT + entry.name.len();
        if used + takes > BLOCK {
            fill(&mut block, &pending, &nid)?;
            block.resize(BLOCK, 0);
            emit(&block)?;
            pending.clear();
            used = 0;
        }
        used += takes;
        pending.push(entry);
    }
    fill(&mut block, &pending, &nid)?;
    emit(&block)
}

fn fill<E>(block: &mut Vec<u8>, entries: &[DirEntry<'_>], nid: impl Fn(u64) -> Result<u64, E>) -> Result<(), E> {
    block.clear();
    let mut name_offset = entries.len() * DIRENT;
    for entry in entries {
        let dirent = Dirent {
            nid: nid(entry.ino)?.into(),
            // Names begin inside the block.
            nameoff: u16::try_from(name_offset).unwrap_or(u16::MAX).into(),
            file_type: file_type(entry.kind),
            reserved: 0,
        };
        block.extend_from_slice(dirent.as_bytes());
        name_offset += entry.name.len();
    }
    for entry in entries {
        block.extend_from_slice(entry.name);
    }
    Ok(())
}
