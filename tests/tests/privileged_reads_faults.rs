//! A registry that fails while programs read in all ways: they get an error in time and never zeros, and what was to be
//! read once it is back. What is complete is read with nobody there.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use hullspeed_tests::content::{ContentFile, noise};
use hullspeed_tests::cri::Pod;
use hullspeed_tests::layout::{ImageConfig, LayoutWriter};
use hullspeed_tests::lazy::{Published, Source, check_all};
use hullspeed_tests::process::output;
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::proxy::{Carrier, LinkOptions};
use hullspeed_tests::reader::{METHODS, Order, Reader};
use hullspeed_tests::scenario::{CONVERTED, Scenario};
use hullspeed_tests::way::Way;
use hullspeed_tests::{layer_tar, pause};
use rustix::process::Signal;

/// Short limits; nothing is fetched but for readers.
const QUICK: &str = "[registry]\nstall_timeout = \"1s\"\n\n\
    [fetch]\nprefetch = false\nbackground = false\nread_around = \"4KiB\"\nread_deadline = \"2s\"\n";

/// The kernel may ask several times before it gives up. Far less than for ever.
const LIMIT: Duration = Duration::from_secs(30);

const CHUNK: usize = 64 << 10;

/// In KiB, ahead of what is fetched; no disk's own.
const FETCHED_READ_AHEAD: u32 = 52;

/// What goes wrong.
enum Failure {
    Answers(Fault),
    Carrier(Carrier),
}

fn files() -> Vec<ContentFile> {
    METHODS
        .iter()
        .map(|method| ContentFile::new(format!("files/{method}"), 200_001))
        .collect()
}

async fn source() -> (Source, Published) {
    let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap();
    let above = vec![ContentFile::new("above", 1)];
    let image = source
        .publish("image", &[files(), above], &["--chunk-size", &CHUNK.to_string()])
        .unwrap();
    (source, image)
}

/// An error that a program can tell from data.
fn is_error(method: &str, answer: &str) -> bool {
    // What populates tells of a fault in the memory.
    answer.starts_with("errno 5 at ")
        || answer.starts_with("bus at ")
        || method == "populate" && answer.starts_with("errno 14 at ")
}

