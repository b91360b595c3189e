//! Bytes on disk of layers that are complete, and what an update of an image fetches.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::layer_tar;
use hullspeed_tests::layout::{ImageConfig, LayoutWriter};
use hullspeed_tests::lazy::Source;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::RunDir;

use super::{AS_SHIPPED, MIB, blob_requests, body_bytes, figure, wait_quiet};
use crate::figure::Figure;

/// Directories of this machine that become layers: a compiler, its headers, a language's modules. Each is there where
/// the tests run.
const DIRECTORIES: [&str; 3] = ["/usr/lib/gcc", "/usr/include", "/usr/share/perl"];

/// Directories of the image that is updated, as packages are, with as many files each.
const PACKAGES: usize = 50;
const PACKAGE_FILES: usize = 40;
const FILE_BYTES: usize = 12_000;

/// Every so many of them are other ones in the update: a tenth.
const CHANGED: usize = 10;

pub(super) async fn measure(run: RunDir) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::default()).await?;
    let mut figures = complete(&source).await?;
    figures.push(update(&source).await?);
    Ok(figures)
}

async fn complete(source: &Source) -> Result<Vec<Figure>> {
    let plain = source.run.path().join("plain-disk");
    let mut writer = LayoutWriter::create(&plain)?;
    let (mut uncompressed, mut unpacked) = (0, 0);
    for directory in DIRECTORIES.map(Path::new) {
        let layer = writer.add_layer(|output| layer_tar::write(directory, output))?;
        uncompressed += layer.uncompressed;
        unpacked += allocated(directory, &mut 0)?;
    }
    writer.finish(&ImageConfig::default(), "disk")?;
    let image = source.convert("disk", &plain, "disk", &[])?;
    let mut node = source.node("disk", AS_SHIPPED).await?;
    source.proxy.reset();
    node.mount(&image).await?;
    wait_quiet(&source.proxy).await?;
    let fetched = body_bytes(&blob_requests(&source.proxy));
    ensure!(
        fetched as f64 > 0.95 * image.image.compressed_bytes() as f64,
        "the layers are not complete: {fetched} bytes came of {}",
        image.image.compressed_bytes()
    );
    let (mut bytes, mut files) = (0, 0);
    for number in 0..DIRECTORIES.len() {
        let mut count = 0;
        bytes += allocated(&node.cache(&image, number)?, &mut count)?;
        files = files.max(count);
    }
    let mib = |bytes: u64| bytes as f64 / MIB;
    let said = format!(
        "{:.1} MiB allocated by {:.1} MiB of tar archives of {}; unpacked they take {:.1} MiB here",
        mib(bytes),
        mib(uncompressed),
        DIRECTORIES.join(", "),
        mib(unpacked)
    );
    let n = DIRECTORIES.len();
    Ok(vec![
        figure(
            ("fetch.disk_ratio", "ratio"),
            bytes as f64 / uncompressed as f64,
            Some(1.15),
            said,
            n,
        ),
        figure(
            ("fetch.files_per_layer", "count"),
            files as f64,
            Some(6.0),
            "regular files of a complete layer, the most of any".into(),
            n,
        ),
    ])
}

/// Bytes allocated below a directory, mounts left out; counts its regular files.
fn allocated(directory: &Path, files: &mut u64) -> Result<u64> {
    let own = fs::symlink_metadata(directory).with_context(|| format!("cannot stat {}", directory.display()))?;
    let mut bytes = own.blocks() * 512;
    for entry in fs::read_dir(directory).with_context(|| format!("cannot list {}", directory.display()))? {
        let path = entry?.path();
        let metadata = fs::symlink_metadata(&path).with_context(|| format!("cannot stat {}", path.display()))?;
        if metadata.dev() != own.dev() {
            continue;
        }
        if metadata.is_dir() {
            bytes += allocated(&path, files)?;
            continue;
        }
        *files += u64::from(metadata.is_file());
        // A file of several names is counted with each; there are few.
        bytes += metadata.blocks() * 512;
    }
    Ok(bytes)
}

/// Mounts an image until it is complete, then one that shares nine tenths of it.
async fn update(source: &Source) -> Result<Figure> {
    let package = |number: usize| small_files(&format!("p{number:02}"), PACKAGE_FILES, FILE_BYTES);
    let first: Vec<ContentFile> = (0..PACKAGES).flat_map(package).collect();
    let second: Vec<ContentFile> = (0..PACKAGES)
        .flat_map(|number| {
            let files = package(number);
            if number % CHANGED == 0 {
                files.iter().map(ContentFile::changed).collect()
            } else {
                files
            }
        })
        .collect();
    let first = source.publish("first", &[first], &[])?;
    let second = source.publish("second", &[second], &[])?;
    let mut node = source.node("update", AS_SHIPPED).await?;
    node.mount(&first).await?;
    wait_quiet(&source.proxy).await?;
    source.proxy.reset();
    node.mount(&second).await?;
    wait_quiet(&source.proxy).await?;
    let records = blob_requests(&source.proxy);
    let (fetched, size) = (body_bytes(&records), second.blob_size(0)?);
    let said = format!(
        "{:.2} of {:.2} MiB in {} requests, the TOC included; a tenth of its packages is new",
        fetched as f64 / MIB,
        size as f64 / MIB,
        records.len()
    );
    Ok(figure(
        ("fetch.update_bytes_ratio", "ratio"),
        fetched as f64 / size as f64,
        Some(0.12),
        said,
        1,
    ))
}
