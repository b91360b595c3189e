//! The cache on a real directory: whole or absent, durable or dropped, verified or refused.

use std::fs;

use estargz::digest::Digest;
use estargz::footer::FooterKind;
use estargz::member::Compression;

use super::*;
use crate::layer::testing::{Packing, Sample, TestStore, assert_only_verified};

fn sample() -> Sample {
    Sample::uniform(5, 150_000, Packing::default())
}

/// Stores chunk `id` with its right bytes.
fn store(sample: &Sample, layer: &CachedLayer, id: u32) -> Result<bool, StoreError> {
    let chunk = layer.index().chunk(id).unwrap();
    let path = String::from_utf8(layer.index().path_of(chunk.ino)).unwrap();
    let start = usize::try_from(chunk.file_offset).unwrap();
    layer.store(id, &sample.files[&path[1..]][start..start + chunk.size as usize])
}

#[test]
fn a_layer_appears_whole_and_loads_again_without_its_toc_being_given() {
    let (test, sample) = (TestStore::new(), sample());
    assert!(test.store.load(&sample.toc_digest).unwrap().is_none());
    drop(sample.create(&test.store));
    let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
    assert_eq!(layer.toc_digest(), sample.toc_digest);
    assert_eq!(fs::read(layer.dir().join("toc")).unwrap(), sample.toc_json);
    assert_eq!(
        fs::metadata(layer.dir().join("data")).unwrap().len(),
        layer.index().data_size()
    );
    assert_eq!(test.store.origin(&sample.toc_digest).unwrap(), sample.origin());
    let usage = test.store.usage(&sample.toc_digest);
    assert!(usage.inodes == 5 && (1..100_000).contains(&usage.bytes), "{usage:?}");
    // Creating it a second time is the same layer.
    assert_eq!(sample.create(&test.store).dir(), layer.dir());
    assert_eq!(fs::read_dir(test.dir.path().join("layers")).unwrap().count(), 1);
}

#[test]
fn layers_of_zstd_frames_keep_their_compression_and_rebuild_their_index_from_either_form_of_the_toc() {
    let sample = || Sample::of_form(FooterKind::ZstdChunked, 5, 150_000, Packing::default());
    for sample in [sample(), sample().named_by_frame()] {
        let test = TestStore::new();
        let layer = sample.create(&test.store);
        assert_eq!(layer.index().compression(), Compression::Zstd);
        assert_eq!(fs::read(layer.dir().join("toc")).unwrap(), sample.toc_json);
        let path = layer.dir().join("index");
        let index = fs::read(&path).unwrap();
        // A layer that is open is not opened again.
        drop(layer);
        fs::write(&path, b"damaged").unwrap();
        let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
        assert_eq!(layer.index().compression(), Compression::Zstd);
        assert!(fs::read(&path).unwrap() == index);
    }
}

#[test]
fn an_origin_from_before_there_were_zstd_layers_is_one_of_gzip_members() {
    let (test, sample) = (TestStore::new(), sample());
    let layer = sample.create(&test.store);
    let path = layer.dir().join("origin");
    let mut origin: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    origin.as_object_mut().unwrap().remove("compression").unwrap();
    fs::write(&path, serde_json::to_vec(&origin).unwrap()).unwrap();
    assert_eq!(test.store.origin(&sample.toc_digest).unwrap(), sample.origin());
}

#[test]
fn a_toc_with_another_digest_and_an_unusable_toc_leave_nothing_behind() {
    let (test, sample) = (TestStore::new(), sample());
    let other = Digest::of(b"other");
    assert!(matches!(
        test.store.create(&other, &sample.toc_json, &sample.origin()),
        Err(CacheError::TocDigest { .. })
    ));
    let nonsense = Digest::of(b"nonsense");
    assert!(matches!(
        test.store.create(&nonsense, b"nonsense", &sample.origin()),
        Err(CacheError::Toc(_))
    ));
    assert_eq!(fs::read_dir(test.dir.path().join("layers")).unwrap().count(), 0);
}

