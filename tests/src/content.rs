//! Images made of nothing but bytes: layers of files whose content is a function of their name, so that a reader can be
//! checked without a copy.

use std::io::Write;
use std::path::Path;

use anyhow::{Context as _, Result};
use tar::{Builder, EntryType, Header};

use crate::layout::{ImageConfig, LayoutWriter};

/// Name of these images in a layout.
pub const TAG: &str = "content";

/// A time with nothing round about it.
const MTIME: u64 = 1_600_000_003;

/// A file of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContentFile {
    /// Its path, without a slash in front. Parents are made by themselves.
    pub path: String,
    /// Bytes.
    pub size: usize,
    /// What its content is made from; another seed gives another content.
    pub seed: u64,
}

impl ContentFile {
    /// A file whose content depends on its path and size alone.
    pub fn new(path: impl Into<String>, size: usize) -> Self {
        let path = path.into();
        // FNV-1a: any function does that tells paths apart.
        let seed = path.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        Self { path, size, seed }
    }

    /// The same file with another content.
    #[must_use]
    pub fn changed(&self) -> Self {
        Self {
            seed: self.seed.wrapping_add(0x9e37_79b9),
            ..self.clone()
        }
    }

    /// Its content.
    #[must_use]
    pub fn content(&self) -> Vec<u8> {
        noise(self.seed, self.size)
    }
}

/// Bytes that do not compress and repeat nowhere.
#[must_use]
pub fn noise(seed: u64, size: usize) -> Vec<u8> {
    // splitmix64: every seed is a good one.
    let mut state = seed;
    let words = std::iter::repeat_with(move || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = state;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (word ^ (word >> 31)).to_le_bytes()
    });
    let mut bytes: Vec<u8> = words.take(size.div_ceil(8)).flatten().collect();
    bytes.truncate(size);
    bytes
}

/// `count` files of `size` bytes each, spread over directories of 50.
#[must_use]
pub fn small_files(root: &str, count: usize, size: usize) -> Vec<ContentFile> {
    (0..count)
        .map(|number| ContentFile::new(format!("{root}/d{:03}/f{number:05}", number / 50), size))
        .collect()
}

/// Writes an image of these layers, lowest first, as a layout. `pause` (a static program) becomes `/bin/pause` of the
/// lowest layer and the image's command.
pub fn build(layout: &Path, layers: &[Vec<ContentFile>], pause: Option<&[u8]>) -> Result<()> {
    let mut writer = LayoutWriter::create(layout)?;
    for (number, files) in layers.iter().enumerate() {
        let program = pause.filter(|_| number == 0);
        writer.add_layer(|output| write_layer(output, files, program))?;
    }
    let config = ImageConfig {
        entrypoint: vec!["/bin/pause".into()],
        ..ImageConfig::default()
    };
    writer.finish(&config, TAG)?;
    Ok(())
}

fn write_layer(output: &mut dyn Write, files: &[ContentFile], program: Option<&[u8]>) -> Result<()> {
    let mut tar = Builder::new(output);
    if let Some(program) = program {
        append(&mut tar, "bin/pause", 0o755, program)?;
        for directory in ["dev", "etc", "proc", "run", "sys"] {
            let mut header = header(EntryType::Directory, 0o755, 0);
            tar.append_data(&mut header, format!("{directory}/"), std::io::empty())?;
        }
        for empty in ["etc/hosts", "etc/hostname", "etc/resolv.conf"] {
            append(&mut tar, empty, 0o644, b"")?;
        }
    }
    for file in files {
        append(&mut tar, &file.path, 0o644, &file.content())?;
    }
    tar.into_inner().context("cannot end an archive")?;
    Ok(())
}

fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_mtime(MTIME);
    header.set_uid(0);
    header.set_gid(0);
    header
}

fn append(tar: &mut Builder<&mut dyn Write>, path: &str, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, mode, content.len());
    tar.append_data(&mut header, path, content)
        .with_context(|| format!("cannot append {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_a_function_of_the_name_and_of_the_change() {
        let file = ContentFile::new("a/b", 1000);
        assert_eq!(file.content(), ContentFile::new("a/b", 1000).content());
        assert_eq!(file.content().len(), 1000);
        assert_ne!(file.content(), file.changed().content());
        assert_ne!(file.content(), ContentFile::new("a/c", 1000).content());
        assert_eq!(noise(7, 11)[..8], noise(7, 8)[..]);
    }

    #[test]
    fn the_same_layers_give_the_same_image() {
        let layers = [small_files("x", 120, 10), vec![ContentFile::new("y", 5)]];
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        build(a.path(), &layers, Some(b"program")).unwrap();
        build(b.path(), &layers, Some(b"program")).unwrap();
        let index = |directory: &Path| std::fs::read(directory.join("index.json")).unwrap();
        assert_eq!(index(a.path()), index(b.path()));
    }
}
