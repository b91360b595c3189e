//! What a hull costs in memory: everything it takes from the machine, kernel, containerd and our daemon included.

use std::fs;

use anyhow::{Context as _, Result};
use hullspeed_tests::prewarm::Prewarm;
use hullspeed_tests::release::Release;
use hullspeed_tests::run::RunDir;

use super::{Bench, REST, relay};
use crate::figure::Figure;

/// Weighs `hulls` hulls.
pub(super) async fn measure(run: RunDir, release: Release, hulls: u32) -> Result<Figure> {
    let mut bench = Bench::start(run, release, 1).await?;
    // The first one brings programs and caches into memory that all share.
    bench.filled(1).await?;
    let before = available().await?;
    bench.prewarm.process().stop()?;
    bench.prewarm = Prewarm::start(&bench.run, &relay(&bench.containerd, hulls + 1))?;
    bench.filled(hulls + 1).await?;
    let after = available().await?;
    let each = (before - after) / f64::from(hulls);
    let said = "fall of MemAvailable, page cache dropped before each reading";
    Ok(bench.figure(
        ("hulls.memory_mib_per_hull", "MiB"),
        each,
        Some(6.0),
        said,
        hulls as usize,
    ))
}

/// MemAvailable in MiB, at rest and without page cache that could go.
async fn available() -> Result<f64> {
    tokio::time::sleep(REST).await;
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")?;
    tokio::time::sleep(REST).await;
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .context("/proc/meminfo has no MemAvailable")?;
    let kib: f64 = line
        .trim()
        .trim_end_matches("kB")
        .trim()
        .parse()
        .context("MemAvailable is no number")?;
    Ok(kib / 1024.0)
}
