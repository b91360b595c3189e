//! Every way to read gives the right bytes: cold files in a container's view, overlayfs over lazy layers.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use hullspeed_tests::content::{ContentFile, noise};
use hullspeed_tests::layer_tar;
use hullspeed_tests::layout::{ImageConfig, LayoutWriter};
use hullspeed_tests::lazy::Source;
use hullspeed_tests::process::output;
use hullspeed_tests::proxy::{Carrier, LinkOptions};
use hullspeed_tests::reader::{METHODS, Order, Reader};
use hullspeed_tests::scenario::Scenario;
use hullspeed_tests::way::Way;

/// Nothing comes but what is asked for, in the smallest pieces.
const COLD: &str = "[fetch]\nprefetch = false\nbackground = false\nread_around = \"4KiB\"\nmax_range = \"64KiB\"\nread_deadline = \"20s\"\n";

/// Bytes of a chunk.
const CHUNK: usize = 64 << 10;

/// Around what the kernel reads, and what the snapshotter fetches.
const SIZES: [usize; 8] = [0, 1, 4095, 4096, 4097, CHUNK - 1, CHUNK, CHUNK + 1];

/// Several MiB, with an odd end.
const LARGE: usize = (2 << 20) + 4321;

/// No single file takes longer.
const LIMIT: Duration = Duration::from_secs(60);

/// What the daemon reads of FUSE, and the kernel nothing by itself.
const THROUGH_THE_DAEMON: &str = "[fuse]\npassthrough = false\n";

/// EROFS on a file has no direct I/O (Linux 6.18), and so what the kernel reads by itself has none: it is refused when the file is
/// opened, before anything is read.
fn is_refused(method: &str, answer: &str) -> bool {
    method == "direct" && answer == "errno 22 at open"
}

async fn source() -> Source {
    Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
        .await
        .unwrap()
}

/// Visits every element, neighbours far apart, so that no reading ahead brings the next one.
fn scattered<T>(elements: &[T]) -> impl Iterator<Item = &T> {
    // No number of elements here has this divisor.
    const STEP: usize = 7919;
    (0..elements.len()).map(|turn| &elements[turn * STEP % elements.len()])
}

