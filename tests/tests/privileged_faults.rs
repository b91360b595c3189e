//! What a lying registry cannot do: get wrong bytes to a reader or into the cache.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use estargz::index::LayerIndex;
use hullspeed_tests::fixture::{LARGE_FILE, LARGE_SIZE, large_content};
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::scenario::{CONVERTED, Scenario};

/// Bytes of a chunk, as the converter makes them.
const CHUNK: usize = 4 << 20;

/// The index of a layer that was mounted.
fn index(directory: &std::path::Path) -> LayerIndex<Vec<u8>> {
    LayerIndex::open(fs::read(directory.join("index")).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_chunk_bytes_are_an_error_and_never_reach_the_cache() {
    let scenario = Scenario::fixture().await.unwrap();
    let layer = scenario.converted.layers()[0].clone();
    let layer_digest = layer["digest"].as_str().unwrap().to_string();
    let toc_digest = layer["annotations"]["containerd.io/snapshot/stargz/toc.digest"]
        .as_str()
        .unwrap()
        .to_string();
    let mut node = scenario.lazy_node("[fetch]\nprefetch = false\n").await.unwrap();
    node.cri.pull(&scenario.reference(CONVERTED)).await.unwrap();
    node.check_lazy(&scenario.converted).unwrap();

    // The second chunk of the large file: its content does not compress, so bytes flipped inside its member are flipped
    // content, whatever the reader checks first.
    let cache = node.snapshotter().unwrap().layer(&toc_digest);
    let index = index(&cache);
    let directory = index.lookup(1, b"data").unwrap();
    let ino = index.lookup(directory, b"large.bin").unwrap();
    let chunks = index.chunks_in(ino, 0..LARGE_SIZE as u64);
    assert_eq!(chunks.len(), LARGE_SIZE.div_ceil(CHUNK));
    let chunk = index.chunk(chunks.start + 1).unwrap();
    let member = index.member(chunk.member).unwrap();
    let middle = u64::midpoint(member.start, member.end);
    scenario.proxy.inject(FaultRule::get(
        layer_digest.clone(),
        Fault::Corrupt(middle..middle + 64),
    ));

    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    let file = File::open(view.path().join(LARGE_FILE)).unwrap();
    let mut buffer = vec![0; 4096];
    let error = file.read_exact_at(&mut buffer, CHUNK as u64 + 100_000).unwrap_err();
    assert_eq!(
        error.raw_os_error(),
        Some(rustix::io::Errno::IO.raw_os_error()),
        "{error}"
    );

    // Nothing of the chunk is in `data`.
    let data = File::open(cache.join("data")).unwrap();
    let mut stored = vec![1; usize::try_from(chunk.size).unwrap()];
    data.read_exact_at(&mut stored, chunk.data_offset).unwrap();
    assert!(
        stored.iter().all(|&byte| byte == 0),
        "bytes of a chunk that did not verify are in the cache"
    );

    // One line says which image, layer, file and chunk; a metric counts.
    let log = node.snapshotter().unwrap().process().log_text().unwrap();
    let named = |line: &&str| {
        let image = line.contains(&scenario.reference(CONVERTED)) || line.contains("test/image");
        image && line.contains(&layer_digest) && line.contains(LARGE_FILE) && line.contains("chunk")
    };
    assert!(
        log.lines().any(|line| named(&line)),
        "no line names image, layer, file and chunk:\n{log}"
    );
    assert!(
        node.snapshotter()
            .unwrap()
            .metric("hullspeed_verify_failures_total", &[])
            .await
            .unwrap()
            >= 1.0
    );

    // The other chunks are fine, and once the registry is honest again so is this one.
    let content = large_content();
    let mut first = vec![0; 4096];
    file.read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, content[..4096]);
    scenario.proxy.heal();
    let read = fs::read(view.path().join(LARGE_FILE)).unwrap();
    assert!(read == content, "the file differs after the registry recovered");
    node.snapshots.remove(view).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_ignores_ranges_is_served_from_all_the_same() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    scenario.proxy.inject(FaultRule {
        ranges_only: true,
        ..FaultRule::get("/blobs/", Fault::IgnoreRange)
    });
    node.cri.pull(&scenario.reference(CONVERTED)).await.unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    node.snapshots.remove(view).await.unwrap();
}

/// A layer whose TOC cannot be had is unpacked in the ordinary way, and the reason is counted.
#[tokio::test(flavor = "multi_thread")]
async fn a_plain_image_falls_back_to_overlay_snapshots() {
    let scenario = Scenario::fixture().await.unwrap();
    let mut node = scenario.lazy_node("").await.unwrap();
    node.cri.pull(&scenario.plain_reference()).await.unwrap();
    let view = node.view(&scenario.run, "view", &scenario.plain).await.unwrap();
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    node.snapshots.remove(view).await.unwrap();
    let fallbacks = node
        .snapshotter()
        .unwrap()
        .metric("hullspeed_snapshot_prepare_total", &["no_toc_digest"])
        .await
        .unwrap();
    assert!(
        fallbacks >= 3.0,
        "{fallbacks} fallbacks are counted for three layers:\n{}",
        node.snapshotter().unwrap().metrics().await.unwrap()
    );
}
