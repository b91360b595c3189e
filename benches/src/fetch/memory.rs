//! What the daemon weighs when many images are mounted and nobody reads.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::{Published, Source};
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::sweep;

use super::{AS_SHIPPED, Amounts, figure, wait_quiet};
use crate::figure::Figure;

/// Layers of each image.
const LAYERS: usize = 10;

/// Bytes of each file: enough to be one, so that it has a chunk.
const FILE_BYTES: usize = 64;

/// Time for the daemon to come to rest.
const REST: Duration = Duration::from_secs(15);

pub(super) async fn measure(run: RunDir, amounts: &Amounts) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::default()).await?;
    let mut node = source.node("memory", AS_SHIPPED).await?;
    let empty = Weight::of(node.snapshotter.process().pid())?;
    for number in 0..amounts.images {
        let image = publish(&source, number, amounts.files)?;
        node.mount(&image).await?;
        fs::remove_dir_all(&image.layout).context("cannot remove a layout")?;
    }
    wait_quiet(&source.proxy).await?;
    tokio::time::sleep(REST).await;
    let mounts = sweep::mounts_below(&node.snapshotter.root().join("layers"))?.len();
    ensure!(
        mounts == amounts.images * LAYERS,
        "{mounts} layers are mounted of {}",
        amounts.images * LAYERS
    );
    let weight = Weight::of(node.snapshotter.process().pid())?;
    let said = format!(
        "{} images of {LAYERS} layers of {} files, all different, complete and idle: {:.1} MiB of its own, {:.1} MiB of mapped files, {} threads; {:.1} MiB without an image",
        amounts.images, amounts.files, weight.own, weight.files, weight.threads, empty.resident
    );
    Ok(vec![figure(
        ("fetch.rss_mib_50_images", "MiB"),
        weight.resident,
        Some(60.0),
        said,
        mounts,
    )])
}

fn publish(source: &Source, number: usize, files: usize) -> Result<Published> {
    let layer = |layer: usize| -> Vec<ContentFile> { small_files(&format!("i{number}l{layer}"), files, FILE_BYTES) };
    let layers: Vec<_> = (0..LAYERS).map(layer).collect();
    source.publish(&format!("memory-{number}"), &layers, &[])
}

/// MiB by what they are.
struct Weight {
    resident: f64,
    own: f64,
    files: f64,
    threads: f64,
}

impl Weight {
    fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        let number = |name: &str| -> Result<f64> {
            let line = text.lines().find_map(|line| line.strip_prefix(name));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok());
            number.with_context(|| format!("there is no {name} in {path}"))
        };
        Ok(Self {
            resident: number("VmRSS:")? / 1024.0,
            own: number("RssAnon:")? / 1024.0,
            files: number("RssFile:")? / 1024.0,
            threads: number("Threads:")?,
        })
    }
}
