//! What is left behind by pods that came and went.

use anyhow::Result;
use hullspeed_tests::leaks::Count;

use super::Bench;
use crate::figure::Figure;

/// Pods of a round; each is run, every third with a container, and removed.
const ROUND: usize = 20;

/// Runs `cycles` pods through the relay; a leak is anything there is more of afterwards.
pub async fn measure(bench: &mut Bench, cycles: usize) -> Result<Vec<Figure>> {
    // Warm caches, pools of threads and connections are no leak.
    round(bench, 0).await?;
    bench.settle().await?;
    let before = Count::take(&bench.run, &bench.containerd, &bench.prewarm)?;
    let adopted_before = bench.adoptions().await?;
    for number in 1..=cycles.div_ceil(ROUND) {
        round(bench, number).await?;
    }
    bench.settle().await?;
    let adopted = bench.adoptions().await? - adopted_before;
    let after = Count::take(&bench.run, &bench.containerd, &bench.prewarm)?;
    let growth = after.growth_since(&before);
    let said = format!("IPs, netns, mounts, cgroups, shims, fds, memory before and after; {adopted} pods got a hull; {growth}");
    Ok(vec![bench.figure(("hulls.leaks", "count"), growth.leaks() as f64, Some(0.0), &said, cycles)])
}

async fn round(bench: &mut Bench, number: usize) -> Result<()> {
    bench.filled(ROUND).await?;
    let mut sandboxes = Vec::new();
    for index in 0..ROUND {
        let pod = bench.pod(&format!("cycle-{number}-{index}"));
        let sandbox = bench.relay.run_sandbox(&pod).await?;
        if index % 3 == 0 {
            let container = bench.relay.create_container(&sandbox, &pod, "main", &bench.image.clone()).await?;
            bench.relay.start_container(&container).await?;
        }
        sandboxes.push(sandbox);
    }
    for sandbox in sandboxes {
        bench.relay.remove_sandbox(&sandbox).await?;
    }
    Ok(())
}
