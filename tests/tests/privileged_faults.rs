//! What a lying registry cannot do: get wrong bytes to a reader or into the cache.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use estargz::index::LayerIndex;
use hullspeed_tests::fixture::{LARGE_FILE, LARGE_SIZE, large_content};
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::proxy::record::RequestRecord;
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use hullspeed_tests::unasked;
use serde_json::Value;

/// Bytes of a chunk, as the converter makes them.
const CHUNK: usize = 1 << 20;

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
    let chunk_id = chunks.start + 1;
    let chunk = index.chunk(chunk_id).unwrap();
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
    let data = unasked::open(&cache.join("data")).unwrap();
    let mut stored = vec![1; usize::try_from(chunk.size).unwrap()];
    data.read_exact_at(&mut stored, chunk.data_offset).unwrap();
    assert!(
        stored.iter().all(|&byte| byte == 0),
        "bytes of a chunk that did not verify are in the cache"
    );

    // One line says which image, layer, file and chunk; a metric counts.
    let records = node.snapshotter().unwrap().log_records().unwrap();
    let named = |record: &Value| {
        record["level"] == "ERROR"
            && record["image"] == scenario.reference(CONVERTED)
            && record["layer"] == layer_digest
            && record["file"] == format!("/{LARGE_FILE}")
            && record["chunk"] == chunk_id
    };
    assert!(
        records.iter().any(named),
        "no line names image, layer, file and chunk {chunk_id}: {records:#?}"
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
    node.check_lazy(&scenario.converted).unwrap();
    let view = node.view(&scenario.run, "view", &scenario.converted).await.unwrap();
    assert!(fs::read(view.path().join(LARGE_FILE)).unwrap() == large_content());
    let requests = scenario.proxy.requests();
    let layer = scenario.converted.layers()[0]["digest"].as_str().unwrap().to_string();
    let ignored = |record: &RequestRecord| {
        record.method == "GET" && record.path.contains(&layer) && record.range.is_some() && record.status == 200
    };
    assert!(requests.iter().any(ignored), "no range was ignored: {requests:#?}");
    assert!(!requests.iter().any(|record| record.status == 206), "{requests:#?}");
    node.snapshots.remove(view).await.unwrap();
}

/// A layer whose TOC cannot be had is unpacked in the ordinary way, and the reason is counted and logged.
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
    let records = node.snapshotter().unwrap().log_records().unwrap();
    for layer in scenario.plain.layer_digests() {
        let named = |record: &Value| {
            record["reason"] == "no_toc_digest"
                && record["image"] == scenario.plain_reference()
                && record["layer"] == layer
        };
        assert!(
            records.iter().any(named),
            "no line says why {layer} is unpacked: {records:#?}"
        );
    }
}
