//! What is left behind by pods that came and went.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use hullspeed_tests::census;

use super::Bench;
use crate::figure::Figure;

/// Pods of a round; each is run, every third with a container, and removed.
const ROUND: u32 = 20;

/// What a daemon's memory and threads may grow by without its being a leak: an allocator's slack, a pool of threads. What
/// of ours hides below it is less than 4 KiB for each of a thousand pods; of containerd, whose collector lets its heap
/// grow to twice of what lives, less than 32 KiB. Descriptors have none.
const SLACK: [(&str, u64); 4] = [
    ("daemon: resident KiB", 4096),
    ("daemon: threads", 4),
    ("containerd: resident KiB", 32 * 1024),
    ("containerd: threads", 8),
];

/// Counts by what is counted, and of whom.
type Counts = BTreeMap<String, u64>;

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
    let pods = rounds * ROUND as usize;
    ensure!(adopted == pods as u64, "{adopted} of {pods} pods got a hull");
    let grown: Vec<_> = after
        .iter()
        .filter(|(what, count)| **count > before.get(*what).copied().unwrap_or(0) + slack(what))
        .map(|(what, count)| format!("{what}: {} to {count}", before.get(what).copied().unwrap_or(0)))
        .collect();
    let kinds: Vec<_> = after.keys().cloned().collect();
    let named = if grown.is_empty() { &kinds } else { &grown };
    let said = format!("before and after, {adopted} adoptions between: {}", named.join(", "));
    Ok(bench.figure(("hulls.leaks", "count"), grown.len() as f64, Some(0.0), &said, pods))
}

fn slack(what: &str) -> u64 {
    let found = SLACK.iter().find(|(name, _)| *name == what);
    found.map_or(0, |(_, slack)| *slack)
}

async fn count(bench: &mut Bench) -> Result<Counts> {
    bench.settle().await?;
    let mut counts: Counts = census::take(&bench.run)?
        .into_iter()
        .map(|(what, count)| (what.to_string(), count))
        .collect();
    let daemons = [
        ("daemon", bench.prewarm.process().pid()),
        ("containerd", bench.containerd.process().pid()),
    ];
    for (name, pid) in daemons {
        let of_process = census::process(pid)?.into_iter();
        counts.extend(of_process.map(|(what, count)| (format!("{name}: {what}"), count)));
    }
    Ok(counts)
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
