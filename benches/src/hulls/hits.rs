//! RunPodSandbox with a hull in the pool, beside containerd's own, and what it takes to make the next hull.

use std::convert::Infallible;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::metrics::Metrics;

use super::{BATCH, Bench};
use crate::figure::{Figure, Times};

/// Native calls before each batch of hits.
const NATIVE_PER_BATCH: usize = 3;

/// How often the daemon is asked for what its creations took; one takes many times as long.
const POLL: Duration = Duration::from_millis(10);

/// Times `hits` adoptions in batches of [`BATCH`], and native calls before each.
pub(super) async fn measure(bench: &mut Bench, hits: usize) -> Result<Vec<Figure>> {
    let (mut adopted, mut native, mut refills) = (Times::default(), Times::default(), Times::default());
    let before = bench.adoptions().await?;
    let mut number = 0;
    while adopted.len() < hits {
        // Native calls come first, when nothing that earlier adoptions left to be done is under way.
        watch_refills(bench, &mut refills).await?;
        let mut sandboxes = Vec::new();
        for _ in 0..NATIVE_PER_BATCH {
            number += 1;
            let pod = bench.pod(&format!("native-{number}"));
            let begin = Instant::now();
            let sandbox = bench.native.run_sandbox(&pod).await?;
            native.push(begin.elapsed());
            sandboxes.push(sandbox);
        }
        for _ in 0..hits.saturating_sub(adopted.len()).min(BATCH as usize) {
            number += 1;
            let pod = bench.pod(&format!("hit-{number}"));
            let begin = Instant::now();
            let sandbox = bench.relay.run_sandbox(&pod).await?;
            adopted.push(begin.elapsed());
            sandboxes.push(sandbox);
        }
        for sandbox in sandboxes {
            bench.relay.remove_sandbox(&sandbox).await?;
        }
    }
    let made = bench.adoptions().await? - before;
    ensure!(made == hits as u64, "{made} of {hits} pods got a hull");
    // The last batch's hulls are made anew, too.
    watch_refills(bench, &mut refills).await?;
    figures(bench, &adopted, &native, &refills)
}

fn figures(bench: &Bench, adopted: &Times, native: &Times, refills: &Times) -> Result<Vec<Figure>> {
    let (middle, native_middle) = (adopted.median()?, native.median()?);
    let said = format!(
        "native median {native_middle:.1} ms of {} in the same run",
        native.len()
    );
    let hits = adopted.len();
    let last = adopted.quantile(0.99)?;
    Ok(vec![
        bench.figure(("hulls.run_pod_sandbox_ms_p50", "ms"), middle, Some(2.0), &said, hits),
        bench.figure(("hulls.run_pod_sandbox_ms_p99", "ms"), last, Some(5.0), &said, hits),
        bench.figure(
            ("hulls.run_pod_sandbox_ratio", "ratio"),
            middle / native_middle,
            Some(0.02),
            &said,
            hits,
        ),
        bench.figure(
            ("hulls.run_pod_sandbox_native_ms_p50", "ms"),
            native_middle,
            None,
            "containerd's own socket, pool full and at rest",
            native.len(),
        ),
        bench.figure(
            ("hulls.refill_ms_p50", "ms"),
            refills.median()?,
            None,
            "containerd's time to make one hull, no pod starting",
            refills.len(),
        ),
    ])
}

/// Waits until the pool is at its level and at rest, and adds what each hull took that was made meanwhile.
async fn watch_refills(bench: &mut Bench, refills: &mut Times) -> Result<()> {
    let metrics = bench.prewarm.metrics();
    tokio::select! {
        settled = bench.settle() => settled,
        failed = watch(metrics, refills) => failed.map(|never| match never {}),
    }
}

/// The creations that end while it is polled: the daemon counts them and sums their times, and makes one at a time.
async fn watch(metrics: Metrics, refills: &mut Times) -> Result<Infallible> {
    let (mut count, mut sum) = creations(metrics).await?;
    loop {
        tokio::time::sleep(POLL).await;
        let (new_count, new_sum) = creations(metrics).await?;
        // Two within one poll could not be told apart.
        if (new_count - count - 1.0).abs() < 0.5 {
            refills.push(Duration::try_from_secs_f64(new_sum - sum).context("a sum of times that falls")?);
        }
        (count, sum) = (new_count, new_sum);
    }
}

async fn creations(metrics: Metrics) -> Result<(f64, f64)> {
    let count = metrics
        .sum("hullspeed_hull_creation_duration_seconds_count", &[])
        .await?;
    let sum = metrics.sum("hullspeed_hull_creation_duration_seconds_sum", &[]).await?;
    Ok((count, sum))
}
