//! The daemon is killed at each point on the way of a layer between whose two sides something is done and something else is not. Those who
//! read get the right bytes and no error; nothing is left of layers that have gone.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use hullspeed_snapshotter::layer::fault::{CACHE, EROFS, FUSE};
use hullspeed_tests::content::ContentFile;
use hullspeed_tests::lazy::{LazyNode, Published, Source};
use hullspeed_tests::load::{
    STUCK, check_every_byte, check_nothing_kept, check_stored, finish, forget, two_layers, wait_unmounted,
};
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::reader::{Hammer, Reader};
use hullspeed_tests::scenario::Scenario;
use hullspeed_tests::snapshots::View;
use hullspeed_tests::way::Way;

/// Nothing is fetched but for readers, in small pieces, so that much is cold for long.
const DEMAND: &str = "[fetch]\nprefetch = false\nbackground = false\nread_around = \"64KiB\"\nmax_range = \"256KiB\"\n\n\
    [cache]\ncheckpoint_interval = \"100ms\"\n";

/// As delivered, but that what was read is durable soon.
const COMPLETING: &str = "[cache]\ncheckpoint_interval = \"100ms\"\n";

/// A point is reached sooner than this, or never; and whatever else is waited for.
const REACHED: Duration = Duration::from_secs(20);

/// Of an image that is soon complete, and whose layers do not come as a whole with the first request.
const FILES: usize = 12;
/// Twice the size of the largest of them.
const SIZE: usize = 200_000;

/// Readers read at least so long, however soon a point is reached.
const A_WHILE: Duration = Duration::from_millis(300);

/// While content comes; some not at the first passing.
const READING: [&str; 7] = [
    "chunk-written:3",
    "chunk-marked:5",
    "checkpoint-synced",
    "file-written",
    "checkpoint-done",
    "layer-mounted",
    "chunk-written:40",
];
const READING_EROFS: [&str; 8] = [
    "event-read:4",
    "event-entered:3",
    "event-taken:2",
    "event-fetched",
    "event-answered:5",
    "event-forgotten:3",
    "event-fetched:9",
    "events-reserved",
];
const READING_FUSE: [&str; 4] = [
    "request-read:5",
    "request-fetched:3",
    "request-fetched:20",
    "session-resumed",
];
/// Only where the daemon starts: it is killed for that.
const STARTING: [&str; 3] = ["events-reserved", "layer-mounted", "session-resumed"];

/// While a layer is mounted for the first time.
const MOUNTING: [&str; 2] = ["layer-written", "layer-mounted"];
const MOUNTING_EROFS: [&str; 5] = [
    "native-noted",
    "native-half-kept",
    "native-kept",
    "native-marked",
    "native-created",
];
const MOUNTING_FUSE: [&str; 3] = ["session-mounted", "session-half-kept", "session-kept"];

/// When a layer is complete.
const COMPLETE_EROFS: [&str; 3] = ["native-whole", "native-unmarked", "native-voided"];

/// When the last snapshot of a layer is removed.
const REMOVING: [&str; 2] = ["layer-released", "layer-unmounted"];
const REMOVING_EROFS: [&str; 1] = ["native-unmounted"];
const REMOVING_FUSE: [&str; 1] = ["session-unmounted"];

/// When a mount is put in the place of another.
const REPLACING_EROFS: [&str; 2] = ["native-beneath", "native-replaced"];

