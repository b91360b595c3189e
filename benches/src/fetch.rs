//! `AREA=fetch`: what the fetch engine and the layer cache promise, on our snapshotter with real FUSE mounts, in front of a
//! real registry behind a shaped link.
//!
//! The daemon is asked over its socket as containerd asks it; no containers are needed. What a figure is compared with is
//! taken in the same run over the same link. docs/benchmarks.md says what each figure is.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::proxy::record::RequestRecord;
use hullspeed_tests::proxy::{LinkOptions, Proxy};
use hullspeed_tests::run::RunDir;

use crate::figure::{Figure, Side, rounded};

mod background;
mod disk;
mod link;
mod memory;
mod mounting;
mod reading;

/// Nothing but what a mount and its readers ask for.
const DEMAND_ONLY: &str = "[fetch]\nprefetch = false\nbackground = false\n";

/// Everything as shipped.
const AS_SHIPPED: &str = "";

/// A link on which nothing was asked for so long is at rest.
const QUIET: Duration = Duration::from_millis(1500);

/// The longest wait for that.
const QUIET_LIMIT: Duration = Duration::from_secs(180);

const POLL: Duration = Duration::from_millis(20);

const MIB: f64 = 1_048_576.0;

/// How many samples each part takes.
#[derive(Debug, Clone)]
pub struct Amounts {
    /// Rounds of everything that is timed; each on a fresh daemon and cache.
    pub rounds: usize,
    /// Images mounted when memory is weighed.
    pub images: usize,
    /// Files of each of their layers.
    pub files: usize,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// The link itself.
    Link,
    /// Requests that a mount costs.
    Mounting,
    /// Cold reads.
    Reading,
    /// Background completion.
    Background,
    /// Bytes on disk, and what an update fetches.
    Disk,
    /// Memory of many mounted images.
    Memory,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Link,
        Self::Mounting,
        Self::Reading,
        Self::Background,
        Self::Disk,
        Self::Memory,
    ];
}

/// Measures the parts; `report` gets each figure as soon as it is there.
pub async fn measure(
    open_run: impl Fn() -> Result<RunDir>,
    parts: &[Part],
    amounts: &Amounts,
    mut report: impl FnMut(Figure) -> Result<()>,
) -> Result<()> {
    for part in parts {
        let run = open_run()?;
        let figures = match part {
            Part::Link => link::measure(run, amounts).await,
            Part::Mounting => mounting::measure(run, amounts).await,
            Part::Reading => reading::measure(run, amounts).await,
            Part::Background => background::measure(run, amounts).await,
            Part::Disk => disk::measure(run).await,
            Part::Memory => memory::measure(run, amounts).await,
        };
        for figure in figures.with_context(|| format!("{part:?}"))? {
            report(figure)?;
        }
    }
    Ok(())
}

/// A figure of this area.
fn figure(
    (figure, unit): (&'static str, &'static str),
    value: f64,
    bound: Option<f64>,
    against: String,
    n: usize,
) -> Figure {
    Figure {
        figure,
        value: rounded(value),
        unit,
        against,
        n,
        containerd: None,
        bound,
        side: Side::AtMost,
    }
}

/// The link of all figures, in words.
fn link_text() -> String {
    let link = LinkOptions::GIGABIT;
    let rate = link.bytes_per_second.unwrap_or(0) * 8 / 1_000_000;
    format!("{} ms per request, {rate} Mbit/s", link.delay.as_millis())
}

/// The requests for bytes of blobs.
fn blob_requests(proxy: &Proxy) -> Vec<RequestRecord> {
    proxy.requests().into_iter().filter(RequestRecord::is_blob).collect()
}

/// Bytes of bodies of these requests.
fn body_bytes(records: &[RequestRecord]) -> u64 {
    records.iter().map(|record| record.body_bytes).sum()
}

/// Waits until nothing has been asked for a while and nothing is under way.
async fn wait_quiet(proxy: &Proxy) -> Result<()> {
    let end = Instant::now() + QUIET_LIMIT;
    let (mut seen, mut since) = (proxy.totals(), Instant::now());
    while since.elapsed() < QUIET {
        ensure!(Instant::now() < end, "the link is not at rest after {QUIET_LIMIT:?}");
        tokio::time::sleep(POLL).await;
        let now = proxy.totals();
        if now != seen || proxy.requests().iter().any(|record| record.ended.is_none()) {
            (seen, since) = (now, Instant::now());
        }
    }
    Ok(())
}

/// Runs work that blocks.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context("a reader panicked")?
}
