//! Which entries survive and in what order they are written.

use super::*;
use TarKind::{Directory, Hardlink, Regular, Symlink};

/// Names of the survivors with their source, links as `name=target`.
fn survivors(entries: &[(&str, TarKind, &str)]) -> Result<Vec<String>, OrderError> {
    let mut tree = Tree::default();
    for (source, (path, kind, link)) in entries.iter().enumerate() {
        tree.add(path.as_bytes(), *kind, link.as_bytes(), source)?;
    }
    let placed = tree.finish()?;
    let text = |path: &[u8]| String::from_utf8(path.to_vec()).unwrap();
    Ok(placed
        .iter()
        .map(|entry| match entry.target {
            Some(target) => format!("{}={}", text(&entry.path), text(&placed[target].path)),
            None => format!("{}:{}", text(&entry.path), entry.source),
        })
        .collect())
}

#[track_caller]
fn check(entries: &[(&str, TarKind, &str)], expected: &[&str]) {
    assert_eq!(survivors(entries).unwrap(), expected);
}

#[test]
fn names_are_cleaned() {
    for (name, expected) in [
        ("./a", "a"),
        ("/a", "a"),
        ("a/", "a"),
        ("a//b/./c", "a/b/c"),
        ("./", ""),
        ("/", ""),
    ] {
        assert_eq!(clean(name.as_bytes()).unwrap(), expected.as_bytes(), "{name}");
    }
    let long = "x".repeat(256);
    let deep = "x/".repeat(2100);
    for bad in ["", "..", "../a", "a/../b", "a\0b", &long, &deep] {
        assert!(clean(bad.as_bytes()).is_err(), "{bad:?}");
    }
}

#[test]
fn later_entries_replace_earlier_ones() {
    check(
        &[("a", Regular, ""), ("b", Regular, ""), ("a", Regular, "")],
        &["b:1", "a:2"],
    );
    // A directory keeps its place and gets the new metadata; its content stays.
    check(
        &[("d", Directory, ""), ("d/a", Regular, ""), ("d", Directory, "")],
        &["d:2", "d/a:1"],
    );
    check(&[("d/a", Regular, ""), ("d", Directory, "")], &["d/a:0", "d:1"]);
}

#[test]
fn files_and_directories_replace_each_other() {
    let gone = [
        ("d", Directory, ""),
        ("d/a", Regular, ""),
        ("d/e/f", Regular, ""),
        ("d.x", Regular, ""),
    ];
    check(&[&gone[..], &[("d", Regular, "")]].concat(), &["d.x:3", "d:4"]);
    check(&[&gone[1..], &[("d", Symlink, "x")]].concat(), &["d.x:2", "d:3"]);
    check(
        &[("d", Regular, ""), ("d", Directory, ""), ("d/a", Regular, "")],
        &["d:1", "d/a:2"],
    );
    assert!(matches!(
        survivors(&[("d", Regular, ""), ("d/a", Regular, "")]),
        Err(OrderError::NotBelowDirectory { .. })
    ));
}

#[test]
fn a_link_keeps_the_content_it_was_made_to() {
    check(
        &[("a", Regular, ""), ("b", Hardlink, "a"), ("c", Hardlink, "b")],
        &["a:0", "b=a", "c=a"],
    );
    // `a` is replaced: `b` becomes the file, `c` a link to it.
    check(
        &[
            ("a", Regular, ""),
            ("b", Hardlink, "a"),
            ("c", Hardlink, "a"),
            ("a", Regular, ""),
            ("d", Hardlink, "a"),
        ],
        &["b:0", "c=b", "a:3", "d=a"],
    );
    // … and when its directory goes.
    check(
        &[("d/a", Regular, ""), ("b", Hardlink, "d/a"), ("d", Regular, "")],
        &["b:0", "d:2"],
    );
    check(
        &[("a", Regular, ""), ("b", Hardlink, "a"), ("a", Hardlink, "b")],
        &["b:0", "a=b"],
    );
    check(
        &[("s", Symlink, "x"), ("b", Hardlink, "s"), ("s", Regular, "")],
        &["b:0", "s:2"],
    );
}