fn of_order(order: Order) -> Vec<(&'static str, Order, ContentFile)> {
    // The large ones once: it is the same code that reads them in order.
    let large = (order == Order::Scattered).then_some(LARGE);
    METHODS
        .into_iter()
        .flat_map(|method| SIZES.into_iter().chain(large).map(move |size| (method, size)))
        .map(|(method, size)| {
            let file = ContentFile::new(format!("{order:?}/{method}-{size}"), size);
            (method, order, file)
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_way_reads_cold_files_of_each_size() {
    read_in_each_way("").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_way_reads_cold_files_through_the_daemon_alone() {
    read_in_each_way(THROUGH_THE_DAEMON).await;
}

async fn read_in_each_way(config: &str) {
    let source = source().await;
    let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
    let layers = [Order::Whole, Order::Scattered].map(of_order);
    let files = layers
        .each_ref()
        .map(|layer| layer.iter().map(|(_, _, file)| file.clone()).collect());
    let image = source
        .publish("image", &files, &["--chunk-size", &CHUNK.to_string()])
        .unwrap();
    let mut node = source.node("node", &format!("{COLD}{config}")).await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.container(&image, "container").await.unwrap();
    let copies = view.path().join("copies");
    fs::create_dir(&copies).unwrap();
    let mut checking = reader.check(CHUNK, &copies).unwrap();
    let all = layers.concat();
    let may_refuse = node.snapshotter.way() == Way::Erofs || config.is_empty();
    let mut check = |temperature: &str, (method, order, file): &(&str, Order, ContentFile)| {
        let answer = checking.ask((method, *order), view.path(), file, LIMIT).unwrap();
        let fine = answer == "ok" || may_refuse && is_refused(method, &answer);
        assert!(
            fine,
            "{temperature}: {method}, {order:?}, {} bytes: {answer}",
            file.size
        );
    };
    source.proxy.reset();
    scattered(&all).for_each(|what| check("cold", what));
    let asked = source.proxy.totals().requests;
    assert!(asked > all.len() as u64, "the files were not cold: {asked} requests");
    // Once more, from what the kernel and the cache have.
    source.proxy.set_carrier(Carrier::Refusing);
    all.iter().for_each(|what| check("warm", what));
    drop(checking);
    node.snapshots.remove(view).await.unwrap();
}

/// A program, static and dynamic, and a library, each full of bytes that it knows.
fn write_programs(directory: &Path) {
    fs::write(directory.join("payload.c"), include_str!("../programs/payload.c")).unwrap();
    for (name, seed, arguments) in [
        ("static", 11_u64, &["-static"][..]),
        ("dynamic", 12, &["-fPIE", "-pie"]),
        ("library.so", 13, &["-shared", "-fPIC", "-DLIBRARY"]),
    ] {
        fs::write(directory.join("payload.bin"), noise(seed, (2 << 20) + 777)).unwrap();
        let mut command = Command::new("cc");
        command
            .current_dir(directory)
            .args(["-O2", &format!("-DSEED={seed}ull")]);
        output(command.args(arguments).args(["-o", name, "payload.c"])).unwrap();
    }
    fs::remove_file(directory.join("payload.c")).unwrap();
    fs::remove_file(directory.join("payload.bin")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn cold_programs_and_libraries_are_executed() {
    let source = source().await;
    let (root, empty) = (
        source.run.directory("root").unwrap(),
        source.run.directory("empty").unwrap(),
    );
    write_programs(&root);
    fs::write(empty.join("other"), "a layer above").unwrap();
    let layout = source.run.path().join("programs");
    let mut writer = LayoutWriter::create(&layout).unwrap();
    for layer in [&root, &empty] {
        writer.add_layer(|tar| layer_tar::write(layer, tar)).unwrap();
    }
    writer.finish(&ImageConfig::default(), "programs").unwrap();
    let image = source
        .convert("programs", &layout, "programs", &["--chunk-size", &CHUNK.to_string()])
        .unwrap();
    let loader = root.join("loader");
    fs::write(root.join("loader.c"), include_str!("../programs/loader.c")).unwrap();
    output(Command::new("cc").arg("-o").arg(&loader).arg(root.join("loader.c"))).unwrap();

    let mut node = source.node("node", COLD).await.unwrap();
    node.mount(&image).await.unwrap();
    for round in ["cold", "warm"] {
        let view = node.container(&image, round).await.unwrap();
        for program in ["static", "dynamic"] {
            output(&mut Command::new(view.path().join(program))).unwrap_or_else(|error| panic!("{round}: {error:#}"));
        }
        output(Command::new(&loader).arg(view.path().join("library.so")))
            .unwrap_or_else(|error| panic!("{round}: {error:#}"));
        node.snapshots.remove(view).await.unwrap();
    }
}

/// Small files, sizes of all kinds, spread over directories and two layers.
fn crowd() -> [Vec<ContentFile>; 2] {
    let file = |layer: usize, number: usize| {
        let size = number * 7919 % 3000;
        ContentFile::new(format!("l{layer}/d{:03}/f{number:05}", number / 64), size)
    };
    [0, 1].map(|layer| (0..10_000).map(|number| file(layer, number)).collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_threads_read_twenty_thousand_cold_files() {
    let source = source().await;
    let reader = Reader::compile(&source.run.directory("reader").unwrap()).unwrap();
    let layers = crowd();
    let image = source.publish("crowd", &layers, &[]).unwrap();
    let mut node = source.node("node", "").await.unwrap();
    node.mount(&image).await.unwrap();
    let view = node.container(&image, "container").await.unwrap();
    let (root, list) = (view.path().to_owned(), source.run.path().join("list"));
    let files = layers.concat();
    let expected = 2 * files.len() as u64;
    // Cold, then what the cache has and the kernel may have.
    for round in ["cold", "warm"] {
        let (reader, list, root, files) = (reader.clone(), list.clone(), root.clone(), files.clone());
        let reading = tokio::task::spawn_blocking(move || reader.crowd(64, &list, &root, &files));
        let done = tokio::time::timeout(Duration::from_secs(100), reading).await;
        let (faults, reads) = done.expect("readers hang").unwrap().unwrap();
        assert!(
            faults.is_empty(),
            "{round}: {} faults: {:#?}",
            faults.len(),
            &faults[..faults.len().min(20)]
        );
        assert_eq!(reads, expected, "{round}");
    }
    node.snapshots.remove(view).await.unwrap();
}
