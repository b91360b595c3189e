//! Cold reads: one large file from front to end, and files all over a layer of small ones.

use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::{Published, Source};
use hullspeed_tests::plain::PlainClient;
use hullspeed_tests::process;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::RunDir;

use super::{Amounts, DEMAND_ONLY, blob_requests, blocking, figure, link_text};
use crate::figure::{Figure, Times};

/// The large file.
const LARGE: usize = 24 << 20;

/// The layer of small files: 9.5 MB.
const FILES: usize = 2000;
const FILE_BYTES: usize = 4750;

/// Files read of it, in an order that follows nothing.
const SCATTERED: usize = 106;
const STRIDE: usize = 733;

/// What programs read at once.
const BUFFER: usize = 128 << 10;

/// What the best-known peer asks for at once.
const PEER_BYTES: u64 = 2 << 20;

pub(super) async fn measure(run: RunDir, amounts: &Amounts) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::GIGABIT).await?;
    let mut figures = vec![sequential(&source, amounts).await?];
    figures.extend(scattered(&source, amounts).await?);
    Ok(figures)
}

async fn sequential(source: &Source, amounts: &Amounts) -> Result<Figure> {
    let file = ContentFile::new("large", LARGE);
    let image = source.publish("large", &[vec![file.clone()]], &[])?;
    source.registry.warm()?;
    let (mut own, mut single, mut serial) = (Times::default(), Times::default(), Times::default());
    let mut requests = 0;
    for round in 0..amounts.rounds {
        let mut node = source.node(&format!("sequential-{round}"), DEMAND_ONLY).await?;
        node.mount(&image).await?;
        let view = node.view(&image, "view").await?;
        source.proxy.reset();
        let path = view.path().join(&file.path);
        let (took, content) = blocking(move || timed_read(&path)).await?;
        own.push(took);
        ensure!(content == file.content(), "{} is read wrongly", file.path);
        requests = requests.max(blob_requests(&source.proxy).len());
        node.snapshots.remove(view).await?;
        plain_reads(source, &image, &mut single, &mut serial).await?;
    }
    let (single, serial) = (single.median()? / 1e3, serial.median()? / 1e3);
    let said = format!(
        "{}; {requests} requests at most; the same bytes by a plain client in one GET {single:.3} s, in 12 serial GETs {serial:.3} s",
        link_text()
    );
    let value = own.median()? / 1e3;
    Ok(figure(
        ("fetch.sequential_24mib_s", "s"),
        value,
        Some(0.26),
        said,
        own.len(),
    ))
}

/// The same bytes by the client without ideas, at once and in the peer's pieces.
async fn plain_reads(source: &Source, image: &Published, single: &mut Times, serial: &mut Times) -> Result<()> {
    let (digest, bytes) = (image.layer(0)?, LARGE as u64);
    let repository = image.name.split(':').next().unwrap_or_default();
    let mut client = PlainClient::connect(source.proxy.address()).await?;
    let begin = Instant::now();
    client.range(repository, &digest, 0..bytes).await?;
    single.push(begin.elapsed());
    let begin = Instant::now();
    for piece in 0..bytes / PEER_BYTES {
        let start = piece * PEER_BYTES;
        client.range(repository, &digest, start..start + PEER_BYTES).await?;
    }
    serial.push(begin.elapsed());
    Ok(())
}

async fn scattered(source: &Source, amounts: &Amounts) -> Result<Vec<Figure>> {
    let files = small_files("small", FILES, FILE_BYTES);
    let image = source.publish("small", std::slice::from_ref(&files), &[])?;
    source.registry.warm()?;
    let chosen: Vec<ContentFile> = (0..SCATTERED)
        .map(|number| files[number * STRIDE % FILES].clone())
        .collect();
    let (mut own, mut found) = (Times::default(), Times::default());
    let (mut requests, mut find_requests) = (0, 0);
    for round in 0..amounts.rounds {
        let mut node = source.node(&format!("scattered-{round}"), DEMAND_ONLY).await?;
        node.mount(&image).await?;
        let view = node.view(&image, "view").await?;
        source.proxy.reset();
        let root = view.path().to_path_buf();
        found.push(blocking(move || timed_find(&root)).await?);
        find_requests = find_requests.max(source.proxy.totals().requests);
        source.proxy.reset();
        let paths: Vec<PathBuf> = chosen.iter().map(|file| view.path().join(&file.path)).collect();
        let (took, contents) = blocking(move || timed_reads(&paths)).await?;
        own.push(took);
        let right = chosen.iter().map(ContentFile::content).eq(contents);
        ensure!(right, "a small file is read wrongly");
        requests = requests.max(blob_requests(&source.proxy).len());
        node.snapshots.remove(view).await?;
    }
    let plain = plain_scattered(source, &image).await?.as_secs_f64();
    let said = format!(
        "{}; {requests} requests at most; a plain client's GETs of as many bytes each, one after the other: {plain:.2} s",
        link_text()
    );
    let find_said = format!("find over {FILES} files looks at each; {:.1} ms", found.median()?);
    let value = own.median()? / 1e3;
    Ok(vec![
        figure(("fetch.scattered_106_files_s", "s"), value, Some(0.6), said, own.len()),
        figure(
            ("fetch.requests_find", "count"),
            find_requests as f64,
            Some(0.0),
            find_said,
            found.len(),
        ),
    ])
}

async fn plain_scattered(source: &Source, image: &Published) -> Result<Duration> {
    let digest = image.layer(0)?;
    let repository = image.name.split(':').next().unwrap_or_default();
    let mut client = PlainClient::connect(source.proxy.address()).await?;
    let begin = Instant::now();
    for number in 0..SCATTERED {
        let start = (number * STRIDE % FILES * FILE_BYTES) as u64;
        client
            .range(repository, &digest, start..start + FILE_BYTES as u64)
            .await?;
    }
    Ok(begin.elapsed())
}

fn timed_read(path: &Path) -> Result<(Duration, Vec<u8>)> {
    let mut content = Vec::with_capacity(LARGE);
    let begin = Instant::now();
    let mut file = fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = file
            .read(&mut buffer)
            .with_context(|| format!("cannot read {}", path.display()))?;
        if read == 0 {
            return Ok((begin.elapsed(), content));
        }
        content.extend_from_slice(&buffer[..read]);
    }
}

fn timed_reads(paths: &[PathBuf]) -> Result<(Duration, Vec<Vec<u8>>)> {
    let begin = Instant::now();
    let read = |path: &PathBuf| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let contents = paths.iter().map(read).collect::<Result<_>>()?;
    Ok((begin.elapsed(), contents))
}

fn timed_find(root: &Path) -> Result<Duration> {
    let begin = Instant::now();
    // A size makes it look at every file.
    let mut command = Command::new("find");
    command.arg(root).args(["-type", "f", "-size", "+1c"]);
    let found = process::output(&mut command)?;
    let count = found.iter().filter(|&&byte| byte == b'\n').count();
    ensure!(count == FILES, "find found {count} of {FILES} files");
    Ok(begin.elapsed())
}
