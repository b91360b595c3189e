//! What many mounted layers cost, measured by hand: `cargo nextest run --run-ignored only -E 'test(memory)' --no-capture`.
//!
//! Twice with the same `HULLSPEED_MEMORY_DIR` the second run mounts only, as a daemon does after its start.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use estargz::member::Compression;
use estargz::toc::{EntryType, Toc, TocEntry};

use super::tests::{blocking, layers};
use super::*;
use crate::layer::cache::Origin;

const FILES: usize = 5_000;

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name)
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(default)
}

/// The TOC of a layer of small files, each a chunk and a member of its own.
fn toc(layer: usize) -> Vec<u8> {
    let entries = (0..FILES).map(|file| {
        let mut entry = TocEntry::new(format!("usr/lib/directory{}/file-{file}", file % 97), EntryType::Reg);
        entry.size = 4_700;
        entry.mode = 0o644;
        entry.offset = 100 + file as u64 * 2_000;
        entry.chunk_digest = Some(Digest::of(format!("{layer} {file}").as_bytes()));
        entry.digest = entry.chunk_digest;
        entry
    });
    Toc {
        version: 1,
        entries: entries.collect(),
    }
    .to_json()
}

fn create(root: &Path, count: usize) -> Vec<LayerOrigin> {
    let store = LayerStore::open(root).unwrap();
    let create = |layer| {
        let toc = toc(layer);
        let toc_digest = Digest::of(&toc);
        let origin = Origin {
            image: "127.0.0.1:1/image:1".to_owned(),
            layer_digest: Digest::of(layer.to_le_bytes()),
            blob_size: 20_000_000,
            toc_offset: 15_000_000,
            compression: Compression::Gzip,
        };
        if !store.contains(&toc_digest) {
            store.create(&toc_digest, &toc, &origin).unwrap();
        }
        LayerOrigin {
            toc_digest,
            image: origin.image,
            layer_digest: origin.layer_digest,
        }
    };
    (0..count).map(create).collect()
}

fn report(what: &str) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let value = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .unwrap_or_default()
            .trim()
    };
    eprintln!(
        "{what}: rss {}, anonymous {}, files {}, threads {}",
        value("VmRSS:"),
        value("RssAnon:"),
        value("RssFile:"),
        value("Threads:")
    );
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "measures, asserts nothing"]
async fn privileged_memory_of_many_mounted_layers() {
    let kept = std::env::var_os("HULLSPEED_MEMORY_DIR").map(PathBuf::from);
    let temporary = tempfile::tempdir().unwrap();
    let root = kept.unwrap_or_else(|| temporary.path().to_owned());
    report("before");
    let began = Instant::now();
    let count = setting("HULLSPEED_MEMORY_LAYERS", 500);
    let origins = {
        let root = root.clone();
        blocking(move || create(&root, count)).await
    };
    eprintln!("created in {:?}", began.elapsed());
    report("created");
    let (layers, _) = layers(&root);
    let began = Instant::now();
    let mut mounts = Vec::new();
    for origin in &origins {
        mounts.push(layers.restore(origin.clone()).await.unwrap().path);
    }
    eprintln!("mounted in {:?}", began.elapsed());
    report("mounted");
    tokio::time::sleep(Duration::from_secs(22)).await;
    report("idle");
    let began = Instant::now();
    let found = blocking(move || {
        let list = |mount: &PathBuf| super::tests::names(mount).len();
        mounts.iter().map(list).sum::<usize>()
    });
    let found = found.await;
    eprintln!("listed {found} names in {:?}", began.elapsed());
    report("listed");
    tokio::time::sleep(Duration::from_secs(25)).await;
    report("idle again");
    layers.shutdown().await;
    report("unmounted");
}
