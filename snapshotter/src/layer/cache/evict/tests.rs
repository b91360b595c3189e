//! Quota, full disks and readers in between, on real directories.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use estargz::digest::Digest;
use proptest::prelude::*;

use super::Need;
use crate::layer::cache::limits::{Amount, Limits};
use crate::layer::cache::{CachedLayer, LayerStore, StoreError};
use crate::layer::testing::{Packing, Sample, SmallDisk, TestStore, assert_only_verified};
use crate::metrics::Metrics;
use crate::metrics::defs::EvictedLabels;

const MIB: u64 = 1 << 20;

/// The bytes of a chunk.
fn content(sample: &Sample, layer: &CachedLayer, id: u32) -> Vec<u8> {
    let chunk = layer.index().chunk(id).unwrap();
    let path = String::from_utf8(layer.index().path_of(chunk.ino)).unwrap();
    let start = usize::try_from(chunk.file_offset).unwrap();
    sample.files[&path[1..]][start..start + chunk.size as usize].to_vec()
}

fn store(sample: &Sample, layer: &CachedLayer, id: u32) -> Result<bool, StoreError> {
    layer.store(id, &content(sample, layer, id))
}

/// Stores a chunk that a reader waits for.
fn demand(sample: &Sample, layer: &CachedLayer, id: u32) -> Result<bool, StoreError> {
    let _held = layer.hold(id..id + 1);
    store(sample, layer, id)
}

fn read(layer: &CachedLayer, id: u32) -> Option<Vec<u8>> {
    let chunk = layer.index().chunk(id).unwrap();
    let place = chunk.data_offset..chunk.data_offset + u64::from(chunk.size);
    let read = layer.read_resident(place, id..id + 1).unwrap();
    read.map(|bytes| bytes.to_vec())
}

fn is_full(result: &Result<bool, StoreError>) -> bool {
    matches!(result, Err(StoreError::Write { source, .. }) if super::super::layer::is_full(source))
}

/// A store with a quota, and what it counts.
fn limited(root: &Path, quota: &str) -> (LayerStore, Metrics) {
    let metrics = Metrics::unregistered();
    let limits = Limits {
        quota: quota.parse().unwrap(),
        min_free: Amount::NONE,
    };
    (LayerStore::within(root, limits, metrics.clone()).unwrap(), metrics)
}

fn evicted(metrics: &Metrics, kind: &'static str) -> u64 {
    metrics.cache_evicted_bytes.get_or_create(&EvictedLabels { kind }).get()
}

/// Layers that share nothing, of `count` files of 64 KiB.
fn sample(seed: usize, count: usize) -> Sample {
    let files = (0..count).map(|n| {
        let bytes = crate::layer::testing::noise((seed * 1000 + n) as u64 + 1, 64 << 10);
        (format!("file{n:04}"), bytes)
    });
    Sample::new(files.collect(), Packing::default())
}

/// Creates a layer, all of it resident.
fn full(store_: &LayerStore, sample: &Sample) -> CachedLayer {
    let layer = sample.create(store_);
    for id in 0..layer.index().chunk_count() {
        store(sample, &layer, id).unwrap();
    }
    layer.checkpoint().unwrap();
    layer
}

/// Makes a layer that is not open one that was used so many days ago.
fn set_last_use(root: &Path, sample: &Sample, days: u64) {
    let origin = root.join("layers").join(sample.toc_digest.hex()).join("origin");
    let used = SystemTime::now() - Duration::from_secs(days * 86_400);
    let origin = fs::File::options().write(true).open(origin).unwrap();
    origin.set_modified(used).unwrap();
}