#[test]
fn an_interrupted_creation_is_cleared_away() {
    let (test, sample) = (TestStore::new(), sample());
    let unfinished = test.dir.path().join("layers/.new-0123-0");
    fs::create_dir(&unfinished).unwrap();
    fs::write(unfinished.join("toc"), b"half").unwrap();
    let store = LayerStore::open(test.dir.path()).unwrap();
    assert!(!unfinished.exists());
    sample.create(&store);
}

#[test]
fn wrong_bytes_are_refused_and_never_reach_the_file() {
    let (test, sample) = (TestStore::new(), sample());
    let layer = sample.create(&test.store);
    for id in 0..layer.index().chunk_count() {
        let size = layer.index().chunk(id).unwrap().size as usize;
        for wrong in [vec![1; size], vec![], vec![1; size + 1]] {
            assert!(matches!(layer.store(id, &wrong), Err(StoreError::Digest { .. })));
        }
    }
    assert!(matches!(
        layer.store(layer.index().chunk_count(), b""),
        Err(StoreError::NoChunk { .. })
    ));
    assert_eq!(layer.residency().count(), 0);
    assert_only_verified(&layer);
    assert!(store(&sample, &layer, 3).unwrap());
    assert!(!store(&sample, &layer, 3).unwrap());
    assert_only_verified(&layer);
}

#[test]
fn after_an_unclean_stop_only_what_was_checkpointed_is_resident() {
    let (test, sample) = (TestStore::new(), sample());
    let layer = sample.create(&test.store);
    store(&sample, &layer, 0).unwrap();
    store(&sample, &layer, 2).unwrap();
    assert!(layer.is_dirty());
    layer.checkpoint().unwrap();
    assert!(!layer.is_dirty());
    store(&sample, &layer, 4).unwrap();
    drop(layer);
    let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
    let resident: Vec<u32> = (0..layer.index().chunk_count())
        .filter(|&id| layer.residency().contains(id))
        .collect();
    assert_eq!(resident, [0, 2]);
    let chunk = layer.index().chunk(2).unwrap();
    let bytes = layer
        .read(chunk.data_offset..chunk.data_offset + u64::from(chunk.size))
        .unwrap();
    assert_eq!(Digest::of(&bytes), chunk.digest);
}

#[test]
fn what_a_failed_sync_may_have_lost_is_not_resident_any_more() {
    let (test, sample) = (TestStore::new(), sample());
    let layer = sample.create(&test.store);
    store(&sample, &layer, 0).unwrap();
    layer.checkpoint().unwrap();
    store(&sample, &layer, 1).unwrap();
    let failed = layer.checkpoint_after(|_| Err(std::io::Error::from_raw_os_error(libc::EIO)));
    assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
    // The next sync succeeds, as it does after the kernel has told of its failure once.
    layer.checkpoint().unwrap();
    let resident = |layer: &CachedLayer| (0..3).map(|id| layer.residency().contains(id)).collect::<Vec<_>>();
    assert_eq!(resident(&layer), [true, false, false]);
    assert!(store(&sample, &layer, 1).unwrap(), "it is stored again");
    layer.checkpoint().unwrap();
    drop(layer);
    let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
    assert_eq!(resident(&layer), [true, true, false]);
}

/// A store has written its bytes when the sync fails, and marks them when it can: they are lost all the same.
#[test]
fn what_was_written_and_not_yet_marked_when_a_sync_failed_is_not_resident() {
    let (test, sample) = (TestStore::new(), sample());
    let layer = sample.create(&test.store);
    store(&sample, &layer, 0).unwrap();
    let (written, is_written) = std::sync::mpsc::channel();
    let (checkpointed, is_checkpointed) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let storing = scope.spawn(|| {
            let is_checkpointed = std::sync::Mutex::new(is_checkpointed);
            layer.with_room(1, 1, || {
                written.send(()).unwrap();
                // The checkpoint either has ended meanwhile or waits for this store; then nothing comes.
                let _ = is_checkpointed
                    .lock()
                    .unwrap()
                    .recv_timeout(std::time::Duration::from_millis(300));
                Ok(true)
            })
        });
        let failed = layer.checkpoint_after(|_| {
            is_written.recv().unwrap();
            Err(std::io::Error::from_raw_os_error(libc::EIO))
        });
        assert!(failed.is_err());
        let _ = checkpointed.send(());
        assert!(storing.join().unwrap().unwrap());
    });
    assert_eq!(layer.residency().count(), 0);
}

