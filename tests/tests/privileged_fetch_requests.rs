//! What mounting and looking cost in requests.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::process::Command;

use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::Source;
use hullspeed_tests::process;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::proxy::record::RequestRecord;
use hullspeed_tests::scenario::Scenario;

/// Nothing is fetched but for readers.
const DEMAND_ONLY: &str = "[fetch]\nprefetch = false\nbackground = false\n";

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