#[test]
fn unused_layers_go_first_the_one_used_longest_ago_before_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let samples: Vec<_> = (0..4).map(|seed| sample(seed, 16)).collect();
    {
        let (store, _) = limited(dir.path(), "0B");
        samples.iter().for_each(|sample| drop(full(&store, sample)));
    }
    // 1 was used longest ago, then 0, 2, 3; and a snapshot refers to 0.
    for (number, days) in [(1, 9), (0, 8), (2, 7), (3, 6)] {
        set_last_use(dir.path(), &samples[number], days);
    }
    let (store, metrics) = limited(dir.path(), "3MiB");
    let there = || {
        samples
            .iter()
            .map(|sample| store.contains(&sample.toc_digest))
            .collect::<Vec<_>>()
    };
    store.tidy();
    assert_eq!(there(), [true; 4], "nothing goes before it is known what is used");
    store.keep(&samples[0].toc_digest);
    store.settle();
    let pin = store.pin(&samples[1].toc_digest);
    store.tidy();
    assert_eq!(
        there(),
        [true, true, false, false],
        "what is used and what is about to be stays"
    );
    drop(pin);
    let open = store.load(&samples[1].toc_digest).unwrap().unwrap();
    store.keep(&samples[1].toc_digest);
    store.let_go(&samples[0].toc_digest);
    let third = full(&store, &samples[2]);
    store.tidy();
    assert_eq!(there(), [false, true, true, false]);
    assert!(open.residency().is_complete() && third.residency().is_complete());
    assert_eq!(evicted(&metrics, "chunks"), 0);
    assert!(evicted(&metrics, "layer") > 3 * MIB && metrics.cache_bytes.get() > 0);
    assert_eq!(metrics.cache_quota_bytes.get(), 3 << 20);
    assert_eq!(
        fs::read_dir(dir.path().join("layers")).unwrap().count(),
        2,
        "nothing is left of them"
    );
}

/// Mounts something that is in the way of a removal, as a dead mount is.
fn mount_on(path: &Path) {
    let flags = rustix::mount::MountFlags::empty();
    rustix::mount::mount("tmpfs", path, "tmpfs", flags, Some(c"size=64k")).unwrap();
}

#[test]
fn privileged_dead_mounts_keep_no_layer_from_going() {
    let dir = tempfile::tempdir().unwrap();
    let samples: Vec<_> = (0..4).map(|seed| sample(seed, 4)).collect();
    let (store, _) = limited(dir.path(), "0B");
    samples.iter().for_each(|sample| drop(full(&store, sample)));
    let layers = dir.path().join("layers");
    let mount_point = |sample: &Sample| store.path(&sample.toc_digest).join("mnt");
    // What was left of one that was being removed.
    fs::rename(store.path(&samples[0].toc_digest), layers.join(".new-0")).unwrap();
    mount_on(&layers.join(".new-0/mnt"));
    mount_on(&mount_point(&samples[1]));
    mount_on(&mount_point(&samples[1]));
    let mounted = || {
        let table = fs::read_to_string("/proc/self/mounts").unwrap();
        table.matches(layers.to_str().unwrap()).count()
    };
    assert_eq!(mounted(), 3);
    let (store, _) = limited(dir.path(), "0B");
    assert_eq!((mounted(), fs::read_dir(&layers).unwrap().count()), (0, 3));
    // And what came since.
    mount_on(&mount_point(&samples[2]));
    mount_on(&mount_point(&samples[3]));
    store.discard(&samples[3].toc_digest).unwrap();
    store.settle();
    let dropped = store.prune(true);
    assert_eq!((dropped.layers, dropped.failed), (2, 0));
    assert_eq!((mounted(), fs::read_dir(&layers).unwrap().count()), (0, 0));
}

/// Three complete layers of so many chunks, used 9, 8 and 7 days ago.
fn used_days_ago(root: &Path, chunks: usize) -> Vec<Sample> {
    let samples: Vec<_> = (0..3).map(|seed| sample(seed, chunks)).collect();
    let (store, _) = limited(root, "0B");
    samples.iter().for_each(|sample| drop(full(&store, sample)));
    drop(store);
    for (sample, days) in samples.iter().zip([9, 8, 7]) {
        set_last_use(root, sample, days);
    }
    samples
}

#[test]
fn privileged_a_layer_that_cannot_go_counts_and_lets_others_go_first() {
    let dir = tempfile::tempdir().unwrap();
    let samples = used_days_ago(dir.path(), 4);
    let (store, metrics) = limited(dir.path(), "0B");
    store.settle();
    let before = metrics.cache_bytes.get();
    // A directory that is a mount point is not renamed; and one is gone by somebody's hand.
    let stuck = store.path(&samples[0].toc_digest);
    mount_on(&stuck);
    fs::remove_dir_all(store.path(&samples[1].toc_digest)).unwrap();
    let dropped = store.prune(true);
    assert_eq!((dropped.layers, dropped.failed), (0, 1));
    assert_eq!(metrics.cache_bytes.get(), before);
    let dropped = store.prune(true);
    assert_eq!((dropped.layers, dropped.failed), (1, 1));
    assert!(!store.contains(&samples[2].toc_digest));
    assert!((1..before / 2).contains(&metrics.cache_bytes.get()));
    rustix::mount::unmount(&stuck, rustix::mount::UnmountFlags::DETACH).unwrap();
    assert_eq!(store.prune(true).layers, 1);
    assert_eq!(metrics.cache_bytes.get(), 0);
}

