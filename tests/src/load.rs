//! Load on a node whose daemon is killed, and the comparison afterwards: what was read, what can be read, what is stored.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};

use crate::content::ContentFile;
use crate::lazy::{LazyNode, Published, Source, stored};
use crate::reader::{Hammer, Reader};
use crate::way::Way;

/// No read lasts longer, whoever is killed meanwhile; several starts of the daemon, its pauses with them.
pub const STUCK: Duration = Duration::from_secs(25);
/// All files of an image, read by several at once.
const ALL_LIMIT: Duration = Duration::from_secs(60);
/// What a process gives back after its start, it has given back by then.
const GIVEN_BACK: Duration = Duration::from_millis(500);
/// Faults that an error shows.
const SHOWN: usize = 20;

/// Two layers of `count` files, from a page to many chunks; `size` is what the largest have twice.
#[must_use]
pub fn two_layers(name: &str, count: usize, size: usize) -> Vec<Vec<ContentFile>> {
    let file = |layer: usize, number: usize| {
        let size = size / 16 * (1 + number % 31) + number;
        ContentFile::new(format!("{name}/l{layer}/f{number:03}"), size)
    };
    let layer = |layer| (0..count).map(|number| file(layer, number)).collect();
    vec![layer(0), layer(1)]
}

/// Fails unless every byte of an image is right, read by several at once.
pub async fn check_every_byte(source: &Source, reader: &Reader, root: &Path, files: &[ContentFile]) -> Result<()> {
    let (reader, list, root, files) = (
        reader.clone(),
        source.run.path().join("every"),
        root.to_owned(),
        files.to_vec(),
    );
    let expected = 2 * files.len() as u64;
    let reading = tokio::task::spawn_blocking(move || reader.crowd(8, &list, &root, &files));
    let (faults, reads) = tokio::time::timeout(ALL_LIMIT, reading)
        .await
        .context("readers hang")???;
    check(&faults)?;
    ensure!(reads == expected, "{reads} reads of {expected}");
    Ok(())
}

/// EROFS on a file has no direct I/O, and so what the kernel reads by itself has none.
fn is_refused(fault: &str) -> bool {
    fault.starts_with("direct ") && fault.ends_with(": errno 22 at open")
}

/// Ends readers, and fails unless all that they have read was right; how often they have read.
pub fn finish(hammers: Vec<Hammer>, node: &LazyNode) -> Result<u64> {
    let mut all = 0;
    for hammer in hammers {
        let finished = hammer.finish(STUCK * 2);
        let (mut faults, reads) = finished.with_context(|| node.snapshotter.log_end())?;
        faults.retain(|fault| !is_refused(fault));
        check(&faults)?;
        ensure!(reads > 0, "a reader has read nothing");
        all += reads;
    }
    Ok(all)
}

fn check(faults: &[String]) -> Result<()> {
    let shown = &faults[..faults.len().min(SHOWN)];
    ensure!(faults.is_empty(), "{} faults: {shown:#?}", faults.len());
    Ok(())
}

/// Has the kernel forget what it has read of these files.
pub fn forget(root: &Path, files: &[ContentFile]) -> Result<()> {
    for file in files {
        let path = root.join(&file.path);
        let file = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    }
    Ok(())
}

/// Fails unless all of an image's layers is in the cache, and right.
pub fn check_stored(node: &LazyNode, image: &Published, layers: &[Vec<ContentFile>]) -> Result<()> {
    for (number, files) in layers.iter().enumerate() {
        let kept = stored(&node.cache(image, number)?, files)?;
        let whole = (kept.wrong, kept.absent) == (0, 0);
        ensure!(whole, "layer {number}: {kept:?}; log:\n{}", node.snapshotter.log_end());
    }
    Ok(())
}

/// Waits until nothing is mounted of any layer.
pub async fn wait_unmounted(node: &LazyNode) -> Result<()> {
    let layers = node.snapshotter.root().join("layers");
    let end = std::time::Instant::now() + STUCK;
    loop {
        let left = crate::sweep::mounts_below(&layers)?;
        if left.is_empty() {
            return Ok(());
        }
        ensure!(
            std::time::Instant::now() < end,
            "{left:?}; log:\n{}",
            node.snapshotter.log_end()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Fails unless nothing is kept for the daemon but what is no layer's. It is killed for that: the keeper tells at the next start.
pub async fn check_nothing_kept(node: &mut LazyNode) -> Result<()> {
    // The journal.
    let expected = u64::from(node.snapshotter.way() == Way::Erofs);
    let mut kept = None;
    // A kill may come after something was unmounted and before it was given back: then the next process gives it back.
    for _ in 0..4 {
        node.kill();
        node.wait_again().await?;
        let records = node.snapshotter.log_records()?;
        let started = records
            .iter()
            .rfind(|record| record["message"] == "the program is started");
        kept = started.context("the keeper has started nothing")?["kept"].as_u64();
        if kept == Some(expected) {
            return Ok(());
        }
        tokio::time::sleep(GIVEN_BACK).await;
    }
    bail!("{kept:?} are kept; log:\n{}", node.snapshotter.log_end())
}
