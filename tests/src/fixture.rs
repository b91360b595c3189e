//! A small image with everything that a file tree can have, made in memory: it builds in milliseconds, so the tests that
//! need no real program use it.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context as _, Result};
use tar::{Builder, EntryType, Header};

use crate::layout::{ImageConfig, Layer, LayoutWriter};

/// Its name in a layout.
pub const TAG: &str = "fixture";

/// Path of a file of several chunks when layers are converted with 1 MiB chunks; see [`large_content`].
pub const LARGE_FILE: &str = "data/large.bin";

/// Bytes of [`LARGE_FILE`].
pub const LARGE_SIZE: usize = 9 * 1024 * 1024 + 4321;

/// Small files of one directory.
pub const SMALL_FILES: usize = 300;

/// Directories that no layer has an entry for. A snapshotter that unpacks gives them the time of that moment, so times
/// of these paths cannot be compared.
pub const IMPLIED: [&str; 3] = ["", "implied", "implied/parent"];

/// A time with nothing round about it.
const MTIME: u64 = 1_600_000_003;

/// Content that does not compress and repeats nowhere.
#[must_use]
pub fn large_content() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.flatten().take(LARGE_SIZE).collect()
}

/// Makes two trees of the image comparable: see [`IMPLIED`].
pub fn forget_implied_times(tree: &mut crate::tree::Tree) {
    for path in IMPLIED {
        if let Some(node) = tree.get_mut(Path::new(path)) {
            node.mtime = (0, 0);
        }
    }
}

/// Writes the image as a layout: three layers, the lowest with `pause` (a static program) as its command.
pub fn build(layout: &Path, pause: &[u8]) -> Result<Vec<Layer>> {
    let mut writer = LayoutWriter::create(layout)?;
    writer.add_layer(|output| base(LayerTar::new(output), pause))?;
    writer.add_layer(|output| changes(LayerTar::new(output)))?;
    writer.add_layer(|output| deletions(LayerTar::new(output)))?;
    let config = ImageConfig {
        entrypoint: vec!["/bin/pause".into()],
        ..ImageConfig::default()
    };
    writer.finish(&config, TAG)
}

fn base(mut tar: LayerTar<'_>, pause: &[u8]) -> Result<()> {
    for directory in [
        "bin/",
        "data/",
        "data/many/",
        "dev/",
        "etc/",
        "proc/",
        "sys/",
        "gone/",
        "opaque/",
        "opaque/old/",
        "run/",
    ] {
        tar.directory(directory, 0o755)?;
    }
    for empty in ["etc/hosts", "etc/hostname", "etc/resolv.conf"] {
        tar.file(empty, 0o644, b"")?;
    }
    tar.file("bin/pause", 0o755, pause)?;
    tar.file("etc/passwd", 0o644, b"root:x:0:0:root:/:/bin/pause\n")?;
    tar.file(LARGE_FILE, 0o640, &large_content())?;
    for index in 0..SMALL_FILES {
        tar.file(
            &format!("data/many/{index:04}.txt"),
            0o644,
            format!("small file {index}\n").repeat(index + 1).as_bytes(),
        )?;
    }
    tar.file("gone/file", 0o644, b"deleted above")?;
    tar.file("gone-alone", 0o644, b"deleted above, too")?;
    tar.file("opaque/old/file", 0o644, b"hidden by an opaque directory")?;
    tar.file("replaced", 0o644, b"the old content")?;
    // A parent that no entry names.
    tar.file("implied/parent/file", 0o600, b"below directories without entries")
}