#[test]
fn a_layer_that_is_made_anew_is_kept_and_pinned_as_before() {
    let (test, sample) = (TestStore::new(), sample(1, 4));
    let store = &test.store;
    store.settle();
    drop(full(store, &sample));
    store.keep(&sample.toc_digest);
    let first = store.pin(&sample.toc_digest);
    store.discard(&sample.toc_digest).unwrap();
    drop(full(store, &sample));
    assert_eq!(store.prune(true).layers, 0, "a snapshot refers to it");
    store.let_go(&sample.toc_digest);
    let second = store.pin(&sample.toc_digest);
    drop(first);
    assert_eq!(store.prune(true).layers, 0, "somebody is about to open it");
    drop(second);
    assert_eq!(store.prune(true).layers, 1);
}

/// A verification opens every layer and reads all of it.
#[test]
fn what_is_only_looked_at_keeps_its_place_in_the_queue() {
    let dir = tempfile::tempdir().unwrap();
    let samples = used_days_ago(dir.path(), 16);
    let (store, _) = limited(dir.path(), "0B");
    let days = |sample: &Sample| {
        let last = store.last_used(&sample.toc_digest).unwrap();
        SystemTime::now().duration_since(last).unwrap().as_secs() / 86_400
    };
    for (sample, expected) in samples.iter().zip([9, 8, 7]) {
        let looked_at = store.load(&sample.toc_digest).unwrap().unwrap();
        for id in 0..looked_at.index().chunk_count() {
            let chunk = looked_at.index().chunk(id).unwrap();
            let place = chunk.data_offset..chunk.data_offset + u64::from(chunk.size);
            assert_eq!(looked_at.read(place).unwrap(), content(sample, &looked_at, id));
        }
        // The cache looks at all layers meanwhile.
        store.tidy();
        assert_eq!(days(sample), expected);
        drop(looked_at);
        assert_eq!(days(sample), expected);
    }
    // Warmed, or mounted until now.
    store.note_used(&samples[0].toc_digest);
    assert_eq!(days(&samples[0]), 0);
    let mounted = store.load(&samples[1].toc_digest).unwrap().unwrap();
    mounted.touch();
    assert_eq!(days(&samples[1]), 0);
    store.tidy();
    drop(mounted);
    store.settle();
    let least = store.shelf_for_test().take_least().unwrap();
    assert_eq!(
        least.map(|(layer, ..)| layer),
        Some(samples[2].toc_digest),
        "nobody used it"
    );
}

#[test]
fn a_reader_of_more_than_the_quota_is_served_and_the_quota_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let sample = sample(1, 100);
    let (store_, metrics) = limited(dir.path(), "2MiB");
    store_.settle();
    let layer = sample.create(&store_);
    store_.keep(&sample.toc_digest);
    for id in 0..100 {
        let held = layer.hold(id..id + 1);
        assert!(store(&sample, &layer, id).unwrap());
        assert_eq!(read(&layer, id).unwrap(), content(&sample, &layer, id));
        drop(held);
        let used = store_.usage(&sample.toc_digest).bytes;
        assert!(used <= 2 * MIB + 128 * 1024, "{used} after chunk {id}");
    }
    assert!(evicted(&metrics, "chunks") > 4 * MIB);
    assert!(store_.no_room().is_some(), "for nobody");
    assert_only_verified(&layer);
}

#[test]
fn what_was_not_read_goes_before_what_was_and_what_is_held_stays() {
    let dir = tempfile::tempdir().unwrap();
    let sample = sample(1, 40);
    let (store_, _) = limited(dir.path(), "2MiB");
    store_.settle();
    let layer = sample.create(&store_);
    let (warm, cold) = (0..10, 10..25);
    for id in warm.clone().chain(cold) {
        store(&sample, &layer, id).unwrap();
    }
    for id in warm.clone() {
        read(&layer, id).unwrap();
    }
    for id in 25..36 {
        demand(&sample, &layer, id).unwrap();
    }
    assert!(warm.clone().all(|id| layer.residency().contains(id)), "read lately");
    assert!(layer.residency().count() < 36);
    // With everything held there is nothing to give up.
    let held = layer.hold(0..100);
    let refused = (0..40)
        .map(|id| store(&sample, &layer, id))
        .find(|stored| stored.is_err());
    assert!(is_full(&refused.unwrap()));
    drop(held);
    std::thread::sleep(super::FRUITLESS);
    let nobody = (0..40)
        .map(|id| store(&sample, &layer, id))
        .find(|stored| stored.is_err());
    assert!(matches!(nobody, Some(Err(StoreError::NoRoom { .. }))), "{nobody:?}");
    for id in 0..40 {
        demand(&sample, &layer, id).unwrap();
    }
    assert_only_verified(&layer);
}