#[test]
fn only_root_may_enter_the_directory_of_layers() {
    use std::os::unix::fs::PermissionsExt as _;
    let test = TestStore::new();
    let layers = test.dir.path().join("layers");
    let mode = || fs::metadata(&layers).unwrap().permissions().mode() & 0o7777;
    assert_eq!(mode(), 0o700);
    fs::set_permissions(&layers, fs::Permissions::from_mode(0o755)).unwrap();
    LayerStore::open(test.dir.path()).unwrap();
    assert_eq!(mode(), 0o700, "one that was open is closed");
}

#[test]
fn damage_is_told_from_what_may_pass() {
    let io = |errno| CacheError::Io {
        action: "read",
        path: "/x".into(),
        source: std::io::Error::from_raw_os_error(errno),
    };
    for errno in [
        libc::EIO,
        libc::ENOSPC,
        libc::ENFILE,
        libc::EMFILE,
        libc::ENOMEM,
        libc::EACCES,
    ] {
        assert!(!io(errno).is_damage(), "{errno}");
    }
    assert!(io(libc::ENOENT).is_damage());
    let (expected, found) = (Digest::of(b"a"), Digest::of(b"b"));
    assert!(CacheError::TocDigest { expected, found }.is_damage());
}

#[test]
fn a_damaged_residency_file_or_data_of_another_length_start_empty() {
    let (test, sample) = (TestStore::new(), sample());
    let layer = sample.create(&test.store);
    let (resident, data) = (layer.dir().join("resident"), layer.dir().join("data"));
    let checkpoint = || {
        let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
        store(&sample, &layer, 1).unwrap();
        layer.checkpoint().unwrap();
    };
    let count = || {
        test.store
            .load(&sample.toc_digest)
            .unwrap()
            .unwrap()
            .residency()
            .count()
    };
    drop(layer);
    checkpoint();
    assert_eq!(count(), 1);
    let good = fs::read(&resident).unwrap();
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 4;
    for bad in [
        &good[..good.len() - 1],
        &good[..10],
        &[][..],
        &flipped[..],
        &vec![0; 1 << 20][..],
    ] {
        fs::write(&resident, bad).unwrap();
        assert_eq!(count(), 0);
    }
    checkpoint();
    fs::File::options()
        .write(true)
        .open(&data)
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_eq!(count(), 0);
    assert_eq!(
        fs::metadata(&data).unwrap().len(),
        test.store
            .load(&sample.toc_digest)
            .unwrap()
            .unwrap()
            .index()
            .data_size()
    );
    checkpoint();
    fs::remove_file(&data).unwrap();
    assert_eq!(count(), 0);
}

#[test]
fn a_damaged_index_is_built_again_and_a_damaged_toc_is_an_error() {
    let (test, sample) = (TestStore::new(), sample());
    let layer = sample.create(&test.store);
    store(&sample, &layer, 1).unwrap();
    layer.checkpoint().unwrap();
    let dir = layer.dir().to_owned();
    drop(layer);
    let good = fs::read(dir.join("index")).unwrap();
    for bad in [&good[..good.len() / 2], b""] {
        fs::write(dir.join(".index"), bad).unwrap();
        fs::rename(dir.join(".index"), dir.join("index")).unwrap();
        let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
        assert_eq!(fs::read(dir.join("index")).unwrap(), good);
        // The same index is the same layout, so what was resident still is.
        assert_eq!(layer.residency().count(), 1);
    }
    fs::remove_file(dir.join("index")).unwrap();
    fs::write(dir.join("toc"), b"damaged").unwrap();
    assert!(matches!(
        test.store.load(&sample.toc_digest),
        Err(CacheError::TocDigest { .. })
    ));
    test.store.discard(&sample.toc_digest).unwrap();
    assert!(test.store.load(&sample.toc_digest).unwrap().is_none());
    sample.create(&test.store);
}

