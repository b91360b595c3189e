use super::*;
use crate::verify::verify_layer;
use std::io::Write;
use std::process::{Command, Stdio};

mod support;
use support::*;

#[test]
fn a_real_tree_survives() {
    let tar = Command::new("tar")
        .args(["-C", "/usr/share", "-c", "perl", "doc"])
        .output()
        .unwrap()
        .stdout;
    let (blob, built) = convert(&tar, &options(2));
    let report = verify_layer(blob.clone(), Some(built.toc_digest), Some(built.diff_id)).unwrap();
    assert_eq!(report.blob_digest, built.blob_digest);
    assert_eq!(report.uncompressed_size, built.uncompressed_size);
    std::fs::write("/tmp/writer-blob.gz", &blob).unwrap();
    let out = gnu_tar(&["-tv"], &gunzip(&blob));
    println!("{} entries, {report:?} {}", report.entries, out.lines().count());
}
