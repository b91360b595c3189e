//! A full disk and a full quota: room is made or the reader is told so; nothing is damaged, and it recovers.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hullspeed_tests::content::ContentFile;
use hullspeed_tests::lazy::{Source, check_all, read_all, stored};
use hullspeed_tests::process;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::scenario::Scenario;

/// Nothing is fetched but for readers.
const DEMAND_ONLY: &str = "[fetch]\nprefetch = false\nbackground = false\nread_deadline = \"5s\"\n";

const MIB: u64 = 1 << 20;

/// The longest wait for eviction.
const EVICTION_LIMIT: Duration = Duration::from_secs(30);

async fn source() -> Source {
    Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap()
}

fn files(image: &str, count: usize) -> Vec<ContentFile> {
    (0..count)
        .map(|number| ContentFile::new(format!("{image}/{number:02}"), 1 << 20))
        .collect()
}

/// Mounts a small filesystem at `<run>/<name>`; the run's end unmounts it.
fn small_filesystem(run: &RunDir, name: &str, size: u64) -> PathBuf {
    let image = run.path().join(format!("{name}.ext4"));
    File::create(&image).unwrap().set_len(size).unwrap();
    process::output(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image)).unwrap();
    let target = run.directory(name).unwrap();
    process::output(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&target)).unwrap();
    target
}

fn allocated(directory: &Path) -> u64 {
    let own = fs::symlink_metadata(directory).unwrap();
    let Ok(entries) = fs::read_dir(directory) else { return 0 };
    let each = entries.flatten().map(|entry| entry.path()).map(|path| {
        match fs::symlink_metadata(&path) {
            // A mounted layer, or one that is just being removed.
            Ok(metadata) if metadata.dev() != own.dev() => 0,
            Ok(metadata) if metadata.is_dir() => allocated(&path),
            Ok(metadata) => metadata.blocks() * 512,
            Err(_) => 0,
        }
    });
    each.sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_told_and_does_no_damage() {
    let source = source().await;
    let files = files("full", 32);
    let image = source.publish("image", std::slice::from_ref(&files), &[]).unwrap();
    let disk = small_filesystem(&source.run, "full", 96 * MIB);
    let mut node = source.node("full", DEMAND_ONLY).await.unwrap();
    node.mount(&image).await.unwrap();
    // All but a few MiB belong to somebody else.
    let ballast = disk.join("ballast");
    let free = rustix::fs::statvfs(&disk).unwrap();
    let size = free.f_bavail * free.f_frsize - 10 * MIB;
    let file = File::create(&ballast).unwrap();
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size).unwrap();
    let view = node.view(&image, "view").await.unwrap();
    for (file, read) in files.iter().zip(read_all(view.path(), &files).await.unwrap()) {
        match read {
            Ok(content) => assert!(content == file.content(), "{} is read wrongly", file.path),
            Err(error) => {
                let expected = Some(rustix::io::Errno::NOSPC.raw_os_error());
                assert_eq!(error.raw_os_error(), expected, "{}: {error}", file.path);
            }
        }
    }
    let kept = stored(&node.cache(&image, 0).unwrap(), &files).unwrap();
    assert!(kept.absent > 0, "the disk was never full: {kept:?}");
    // With room again everything is read, and a killed daemon finds nothing that it should not believe.
    drop(file);
    fs::remove_file(&ballast).unwrap();
    check_all(view.path(), &files).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    node.snapshotter.process().kill().unwrap();
    node.start_again(&source.run).await.unwrap();
    let view = node.view(&image, "again").await.unwrap();
    check_all(view.path(), &files).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_is_kept_by_giving_up_what_nobody_uses() {
    const QUOTA: u64 = 16 * MIB;
    let source = source().await;
    let (old, new) = (files("old", 12), files("new", 12));
    let (first, second) = (
        source.publish("first", std::slice::from_ref(&old), &[]).unwrap(),
        source.publish("second", std::slice::from_ref(&new), &[]).unwrap(),
    );
    let config = format!("{DEMAND_ONLY}\n[cache]\nquota = \"16MiB\"\n");
    let mut node = source.node("quota", &config).await.unwrap();
    node.mount(&first).await.unwrap();
    let view = node.view(&first, "first").await.unwrap();
    check_all(view.path(), &old).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    node.forget(&first).await.unwrap();
    node.mount(&second).await.unwrap();
    let view = node.view(&second, "second").await.unwrap();
    check_all(view.path(), &new).await.unwrap();
    let layers = node.snapshotter.root().join("layers");
    let end = Instant::now() + EVICTION_LIMIT;
    while allocated(&layers) > QUOTA {
        assert!(
            Instant::now() < end,
            "{} bytes are kept, {QUOTA} allowed",
            allocated(&layers)
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // What is in use has not suffered.
    source.proxy.set_dead(true);
    check_all(view.path(), &new).await.unwrap();
    source.proxy.set_dead(false);
    node.snapshots.remove(view).await.unwrap();
    // And what was given up is fetched again.
    node.forget(&second).await.unwrap();
    node.mount(&first).await.unwrap();
    let view = node.view(&first, "back").await.unwrap();
    check_all(view.path(), &old).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
}
