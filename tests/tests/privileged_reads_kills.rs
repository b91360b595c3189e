//! kill -9 of the daemon again and again while programs read: they get the right bytes, no error, and soon.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use hullspeed_tests::content::ContentFile;
use hullspeed_tests::lazy::{LazyNode, Published, Source, stored};
use hullspeed_tests::process;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::reader::{Hammer, METHODS, Order, Reader};
use hullspeed_tests::scenario::Scenario;
use hullspeed_tests::way::Way;

/// Nothing is fetched but for readers, in small pieces, so that much is cold for long.
const DEMAND: &str = "[fetch]\nprefetch = false\nbackground = false\nread_around = \"64KiB\"\nmax_range = \"256KiB\"\n\n\
    [cache]\ncheckpoint_interval = \"100ms\"\n";

/// As delivered, but that what was read is durable soon.
const COMPLETING: &str = "[cache]\ncheckpoint_interval = \"100ms\"\n";

/// No read lasts longer, whoever is killed meanwhile; several starts of the daemon, its pauses with them.
const STUCK: Duration = Duration::from_secs(25);

/// How long the daemon is killed.
const STORM: Duration = Duration::from_secs(14);

/// Numbers from a seed.
struct Dice(u64);

impl Dice {
    /// The seed of `HULLSPEED_SEED`, to try others or a failure's again.
    fn thrown(default: u64) -> Self {
        let seed = std::env::var("HULLSPEED_SEED").map_or(default, |text| text.parse().unwrap());
        eprintln!("HULLSPEED_SEED={seed}");
        Self(seed)
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }

    /// Mostly while it serves, sometimes while it starts.
    fn pause(&mut self) -> Duration {
        let most = if self.below(4) == 0 { 120 } else { 900 };
        Duration::from_millis(self.below(most))
    }
}

fn layers(name: &str, count: usize, size: usize) -> Vec<Vec<ContentFile>> {
    let file = |layer: usize, number: usize| {
        // From a page to many chunks.
        let size = size / 16 * (1 + number % 31) + number;
        ContentFile::new(format!("{name}/l{layer}/f{number:03}"), size)
    };
    let layer = |layer| (0..count).map(|number| file(layer, number)).collect();
    vec![layer(0), layer(1)]
}

/// Compares every byte of an image, read by several at once.
async fn check_every_byte(source: &Source, reader: &Reader, root: &Path, files: &[ContentFile]) {
    let (reader, list, root, files) = (
        reader.clone(),
        source.run.path().join("every"),
        root.to_owned(),
        files.to_vec(),
    );
    let reading = tokio::task::spawn_blocking(move || {
        let (faults, reads) = reader.crowd(8, &list, &root, &files).unwrap();
        assert!(
            faults.is_empty(),
            "{} faults: {:#?}",
            faults.len(),
            &faults[..faults.len().min(20)]
        );
        assert_eq!(reads, 2 * files.len() as u64);
    });
    let done = tokio::time::timeout(Duration::from_secs(60), reading).await;
    done.expect("readers hang").unwrap();
}

/// EROFS on a file has no direct I/O.
fn is_refused(way: Way, fault: &str) -> bool {
    way == Way::Erofs && fault.starts_with("direct ") && fault.ends_with(": errno 22 at open")
}

/// Ends the readers; how often they have read.
fn finish(hammers: Vec<Hammer>, node: &LazyNode) -> u64 {
    let way = Way::of_this_run().unwrap();
    let mut all = 0;
    for hammer in hammers {
        let finished = hammer.finish(STUCK * 2);
        let (mut faults, reads) = finished.unwrap_or_else(|error| panic!("{error:#}\n{}", node.snapshotter.log_end()));
        faults.retain(|fault| !is_refused(way, fault));
        assert!(
            faults.is_empty(),
            "{} faults: {:#?}",
            faults.len(),
            &faults[..faults.len().min(20)]
        );
        assert!(reads > 0, "a reader has read nothing");
        all += reads;
    }
    all
}

