//! No daemon takes away from under the kernel what it was allowed to read, also one that did not allow it, and mounts otherwise.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use hullspeed_tests::lazy::{Source, check_all, read_all};
use hullspeed_tests::load::{forget, two_layers, wait_unmounted};
use hullspeed_tests::proxy::{Carrier, LinkOptions};
use hullspeed_tests::scenario::Scenario;
use hullspeed_tests::way::Way;

/// Nothing is fetched but for readers; the limits come behind it.
const DEMAND: &str = "[fetch]\nprefetch = false\nbackground = false\nread_around = \"64KiB\"\nread_deadline = \"5s\"\n\n\
    [cache]\nmin_free = \"0B\"\ncheckpoint_interval = \"100ms\"\n";

/// Unit of `st_blocks`.
const BLOCK: u64 = 512;

fn allocated(layer: &Path) -> u64 {
    fs::metadata(layer.join("data")).unwrap().blocks() * BLOCK
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_kernel_reads_stays_whatever_the_next_daemon_needs() {
    if Way::of_this_run().unwrap() != Way::Erofs {
        return;
    }
    let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap();
    let publish = |name: &str| {
        let layers = two_layers(name, 32, 120_000);
        (
            source.publish(name, &layers, &["--chunk-size", "65536"]).unwrap(),
            layers,
        )
    };
    let (image, layers) = publish("there");
    let (other, others) = publish("pressing");
    let mut node = source.kept_node("node", DEMAND).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    // Of one layer all is here, and nobody is asked about it any more; of the other a part.
    let (here, _) = layers[1].split_at(16);
    let here = [&layers[0], here].concat();
    check_all(view.path(), &here).await.unwrap();
    let directories = [0, 1].map(|layer| node.cache(&image, layer).unwrap());
    // The whole one is left to the kernel alone by then, and nothing is kept of it.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = directories.each_ref().map(|layer| allocated(layer));
    // The next daemon mounts by FUSE, and may keep hardly more than that.
    node.snapshotter.process().kill().unwrap();
    let config = node.snapshotter.config();
    let text = fs::read_to_string(&config).unwrap();
    let changed = text
        .replace("mount = \"erofs\"", "mount = \"fuse\"")
        .replace("[cache]\n", "[cache]\nquota = \"8MiB\"\n");
    assert!(changed.contains("fuse") && changed.contains("quota"), "{changed}");
    fs::write(&config, changed).unwrap();
    node.start_again(&source.run).await.unwrap();
    node.mount_somehow(&other).await.unwrap();
    let pressing = node.view(&other, "pressing").await.unwrap();
    let mut refused = 0;
    for _ in 0..2 {
        // There may be no room for all of it: what is read is right.
        let files = others.concat();
        for (file, read) in files.iter().zip(read_all(pressing.path(), &files).await.unwrap()) {
            match read {
                Ok(read) => assert!(read == file.content(), "{}", file.path),
                Err(_) => refused += 1,
            }
        }
    }
    let evicted = node
        .snapshotter
        .metric("hullspeed_cache_evicted_bytes_total", &[])
        .await
        .unwrap();
    assert!(evicted > 0.0 || refused > 0, "nothing was pressed");
    let after = directories.each_ref().map(|layer| allocated(layer));
    assert_eq!(after, before, "a hole was punched");
    // From the disk, by those who had it mounted before, and with nobody to fetch it from.
    source.proxy.set_carrier(Carrier::Refusing);
    forget(view.path(), &here).unwrap();
    check_all(view.path(), &here).await.unwrap();
    node.snapshots.remove(pressing).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    node.forget(&other).await.unwrap();
    node.forget(&image).await.unwrap();
    wait_unmounted(&node).await.unwrap();
}
