//! Whole trees.

use estargz::toc::EntryType;

use super::layer::{Layer, content};
use super::*;

#[test]
fn privileged_a_simple_tree() {
    let mut layer = Layer::default();
    layer
        .dir("etc")
        .file("etc/hosts", 10_000, |_| {})
        .symlink("link", "etc/hosts")
        .file("empty", 0, |_| {})
        .add("null", EntryType::Char, |entry| {
            (entry.dev_major, entry.dev_minor) = (1, 3)
        });
    let index = layer.index();
    let mounted = Mounted::new(&index);
    let read = fs::read(mounted.path("link")).unwrap();
    assert!(
        read == content(
            index.lookup(index.lookup(1, b"etc").unwrap(), b"hosts").unwrap(),
            0,
            10_000
        )
    );
}
