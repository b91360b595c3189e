//! Layers that an earlier daemon left mounted and that cannot be had any more: whoever reads of them gets an error, and does not wait.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hullspeed_tests::content::ContentFile;
use hullspeed_tests::lazy::{LazyNode, Published, Source, check_all, read_all};
use hullspeed_tests::load::{check_nothing_kept, two_layers, wait_unmounted};
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::scenario::Scenario;
use hullspeed_tests::snapshots::chain_id;

/// Nothing is fetched but for readers.
const DEMAND: &str = "[fetch]\nprefetch = false\nbackground = false\nread_around = \"4KiB\"\nmax_range = \"64KiB\"\n\n\
    [cache]\ncheckpoint_interval = \"100ms\"\n";

/// What is taken from a layer, in its place something that is nothing. The daemon that has it open keeps what it has.
struct Damage(Vec<(PathBuf, Vec<u8>)>);

impl Damage {
    fn to(layer: &Path) -> Self {
        let files = ["toc", "index", "origin"].map(|name| layer.join(name));
        let damage = |path: PathBuf| {
            let content = fs::read(&path).unwrap();
            put(&path, b"damaged");
            (path, content)
        };
        Self(files.into_iter().map(damage).collect())
    }

    fn repair(self) {
        self.0.iter().for_each(|(path, content)| put(path, content));
    }
}

fn put(path: &Path, content: &[u8]) {
    let temporary = path.with_extension("put");
    fs::write(&temporary, content).unwrap();
    fs::rename(&temporary, path).unwrap();
}

async fn node() -> (Source, LazyNode, Published, Vec<Vec<ContentFile>>) {
    let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap();
    let layers = two_layers("damage", 12, 60_000);
    let image = source.publish("damage", &layers, &["--chunk-size", "16384"]).unwrap();
    let mut node = source.kept_node("node", DEMAND).await.unwrap();
    node.mount(&image).await.unwrap();
    (source, node, image, layers)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_is_an_error_until_it_can() {
    let (source, mut node, image, layers) = node().await;
    let view = node.view(&image, "view").await.unwrap();
    // Some of each is there.
    check_all(view.path(), &[layers[0][0].clone(), layers[1][0].clone()])
        .await
        .unwrap();
    let damaged = node.cache(&image, 0).unwrap();
    node.snapshotter.process().kill().unwrap();
    let damage = Damage::to(&damaged);
    node.start_again(&source.run).await.unwrap();
    // Cold files: nobody but the daemon could answer.
    for read in read_all(view.path(), &layers[0][1..]).await.unwrap() {
        assert_eq!(read.unwrap_err().raw_os_error(), Some(5));
    }
    check_all(view.path(), &layers[1]).await.unwrap();
    // What the daemon has given up it has not thrown away.
    node.snapshotter.process().kill().unwrap();
    damage.repair();
    node.start_again(&source.run).await.unwrap();
    check_all(view.path(), &layers.concat()).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    node.forget(&image).await.unwrap();
    wait_unmounted(&node).await.unwrap();
    check_nothing_kept(&mut node).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_restored_and_nobody_wants_is_taken_down() {
    let (_source, mut node, image, layers) = node().await;
    let view = node.view(&image, "view").await.unwrap();
    check_all(view.path(), &[layers[0][0].clone(), layers[1][0].clone()])
        .await
        .unwrap();
    node.snapshots.remove(view).await.unwrap();
    for layer in 0..2 {
        drop(Damage::to(&node.cache(&image, layer).unwrap()));
    }
    // No snapshot refers to the upper layer any more, and it is mounted.
    let kills = node.snapshotter.process().kept().unwrap().kills().unwrap();
    node.snapshotter.arm("layer-released").unwrap();
    let chains = [1, 2].map(|layers| chain_id(&image.image.diff_ids()[..layers]));
    let _ = node.snapshots.remove_key(&chains[1]).await;
    let end = Instant::now() + Duration::from_secs(10);
    while node.snapshotter.process().kept().unwrap().kills().unwrap() == kills {
        assert!(Instant::now() < end, "not killed; log:\n{}", node.snapshotter.log_end());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    node.wait_again().await.unwrap();
    // The lower one is wanted until now.
    node.snapshots.remove_key(&chains[0]).await.unwrap();
    wait_unmounted(&node).await.unwrap();
    check_nothing_kept(&mut node).await.unwrap();
}