#[test]
fn what_is_given_up_is_not_resident_after_an_unclean_stop() {
    let (test, sample) = (TestStore::new(), sample(1, 20));
    let layer = full(&test.store, &sample);
    assert!(layer.give_up(&[3, 4, 5, 19, 500]).unwrap() >= 4 * (64 << 10));
    let gone = |layer: &CachedLayer| {
        (0..20)
            .filter(|&id| !layer.residency().contains(id))
            .collect::<Vec<_>>()
    };
    assert_eq!(gone(&layer), [3, 4, 5, 19]);
    assert!(read(&layer, 4).is_none());
    drop(layer);
    let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
    assert_eq!(gone(&layer), [3, 4, 5, 19]);
    assert_only_verified(&layer);
    // Where no new bitmap can be written, the old one goes.
    let blocked = layer.dir().join(".resident.tmp");
    fs::create_dir(&blocked).unwrap();
    layer.give_up(&[0]).unwrap();
    assert!(layer.residency().contains(1));
    drop(layer);
    let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
    assert_eq!(layer.residency().count(), 0);
    fs::remove_dir(&blocked).unwrap();
}

#[test]
fn readers_never_see_a_hole_while_chunks_come_and_go() {
    let (test, sample) = (TestStore::new(), sample(1, 24));
    let layer = full(&test.store, &sample);
    let contents: Vec<_> = (0..24).map(|id| content(&sample, &layer, id)).collect();
    let stop = Arc::new(AtomicBool::new(false));
    std::thread::scope(|scope| {
        for reader in 0..3_u32 {
            let (layer, contents, stop) = (layer.clone(), &contents, stop.clone());
            scope.spawn(move || {
                let mut served = 0_u32;
                for turn in (reader..).map(|turn| turn % 24) {
                    if stop.load(Ordering::Relaxed) && served > 0 {
                        break;
                    }
                    if let Some(bytes) = read(&layer, turn) {
                        assert!(bytes == contents[turn as usize], "chunk {turn}");
                        served += 1;
                    }
                    // As a reader that has to wait for the chunk.
                    let held = layer.hold(turn..turn + 1);
                    layer.store(turn, &contents[turn as usize]).unwrap();
                    let chunk = layer.index().chunk(turn).unwrap();
                    let place = chunk.data_offset..chunk.data_offset + u64::from(chunk.size);
                    assert!(
                        layer.read(place).unwrap() == contents[turn as usize],
                        "held chunk {turn}"
                    );
                    drop(held);
                }
            });
        }
        for round in 0..150_u32 {
            let chunks: Vec<_> = (0..24).filter(|id| (id + round) % 3 != 0).collect();
            layer.give_up(&chunks).unwrap();
            if round % 10 == 0 {
                layer.checkpoint().unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_only_verified(&layer);
}

/// The reader has seen the bit just before it is cleared, and reads when the hole is there.
#[test]
fn a_reader_that_was_overtaken_while_bits_were_cleared_is_served_no_hole() {
    let (test, sample) = (TestStore::new(), sample(1, 4));
    let layer = full(&test.store, &sample);
    let (seen, sees) = std::sync::mpsc::channel();
    let (punched, hole) = std::sync::mpsc::channel();
    let read = std::thread::scope(|scope| {
        let mut reader = None;
        let given_up = layer.give_up_after(&[0, 1, 2, 3], || {
            let layer = layer.clone();
            reader = Some(scope.spawn(move || {
                let chunk = layer.index().chunk(3).unwrap();
                let place = chunk.data_offset..chunk.data_offset + u64::from(chunk.size);
                layer.read_resident_by(place, 3..4, |place| {
                    seen.send(()).unwrap();
                    hole.recv().unwrap();
                    layer.read(place)
                })
            }));
            sees.recv().unwrap();
        });
        assert!(given_up.unwrap() > 0);
        punched.send(()).unwrap();
        reader.unwrap().join().unwrap()
    });
    assert!(read.unwrap().is_none());
}

/// What happens to a layer.
#[derive(Debug, Clone)]
enum Step {
    Store(u32),
    GiveUp(Vec<u32>),
    Hold(u32),
    Release,
    Checkpoint,
    FailedSync,
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    let chunk = 0u32..12;
    prop_oneof![
        6 => chunk.clone().prop_map(Step::Store),
        3 => prop::collection::btree_set(0u32..12, 1..8).prop_map(|chunks| Step::GiveUp(chunks.into_iter().collect())),
        1 => chunk.prop_map(Step::Hold),
        1 => Just(Step::Release),
        2 => Just(Step::Checkpoint),
        1 => Just(Step::FailedSync),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn residency_and_eviction_agree_with_a_model(steps in prop::collection::vec(step(), 1..40)) {
        let test = TestStore::new();
        let files = (0..6).map(|n| (format!("f{n}"), crate::layer::testing::noise(n + 1, 9_000))).collect();
        // Two chunks in each file, neither of them of whole pages.
        let sample = Sample::new(files, Packing { chunk: 5_000, ..Packing::default() });
        let mut layer = sample.create(&test.store);
        let (mut resident, mut synced, mut durable) = (vec![false; 12], vec![false; 12], vec![false; 12]);
        let mut held = None;
        for step in steps {
            match step {
                Step::Store(id) => {
                    prop_assert_eq!(store(&sample, &layer, id).unwrap(), !resident[id as usize]);
                    resident[id as usize] = true;
                }
                Step::GiveUp(chunks) => {
                    let holding = held.map(|id| layer.hold(id..id + 1));
                    layer.give_up(&chunks).unwrap();
                    drop(holding);
                    for &id in &chunks {
                        (synced[id as usize], durable[id as usize]) = (false, false);
                        resident[id as usize] &= held == Some(id);
                    }
                }
                Step::Hold(id) => held = Some(id),
                Step::Release => held = None,
                Step::Checkpoint => {
                    layer.checkpoint().unwrap();
                    synced.clone_from(&resident);
                    durable.clone_from(&resident);
                }
                Step::FailedSync => {
                    if layer.checkpoint_after(|_| Err(std::io::Error::from_raw_os_error(libc::EIO))).is_err() {
                        for (resident, synced) in resident.iter_mut().zip(&synced) {
                            *resident &= synced;
                        }
                    }
                }
                Step::Crash => {
                    let digest = layer.toc_digest();
                    drop(layer);
                    layer = test.store.load(&digest).unwrap().unwrap();
                    let found: Vec<_> = (0..12).map(|id| layer.residency().contains(id)).collect();
                    prop_assert_eq!(&found, &durable);
                    resident.clone_from(&durable);
                    synced.clone_from(&durable);
                    held = None;
                }
            }
            for id in 0..12 {
                prop_assert_eq!(layer.residency().contains(id), resident[id as usize], "chunk {}", id);
                if let Some(bytes) = read(&layer, id) {
                    let digest = layer.index().chunk(id).unwrap().digest;
                    prop_assert_eq!(Digest::of(&bytes), digest);
                }
            }
        }
    }
}

#[test]
fn privileged_a_full_disk_gives_up_what_it_can_then_says_so_and_recovers() {
    let disk = SmallDisk::new(c"size=4m");
    let root = disk.path();
    let (store_, _) = limited(root, "0B");
    let (old, new) = (sample(1, 24), sample(2, 100));
    drop(full(&store_, &old));
    let layer = new.create(&store_);
    for id in 0..20 {
        store(&new, &layer, id).unwrap();
    }
    layer.checkpoint().unwrap();
    // Nothing may be dropped as long as it is not known what is used; so parts of what is open go.
    for id in 20..60 {
        demand(&new, &layer, id).unwrap();
    }
    assert!(store_.contains(&old.toc_digest) && layer.residency().count() < 60);
    // The unused layer goes when it may.
    store_.settle();
    for id in (60..100).chain(0..60) {
        demand(&new, &layer, id).unwrap();
    }
    assert!(!store_.contains(&old.toc_digest));
    layer.checkpoint().unwrap();
    // Somebody else takes all the rest, and everything is held: a clear error, and nothing wrong.
    let held = layer.hold(0..100);
    let ballast = root.join("ballast");
    let filled = fs::write(&ballast, vec![1; 4 << 20]);
    assert_eq!(filled.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    std::thread::sleep(super::FRUITLESS);
    let missing = (0..100).find(|&id| !layer.residency().contains(id)).unwrap();
    assert!(is_full(&store(&new, &layer, missing)));
    assert!(!layer.residency().contains(missing));
    fs::remove_file(&ballast).unwrap();
    assert!(store(&new, &layer, missing).unwrap(), "room came back");
    drop(held);
    layer.checkpoint().unwrap();
    assert_only_verified(&layer);
    drop(layer);
    let layer = store_.load(&new.toc_digest).unwrap().unwrap();
    assert!(layer.residency().contains(missing));
    assert_only_verified(&layer);
}

#[test]
fn what_nobody_waits_for_stops_before_the_quota_and_is_not_started_by_what_readers_push_out() {
    let dir = tempfile::tempdir().unwrap();
    let (used, unused) = (sample(1, 60), sample(2, 20));
    let (store_, _) = limited(dir.path(), "4MiB");
    drop(full(&store_, &unused));
    store_.settle();
    let layer = used.create(&store_);
    store_.keep(&used.toc_digest);
    store_.tidy();
    let mut background = 0;
    while layer.has_room() && background < 60 {
        store(&used, &layer, background).unwrap();
        background += 1;
        store_.tidy();
    }
    assert!(
        (40..58).contains(&background),
        "{background}: seven eighths, the unused layer's share too"
    );
    for id in background..60 {
        demand(&used, &layer, id).unwrap();
    }
    assert!(!store_.contains(&unused.toc_digest), "given up for a reader");
    for id in 0..60 {
        demand(&used, &layer, id).unwrap();
    }
    store_.tidy();
    assert!(!layer.has_room());
}

/// As with blocks that other files share.
#[test]
fn privileged_what_is_given_up_and_frees_nothing_is_no_room() {
    let disk = SmallDisk::new(c"size=4m");
    let (store, _) = limited(disk.path(), "0B");
    let samples = [sample(1, 8), sample(2, 8)];
    samples.iter().for_each(|sample| drop(full(&store, sample)));
    set_last_use(disk.path(), &samples[0], 1);
    store.settle();
    let elsewhere: Vec<_> = samples
        .iter()
        .flat_map(|sample| fs::read_dir(store.path(&sample.toc_digest)).unwrap())
        .map(|entry| fs::File::open(entry.unwrap().path()).unwrap())
        .collect();
    disk.fill();
    let shelf = store.shelf_for_test();
    assert!(!shelf.make_room_on_disk(1, Need::Reader));
    assert!(shelf.making_room.lock().unwrap().is_some(), "it is tried again at once");
    drop(elsewhere);
    full(&store, &samples[0]);
}

#[test]
fn privileged_a_table_of_contents_finds_room_on_a_full_disk() {
    let disk = SmallDisk::new(c"size=4m");
    let root = disk.path();
    let (store_, _) = limited(root, "0B");
    let (old, new) = (sample(1, 32), sample(2, 200));
    let open = full(&store_, &old);
    disk.fill();
    // Parts of a mounted layer go for it; and where there is nothing to give up, it is said what is wrong.
    let created = new.create(&store_);
    assert!(open.residency().count() < 32);
    assert_only_verified(&open);
    drop((created, open));
    store_.discard(&new.toc_digest).unwrap();
    store_.discard(&old.toc_digest).unwrap();
    disk.fill();
    let refused = store_.create(&new.toc_digest, &new.toc_json, &new.origin());
    assert!(refused.as_ref().is_err_and(|error| error.is_full()), "{refused:?}");
    let left = fs::read_dir(root.join("layers")).unwrap().count();
    assert_eq!(left, 0, "half a layer is left");
    disk.empty();
    new.create(&store_);
}

#[test]
fn what_is_lacking_is_named_and_told_once() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = Metrics::unregistered();
    let limits = Limits {
        quota: Amount::NONE,
        min_free: Amount::Percent(100),
    };
    let store_ = LayerStore::within(dir.path(), limits, metrics.clone()).unwrap();
    let lack = store_.no_room().unwrap();
    assert_eq!(lack.limit(), "min_free");
    store_.tidy();
    assert_eq!(metrics.cache_short_of_room.get(), 1);
    // A reader is served all the same.
    let sample = sample(1, 4);
    let layer = sample.create(&store_);
    assert!(!layer.has_room() && demand(&sample, &layer, 0).unwrap());
    let (roomy, metrics) = limited(dir.path(), "0B");
    roomy.tidy();
    assert_eq!((roomy.no_room(), metrics.cache_short_of_room.get()), (None, 0));
}
