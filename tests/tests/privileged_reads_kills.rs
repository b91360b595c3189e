//! kill -9 of the daemon again and again while programs read: they get the right bytes, no error, and soon.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::{Duration, Instant};

use hullspeed_tests::lazy::{Source, check_all};
use hullspeed_tests::load::{
    STUCK, check_every_byte, check_nothing_kept, check_stored, finish, forget, two_layers, wait_unmounted,
};
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::reader::{METHODS, Order, Reader};
use hullspeed_tests::scenario::Scenario;
use hullspeed_tests::way::Way;

/// Nothing is fetched but for readers, in small pieces, so that much is cold for long.
const DEMAND: &str = "[fetch]\nprefetch = false\nbackground = false\nread_around = \"64KiB\"\nmax_range = \"256KiB\"\n\n\
    [cache]\ncheckpoint_interval = \"100ms\"\n";

/// As delivered, but that what was read is durable soon.
const COMPLETING: &str = "[cache]\ncheckpoint_interval = \"100ms\"\n";

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

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_again_and_again_costs_its_readers_time_and_nothing_else() {
    // Slow enough that there is always something that nobody has read.
    let link = LinkOptions {
        delay: Duration::from_millis(3),
        bytes_per_second: Some(3_000_000),
    };
    let source = Source::start(Scenario::prepare().unwrap(), link).await.unwrap();
    let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
    let layers = two_layers("storm", 160, 120_000);
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
        kills += u64::from(node.kill());
    }
    assert!(kills > 10, "only {kills} kills");
    node.wait_again().await.unwrap();
    let reads = finish(hammers, &node).unwrap();
    eprintln!("{kills} kills, {reads} reads");
    check_every_byte(&source, &reader, view.path(), &files).await.unwrap();
    // What the kernel still had is not on the disk for that: once more from there.
    forget(view.path(), &files).unwrap();
    check_every_byte(&source, &reader, view.path(), &files).await.unwrap();
    check_stored(&node, &image, &layers).unwrap();
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
        let layers = two_layers(&name, 20, 40_000);
        let image = source.publish(&name, &layers, &["--chunk-size", "65536"]).unwrap();
        node.mount(&image).await.unwrap();
        let view = node.view(&image, &name).await.unwrap();
        let files = layers.concat();
        let list = source.run.path().join("list");
        let hammer = reader.hammer((2, round), STUCK, &list, view.path(), &files).unwrap();
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(dice.below(150))).await;
            node.kill();
            if dice.below(3) > 0 {
                node.wait_again().await.unwrap();
            }
        }
        node.wait_again().await.unwrap();
        finish(vec![hammer], &node).unwrap();
        check_every_byte(&source, &reader, view.path(), &files).await.unwrap();
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
        check_stored(&node, &image, &layers).unwrap();
        node.snapshots.remove(view).await.unwrap();
        node.forget(&image).await.unwrap();
    }
    // Nothing is left of any of them, neither a mount nor a kept descriptor but the journal.
    wait_unmounted(&node).await.unwrap();
    check_nothing_kept(&mut node).await.unwrap();
}

/// How each file was opened is the mount's, not the process's: the next daemon knows it.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_killed_while_the_kernel_reads_complete_files_by_itself() {
    if Way::of_this_run().unwrap() != Way::Fuse {
        return;
    }
    const KILLS: usize = 6;
    let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap();
    let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
    let layers = two_layers("direct", 24, 110_000);
    let image = source.publish("direct", &layers, &["--chunk-size", "65536"]).unwrap();
    let config = format!("{DEMAND}\n[fuse]\npassthrough = true\n");
    let mut node = source.kept_node("node", &config).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "before").await.unwrap();
    let files = layers.concat();
    let list = |number: usize| source.run.path().join(format!("list-{number}"));
    // Half of them are here when they are first opened by this mount, and held open; the others come while it is killed.
    let (here, coming) = files.split_at(files.len() / 2);
    check_every_byte(&source, &reader, view.path(), here).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    node.forget(&image).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    let open: Vec<_> = here
        .iter()
        .map(|file| std::fs::File::open(view.path().join(&file.path)).unwrap())
        .collect();
    let hammer = |number: usize, files| {
        reader
            .hammer((2, number as u64), STUCK, &list(number), view.path(), files)
            .unwrap()
    };
    let hammers = vec![hammer(1, here), hammer(2, coming)];
    for _ in 0..KILLS {
        tokio::time::sleep(Duration::from_millis(150)).await;
        assert!(node.kill());
        node.wait_again().await.unwrap();
    }
    finish(hammers, &node).unwrap();
    check_every_byte(&source, &reader, view.path(), &files).await.unwrap();
    // What is complete is read past the daemon, also by the one that began to serve it as the seventh.
    let served = async || {
        node.snapshotter
            .metric("hullspeed_read_bytes_total", &[])
            .await
            .unwrap()
    };
    let before = served().await;
    forget(view.path(), &files).unwrap();
    // Not in every way: to read ahead is asked of FUSE itself.
    check_all(view.path(), here).await.unwrap();
    assert_eq!(served().await, before, "it was read through the daemon");
    drop(open);
    node.snapshots.remove(view).await.unwrap();
    node.forget(&image).await.unwrap();
    wait_unmounted(&node).await.unwrap();
    check_nothing_kept(&mut node).await.unwrap();
}