/// The kernel forgets what it has read of these files.
fn forget(root: &Path, files: &[ContentFile]) {
    for file in files {
        let file = File::open(root.join(&file.path)).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

fn check_stored(node: &LazyNode, image: &Published, layers: &[Vec<ContentFile>]) {
    for (number, files) in layers.iter().enumerate() {
        let kept = stored(&node.cache(image, number).unwrap(), files).unwrap();
        let whole = (kept.wrong, kept.absent) == (0, 0);
        assert!(whole, "layer {number}: {kept:?}; log:\n{}", node.snapshotter.log_end());
    }
}

/// SIGKILL, whatever the daemon is at. It may not be there just now.
fn kill(node: &mut LazyNode) -> bool {
    let running = node.snapshotter.process().kept().unwrap().running();
    running.is_some_and(|pid| process::kill(pid).is_ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_again_and_again_costs_its_readers_time_and_nothing_else() {
    // Slow enough that there is always something that nobody has read.
    let link = LinkOptions {
        delay: Duration::from_millis(3),
        bytes_per_second: Some(3_000_000),
    };
    let source = Source::start(Scenario::prepare().unwrap(), link).await.unwrap();
    let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
    let layers = layers("storm", 160, 120_000);
    let image = source.publish("storm", &layers, &["--chunk-size", "65536"]).unwrap();
    let mut node = source.kept_node("node", DEMAND).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    let files = layers.concat();
    let mut dice = Dice::thrown(20_261_123);
    let mut hammers = Vec::new();
    let hammer = |number: usize| {
        let list = source.run.path().join(format!("list-{number}"));
        reader
            .hammer((number, number as u64), STUCK, &list, view.path(), &files)
            .unwrap()
    };
    let (begin, mut kills) = (Instant::now(), 0);
    while begin.elapsed() < STORM {
        // One reader, then two, then three, each with one thread more.
        if hammers.len() < 3 && begin.elapsed() >= STORM / 4 * u32::try_from(hammers.len()).unwrap() {
            hammers.push(hammer(hammers.len() + 1));
        }
        tokio::time::sleep(dice.pause()).await;
        kills += u64::from(kill(&mut node));
    }
    assert!(kills > 10, "only {kills} kills");
    node.wait_again().await.unwrap();
    let reads = finish(hammers, &node);
    eprintln!("{kills} kills, {reads} reads");
    check_every_byte(&source, &reader, view.path(), &files).await;
    // What the kernel still had is not on the disk for that: once more from there.
    forget(view.path(), &files);
    check_every_byte(&source, &reader, view.path(), &files).await;
    check_stored(&node, &image, &layers);
    node.snapshots.remove(view).await.unwrap();
}

/// Layers that complete while the daemon is killed: the moments at which a mark is set and taken away, and things are
/// kept and forgotten.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_layers_come_and_complete_serves_them_all() {
    const ROUNDS: u64 = 8;
    let link = LinkOptions {
        delay: Duration::from_millis(2),
        bytes_per_second: Some(40_000_000),
    };
    let source = Source::start(Scenario::prepare().unwrap(), link).await.unwrap();
    let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
    let mut node = source.kept_node("node", COMPLETING).await.unwrap();
    let mut dice = Dice::thrown(5);
    for round in 0..ROUNDS {
        let name = format!("round-{round}");
        let layers = layers(&name, 20, 40_000);
        let image = source.publish(&name, &layers, &["--chunk-size", "65536"]).unwrap();
        node.mount(&image).await.unwrap();
        let view = node.view(&image, &name).await.unwrap();
        let files = layers.concat();
        let list = source.run.path().join("list");
        let hammer = reader.hammer((2, round), STUCK, &list, view.path(), &files).unwrap();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(dice.below(150))).await;
            kill(&mut node);
            if dice.below(3) > 0 {
                node.wait_again().await.unwrap();
            }
        }
        node.wait_again().await.unwrap();
        finish(vec![hammer], &node);
        check_every_byte(&source, &reader, view.path(), &files).await;
        // Again from the disk, with what the kernel had forgotten.
        let mut checking = reader.check(65536, source.run.path()).unwrap();
        for (file, method) in files
            .iter()
            .zip(METHODS.iter().cycle())
            .filter(|(_, method)| **method != "direct")
        {
            let answer = checking.ask((method, Order::Whole), view.path(), file, STUCK).unwrap();
            assert_eq!(answer, "ok", "round {round}: {method} of {}", file.path);
        }
        drop(checking);
        check_stored(&node, &image, &layers);
        node.snapshots.remove(view).await.unwrap();
        node.forget(&image).await.unwrap();
    }
    // Nothing is left of any of them, neither a mount nor a kept descriptor but the journal.
    let layers = node.snapshotter.root().join("layers");
    let end = Instant::now() + STUCK;
    loop {
        let left = hullspeed_tests::sweep::mounts_below(&layers).unwrap();
        if left.is_empty() {
            break;
        }
        assert!(Instant::now() < end, "{left:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    kill(&mut node);
    node.wait_again().await.unwrap();
    let records = node.snapshotter.log_records().unwrap();
    let started = records
        .iter()
        .rfind(|record| record["message"] == "the program is started");
    let expected = u64::from(node.snapshotter.way() == Way::Erofs);
    assert_eq!(started.unwrap()["kept"], expected, "{}", node.snapshotter.log_end());
}
