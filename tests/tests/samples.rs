//! The samples that users copy: containerd's configuration in `deploy/`, and its short form in the README.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use hullspeed_tests::process;
use toml::{Table, Value};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

fn sample(name: &str) -> PathBuf {
    workspace().join("deploy/containerd").join(name)
}

fn parse(text: &str) -> Table {
    text.parse().unwrap_or_else(|error| panic!("{error}:\n{text}"))
}

/// What stands at a path of keys.
fn at<'a>(table: &'a Table, keys: &[&str]) -> &'a Value {
    let (first, rest) = keys.split_first().unwrap();
    let found = table.get(*first).unwrap_or_else(|| panic!("no {first} in {table}"));
    rest.iter().fold(found, |value, key| {
        value.get(key).unwrap_or_else(|| panic!("no {key} in {value}"))
    })
}

/// The proxy plugin is the same in both versions.
fn check_plugin(table: &Table) {
    let plugin = at(table, &["proxy_plugins", "hullspeed"]);
    assert_eq!(plugin["type"].as_str(), Some("snapshot"));
    assert_eq!(plugin["address"].as_str(), Some("/run/hullspeed/snapshotter.sock"));
}

/// What the plugin exports; 1.6 has no such key and drops it.
fn check_exports(table: &Table) {
    let root = at(table, &["proxy_plugins", "hullspeed", "exports", "root"]);
    assert_eq!(root.as_str(), Some("/var/lib/hullspeed"));
}

/// containerd itself reads the sample of its version, and takes every value from it that this version knows.
#[test]
fn containerd_takes_the_sample() {
    let mut command = Command::new("containerd");
    command
        .arg("--config")
        .arg(sample("config-1.x.toml"))
        .args(["config", "dump"]);
    let dump = parse(&String::from_utf8(process::output(&mut command).unwrap()).unwrap());
    check_plugin(&dump);
    let cri = at(&dump, &["plugins", "io.containerd.grpc.v1.cri", "containerd"]);
    assert_eq!(cri["snapshotter"].as_str(), Some("hullspeed"));
    assert_eq!(cri["disable_snapshot_annotations"].as_bool(), Some(false));
}

/// No containerd 2 is in Debian 12, so its sample is only read.
#[test]
fn the_sample_for_containerd_2_says_the_same() {
    let table = parse(&fs::read_to_string(sample("config-2.x.toml")).unwrap());
    check_plugin(&table);
    check_exports(&table);
    assert_eq!(at(&table, &["version"]).as_integer(), Some(3));
    let images = at(&table, &["plugins", "io.containerd.cri.v1.images"]);
    assert_eq!(images["snapshotter"].as_str(), Some("hullspeed"));
    assert_eq!(images["disable_snapshot_annotations"].as_bool(), Some(false));
}

#[test]
fn the_readme_shows_the_sample() {
    let readme = fs::read_to_string(workspace().join("README.md")).unwrap();
    let snippets = readme
        .split("```toml\n")
        .skip(1)
        .map(|rest| rest.split("```").next().unwrap());
    let containerd: Vec<_> = snippets.filter(|text| text.contains("[proxy_plugins.")).collect();
    assert_eq!(containerd.len(), 1, "{containerd:?}");
    let sample = parse(&fs::read_to_string(sample("config-1.x.toml")).unwrap());
    check_exports(&sample);
    assert_eq!(parse(containerd[0]), sample);
}
