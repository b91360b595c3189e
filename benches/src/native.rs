//! `AREA=native`: what a container's root costs on each way to mount lazy layers. The unit is containerd's native overlayfs over ext4
//! directories; everything is seen through an overlayfs, as a container sees it. docs/benchmarks.md says what each figure is.

use std::fs;

use anyhow::{Context as _, Result};
use hullspeed_tests::lazy::{LazyNode, Source};
use hullspeed_tests::run::RunDir;
use hullspeed_tests::way::Way;

use crate::figure::{Figure, Side, rounded};

mod cold;
mod session;
mod warm;
pub mod workload;

/// Everything as shipped.
const AS_SHIPPED: &str = "";

/// How many samples each part takes.
#[derive(Debug, Clone)]
pub struct Amounts {
    /// Interleaved rounds.
    pub rounds: usize,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Complete layers.
    Warm,
    /// The session loop alone.
    Session,
    /// Layers of which nothing is there.
    Cold,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Warm, Self::Session, Self::Cold];
}

/// What is promised.
#[derive(Debug, Clone, Copy)]
enum Goal {
    AtMost(f64),
    AtLeast(f64),
}

/// Measures the parts; `report` gets each figure as soon as it is there.
pub async fn measure(
    open_run: impl Fn() -> Result<RunDir>,
    parts: &[Part],
    amounts: &Amounts,
    mut report: impl FnMut(Figure) -> Result<()>,
) -> Result<()> {
    for part in parts {
        let figures = match part {
            Part::Warm => warm::measure(open_run()?, amounts).await,
            Part::Session => session::measure(amounts).await,
            Part::Cold => cold::measure(open_run()?, amounts).await,
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
    goal: Option<Goal>,
    against: String,
    n: usize,
) -> Figure {
    let (bound, side) = match goal {
        None => (None, Side::default()),
        Some(Goal::AtMost(bound)) => (Some(bound), Side::AtMost),
        Some(Goal::AtLeast(bound)) => (Some(bound), Side::AtLeast),
    };
    Figure {
        figure,
        value: rounded(value),
        unit,
        against,
        n,
        containerd: None,
        bound,
        side,
    }
}

/// A snapshotter that gets its images straight from the registry.
async fn node(source: &Source, name: &str, way: Way) -> Result<LazyNode> {
    let host = source.registry.address();
    LazyNode::start_on(&source.run, name, host, AS_SHIPPED, way).await
}

/// What was read or written is on disk alone.
fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")
}

/// Runs work that blocks.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.context("a workload panicked")?
}
