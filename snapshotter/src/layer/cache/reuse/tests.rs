//! Chunks found on the node, and everything that can be wrong with where they were found.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::*;
use crate::layer::testing::{Packing, Sample, TestStore, assert_only_verified};

fn store_all(sample: &Sample, layer: &CachedLayer) {
    for id in 0..layer.index().chunk_count() {
        let chunk = layer.index().chunk(id).unwrap();
        let path = String::from_utf8(layer.index().path_of(chunk.ino)).unwrap();
        let start = usize::try_from(chunk.file_offset).unwrap();
        layer
            .store(id, &sample.files[&path[1..]][start..start + chunk.size as usize])
            .unwrap();
    }
    layer.checkpoint().unwrap();
}

/// Two layers of which the second has all files of the first and two more.
fn samples() -> [Sample; 2] {
    let packing = Packing {
        chunk: 50_000,
        per_member: 3,
        prioritized: None,
    };
    [6, 8].map(|count| Sample::uniform(count, 120_000, packing))
}

fn all(layer: &CachedLayer) -> Range<u32> {
    0..layer.index().chunk_count()
}

#[test]
fn what_another_layer_has_is_copied_whether_that_layer_is_open_or_not() {
    for is_open in [true, false] {
        let (test, [first, second]) = (TestStore::new(), samples());
        let donor = first.create(&test.store);
        store_all(&first, &donor);
        let open = is_open.then_some(donor);
        let layer = second.create(&test.store);
        let filled = fill(&layer, all(&layer)).unwrap();
        assert_eq!(filled.bytes, 7 * 120_000, "six files and the zeros");
        assert_eq!(filled.chunks, layer.residency().count());
        assert_eq!(fill(&layer, all(&layer)).unwrap(), Filled::default());
        assert_only_verified(&layer);
        drop(open);
    }
}

#[test]
fn a_chunk_that_a_layer_has_twice_is_fetched_once() {
    let twin = crate::layer::testing::noise(1, 100_000);
    let files = vec![("a".to_owned(), twin.clone()), ("b".to_owned(), twin.clone())];
    let sample = Sample::new(files, Packing::default());
    let test = TestStore::new();
    let layer = sample.create(&test.store);
    layer.store(0, &twin[..64 << 10]).unwrap();
    assert_eq!(fill(&layer, all(&layer)).unwrap().chunks, 1);
    assert_only_verified(&layer);
}

#[test]
fn wrong_bytes_missing_bytes_and_layers_that_are_gone_are_no_help() {
    let (test, [first, second]) = (TestStore::new(), samples());
    let donor = first.create(&test.store);
    store_all(&first, &donor);
    let layer = second.create(&test.store);
    let found = |id: u32| {
        let chunk = layer.index().chunk(id).unwrap();
        test.store.find_elsewhere(&chunk.digest, chunk.size)
    };
    // The disk of the donor is wrong in one chunk.
    let damaged = found(0).unwrap();
    let place = damaged.layer.index().chunk(damaged.chunk).unwrap();
    donor.data.write_all_at(b"damage", place.data_offset + 77).unwrap();
    assert!(!layer.adopt_chunk(0, &damaged).unwrap());
    let cloned = layer.clone_chunk(0, &layer.chunk(0).unwrap(), &donor, &place);
    assert_eq!(cloned.unwrap(), Some(false));
    // Another one was given up between finding and taking it.
    let late = found(1).unwrap();
    donor.give_up(&[late.chunk]).unwrap();
    assert!(!layer.adopt_chunk(1, &late).unwrap());
    assert!(found(1).is_none());
    // Taken for another chunk than it is.
    assert!(!layer.adopt_chunk(2, &found(3).unwrap()).unwrap());
    assert_eq!(layer.residency().count(), 0);
    assert_only_verified(&layer);
    // Nothing is left of the donor.
    drop((donor, damaged, late));
    test.store.discard(&first.toc_digest).unwrap();
    assert!(found(2).is_none());
    assert_eq!(fill(&layer, all(&layer)).unwrap(), Filled::default());
    fs::read_dir(test.dir.path().join("layers")).unwrap().for_each(drop);
}

#[test]
fn cloned_chunks_are_compared_where_they_arrive() {
    let (test, [first, second]) = (TestStore::new(), samples());
    let donor = first.create(&test.store);
    store_all(&first, &donor);
    let layer = second.create(&test.store);
    for id in all(&layer) {
        let ours = layer.index().chunk(id).unwrap();
        let Some(found) = test.store.find_elsewhere(&ours.digest, ours.size) else {
            continue;
        };
        let theirs = donor.index().chunk(found.chunk).unwrap();
        if Digest::of(b"") == ours.digest || layer.residency().contains(id) {
            continue;
        }
        assert_eq!(layer.clone_chunk(id, &ours, &donor, &theirs).unwrap(), Some(true));
        let again = layer.clone_chunk(id, &ours, &donor, &theirs).unwrap();
        assert_eq!(again, Some(false), "it is there");
    }
    assert!(layer.residency().count() > 15);
    assert_only_verified(&layer);
}

#[test]
fn nothing_is_cloned_to_where_the_kernel_may_read_it_by_the_time() {
    let (test, [first, second]) = (TestStore::new(), samples());
    let donor = first.create(&test.store);
    store_all(&first, &donor);
    let layer = second.create(&test.store);
    let ours = layer.chunk(0).unwrap();
    let found = test.store.find_elsewhere(&ours.digest, ours.size).unwrap();
    let theirs = donor.chunk(found.chunk).unwrap();
    donor.data.write_all_at(b"damage", theirs.data_offset + 77).unwrap();
    // It is left to the kernel while somebody who has looked already waits for his turn to clone.
    let turn = layer.writing.read().unwrap();
    let cloned = std::thread::scope(|scope| {
        let cloning = scope.spawn(|| layer.clone_chunk(0, &ours, &donor, &theirs).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        layer.read_by_kernel.store(true, Ordering::SeqCst);
        drop(turn);
        cloning.join().unwrap()
    });
    assert_eq!(cloned, None);
    // Neither a wrong byte was there nor a hole was punched: nothing was touched.
    let blocks = layer.data.metadata().unwrap().blocks();
    assert_eq!(blocks, 0);
    assert!(!layer.adopt_chunk(0, &found).unwrap());
    assert_only_verified(&layer);
}

#[test]
fn many_layers_are_few_runs_and_everything_is_found() {
    let test = TestStore::new();
    let samples: Vec<_> = (0..70)
        .map(|n| {
            let file = crate::layer::testing::noise(n + 1, 300);
            Sample::new(
                vec![("f".to_owned(), file), ("all".to_owned(), vec![7; 100])],
                Packing::default(),
            )
        })
        .collect();
    for sample in &samples {
        store_all(sample, &sample.create(&test.store));
    }
    let shelf = test.store.shelf_for_test();
    assert!(shelf.digests.runs() < 20);
    for sample in &samples {
        let digest = Digest::of(&sample.files["f"]);
        assert_eq!(shelf.digests.find(&digest), [(sample.toc_digest, 0)]);
        assert!(test.store.find_elsewhere(&digest, 300).is_some());
        assert!(test.store.find_elsewhere(&digest, 299).is_none());
    }
    assert_eq!(
        shelf.digests.find(&Digest::of([7; 100])).len(),
        16,
        "no more places than that"
    );
    assert!(shelf.digests.find(&Digest::of(b"nowhere")).is_empty());
    shelf.digests.forget(&samples[3].toc_digest);
    assert!(shelf.digests.find(&Digest::of(&samples[3].files["f"])).is_empty());
}
