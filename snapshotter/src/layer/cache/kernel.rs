//! The note on a layer's `data` that the kernel reads it by itself.
//!
//! Containers keep a file system that no process of ours knows of any more. So it is noted on the file, with the boot in which it is so,
//! and whoever opens the layer later punches no holes into it either. The note has the layout with it by which those file systems look
//! for content: who opens the layer with an index of another layout would fill other places.

use std::fs::{self, File};
use std::io;

use estargz::digest::Digest;
use estargz::index::LayerIndex;
use rustix::fs::XattrFlags;
use rustix::io::Errno;

/// Name of the attribute. Only root sees it.
const NAME: &str = "trusted.hullspeed.read_by_kernel";
/// What tells one boot from another.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
/// Longest value that is looked at.
const MAX_VALUE: usize = 256;

/// What the note says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Note {
    /// Nothing of this boot.
    None,
    /// The kernel reads it, by this layout.
    Layout(Digest),
    /// The kernel reads it, by a layout that cannot be told.
    Unknown,
}

/// Which content lies where in `data`.
pub(super) fn layout<B: AsRef<[u8]>>(index: &LayerIndex<B>) -> Digest {
    let mut extents = index.data_size().to_le_bytes().to_vec();
    for chunk in (0..index.chunk_count()).filter_map(|id| index.chunk(id)) {
        extents.extend_from_slice(&chunk.data_offset.to_le_bytes());
        extents.extend_from_slice(&chunk.size.to_le_bytes());
        extents.extend_from_slice(chunk.digest.as_bytes());
    }
    Digest::of(&extents)
}

fn boot() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT)?.trim().to_owned())
}

/// Notes it.
pub(super) fn note(data: &File, layout: &Digest) -> io::Result<()> {
    let value = format!("{} {}", boot()?, layout.hex());
    Ok(rustix::fs::fsetxattr(
        data,
        NAME,
        value.as_bytes(),
        XattrFlags::empty(),
    )?)
}

/// Takes the note away.
pub(super) fn clear(data: &File) -> io::Result<()> {
    match rustix::fs::fremovexattr(data, NAME) {
        Ok(()) | Err(Errno::NODATA) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// What was noted since the machine was booted.
pub(super) fn noted(data: &File) -> io::Result<Note> {
    let mut value = [0; MAX_VALUE];
    let length = match rustix::fs::fgetxattr(data, NAME, &mut value) {
        Ok(length) => length,
        // Nothing noted, or a file system that can note nothing.
        Err(Errno::NODATA | Errno::NOTSUP) => return Ok(Note::None),
        Err(errno) => return Err(errno.into()),
    };
    let text = String::from_utf8_lossy(value.get(..length).unwrap_or_default());
    let (noted, layout) = text.split_once(' ').unwrap_or((&text, ""));
    if noted != boot()? {
        return Ok(Note::None);
    }
    let layout = format!("sha256:{layout}").parse();
    Ok(layout.map_or(Note::Unknown, Note::Layout))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileged_a_note_is_of_this_boot() {
        let (data, layout) = (tempfile::tempfile().unwrap(), Digest::of(b"layout"));
        assert_eq!(noted(&data).unwrap(), Note::None);
        note(&data, &layout).unwrap();
        assert_eq!(noted(&data).unwrap(), Note::Layout(layout));
        let written = |value: &str| {
            rustix::fs::fsetxattr(&data, NAME, value.as_bytes(), XattrFlags::empty()).unwrap();
            noted(&data).unwrap()
        };
        assert_eq!(written(&format!("another {}", layout.hex())), Note::None);
        assert_eq!(written("another"), Note::None);
        let boot = boot().unwrap();
        for value in [
            boot.clone(),
            format!("{boot} "),
            format!("{boot} 12"),
            format!("{boot} {}x", layout.hex()),
        ] {
            assert_eq!(written(&value), Note::Unknown, "{value}");
        }
        clear(&data).unwrap();
        clear(&data).unwrap();
        assert_eq!(noted(&data).unwrap(), Note::None);
    }
}
