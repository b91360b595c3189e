//! What is left behind by pods that came and went.

use anyhow::Result;
use hullspeed_tests::census::{self, Census};

use super::Bench;
use crate::figure::Figure;

/// Pods of a round; each is run, every third with a container, and removed.
const ROUND: u32 = 20;

/// What the daemon's memory and threads may grow by without its being a leak: an allocator's slack, a pool of threads.
/// A byte leaked for each of a thousand pods would have to be four thousand of them to hide below it.
const SLACK: [(&str, u64); 2] = [("resident KiB", 4096), ("threads", 4)];

/// Runs `cycles` pods through the relay; a leak is anything there is more of afterwards.
pub(super) async fn measure(bench: &mut Bench, cycles: usize) -> Result<Figure> {
    // Warm caches, pools of threads and connections are no leak.
    for number in 0..3 {
        round(bench, number).await?;
    }
    let before = count(bench).await?;
    let adopted_before = bench.adoptions().await?;
    let rounds = cycles.div_ceil(ROUND as usize);
    for number in 0..rounds {
        round(bench, number + 3).await?;
    }
    let after = count(bench).await?;
    let adopted = bench.adoptions().await? - adopted_before;
    let grown: Vec<_> = after
        .iter()
        .filter(|(what, count)| **count > before.get(*what).copied().unwrap_or(0) + slack(what))
        .map(|(what, count)| format!("{what}: {} to {count}", before.get(what).copied().unwrap_or(0)))
        .collect();
    let kinds: Vec<_> = after.keys().copied().collect();
    let said = if grown.is_empty() {
        format!("before and after, {adopted} adoptions between: {}", kinds.join(", "))
    } else {
        format!("before and after, {adopted} adoptions between: {}", grown.join(", "))
    };
    let pods = rounds * ROUND as usize;
    Ok(bench.figure(("hulls.leaks", "count"), grown.len() as f64, Some(0.0), &said, pods))
}

fn slack(what: &str) -> u64 {
    let found = SLACK.iter().find(|(name, _)| *name == what);
    found.map_or(0, |(_, slack)| *slack)
}

async fn count(bench: &mut Bench) -> Result<Census> {
    bench.settle().await?;
    let mut census = census::take(&bench.run)?;
    census.extend(census::process(bench.prewarm.process().pid())?);
    Ok(census)
}

async fn round(bench: &mut Bench, number: usize) -> Result<()> {
    bench.filled(ROUND).await?;
    let image = bench.image.clone();
    let mut sandboxes = Vec::new();
    for index in 0..ROUND {
        let pod = bench.pod(&format!("cycle-{number}-{index}"));
        let sandbox = bench.relay.run_sandbox(&pod).await?;
        if index % 3 == 0 {
            let container = bench.relay.create_container(&sandbox, &pod, "main", &image).await?;
            bench.relay.start_container(&container).await?;
        }
        sandboxes.push(sandbox);
    }
    for sandbox in sandboxes {
        bench.relay.remove_sandbox(&sandbox).await?;
    }
    Ok(())
}