fn changes(mut tar: LayerTar<'_>) -> Result<()> {
    tar.file("replaced", 0o4755, b"the new content, setuid")?;
    tar.file("links/one", 0o644, b"one inode, three names")?;
    tar.hardlink("links/two", "links/one")?;
    tar.hardlink("links/three", "links/one")?;
    tar.symlink("links/relative", "one")?;
    tar.symlink("links/dangling", "/does/not/exist")?;
    tar.directory("attributes/", 0o755)?;
    tar.xattr("user.comment", b"binary \0 value")?;
    tar.file("attributes/user", 0o644, b"")?;
    tar.xattr(
        "security.capability",
        &[1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    )?;
    tar.file("attributes/capability", 0o755, b"#!/bin/false\n")?;
    tar.xattr("user.on-directory", b"yes")?;
    tar.directory("attributes/directory/", 0o2750)?;
    tar.special("special/null", EntryType::Char, 1, 3)?;
    tar.special("special/disk", EntryType::Block, 8, 17)?;
    tar.special("special/pipe", EntryType::Fifo, 0, 0)?;
    tar.directory("sticky/", 0o1777)?;
    tar.owner = (1000, 2000);
    tar.file("owned/by-someone", 0o600, b"not root's")?;
    tar.owner = (4_000_000, 4_000_001);
    tar.file(
        "owned/beyond-octal",
        0o600,
        b"an id that needs more than seven octal digits",
    )?;
    tar.owner = (0, 0);
    let deep = format!("{}/file", vec!["directory"; 30].join("/"));
    tar.file(&deep, 0o644, b"a path beyond the header's field")?;
    tar.file(&format!("long/{}", "n".repeat(255)), 0o644, b"the longest name")?;
    tar.file("names/ space, ünïcode and \"quotes\"", 0o644, b"")
}

fn deletions(mut tar: LayerTar<'_>) -> Result<()> {
    tar.file(".wh.gone", 0o644, b"")?;
    tar.file(".wh.gone-alone", 0o644, b"")?;
    tar.directory("opaque/", 0o700)?;
    tar.file("opaque/.wh..wh..opq", 0o644, b"")?;
    tar.file("opaque/new", 0o644, b"seen")?;
    tar.file("data/many/.wh.0007.txt", 0o644, b"")
}

struct LayerTar<'a> {
    builder: Builder<&'a mut dyn Write>,
    owner: (u64, u64),
    /// Directories that have an entry in this layer.
    directories: BTreeSet<String>,
}

impl<'a> LayerTar<'a> {
    fn new(output: &'a mut dyn Write) -> Self {
        Self {
            builder: Builder::new(output),
            owner: (0, 0),
            directories: BTreeSet::new(),
        }
    }

    fn header(&self, kind: EntryType, mode: u32, size: usize) -> Header {
        // GNU headers: large ids need its binary numbers.
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size as u64);
        header.set_mtime(MTIME);
        header.set_uid(self.owner.0);
        header.set_gid(self.owner.1);
        header
    }

    /// Entries for the parents of a path that have none yet, as archivers write them.
    fn parents(&mut self, path: &str) -> Result<()> {
        let ends = path.trim_end_matches('/').match_indices('/').map(|(end, _)| end);
        let parents: Vec<String> = ends.map(|end| path[..=end].to_string()).collect();
        for parent in parents {
            let mut header = self.header(EntryType::Directory, 0o755, 0);
            header.set_uid(0);
            header.set_gid(0);
            self.directory_entry(header, &parent)?;
        }
        Ok(())
    }

    fn directory_entry(&mut self, mut header: Header, path: &str) -> Result<()> {
        if IMPLIED.contains(&path.trim_end_matches('/')) || !self.directories.insert(path.into()) {
            return Ok(());
        }
        self.builder
            .append_data(&mut header, path, io::empty())
            .with_context(|| format!("cannot append {path}"))
    }

    fn append(&mut self, mut header: Header, path: &str, content: &[u8]) -> Result<()> {
        self.builder
            .append_data(&mut header, path, content)
            .with_context(|| format!("cannot append {path}"))
    }

    fn directory(&mut self, path: &str, mode: u32) -> Result<()> {
        self.parents(path)?;
        self.directory_entry(self.header(EntryType::Directory, mode, 0), path)
    }

    fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.append(self.header(EntryType::Regular, mode, content.len()), path, content)
    }

    fn hardlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        let mut header = self.header(EntryType::Link, 0o644, 0);
        self.builder
            .append_link(&mut header, path, target)
            .with_context(|| format!("cannot append {path}"))
    }

    fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        let mut header = self.header(EntryType::Symlink, 0o777, 0);
        self.builder
            .append_link(&mut header, path, target)
            .with_context(|| format!("cannot append {path}"))
    }

    fn special(&mut self, path: &str, kind: EntryType, major: u32, minor: u32) -> Result<()> {
        self.parents(path)?;
        let mut header = self.header(kind, 0o660, 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.builder
            .append_data(&mut header, path, io::empty())
            .with_context(|| format!("cannot append {path}"))
    }

    /// For the next entry.
    fn xattr(&mut self, name: &str, value: &[u8]) -> Result<()> {
        self.builder
            .append_pax_extensions([(format!("SCHILY.xattr.{name}").as_str(), value)])
            .context("cannot append an attribute")
    }
}

impl Drop for LayerTar<'_> {
    fn drop(&mut self) {
        // A failure to end the archive shows as a digest that nothing else agrees with; writing to a file reports it again.
        let _ = self.builder.finish();
    }
}