/// Those of the way of this run.
fn of_this_way(both: &[&'static str], erofs: &[&'static str], fuse: &[&'static str]) -> Vec<&'static str> {
    let own = match Way::of_this_run().unwrap() {
        Way::Erofs => erofs,
        Way::Fuse => fuse,
    };
    [own, both].concat()
}

fn name(point: &str) -> &str {
    point.split(':').next().unwrap()
}

#[test]
fn no_point_is_left_out() {
    let tried = [
        &READING[..],
        &READING_EROFS,
        &READING_FUSE,
        &MOUNTING,
        &MOUNTING_EROFS,
        &MOUNTING_FUSE,
        &COMPLETE_EROFS,
        &REMOVING,
        &REMOVING_EROFS,
        &REMOVING_FUSE,
        &REPLACING_EROFS,
    ];
    let tried: BTreeSet<_> = tried.concat().into_iter().map(name).collect();
    let all: BTreeSet<_> = [&CACHE[..], &EROFS, &FUSE].concat().into_iter().collect();
    assert_eq!(tried, all);
}

struct Field {
    node: LazyNode,
    reader: Reader,
    source: Source,
}

/// An image that is mounted and read.
struct Read {
    image: Published,
    layers: Vec<Vec<ContentFile>>,
    view: View,
    hammer: Hammer,
}

impl Read {
    fn files(&self) -> Vec<ContentFile> {
        self.layers.concat()
    }
}

impl Field {
    async fn new(link: LinkOptions, config: &str) -> Self {
        let source = Source::start(Scenario::prepare().unwrap(), link).await.unwrap();
        let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
        let node = source.kept_node("node", config).await.unwrap();
        Self { node, reader, source }
    }

    fn publish(&self, name: &str, count: usize, size: usize) -> (Published, Vec<Vec<ContentFile>>) {
        let layers = two_layers(name, count, size);
        let image = self.source.publish(name, &layers, &["--chunk-size", "65536"]).unwrap();
        (image, layers)
    }

    /// Looks at an image whose layers are mounted, and begins to read it.
    async fn read(&mut self, name: &str, image: Published, layers: Vec<Vec<ContentFile>>) -> Read {
        let view = self.node.view(&image, name).await.unwrap();
        let list = self.source.run.path().join(format!("list-{name}"));
        let hammer = self.reader.hammer((3, 11), STUCK, &list, view.path(), &layers.concat());
        Read {
            hammer: hammer.unwrap(),
            image,
            layers,
            view,
        }
    }

    /// Ends the reading of an image, compares all of it, and removes it.
    async fn end(&mut self, read: Read) {
        let files = read.files();
        tokio::time::sleep(A_WHILE).await;
        let reads = finish(vec![read.hammer], &self.node).unwrap();
        eprintln!("{}: {reads} reads", read.image.name);
        let check = || check_every_byte(&self.source, &self.reader, read.view.path(), &files);
        check().await.unwrap();
        // What the kernel still had is not on the disk for that: once more from there.
        forget(read.view.path(), &files).unwrap();
        check().await.unwrap();
        check_stored(&self.node, &read.image, &read.layers).unwrap();
        self.node.snapshots.remove(read.view).await.unwrap();
        self.node.forget(&read.image).await.unwrap();
    }

    fn kills(&mut self) -> usize {
        self.node.snapshotter.process().kept().unwrap().kills().unwrap()
    }

    /// Waits until the daemon was killed at the point that it was told, and `kills` times in all, and another one serves.
    async fn killed(&mut self, point: &str, kills: usize) {
        let end = Instant::now() + REACHED;
        while self.node.snapshotter.is_armed() || self.kills() < kills {
            let log = || self.node.snapshotter.log_end();
            assert!(Instant::now() < end, "{point} was not reached; log:\n{}", log());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(self.kills(), kills, "killed elsewhere than at {point}");
        self.node.wait_again().await.unwrap();
    }

    /// Tries a point that is reached by itself.
    async fn pass(&mut self, point: &str) {
        let kills = self.kills();
        self.node.snapshotter.arm(point).unwrap();
        self.killed(point, kills + 1).await;
    }

    /// Waits until what was mounted is mounted again: nothing of a start is to come.
    async fn settle(&self) {
        let end = Instant::now() + REACHED;
        loop {
            let records = self.node.snapshotter.log_records().unwrap();
            let last = |message: &str| records.iter().rposition(|record| record["message"] == message);
            if last("lazy layers are mounted again") > last("the program is started") {
                return;
            }
            assert!(Instant::now() < end, "{}", self.node.snapshotter.log_end());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until every layer is mounted once, and natively.
    async fn wait_native(&mut self, layers: usize) {
        let directory = self.node.snapshotter.root().join("layers");
        let end = Instant::now() + REACHED;
        loop {
            let mounts = hullspeed_tests::sweep::mounts_below(&directory).unwrap();
            if self.node.snapshotter.check_way().is_ok() && mounts.len() == layers {
                return;
            }
            assert!(
                Instant::now() < end,
                "{mounts:?}; log:\n{}",
                self.node.snapshotter.log_end()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Tries a point that is reached when the daemon starts.
    async fn pass_at_start(&mut self, point: &str) {
        self.settle().await;
        let kills = self.kills();
        self.node.snapshotter.arm(point).unwrap();
        assert!(self.node.kill());
        self.killed(point, kills + 2).await;
    }

    /// Nothing is left of anything.
    async fn check_left(mut self) {
        wait_unmounted(&self.node).await.unwrap();
        check_nothing_kept(&mut self.node).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_content_comes() {
    let link = LinkOptions {
        delay: Duration::from_millis(3),
        bytes_per_second: Some(2_500_000),
    };
    let mut field = Field::new(link, DEMAND).await;
    let (image, layers) = field.publish("reading", 100, 110_000);
    field.node.mount(&image).await.unwrap();
    let read = field.read("reading", image, layers).await;
    for point in of_this_way(&READING, &READING_EROFS, &READING_FUSE) {
        if STARTING.contains(&point) {
            field.pass_at_start(point).await;
        } else {
            field.pass(point).await;
        }
    }
    field.end(read).await;
    field.check_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_layers_are_mounted_become_complete_and_go() {
    let link = LinkOptions {
        delay: Duration::from_millis(2),
        bytes_per_second: Some(20_000_000),
    };
    let mut field = Field::new(link, COMPLETING).await;
    for point in of_this_way(&MOUNTING, &MOUNTING_EROFS, &MOUNTING_FUSE) {
        let (image, layers) = field.publish(point, FILES, SIZE);
        let kills = field.kills();
        field.node.snapshotter.arm(point).unwrap();
        // Its connection broke off, or another daemon took it.
        let _ = field.node.mount(&image).await;
        field.killed(point, kills + 1).await;
        field.node.mount(&image).await.unwrap();
        let read = field.read(point, image, layers).await;
        field.end(read).await;
    }
    for point in of_this_way(&[], &COMPLETE_EROFS, &[]) {
        let (image, layers) = field.publish(point, FILES, SIZE);
        let kills = field.kills();
        field.node.snapshotter.arm(point).unwrap();
        // It may be complete before all of it is mounted.
        let mounted = field.node.mount(&image).await.is_ok();
        let mut read = None;
        if mounted {
            read = Some(field.read(point, image.clone(), layers.clone()).await);
        }
        field.killed(point, kills + 1).await;
        if read.is_none() {
            field.node.mount(&image).await.unwrap();
            read = Some(field.read(point, image, layers).await);
        }
        field.end(read.unwrap()).await;
    }
    for point in of_this_way(&REMOVING, &REMOVING_EROFS, &REMOVING_FUSE) {
        let (image, layers) = field.publish(point, FILES, SIZE);
        field.node.mount(&image).await.unwrap();
        let read = field.read(point, image.clone(), layers.clone()).await;
        field.end_but_for(point, read).await;
        // Somebody comes for it while what is left of it is taken down.
        field.node.mount(&image).await.unwrap();
        let read = field.read(&format!("again-{point}"), image, layers).await;
        field.end(read).await;
    }
    field.check_left().await;
}

impl Field {
    /// Ends the reading of an image and removes it, whereupon the daemon is killed at `point`.
    async fn end_but_for(&mut self, point: &str, read: Read) {
        tokio::time::sleep(A_WHILE).await;
        finish(vec![read.hammer], &self.node).unwrap();
        self.node.snapshots.remove(read.view).await.unwrap();
        let kills = self.kills();
        self.node.snapshotter.arm(point).unwrap();
        // Its connection broke off.
        let _ = self.node.forget(&read.image).await;
        self.killed(point, kills + 1).await;
    }
}

/// A layer that was mounted by FUSE is mounted natively when it is complete, and a complete one anew by the next daemon.
#[tokio::test(flavor = "multi_thread")]
async fn while_a_mount_takes_the_place_of_another() {
    if Way::of_this_run().unwrap() != Way::Erofs {
        return;
    }
    let link = LinkOptions {
        delay: Duration::from_millis(2),
        bytes_per_second: Some(10_000_000),
    };
    let by_fuse = format!("{COMPLETING}\n[layers]\nmount = \"fuse\"\n");
    let mut field = Field::new(link, &by_fuse).await;
    let (image, layers) = field.publish("replacing", 40, 110_000);
    field.node.mount_somehow(&image).await.unwrap();
    let read = field.read("replacing", image, layers).await;
    let config = field.node.snapshotter.config();
    let text = std::fs::read_to_string(&config).unwrap();
    let changed = text.replace("mount = \"fuse\"", "mount = \"erofs\"");
    assert!(changed != text);
    std::fs::write(&config, changed).unwrap();
    // In the place of FUSE, whenever it is complete; and then whenever the daemon starts.
    field.pass_at_start("native-beneath").await;
    field.wait_native(2).await;
    for point in REPLACING_EROFS {
        field.pass_at_start(point).await;
        field.wait_native(2).await;
    }
    field.end(read).await;
    field.check_left().await;
}
