//! Ten pods at once: when does the last one's container run?

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::cri::{Cri, Pod};
use tokio::task::JoinSet;

use super::{BATCH, Bench};
use crate::figure::{Figure, Times};

/// Pods of a burst.
const PODS: usize = 10;

/// Runs `rounds` bursts of each kind, in turn.
pub(super) async fn measure(bench: &mut Bench, rounds: usize) -> Result<Figure> {
    let (mut native, mut adopted) = (Times::default(), Times::default());
    for round in 0..rounds {
        bench.filled(BATCH).await?;
        native.push(burst(bench, &bench.native.clone(), &format!("burst-native-{round}")).await?);
        bench.filled(BATCH).await?;
        let before = bench.adoptions().await?;
        adopted.push(burst(bench, &bench.relay.clone(), &format!("burst-hull-{round}")).await?);
        let made = bench.adoptions().await? - before;
        ensure!(made == PODS as u64, "{made} of {PODS} pods of a burst got a hull");
    }
    let (ours, theirs) = (adopted.median()?, native.median()?);
    let said = format!("last of {PODS} containers started after {ours:.0} ms, native {theirs:.0} ms");
    Ok(bench.figure(
        ("hulls.burst10_last_started_ratio", "ratio"),
        ours / theirs,
        Some(0.55),
        &said,
        rounds,
    ))
}

async fn burst(bench: &Bench, cri: &Cri, name: &str) -> Result<Duration> {
    let pods: Vec<Pod> = (0..PODS).map(|number| bench.pod(&format!("{name}-{number}"))).collect();
    let begin = Instant::now();
    let mut starts = JoinSet::new();
    for pod in pods {
        starts.spawn(start(cri.clone(), pod, bench.image.clone()));
    }
    let mut sandboxes = Vec::new();
    let mut last = Duration::ZERO;
    while let Some(started) = starts.join_next().await {
        let (sandbox, at) = started.context("a start panicked")??;
        last = last.max(at.duration_since(begin));
        sandboxes.push(sandbox);
    }
    for sandbox in sandboxes {
        cri.clone().remove_sandbox(&sandbox).await?;
    }
    Ok(last)
}

async fn start(mut cri: Cri, pod: Pod, image: String) -> Result<(String, Instant)> {
    let sandbox = cri.run_sandbox(&pod).await?;
    let container = cri.create_container(&sandbox, &pod, "main", &image).await?;
    cri.start_container(&container).await?;
    Ok((sandbox, Instant::now()))
}