#[test]
fn what_an_unclean_stop_left_is_given_back() {
    let test = TestStore::new();
    let sample = Sample::uniform(12, 300_000, Packing::default());
    let layer = sample.create(&test.store);
    store(&sample, &layer, 0).unwrap();
    layer.checkpoint().unwrap();
    for id in 1..layer.index().chunk_count() {
        store(&sample, &layer, id).unwrap();
    }
    // The kernel has written everything, and nothing says so.
    fs::File::open(layer.dir().join("data")).unwrap().sync_all().unwrap();
    drop(layer);
    assert!(test.store.usage(&sample.toc_digest).bytes > 3_000_000);
    let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
    assert_eq!(layer.residency().count(), 1);
    assert!(test.store.usage(&sample.toc_digest).bytes < 300_000);
    assert_only_verified(&layer);
}

#[test]
fn what_is_no_layer_is_left_alone_and_in_nobodys_way() {
    let (test, sample) = (TestStore::new(), sample());
    let layers = test.dir.path().join("layers");
    let toc = sample.toc_digest.hex();
    drop(sample.create(&test.store));
    let strange = ["lost+found", "0123", "\u{fffd}", &toc[..63], ".hidden"];
    for name in strange {
        fs::create_dir(layers.join(name)).unwrap();
    }
    // A file where a layer might be, and a layer's directory with nothing in it.
    fs::write(layers.join("0".repeat(64)), b"?").unwrap();
    fs::create_dir(layers.join("1".repeat(64))).unwrap();
    let store = LayerStore::open(test.dir.path()).unwrap();
    store.settle();
    store.tidy();
    assert!(store.load(&sample.toc_digest).unwrap().is_some());
    assert!(store.load(&Digest::from_bytes([0; 32])).unwrap().is_none());
    let empty = store.load(&Digest::from_bytes([0x11; 32])).unwrap_err();
    assert!(empty.is_damage(), "{empty}");
    store.discard(&Digest::from_bytes([0x11; 32])).unwrap();
    assert!(strange.iter().all(|name| layers.join(name).is_dir()));
}

#[test]
fn privileged_what_the_kernel_reads_by_one_layout_is_not_opened_by_another() {
    let test = TestStore::new();
    let of_sizes = |sizes: [usize; 2]| {
        let files = ["a", "b"].into_iter().zip(sizes);
        let files = files.map(|(name, size)| (name.to_owned(), crate::layer::testing::noise(7, size)));
        Sample::new(files.collect(), Packing::default())
    };
    let (sample, other) = (of_sizes([102_400, 51_200]), of_sizes([51_200, 102_400]));
    let layer = sample.create(&test.store);
    store(&sample, &layer, 0).unwrap();
    layer.leave_to_kernel().unwrap();
    let (dir, size) = (layer.dir().to_owned(), layer.index().data_size());
    // The same index is no other layout, whoever made it.
    drop(layer);
    fs::remove_file(dir.join("index")).unwrap();
    drop(test.store.load(&sample.toc_digest).unwrap().unwrap());
    let toc = estargz::toc::Toc::parse_verified(&other.toc_json).unwrap();
    let Origin {
        blob_size,
        toc_offset,
        compression,
        ..
    } = other.origin();
    let layout = estargz::index::BlobLayout {
        blob_size,
        toc_offset,
        compression,
    };
    let index = estargz::index::build(&toc, layout, sample.toc_digest).unwrap();
    fs::write(dir.join("index"), index).unwrap();
    let data = fs::read(dir.join("data")).unwrap();
    let error = test.store.load(&sample.toc_digest).unwrap_err();
    // So that it is fetched anew, into another file.
    assert!(error.is_damage(), "{error}");
    assert!(fs::read(dir.join("data")).unwrap() == data);
    // Where the kernel reads nothing, content is fetched again.
    rustix::fs::removexattr(dir.join("data"), "trusted.hullspeed.read_by_kernel").unwrap();
    let layer = test.store.load(&sample.toc_digest).unwrap().unwrap();
    assert_eq!((layer.residency().count(), layer.index().data_size()), (0, size));
}

#[test]
fn a_layer_is_open_once() {
    let (test, sample) = (TestStore::new(), sample());
    let first = sample.create(&test.store);
    let second = test.store.load(&sample.toc_digest).unwrap().unwrap();
    store(&sample, &first, 1).unwrap();
    assert!(second.residency().contains(1));
}
