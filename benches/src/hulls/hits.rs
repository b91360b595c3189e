//! RunPodSandbox with a hull in the pool, beside containerd's own.

use std::time::Instant;

use anyhow::{Result, ensure};

use super::{BATCH, Bench};
use crate::figure::{Figure, Times};

/// Native calls after each batch of hits.
const NATIVE_PER_BATCH: usize = 3;

/// Times `hits` adoptions in batches of [`BATCH`], and native calls in between.
pub(super) async fn measure(bench: &mut Bench, hits: usize) -> Result<Vec<Figure>> {
    let (mut adopted, mut native) = (Times::default(), Times::default());
    let before = bench.adoptions().await?;
    let mut number = 0;
    while adopted.len() < hits {
        bench.filled(BATCH).await?;
        let mut sandboxes = Vec::new();
        for _ in 0..hits.saturating_sub(adopted.len()).min(BATCH as usize) {
            number += 1;
            let pod = bench.pod(&format!("hit-{number}"));
            let begin = Instant::now();
            let sandbox = bench.relay.run_sandbox(&pod).await?;
            adopted.push(begin.elapsed());
            sandboxes.push(sandbox);
        }
        for _ in 0..NATIVE_PER_BATCH {
            number += 1;
            let pod = bench.pod(&format!("native-{number}"));
            let begin = Instant::now();
            let sandbox = bench.native.run_sandbox(&pod).await?;
            native.push(begin.elapsed());
            sandboxes.push(sandbox);
        }
        for sandbox in sandboxes {
            bench.relay.remove_sandbox(&sandbox).await?;
        }
    }
    let made = bench.adoptions().await? - before;
    ensure!(made == hits as u64, "{made} of {hits} pods got a hull");
    let (middle, native_middle) = (adopted.median()?, native.median()?);
    let said = format!(
        "native median {native_middle:.1} ms of {} in the same run",
        native.len()
    );
    Ok(vec![
        bench.figure(("hulls.run_pod_sandbox_ms_p50", "ms"), middle, Some(2.0), &said, hits),
        bench.figure(
            ("hulls.run_pod_sandbox_ms_p99", "ms"),
            adopted.quantile(0.99)?,
            Some(5.0),
            &said,
            hits,
        ),
        bench.figure(
            ("hulls.run_pod_sandbox_ratio", "ratio"),
            middle / native_middle,
            Some(0.02),
            &said,
            hits,
        ),
    ])
}
