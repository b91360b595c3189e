//! Background completion: what it fetches, when it starts, and what it does to those who read meanwhile.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::{LazyNode, Published, Source};
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::proxy::record::RequestRecord;
use hullspeed_tests::run::RunDir;

use super::{
    AS_SHIPPED, Amounts, DEMAND_ONLY, MIB, POLL, blob_requests, blocking, body_bytes, figure, link_text, wait_quiet,
};
use crate::figure::{Figure, Times};

/// Requests of the background that have to be there before a reader comes.
const UNDER_WAY: usize = 3;

/// The longest wait for them.
const START_LIMIT: Duration = Duration::from_secs(10);

/// Large files of the layer.
const LARGE: usize = 96;

/// The files that are read while the background is at work, by number: it goes from the first to the last.
const READ: [usize; 3] = [95, 85, 75];

pub(super) async fn measure(run: RunDir, amounts: &Amounts) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::GIGABIT).await?;
    let image = source.publish("background", &[layer()], &[])?;
    source.registry.warm()?;
    let mut figures = complete(&source, &image, amounts).await?;
    figures.push(demand_delay(&source, &image, amounts).await?);
    Ok(figures)
}

fn large(number: usize) -> ContentFile {
    ContentFile::new(format!("large/{number:03}"), 1 << 20)
}

/// 96 files of 1 MiB, then 1000 small ones.
fn layer() -> Vec<ContentFile> {
    (0..LARGE).map(large).chain(small_files("small", 1000, 6000)).collect()
}

/// Mounts and waits until nothing more is fetched.
async fn complete(source: &Source, image: &Published, amounts: &Amounts) -> Result<Vec<Figure>> {
    let blob = image.blob_size(0)? as f64;
    let (mut bytes, mut requests, mut start) = (0.0_f64, 0.0_f64, 0.0_f64);
    for round in 0..amounts.rounds {
        let mut node = source.node(&format!("complete-{round}"), AS_SHIPPED).await?;
        let begin = Instant::now();
        source.proxy.reset();
        node.mount(image).await?;
        let mounted = begin.elapsed();
        wait_quiet(&source.proxy).await?;
        let records = blob_requests(&source.proxy);
        bytes = bytes.max(body_bytes(&records) as f64 / blob);
        // The first is the mount's own.
        let own = records
            .get(1..)
            .filter(|own| !own.is_empty())
            .context("nothing is fetched in the background")?;
        requests = requests.max(own.len() as f64 / (blob / MIB));
        let after = own[0].at.saturating_sub(mounted);
        start = start.max(after.as_secs_f64());
        check_complete(source, &mut node, image).await?;
    }
    let said = |what: &str| {
        format!(
            "{what}; one layer of {:.0} MiB over {}, the worst round",
            blob / MIB,
            link_text()
        )
    };
    let n = amounts.rounds;
    Ok(vec![
        figure(
            ("fetch.background_bytes_ratio", "ratio"),
            bytes,
            Some(1.05),
            said("bytes of all bodies by the blob's size"),
            n,
        ),
        figure(
            ("fetch.background_requests_per_mib", "count"),
            requests,
            Some(1.0),
            said("requests after the mount's own, by the blob's MiB"),
            n,
        ),
        figure(
            ("fetch.background_start_s", "s"),
            start,
            Some(1.0),
            said("from the mount's answer to the first request"),
            n,
        ),
    ])
}

/// With the registry gone every file is there.
async fn check_complete(source: &Source, node: &mut LazyNode, image: &Published) -> Result<()> {
    let view = node.view(image, "view").await?;
    source.proxy.set_dead(true);
    let root = view.path().to_path_buf();
    let read = blocking(move || {
        for file in layer() {
            let path = root.join(&file.path);
            let content = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            ensure!(content == file.content(), "{} is read wrongly", file.path);
        }
        Ok(())
    });
    let read = read.await;
    source.proxy.set_dead(false);
    node.snapshots.remove(view).await?;
    read.context("what the background brought is not the whole layer")
}

/// What a read takes longer while the background is at work, in requests of the background.
async fn demand_delay(source: &Source, image: &Published, amounts: &Amounts) -> Result<Figure> {
    let (mut alone, mut disturbed, mut background) = (Times::default(), Times::default(), Times::default());
    for round in 0..amounts.rounds {
        let mut node = source.node(&format!("alone-{round}"), DEMAND_ONLY).await?;
        node.mount(image).await?;
        reads(&mut node, image, &mut alone).await?;
        let mut node = source.node(&format!("disturbed-{round}"), AS_SHIPPED).await?;
        source.proxy.reset();
        node.mount(image).await?;
        let end = Instant::now() + START_LIMIT;
        while blob_requests(&source.proxy).len() <= UNDER_WAY {
            ensure!(Instant::now() < end, "the background does not start");
            tokio::time::sleep(POLL / 4).await;
        }
        reads(&mut node, image, &mut disturbed).await?;
        let undone = blob_requests(&source.proxy);
        let sent: u64 = body_bytes(&undone);
        ensure!(
            sent < image.blob_size(0)?,
            "the background was done before the readers were; nothing is measured"
        );
        for took in undone.iter().skip(1).filter_map(duration) {
            background.push(took);
        }
        wait_quiet(&source.proxy).await?;
    }
    let (one, alone_middle, middle) = (background.median()?, alone.median()?, disturbed.median()?);
    let said = format!(
        "4 KiB of a file that is not there: {middle:.1} ms beside the background, {alone_middle:.1} ms alone; one request of the background takes {one:.1} ms; {}",
        link_text()
    );
    Ok(figure(
        ("fetch.background_demand_delay_requests", "count"),
        (middle - alone_middle).max(0.0) / one,
        Some(1.0),
        said,
        disturbed.len(),
    ))
}

fn duration(record: &RequestRecord) -> Option<Duration> {
    record.ended?.checked_sub(record.at)
}

async fn reads(node: &mut LazyNode, image: &Published, times: &mut Times) -> Result<()> {
    let view = node.view(image, "view").await?;
    let root = view.path().to_path_buf();
    let took = blocking(move || {
        READ.iter()
            .map(|&number| timed_read(&root, number))
            .collect::<Result<Vec<_>>>()
    })
    .await?;
    for time in took {
        times.push(time);
    }
    node.snapshots.remove(view).await
}

fn timed_read(root: &std::path::Path, number: usize) -> Result<Duration> {
    let file = large(number);
    let path: PathBuf = root.join(&file.path);
    let opened = File::open(&path).with_context(|| format!("cannot open {}", path.display()))?;
    let mut buffer = vec![0; 4096];
    let begin = Instant::now();
    opened
        .read_exact_at(&mut buffer, 0)
        .with_context(|| format!("cannot read {}", path.display()))?;
    let took = begin.elapsed();
    ensure!(
        buffer == file.content()[..buffer.len()],
        "{} is read wrongly",
        file.path
    );
    Ok(took)
}
