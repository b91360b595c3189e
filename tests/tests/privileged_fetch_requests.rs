//! What mounting, looking and completing cost in requests, bytes and files.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::{LazyNode, Published, Source, check_all, stored};
use hullspeed_tests::process;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::proxy::record::RequestRecord;
use hullspeed_tests::scenario::Scenario;

/// Nothing is fetched but for readers.
const DEMAND_ONLY: &str = "[fetch]\nprefetch = false\nbackground = false\n";

/// The longest wait for a layer to become complete.
const COMPLETE_LIMIT: Duration = Duration::from_secs(60);

async fn source() -> Source {
    Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap()
}

fn blobs(source: &Source) -> Vec<RequestRecord> {
    let requests = source.proxy.requests().into_iter();
    requests.filter(RequestRecord::is_blob).collect()
}

fn layers() -> Vec<Vec<ContentFile>> {
    (0..4)
        .map(|layer| small_files(&format!("l{layer}"), 150, 2000))
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_costs_one_request_and_none_when_its_toc_is_here() {
    let source = source().await;
    let image = source.publish("image", &layers(), &[]).unwrap();
    let mut node = source.node("node", DEMAND_ONLY).await.unwrap();
    node.mount(&image).await.unwrap();
    let requests = blobs(&source);
    assert_eq!(requests.len(), layers().len(), "{requests:#?}");
    assert!(requests.iter().all(|request| request.status == 206), "{requests:#?}");

    // Looking at everything asks for nothing.
    source.proxy.reset();
    let view = node.view(&image, "view").await.unwrap();
    let mut find = Command::new("find");
    find.arg(view.path()).args(["-type", "f", "-size", "+1c"]);
    let found = process::output(&mut find).unwrap();
    let files: usize = layers().iter().map(Vec::len).sum();
    assert_eq!(found.iter().filter(|&&byte| byte == b'\n').count(), files);
    node.snapshots.remove(view).await.unwrap();
    assert_eq!(source.proxy.requests(), []);

    // The image is removed and comes back, then the daemon does.
    node.forget(&image).await.unwrap();
    node.mount(&image).await.unwrap();
    node.snapshotter.process().stop().unwrap();
    node.start_again(&source.run).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    assert_eq!(source.proxy.requests(), []);
}

/// Waits until the background has brought all of a layer's files.
async fn completed(node: &LazyNode, image: &Published, files: &[ContentFile]) {
    let end = Instant::now() + COMPLETE_LIMIT;
    loop {
        let stored = stored(&node.cache(image, 0).unwrap(), files).unwrap();
        if stored.absent == 0 && stored.wrong == 0 {
            return;
        }
        assert!(
            Instant::now() < end,
            "not complete after {COMPLETE_LIMIT:?}: {stored:?}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Bytes allocated by a layer's files, and their number.
fn weight(cache: &Path) -> (u64, usize) {
    let entries = fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path());
    let files = entries.map(|path| fs::symlink_metadata(path).unwrap());
    let files: Vec<_> = files.filter(fs::Metadata::is_file).collect();
    (files.iter().map(|file| file.blocks() * 512).sum(), files.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_completes_in_the_background_with_few_requests_and_no_byte_twice() {
    let source = source().await;
    let files: Vec<_> = (0..20)
        .map(|number| ContentFile::new(format!("large/{number}"), 600_000))
        .chain(small_files("small", 200, 4000))
        .collect();
    let image = source.publish("image", std::slice::from_ref(&files), &[]).unwrap();
    let mut node = source.node("node", "").await.unwrap();
    node.mount(&image).await.unwrap();
    completed(&node, &image, &files).await;
    let requests = blobs(&source);
    let (bytes, size) = (
        requests.iter().map(|request| request.body_bytes).sum::<u64>(),
        image.blob_size(0).unwrap(),
    );
    assert!(
        bytes as f64 <= 1.05 * size as f64,
        "{bytes} bytes of {size}: {requests:#?}"
    );
    let allowed = 1 + size.div_ceil(1 << 20);
    assert!(
        requests.len() as u64 <= allowed,
        "{} requests for {size} bytes",
        requests.len()
    );
    let view = node.view(&image, "view").await.unwrap();
    source.proxy.set_dead(true);
    check_all(view.path(), &files).await.unwrap();
    node.snapshots.remove(view).await.unwrap();

    let (allocated, count) = weight(&node.cache(&image, 0).unwrap());
    assert!(count <= 6, "{count} files for one layer");
    let content: usize = files.iter().map(|file| file.size).sum();
    assert!(
        allocated as f64 <= 1.15 * content as f64,
        "{allocated} bytes on disk of {content} uncompressed"
    );
}

/// Two images share nine tenths of their content and no layer.
#[tokio::test(flavor = "multi_thread")]
async fn an_update_fetches_what_is_new() {
    let source = source().await;
    let package = |number: usize| small_files(&format!("p{number:02}"), 20, 15_000);
    let first: Vec<_> = (0..30).flat_map(package).collect();
    let second: Vec<_> = (0..30)
        .flat_map(|number| {
            let files = package(number).into_iter();
            files.map(move |file| if number % 10 == 0 { file.changed() } else { file })
        })
        .collect();
    let old = source.publish("old", std::slice::from_ref(&first), &[]).unwrap();
    let new = source.publish("new", std::slice::from_ref(&second), &[]).unwrap();
    let mut node = source.node("node", "").await.unwrap();
    node.mount(&old).await.unwrap();
    completed(&node, &old, &first).await;
    source.proxy.reset();
    node.mount(&new).await.unwrap();
    completed(&node, &new, &second).await;
    let requests = blobs(&source);
    let bytes: u64 = requests.iter().map(|request| request.body_bytes).sum();
    let size = new.blob_size(0).unwrap();
    assert!(
        bytes as f64 <= 0.12 * size as f64,
        "{bytes} bytes of {size}: {requests:#?}"
    );
    let view = node.view(&new, "view").await.unwrap();
    source.proxy.set_dead(true);
    check_all(view.path(), &second).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
}