#[test]
fn links_may_precede_their_target_but_not_lack_it() {
    check(
        &[("b", Hardlink, "a"), ("c", Hardlink, "b"), ("a", Regular, "")],
        &["b=a", "c=a", "a:2"],
    );
    check(&[("b", Hardlink, "a"), ("b", Regular, "")], &["b:1"]);
    for bad in [
        &[("b", Hardlink, "a")][..],
        &[("a", Hardlink, "a")],
        &[("a", Regular, ""), ("a", Hardlink, "a")],
        &[("a", Hardlink, "b"), ("b", Hardlink, "a")],
        &[("a", Hardlink, "b"), ("b", Hardlink, "c"), ("c", Hardlink, "b")],
        &[("d", Directory, ""), ("a", Hardlink, "d")],
        &[("a", Hardlink, "d"), ("d", Directory, "")],
        &[("", Regular, "")],
    ] {
        assert!(survivors(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn long_chains_of_links_settle_fast() {
    let mut tree = Tree::default();
    let count = 100_000;
    for i in 0..count {
        let (path, target) = (i.to_string(), (i + 1).to_string());
        tree.add(path.as_bytes(), Hardlink, target.as_bytes(), i).unwrap();
    }
    tree.add(count.to_string().as_bytes(), Regular, b"", count).unwrap();
    let placed = tree.finish().unwrap();
    assert!(placed[..count].iter().all(|entry| entry.target == Some(count)));
}

#[test]
fn paths_below_symbolic_links_go_to_their_targets() {
    check(
        &[
            ("lib", Symlink, "usr/lib"),
            ("lib/a", Regular, ""),
            ("usr/x", Symlink, "/opt/../lib"),
            ("usr/x/b", Regular, ""),
            ("usr/y", Symlink, "../../etc"),
            ("usr/y/c", Hardlink, "lib/a"),
        ],
        &[
            "lib:0",
            "usr/lib/a:1",
            "usr/x:2",
            "usr/lib/b:3",
            "usr/y:4",
            "etc/c=usr/lib/a",
        ],
    );
    assert!(matches!(
        survivors(&[("a", Symlink, "b"), ("b", Symlink, "a"), ("a/x", Regular, "")]),
        Err(OrderError::SymlinkLoop { .. })
    ));
    let growing = ["x/"; 100].concat();
    assert!(
        survivors(&[
            ("a", Symlink, &format!("{growing}../a/{growing}")),
            ("a/x", Regular, "")
        ])
        .is_ok()
    );
}

#[test]
fn prioritized_entries_bring_their_parents_and_targets() {
    let mut tree = Tree::default();
    for (source, (path, kind, link)) in [
        ("", Directory, ""),
        ("z", Regular, ""),
        ("usr", Directory, ""),
        ("usr/lib", Directory, ""),
        ("usr/lib/a", Regular, ""),
        ("bin", Directory, ""),
        ("bin/a", Hardlink, "usr/lib/a"),
        ("bin/b", Regular, ""),
    ]
    .into_iter()
    .enumerate()
    {
        tree.add(path.as_bytes(), kind, link.as_bytes(), source).unwrap();
    }
    let placed = tree.finish().unwrap();
    let paths = [&b"./bin/a"[..], b"none", b"/bin/b", b"bin/a", b"../x"].map(<[u8]>::to_vec);
    let arranged = arrange(&placed, &paths);
    assert_eq!(arranged.order, [0, 2, 3, 4, 5, 6, 7, 1]);
    assert_eq!(arranged.prioritized, 7);
    assert_eq!(arranged.missing, [b"none".to_vec(), b"../x".to_vec()]);
    assert_eq!(arrange(&placed, &[]).order, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn targets_are_written_before_their_links() {
    let mut tree = Tree::default();
    tree.add(b"b", Hardlink, b"a", 0).unwrap();
    tree.add(b"a", Regular, b"", 1).unwrap();
    assert_eq!(arrange(&tree.finish().unwrap(), &[]).order, [1, 0]);
}
