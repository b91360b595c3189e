//! Tars to convert, and ways to look at what came out.

use super::*;

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::member::{Compression, unfold};
use crate::reader::LayerBlob;
use crate::toc::{EntryType, clean_path, decode_xattr};

pub(super) fn options(threads: usize) -> BuildOptions {
    BuildOptions {
        threads: NonZeroUsize::new(threads).unwrap(),
        ..BuildOptions::default()
    }
}

pub(super) fn convert(tar: &[u8], options: &BuildOptions) -> (Vec<u8>, BuiltLayer) {
    let mut blob = Vec::new();
    let built = build(tar, &mut blob, options).unwrap();
    (blob, built)
}

pub(super) fn gunzip(blob: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    crate::input::decompress(blob).unwrap().read_to_end(&mut out).unwrap();
    out
}

/// Runs GNU tar on an archive; fails on anything it complains about.
pub(super) fn gnu_tar(args: &[&str], archive: &[u8]) -> String {
    let mut child = Command::new("tar")
        .args(args)
        .env("LC_ALL", "C.UTF-8")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let archive = archive.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&archive));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && complaints.is_empty(), "{complaints}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Extracts as root would.
pub(super) fn extract(archive: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    gnu_tar(
        &["-C", path, "-xp", "--numeric-owner", "--delay-directory-restore"],
        archive,
    );
    dir
}

pub(super) fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

/// One entry of an input tar, in GNU format so that no code under test takes part in writing it.
#[derive(Debug, Clone)]
pub(super) struct Sample {
    pub(super) name: String,
    pub(super) typeflag: u8,
    pub(super) link: String,
    pub(super) content: Vec<u8>,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) mtime: u64,
}

pub(super) fn sample(name: &str, typeflag: u8) -> Sample {
    Sample {
        name: name.to_owned(),
        typeflag,
        link: String::new(),
        content: Vec::new(),
        mode: 0o644,
        uid: 0,
        mtime: 1_700_000_000,
    }
}

pub(super) fn file(name: &str, content: &[u8]) -> Sample {
    Sample {
        content: content.to_vec(),
        ..sample(name, b'0')
    }
}

pub(super) fn dir(name: &str) -> Sample {
    Sample {
        mode: 0o755,
        ..sample(name, b'5')
    }
}

pub(super) fn link(name: &str, typeflag: u8, target: &str) -> Sample {
    Sample {
        link: target.to_owned(),
        ..sample(name, typeflag)
    }
}

pub(super) fn tar_of(samples: &[Sample]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for sample in samples {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::new(sample.typeflag));
        header.set_mode(sample.mode);
        header.set_uid(sample.uid);
        header.set_gid(sample.uid);
        header.set_mtime(sample.mtime);
        header.set_size(sample.content.len() as u64);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        if sample.typeflag == b'1' || sample.typeflag == b'2' {
            builder.append_link(&mut header, &sample.name, &sample.link).unwrap();
        } else {
            builder
                .append_data(&mut header, &sample.name, sample.content.as_slice())
                .unwrap();
        }
    }
    builder.into_inner().unwrap()
}

/// What a file is, wherever it was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) kind: char,
    pub(super) mode: u32,
    pub(super) owner: (u64, u64),
    pub(super) mtime: (i64, i64),
    pub(super) content: Vec<u8>,
    /// Of all names of the same inode the first, in the order of names.
    pub(super) same_as: String,
}

pub(super) type Nodes = BTreeMap<String, Node>;

/// What extracting entry after entry leaves: the plainest model of it.
pub(super) fn extracted(samples: &[Sample]) -> Nodes {
    let mut nodes = Nodes::new();
    for (number, sample) in samples.iter().enumerate() {
        let name = clean_path(&sample.name).join("/");
        let directory = sample.typeflag == b'5';
        if !directory || nodes.get(&name).is_some_and(|node| node.kind != 'd') {
            nodes.retain(|other, _| *other != name && !other.starts_with(&format!("{name}/")));
        }
        let (kind, content) = match sample.typeflag {
            b'0' => ('f', sample.content.clone()),
            b'1' => {
                let target = nodes[&clean_path(&sample.link).join("/")].clone();
                nodes.insert(name, target);
                continue;
            }
            b'2' => ('l', sample.link.clone().into_bytes()),
            b'3' => ('c', b"259".to_vec()),
            b'5' => ('d', Vec::new()),
            _ => ('p', Vec::new()),
        };
        let mode = if kind == 'l' { 0o777 } else { sample.mode };
        let (owner, mtime) = ((sample.uid, sample.uid), (i64::try_from(sample.mtime).unwrap(), 0));
        nodes.insert(
            name,
            Node {
                kind,
                mode,
                owner,
                mtime,
                content,
                same_as: number.to_string(),
            },
        );
    }
    name_inodes(&mut nodes);
    nodes
}