async fn fails_and_recovers(name: &str, failure: &Failure) {
    let (source, image) = source().await;
    let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
    let mut node = source.node("node", QUICK).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.container(&image, "container").await.unwrap();
    let copies = view.path().join("copies");
    fs::create_dir(&copies).unwrap();
    match failure {
        Failure::Answers(fault) => {
            let rule = FaultRule::get(image.layer(0).unwrap(), fault.clone());
            source.proxy.inject(rule);
        }
        Failure::Carrier(carrier) => source.proxy.set_carrier(*carrier),
    }
    let refused = |method: &str| node.snapshotter.way() == Way::Erofs && method == "direct";
    let methods = METHODS.into_iter().zip(files()).filter(|(method, _)| !refused(method));
    let mut asked: Vec<_> = methods
        .map(|(method, file)| (method, file, reader.check(CHUNK, &copies).unwrap()))
        .collect();
    // All at once: each waits for its deadline.
    let mut ask_all = || {
        thread::scope(|scope| {
            let asking: Vec<_> = asked
                .iter_mut()
                .map(|(method, file, checking)| {
                    let root = view.path();
                    scope.spawn(move || (*method, checking.ask((method, Order::Scattered), root, file, LIMIT)))
                })
                .collect();
            let answers = asking.into_iter().map(|asking| asking.join().unwrap());
            answers
                .map(|(method, answer)| (method, answer.unwrap()))
                .collect::<Vec<_>>()
        })
    };
    // What failed is not believed the next time either; the wait is the same.
    let rounds = if matches!(failure, Failure::Answers(Fault::Corrupt(_))) {
        3
    } else {
        1
    };
    for round in 0..rounds {
        for (method, answer) in ask_all() {
            assert!(is_error(method, &answer), "{name}: {method}, round {round}: {answer}");
        }
    }
    // The same open files and mappings; the host may not be asked at once again.
    source.proxy.heal();
    let healed = Instant::now();
    loop {
        let answers = ask_all();
        if answers.iter().all(|(_, answer)| answer == "ok") {
            break;
        }
        for (method, answer) in &answers {
            let bounded = healed.elapsed() < LIMIT && (answer == "ok" || is_error(method, answer));
            assert!(bounded, "{name}, {:?} after it: {method}: {answer}", healed.elapsed());
        }
    }
    check_all(view.path(), &files()).await.unwrap();
    drop(asked);
    node.snapshots.remove(view).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_are_errors_whatever_reads_them() {
    fails_and_recovers("wrong bytes", &Failure::Answers(Fault::Corrupt(0..u64::MAX))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_registry_is_an_error_whatever_reads() {
    fails_and_recovers("dead", &Failure::Carrier(Carrier::Refusing)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_break_are_errors_whatever_reads() {
    fails_and_recovers("resetting", &Failure::Carrier(Carrier::Resetting)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_end_early_are_errors_whatever_reads_them() {
    fails_and_recovers("cut", &Failure::Answers(Fault::Truncate(100))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_never_answers_is_an_error_whatever_reads() {
    fails_and_recovers("silent", &Failure::Answers(Fault::Silent)).await;
}

/// The list of an image's files, as the reader in a container finds them.
const LIST: &str = "list";

/// An image with a program that reads everything in it.
fn write_whole(root: &Path) -> Vec<ContentFile> {
    for directory in ["bin", "data", "dev", "etc", "proc", "run", "sys", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let bin = root.join("bin");
    Reader::compile(&bin).unwrap();
    fs::remove_file(bin.join("reader.c")).unwrap();
    pause::compile(&bin).unwrap();
    fs::write(bin.join("payload.c"), include_str!("../programs/payload.c")).unwrap();
    fs::write(bin.join("payload.bin"), noise(5, 3 << 20)).unwrap();
    let mut command = Command::new("cc");
    command
        .current_dir(&bin)
        .args(["-O2", "-static", "-DSEED=5ull", "-o", "payload", "payload.c"]);
    output(&mut command).unwrap();
    for left in ["payload.c", "payload.bin"] {
        fs::remove_file(bin.join(left)).unwrap();
    }
    let files: Vec<_> = (0..400)
        .map(|number| ContentFile::new(format!("data/{number:03}"), number * 997 % 90_000))
        .collect();
    for file in &files {
        fs::write(root.join(&file.path), file.content()).unwrap();
    }
    // EROFS on a file refuses direct I/O whoever is there.
    let methods = METHODS
        .iter()
        .filter(|method| !["direct", "copy_file_range"].contains(method));
    let lines: String = files
        .iter()
        .zip(methods.cycle())
        .map(|(file, method)| format!("{method} whole {} {} /{}\n", file.seed, file.size, file.path))
        .collect();
    fs::write(root.join(LIST), lines).unwrap();
    files
}

fn build_whole(layout: &Path, root: &Path) -> Vec<ContentFile> {
    let files = write_whole(root);
    layer_tar::clamp_times(root, 0, 1_600_000_000).unwrap();
    let above = root.with_extension("above");
    fs::create_dir_all(&above).unwrap();
    fs::write(above.join("above"), "a layer above").unwrap();
    let mut writer = LayoutWriter::create(layout).unwrap();
    for layer in [root, &above] {
        writer.add_layer(|tar| layer_tar::write(layer, tar)).unwrap();
    }
    let config = ImageConfig {
        entrypoint: vec!["/bin/pause".into()],
        ..ImageConfig::default()
    };
    writer.finish(&config, "whole").unwrap();
    files
}

/// How many marks of fanotify a process has set.
fn marks(pid: u32) -> usize {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo")).unwrap();
    let texts = entries.map(|entry| fs::read_to_string(entry.unwrap().path()).unwrap_or_default());
    texts
        .map(|text| text.lines().filter(|line| line.starts_with("fanotify ino:")).count())
        .sum()
}

/// What is read ahead of each EROFS there is, in KiB.
fn read_aheads() -> Vec<u32> {
    let devices = fs::read_dir("/sys/class/bdi")
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let ours = devices.filter(|path| path.file_name().unwrap().as_encoded_bytes().starts_with(b"erofs-"));
    // Those of other tests go at any time.
    let texts = ours.filter_map(|path| fs::read_to_string(path.join("read_ahead_kb")).ok());
    texts.map(|text| text.trim().parse().unwrap()).collect()
}

/// The kernel forgets what it has read of these files.
fn forget(root: &Path, files: &[ContentFile]) {
    let programs = ["bin/payload", "bin/reader", LIST].map(String::from);
    for path in files.iter().map(|file| file.path.clone()).chain(programs) {
        let file = File::open(root.join(path)).unwrap();
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_complete_layer_is_read_and_executed_with_the_daemon_stopped() {
    if Way::of_this_run().unwrap() == Way::Fuse {
        eprintln!("FUSE asks its daemon for every open file, complete or not: this is for native mounts");
        return;
    }
    let run = Scenario::prepare().unwrap();
    let layout = run.path().join("whole");
    let files = build_whole(&layout, &run.directory("root").unwrap());
    let scenario = Scenario::with_image(run, &layout, "whole", &[]).await.unwrap();
    let read_ahead = format!("[fuse]\nread_ahead = \"{FETCHED_READ_AHEAD}KiB\"\n");
    let mut node = scenario.lazy_node(&read_ahead).await.unwrap();
    let reference = scenario.reference(CONVERTED);
    node.cri.pull(&reference).await.unwrap();
    node.check_lazy(&scenario.converted).unwrap();
    let logs = scenario.run.directory("pods").unwrap();
    let pod = Pod::new("whole", &logs, &scenario.run.names().cgroup);
    let sandbox = node.cri.run_sandbox(&pod).await.unwrap();
    let container = node
        .cri
        .create_container(&sandbox, &pod, "main", &reference)
        .await
        .unwrap();
    node.cri.start_container(&container).await.unwrap();
    let snapshotter = node.snapshotter().unwrap();
    let pid = snapshotter.process().pid();
    let end = Instant::now() + Duration::from_secs(60);
    while marks(pid) > 0 {
        assert!(
            Instant::now() < end,
            "the layers are not left to the kernel: {} marks",
            marks(pid)
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // From now on as much is read ahead as of any file of this disk.
    let root = File::open(node.snapshotter().unwrap().root()).unwrap();
    let expected = hullspeed_erofs::read_ahead::of_disk(root.as_fd())
        .map_or(FETCHED_READ_AHEAD, |kib| kib.max(FETCHED_READ_AHEAD));
    let found = read_aheads();
    assert!(
        found.iter().filter(|kib| **kib == expected).count() >= 2,
        "{expected} in {found:?}"
    );
    assert!(
        expected == FETCHED_READ_AHEAD || !found.contains(&FETCHED_READ_AHEAD),
        "{found:?}"
    );
    let rootfs = node.containerd.rootfs(&container);
    let executable = fs::metadata(rootfs.join("bin/payload")).unwrap().permissions().mode();
    assert_eq!(executable & 0o111, 0o111);
    forget(&rootfs, &files);
    for layer in hullspeed_tests::sweep::mounts_of_kind(&node.snapshotter().unwrap().root().join("layers")).unwrap() {
        assert_eq!(layer.1, "erofs");
    }
    node.snapshotter().unwrap().process().signal(Signal::STOP).unwrap();
    scenario.proxy.set_carrier(Carrier::Refusing);
    for round in ["first", "again"] {
        let read = node
            .cri
            .exec(&container, &["/bin/reader", "crowd", "8", "/list"])
            .await
            .unwrap();
        let said = String::from_utf8_lossy(&read.stdout).into_owned();
        assert_eq!(said.trim(), format!("done {}", 2 * files.len()), "{round}");
        let executed = node.cri.exec(&container, &["/bin/payload"]).await.unwrap();
        assert_eq!(executed.exit_code, 0, "{round}");
        forget(&rootfs, &files);
    }
    assert_eq!(
        node.snapshotter().unwrap().process().pid(),
        pid,
        "the daemon was started anew"
    );
    node.snapshotter().unwrap().process().signal(Signal::CONT).unwrap();
    node.cri.remove_container(&container).await.unwrap();
    node.cri.remove_sandbox(&sandbox).await.unwrap();
}
