//! Large directories, large files, and many attributes.

use std::os::unix::fs::FileExt;

use super::compare::{What, same_tree};
use super::layer::{Layer, content, set_xattr};
use super::*;

#[test]
fn privileged_a_directory_of_twenty_thousand_names() {
    let mut layer = Layer::default();
    for at in 0..20_000 {
        let name = format!("{:x}", at * 7919 % 20_011);
        let long = if at % 10 == 0 {
            "l".repeat(255 - name.len())
        } else {
            String::new()
        };
        layer.file(&format!("many/{name}{long}"), 1, |_| {});
    }
    layer.dir("many/sub");
    let index = layer.index();
    let mounted = Mounted::new(&index);
    assert_eq!(same_tree(&index, &mounted.root(), What::Mount), 20_003);
    for absent in ["", "0g", "zzz", "!", "l"] {
        let name = format!("many/{absent}{}", "q".repeat(20));
        assert!(fs::symlink_metadata(mounted.path(&name)).is_err(), "{name}");
    }
    let parent = fs::canonicalize(mounted.path("many/sub/../..")).unwrap();
    assert_eq!(parent, mounted.root());
    mounted.check();
}

/// Writes what `content` says at some places of a file's extent, and then reads them through the mount.
fn same_at<B: AsRef<[u8]>>(index: &LayerIndex<B>, mounted: &Mounted, name: &str, places: &[u64]) {
    let ino = index.lookup(1, name.as_bytes()).unwrap();
    let inode = index.inode(ino).unwrap();
    let pieces = places.iter().map(|at| {
        let size = usize::try_from((inode.size - at).min(10_000)).unwrap();
        (*at, content(ino, *at, size))
    });
    let pieces: Vec<_> = pieces.collect();
    for (at, bytes) in &pieces {
        mounted.data.write_all_at(bytes, inode.data_offset + at).unwrap();
    }
    let file = File::open(mounted.path(name)).unwrap();
    assert_eq!(file.metadata().unwrap().len(), inode.size);
    for (at, bytes) in &pieces {
        let mut read = vec![0; bytes.len()];
        file.read_exact_at(&mut read, *at).unwrap();
        assert!(read == *bytes, "{name} at {at}");
        assert_eq!(file.read_at(&mut read, inode.size).unwrap(), 0);
    }
}

#[test]
fn privileged_files_beyond_four_gib() {
    let mut layer = Layer::default();
    let size = (5 << 30) + 123;
    layer
        .file("first", 100, |_| {})
        .file("large", size, |_| {})
        .file("behind", 20_000, |_| {});
    let index = layer.index();
    let mounted = Mounted::empty(&index);
    let edges = [0, 4095, (1 << 31) - 5000, (1 << 32) - 5000, (5 << 30) - 4096, size - 1];
    same_at(&index, &mounted, "large", &edges);
    same_at(&index, &mounted, "behind", &[0, 10_000]);
    mounted.check();
}

#[test]
fn privileged_files_beyond_the_largest_chunk() {
    let mut layer = Layer::default();
    let tib = 1 << 40;
    layer
        .file("small", 5000, |_| {})
        .file("large", 9 * tib + 1, |_| {})
        .file("behind", 6 * tib, |_| {});
    let index = layer.index();
    let mounted = Mounted::empty(&index);
    same_at(
        &index,
        &mounted,
        "large",
        &[0, 8 * tib - 5000, 8 * tib, 9 * tib - 4096, 9 * tib],
    );
    same_at(&index, &mounted, "behind", &[0, 6 * tib - 10_000]);
    same_at(&index, &mounted, "small", &[0]);
    mounted.check();
}

#[test]
fn privileged_more_attributes_than_can_be_shared() {
    let mut layer = Layer::default();
    for name in ["a", "b"] {
        layer.file(name, 10, |file| {
            for at in 0..400 {
                set_xattr(file, &format!("user.{at}"), format!("value {at}").as_bytes());
            }
        });
    }
    layer.file("large", 10, |file| {
        for at in 0..20u8 {
            set_xattr(file, &format!("user.{at}"), &vec![at; 3210 * usize::from(at)]);
        }
        set_xattr(file, "user.largest", &[1; 65_535]);
    });
    layer.file("inline", 10, |file| {
        for at in 0..1000 {
            set_xattr(file, &format!("user.own.{at}"), &[7; 200]);
        }
    });
    layer.add("link", estargz::toc::EntryType::Symlink, |link| {
        link.link_name = "inline".into();
        for at in 0..30 {
            set_xattr(link, &format!("security.own.{at}"), &[9; 200]);
        }
    });
    let index = layer.index();
    let mounted = Mounted::new(&index);
    same_tree(&index, &mounted.root(), What::Mount);
    mounted.check();
}