/// Replaces whatever tells inodes apart by the first name that each has, in the order of names.
fn name_inodes(nodes: &mut Nodes) {
    let mut first = BTreeMap::new();
    for (name, node) in nodes {
        node.same_as = first.entry(node.same_as.clone()).or_insert(name.clone()).clone();
    }
}

/// A tree on disk.
pub(super) fn on_disk(root: &Path) -> Nodes {
    let mut nodes = Nodes::new();
    walk(root, root, &mut nodes);
    name_inodes(&mut nodes);
    nodes
}

fn walk(root: &Path, path: &Path, nodes: &mut Nodes) {
    let meta = std::fs::symlink_metadata(path).unwrap();
    let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
    let kind = match meta.mode() & 0o170000 {
        0o040000 => 'd',
        0o100000 => 'f',
        0o120000 => 'l',
        0o020000 => 'c',
        0o010000 => 'p',
        other => panic!("{other:o}"),
    };
    let content = match kind {
        'f' => std::fs::read(path).unwrap(),
        'l' => std::fs::read_link(path).unwrap().into_os_string().into_encoded_bytes(),
        'c' => meta.rdev().to_string().into_bytes(),
        _ => Vec::new(),
    };
    let node = Node {
        kind,
        mode: meta.permissions().mode() & 0o7777,
        owner: (meta.uid().into(), meta.gid().into()),
        mtime: (meta.mtime(), meta.mtime_nsec()),
        content,
        same_as: meta.ino().to_string(),
    };
    nodes.insert(name, node);
    if kind == 'd' {
        let mut children: Vec<_> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        children.sort();
        for child in children {
            walk(root, &child, nodes);
        }
    }
}

/// The tree that the TOC describes, every chunk read as a snapshotter does: one member, unfolded alone.
pub(super) fn in_toc(blob: &[u8]) -> Nodes {
    let layer = LayerBlob::open(blob.to_vec()).unwrap();
    let mut nodes = Nodes::new();
    let mut links = Vec::new();
    let mut last = String::new();
    for entry in &layer.toc.entries {
        let name = clean_path(&entry.name).join("/");
        if entry.kind == EntryType::Hardlink {
            links.push((name, clean_path(&entry.link_name).join("/")));
            continue;
        }
        if entry.kind == EntryType::Chunk {
            let content = &mut nodes.get_mut(&last).unwrap().content;
            assert_eq!(content.len() as u64, entry.chunk_offset);
            content.extend(chunk(blob, entry, None));
            continue;
        }
        let (kind, content) = match entry.kind {
            EntryType::Dir => ('d', Vec::new()),
            EntryType::Symlink => ('l', entry.link_name.clone().into_bytes()),
            EntryType::Char => ('c', (entry.dev_major << 8 | entry.dev_minor).to_string().into_bytes()),
            EntryType::Fifo => ('p', Vec::new()),
            _ if entry.size == 0 => ('f', Vec::new()),
            _ => ('f', chunk(blob, entry, Some(entry.size))),
        };
        let time = crate::toc::time::Timestamp::parse(&entry.mod_time).unwrap();
        for value in entry.xattrs.values() {
            decode_xattr(value).unwrap();
        }
        let node = Node {
            kind,
            // Linux gives every symbolic link this mode, whatever a tar says.
            mode: if kind == 'l' {
                0o777
            } else {
                u32::try_from(entry.mode).unwrap()
            },
            owner: (entry.uid, entry.gid),
            mtime: (time.seconds, time.nanoseconds.into()),
            content,
            same_as: name.clone(),
        };
        last.clone_from(&name);
        nodes.insert(name, node);
    }
    for (name, target) in links {
        let node = nodes[&target].clone();
        nodes.insert(name, node);
    }
    name_inodes(&mut nodes);
    nodes
}

/// A chunk's bytes; `file_size` for a file's first chunk.
fn chunk(blob: &[u8], entry: &crate::toc::TocEntry, file_size: Option<u64>) -> Vec<u8> {
    let mut out = Vec::new();
    let start = usize::try_from(entry.offset).unwrap();
    let digest = entry.chunk_digest.unwrap();
    // The last of several chunks does not say its size; its digest tells when it is complete.
    let known = if entry.chunk_size > 0 {
        Some(entry.chunk_size)
    } else {
        file_size
    };
    if let Some(size) = known {
        unfold(
            Compression::Gzip,
            &blob[start..],
            usize::try_from(size).unwrap(),
            &mut out,
        )
        .unwrap();
    } else {
        for size in 1.. {
            unfold(Compression::Gzip, &blob[start..], size, &mut out).unwrap();
            if Digest::of(&out) == digest {
                break;
            }
        }
    }
    assert_eq!(Digest::of(&out), digest);
    out
}
