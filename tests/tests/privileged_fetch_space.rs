//! What layers take on disk and what is told of it; a full disk and a full quota: room is made or the reader is told so; nothing is
//! damaged, and it recovers.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hullspeed_tests::content::{self, ContentFile};
use hullspeed_tests::lazy::{LazyNode, Published, Source, check_all, read_all, stored};
use hullspeed_tests::process;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::scenario::{CONVERTED, Scenario, estargz};
use hullspeed_tests::snapshotter;
use hullspeed_tests::way::Way;
use rustix::fs::OFlags;

/// Nothing is fetched but for readers.
const DEMAND_ONLY: &str = "[fetch]\nprefetch = false\nbackground = false\nread_deadline = \"5s\"\n";

const MIB: u64 = 1 << 20;

/// The longest wait for eviction, and for whatever else is done every few seconds.
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

/// What a program writes to its output.
fn said(command: &mut Command) -> String {
    String::from_utf8(process::output(command).unwrap()).unwrap()
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

/// Fills a filesystem to the last block, as a program does that writes a log.
fn fill(disk: &Path) -> PathBuf {
    let ballast = disk.join("ballast");
    let mut file = File::create(&ballast).unwrap();
    for piece in [vec![0xb7; 1 << 20], vec![0xb7; 4096]] {
        while file.write_all(&piece).is_ok() {}
        // The disk may be found to be full only now.
        let _ = file.sync_all();
    }
    assert!(rustix::fs::statvfs(disk).unwrap().f_bavail < 16, "it is not full");
    ballast
}

/// Waits until both are the same.
async fn become_equal<T: PartialEq + std::fmt::Debug>(what: &str, mut both: impl AsyncFnMut() -> (T, T)) {
    let end = Instant::now() + EVICTION_LIMIT;
    loop {
        let (one, other) = both().await;
        if one == other {
            return;
        }
        assert!(Instant::now() < end, "{what}: {one:?} and {other:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// What each snapshot uses: bytes and inodes.
async fn usages(node: &mut LazyNode) -> BTreeMap<String, (i64, i64)> {
    let mut usages = BTreeMap::new();
    for info in node.snapshots.list().await.unwrap() {
        let usage = node.snapshots.usage(&info.name).await.unwrap();
        usages.insert(info.name, usage);
    }
    usages
}

/// The sum of it, as CRI tells it of its image filesystem.
fn sum(usages: &BTreeMap<String, (i64, i64)>) -> (i64, i64) {
    let each = usages.values();
    each.fold((0, 0), |(bytes, inodes), usage| (bytes + usage.0, inodes + usage.1))
}

/// What these layers have on disk: blocks and inodes of their directories and files, without their mount points.
fn on_disk<'a>(layers: impl IntoIterator<Item = &'a PathBuf>) -> (i64, i64) {
    let (mut bytes, mut inodes) = (0, 0);
    for layer in layers {
        let entries = fs::read_dir(layer).unwrap().map(|entry| entry.unwrap().path());
        let files = entries.filter(|path| !path.ends_with("mnt"));
        for path in files.chain([layer.clone()]) {
            // A checkpoint replaces a file by another.
            let Ok(metadata) = fs::symlink_metadata(&path) else {
                continue;
            };
            bytes += i64::try_from(metadata.blocks() * 512).unwrap();
            inodes += 1;
        }
    }
    (bytes, inodes)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_all_snapshots_use_is_what_is_on_disk() {
    let source = source().await;
    let (shared, first, second) = (files("shared", 4), files("first", 2), files("second", 3));
    // The same layer at different places of two chains, so that it is two snapshots.
    let one = source.publish("one", &[shared.clone(), first.clone()], &[]).unwrap();
    let two = source.publish("two", &[second.clone(), shared.clone()], &[]).unwrap();
    assert_eq!(one.toc_digest(0).unwrap(), two.toc_digest(1).unwrap());
    let mut node = source.node("usage", DEMAND_ONLY).await.unwrap();
    node.mount(&one).await.unwrap();
    node.mount(&two).await.unwrap();
    for (image, files) in [(&one, [&shared, &first]), (&two, [&second, &shared])] {
        let view = node.view(image, "view").await.unwrap();
        for files in files {
            check_all(view.path(), files).await.unwrap();
        }
        node.snapshots.remove(view).await.unwrap();
    }
    let layer = |image: &Published, number| node.cache(image, number).unwrap();
    let (both, own) = (layer(&one, 0), [layer(&one, 1), layer(&two, 0)]);
    let all = [&both, &own[0], &own[1]];
    become_equal("a sum and the disk", async || {
        (sum(&usages(&mut node).await), on_disk(all))
    })
    .await;
    let before = usages(&mut node).await;
    assert_eq!(before.len(), 4);
    assert!(sum(&before).0 > 9 << 20 && sum(&before).1 >= 3 * 5, "{before:?}");
    let shares: Vec<_> = before.values().filter(|usage| **usage == (0, 0)).collect();
    assert_eq!(shares.len(), 1, "{before:?}");

    // Which snapshot it counts for is the same after a restart.
    node.snapshotter.process().kill().unwrap();
    node.start_again(&source.run).await.unwrap();
    become_equal("the usages before and after a restart", async || {
        (before.clone(), usages(&mut node).await)
    })
    .await;
    // And when that one goes, the other has it.
    node.forget(&one).await.unwrap();
    become_equal("a sum and the disk", async || {
        (sum(&usages(&mut node).await), on_disk([&both, &own[1]]))
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_filesystem_of_cri_counts_a_shared_layer_once() {
    let run = Scenario::prepare().unwrap();
    let (shared, first, second) = (files("shared", 2), files("first", 1), files("second", 1));
    let layouts = ["one", "two"].map(|name| run.path().join(name));
    content::build(&layouts[0], &[shared.clone(), first], None).unwrap();
    content::build(&layouts[1], &[second, shared], None).unwrap();
    let scenario = Scenario::with_image(run, &layouts[0], content::TAG, &[]).await.unwrap();
    let target = format!(
        "oci:{}:{CONVERTED}",
        scenario.run.path().join("converted-two").display()
    );
    let plain = format!("oci:{}:{}", layouts[1].display(), content::TAG);
    estargz(&scenario.run, &["convert", &plain, &target]).unwrap();
    let (one, two) = (scenario.reference(CONVERTED), scenario.reference("two"));
    let (_, name) = two.split_once('/').unwrap();
    scenario.registry.push(&target, name).unwrap();
    let mut node = scenario.lazy_node(DEMAND_ONLY).await.unwrap();
    for image in [&one, &two] {
        node.cri.pull(image).await.unwrap();
    }
    let layers = fs::read_dir(node.snapshotter().unwrap().root().join("layers")).unwrap();
    let layers: Vec<PathBuf> = layers.map(|entry| entry.unwrap().path()).collect();
    assert_eq!(layers.len(), 3, "{layers:?}");
    // containerd looks every ten seconds.
    become_equal("what CRI tells and the disk", async || {
        let told = node.cri.image_fs_info().await.unwrap().image_filesystems.swap_remove(0);
        let told = (told.used_bytes.unwrap().value, told.inodes_used.unwrap().value);
        let (bytes, inodes) = on_disk(&layers);
        (told, (u64::try_from(bytes).unwrap(), u64::try_from(inodes).unwrap()))
    })
    .await;
    node.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn df_shows_a_layer_as_full_and_a_container_its_disk() {
    let source = source().await;
    let files = files("df/deep", 3);
    let image = source.publish("image", std::slice::from_ref(&files), &[]).unwrap();
    let mut node = source.node("df", DEMAND_ONLY).await.unwrap();
    node.mount(&image).await.unwrap();
    let layer = node.cache(&image, 0).unwrap().join("mnt");
    let found = rustix::fs::statvfs(&layer).unwrap();
    // As every filesystem that cannot be written, whatever is resident of it.
    let more = match node.snapshotter.way() {
        Way::Fuse => 0,
        // The kernel counts what of the image it uses, too.
        Way::Erofs => fs::metadata(layer.with_file_name("erofs")).unwrap().len(),
    };
    let size = found.f_blocks * found.f_frsize;
    assert!((3 * MIB..=3 * MIB + more).contains(&size), "{size}");
    assert_eq!((found.f_bfree, found.f_bavail), (0, 0));
    let listed = said(Command::new("find").arg(&layer));
    // EROFS says of no inode that it is missing.
    let is_full = node.snapshotter.way() == Way::Fuse;
    assert_eq!(found.f_ffree == 0, is_full);
    assert_eq!(found.f_files - found.f_ffree, listed.lines().count() as u64, "{listed}");
    // What a container has is the disk that it writes to.
    let [upper, work, root] = ["upper", "work", "root"].map(|name| source.run.directory(name).unwrap());
    let [lower, upper_text, work] = [&layer, &upper, &work].map(|path| path.to_str().unwrap());
    let options = format!("lowerdir={lower},upperdir={upper_text},workdir={work}");
    process::output(
        Command::new("mount")
            .args(["-t", "overlay", "-o", &options, "overlay"])
            .arg(&root),
    )
    .unwrap();
    let (seen, disk) = (
        rustix::fs::statvfs(&root).unwrap(),
        rustix::fs::statvfs(&upper).unwrap(),
    );
    assert_eq!((seen.f_blocks, seen.f_files), (disk.f_blocks, disk.f_files));
    assert!(seen.f_bavail > 0);
    assert!(root.join(&files[0].path).is_file());
    process::output(Command::new("umount").arg(&root)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_nearly_full_serves_readers_and_says_why_nothing_else_is_fetched() {
    let source = source().await;
    let files = files("short", 6);
    let image = source.publish("image", std::slice::from_ref(&files), &[]).unwrap();
    // More than there is on any disk.
    let config = "[fetch]\nprefetch = true\nbackground = true\n\n[cache]\nmin_free = \"100%\"\n";
    let mut node = source.node("short", config).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    check_all(view.path(), &files[..2]).await.unwrap();
    let config = node.snapshotter.config();
    let ask = |arguments: &[&str]| said(snapshotter::command(&config).unwrap().args(arguments));
    let status = ask(&["status"]);
    assert!(
        status.contains("no room to spare") && status.contains("cache.min_free leaves"),
        "{status}"
    );
    let explained = ask(&["explain", &node.reference(&image)]);
    assert!(explained.contains("no_room"), "{explained}");
    let short = node
        .snapshotter
        .metric("hullspeed_cache_short_of_room", &[])
        .await
        .unwrap();
    assert!((short - 1.0).abs() < f64::EPSILON, "{short}");
    let told = node.snapshotter.log_records().unwrap();
    let told = told
        .iter()
        .filter(|record| record.to_string().contains("no room to spare"));
    let told: Vec<String> = told.map(ToString::to_string).collect();
    assert!(
        told.len() == 1 && told[0].contains("min_free"),
        "once, with the reason: {told:?}"
    );
    let kinds = ["prefetch", "background"].map(|kind| format!("kind=\"{kind}\""));
    for kind in &kinds {
        let asked = node.snapshotter.metric("hullspeed_fetch_requests_total", &[kind]).await;
        assert!(asked.unwrap().abs() < f64::EPSILON, "{kind}");
    }
    check_all(view.path(), &files).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_others_filled_mounts_and_serves_and_is_left_as_it_was_found() {
    let source = source().await;
    let (old, new) = (files("old", 24), files("new", 24));
    let first = source.publish("first", std::slice::from_ref(&old), &[]).unwrap();
    let second = source.publish("second", std::slice::from_ref(&new), &[]).unwrap();
    let disk = small_filesystem(&source.run, "filled", 128 * MIB);
    // What the kernel reads by itself is never given up, under FUSE as well.
    let config = format!(
        "{DEMAND_ONLY}\n[cache]\nmin_free = \"0B\"\ncheckpoint_interval = \"200ms\"\n[fuse]\npassthrough = false\n"
    );
    let mut node = source.node("filled", &config).await.unwrap();
    node.mount(&first).await.unwrap();
    let view = node.view(&first, "first").await.unwrap();
    check_all(view.path(), &old).await.unwrap();
    let ballast = fill(&disk);
    if node.snapshotter.way() == Way::Erofs {
        // What the kernel reads by itself is never given up: the first stays whole, the second has to wait for room.
        assert!(node.mount(&second).await.is_err());
        check_all(view.path(), &old).await.unwrap();
        fs::remove_file(&ballast).unwrap();
        node.mount(&second).await.unwrap();
        let other = node.view(&second, "second").await.unwrap();
        check_all(other.path(), &new).await.unwrap();
        node.snapshots.remove(view).await.unwrap();
        node.snapshots.remove(other).await.unwrap();
        return;
    }
    // What the mounted layer has is all that there is for both; each pushes the other out, and nothing is wrong.
    node.mount(&second).await.unwrap();
    let other = node.view(&second, "second").await.unwrap();
    check_all(other.path(), &new).await.unwrap();
    check_all(view.path(), &old).await.unwrap();
    let evicted = node
        .snapshotter
        .metric("hullspeed_cache_evicted_bytes_total", &["chunks"])
        .await;
    assert!(evicted.unwrap() > 16e6);
    // Others take that too, and the daemon is killed and starts on such a disk.
    node.snapshots.remove(view).await.unwrap();
    node.snapshots.remove(other).await.unwrap();
    node.snapshotter.process().kill().unwrap();
    fs::remove_file(&ballast).unwrap();
    let ballast = fill(&disk);
    node.start_again(&source.run).await.unwrap();
    // The directories of a snapshot need some blocks, which are there if the kill left chunks that nobody knows of.
    match node.view(&second, "at once").await {
        Ok(view) => node.snapshots.remove(view).await.unwrap(),
        Err(refused) => assert!(format!("{refused:#}").contains("No space left"), "{refused:#}"),
    }
    let length = fs::metadata(&ballast).unwrap().len();
    let ballast_file = File::options().write(true).open(&ballast).unwrap();
    ballast_file.set_len(length - MIB / 4).unwrap();
    drop(ballast_file);
    let view = node.view(&second, "again").await.unwrap();
    check_all(view.path(), &new).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    // With room again all of both stays.
    fs::remove_file(&ballast).unwrap();
    node.snapshotter.process().kill().unwrap();
    node.start_again(&source.run).await.unwrap();
    for (image, files) in [(&first, &old), (&second, &new)] {
        let view = node.view(image, "last").await.unwrap();
        check_all(view.path(), files).await.unwrap();
        node.snapshots.remove(view).await.unwrap();
        let kept = stored(&node.cache(image, 0).unwrap(), files).unwrap();
        assert_eq!((kept.wrong, kept.absent), (0, 0), "{kept:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_completion_waits_for_room_and_goes_on_when_there_is_some() {
    let source = source().await;
    let files = files("later", 24);
    let image = source.publish("image", std::slice::from_ref(&files), &[]).unwrap();
    let disk = small_filesystem(&source.run, "later", 128 * MIB);
    let mut node = source
        .node("later", "[cache]\ncheckpoint_interval = \"200ms\"\n")
        .await
        .unwrap();
    let ballast = fill(&disk);
    let length = fs::metadata(&ballast).unwrap().len();
    File::options()
        .write(true)
        .open(&ballast)
        .unwrap()
        .set_len(length - 4 * MIB)
        .unwrap();
    node.mount_somehow(&image).await.unwrap();
    let view = node.view(&image, "view").await.unwrap();
    check_all(view.path(), &files[..2]).await.unwrap();
    let cache = node.cache(&image, 0).unwrap();
    let asked = node
        .snapshotter
        .metric("hullspeed_fetch_requests_total", &["background"])
        .await;
    assert!(asked.unwrap().abs() < f64::EPSILON);
    assert!(stored(&cache, &files).unwrap().absent >= 20);
    fs::remove_file(&ballast).unwrap();
    become_equal("wrong and missing chunks", async || {
        let kept = stored(&cache, &files).unwrap();
        ((0, 0), (kept.wrong, kept.absent))
    })
    .await;
    let short = node.snapshotter.metric("hullspeed_cache_short_of_room", &[]).await;
    assert!(short.unwrap().abs() < f64::EPSILON);
    node.snapshots.remove(view).await.unwrap();
}

/// Numbers that look random, the same for each seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % end
    }
}

/// Reads here and there without the kernel's page cache, and compares every byte.
fn read_here_and_there(layer: &Path, files: &[ContentFile], seed: u64, reads: u32) {
    let mut numbers = Numbers(seed);
    let mut buffer = vec![0; 300 << 10];
    for turn in 0..reads {
        let file = &files[usize::try_from(numbers.below(files.len() as u64)).unwrap()];
        let (offset, length) = (numbers.below(file.size as u64), 1 + numbers.below(buffer.len() as u64));
        let length = length.min(file.size as u64 - offset);
        let direct = i32::try_from(OFlags::DIRECT.bits()).unwrap();
        let open = File::options()
            .read(true)
            .custom_flags(direct)
            .open(layer.join(&file.path));
        let bytes = &mut buffer[..usize::try_from(length).unwrap()];
        let read = open.unwrap().read_exact_at(bytes, offset);
        let place = || format!("seed {seed}, turn {turn}: {} at {offset}, {length} bytes", file.path);
        read.unwrap_or_else(|error| panic!("{}: {error}", place()));
        let from = usize::try_from(offset).unwrap();
        assert!(
            file.content()[from..from + bytes.len()] == *bytes,
            "{} is wrong",
            place()
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_at_once_get_every_byte_right_while_the_quota_takes_chunks_away() {
    let source = source().await;
    let (one, two) = (files("one", 8), files("two", 8));
    let pieces = ["--chunk-size", "65536"];
    let image = source.publish("image", &[one.clone(), two.clone()], &pieces).unwrap();
    let limits = "quota = \"6MiB\"\nmin_free = \"0B\"\ncheckpoint_interval = \"200ms\"\n";
    let config = format!("{DEMAND_ONLY}\n[cache]\n{limits}");
    let mut node = source.node("busy", &config).await.unwrap();
    node.mount_somehow(&image).await.unwrap();
    let layers = [0, 1].map(|number| node.cache(&image, number).unwrap().join("mnt"));
    let readers = (0..4_u64).map(|reader| {
        let (layer, files) = if reader % 2 == 0 {
            (&layers[0], &one)
        } else {
            (&layers[1], &two)
        };
        let (layer, files) = (layer.clone(), files.clone());
        tokio::task::spawn_blocking(move || read_here_and_there(&layer, &files, 0x5eed + reader, 80))
    });
    for reader in readers.collect::<Vec<_>>() {
        reader.await.unwrap();
    }
    let evicted = node
        .snapshotter
        .metric("hullspeed_cache_evicted_bytes_total", &["chunks"])
        .await;
    assert!(evicted.unwrap() > 12e6, "nothing was taken away");
    let wrong = node.snapshotter.metric("hullspeed_verify_failures_total", &[]).await;
    assert!(wrong.unwrap().abs() < f64::EPSILON);
    let all = node.snapshotter.root().join("layers");
    become_equal("the quota is kept", async || (true, allocated(&all) <= 6 * MIB)).await;
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
                // Whatever fails below EROFS is an EIO to its readers.
                let expected = match node.snapshotter.way() {
                    Way::Fuse => rustix::io::Errno::NOSPC,
                    Way::Erofs => rustix::io::Errno::IO,
                };
                assert_eq!(
                    error.raw_os_error(),
                    Some(expected.raw_os_error()),
                    "{}: {error}",
                    file.path
                );
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
    node.mount_somehow(&first).await.unwrap();
    let view = node.view(&first, "first").await.unwrap();
    check_all(view.path(), &old).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
    node.forget(&first).await.unwrap();
    node.mount_somehow(&second).await.unwrap();
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
    node.mount_somehow(&first).await.unwrap();
    let view = node.view(&first, "back").await.unwrap();
    check_all(view.path(), &old).await.unwrap();
    node.snapshots.remove(view).await.unwrap();
}
