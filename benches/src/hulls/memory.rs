//! What a hull costs in memory: its processes, what containerd and our daemon keep of it, and the kernel's share.
//!
//! Neighbours on the machine move MemAvailable by more than a hull weighs, so processes are counted one by one and of the
//! kernel only what cannot be reclaimed.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context as _, Result};
use hullspeed_tests::census;
use hullspeed_tests::prewarm::Prewarm;
use hullspeed_tests::release::Release;
use hullspeed_tests::run::RunDir;

use super::{Bench, REST, relay};
use crate::figure::Figure;

/// Names that processes of a run begin with: containerd and its shims, our daemon (the kernel cuts names short).
const PROGRAMS: [&str; 2] = ["containerd", "hullspeed-prewa"];

/// Kernel memory that namespaces, interfaces, cgroups, mounts and processes take and that cannot be reclaimed.
const KERNEL: [&str; 4] = ["SUnreclaim:", "KernelStack:", "PageTables:", "Percpu:"];

/// KiB by whose they are.
struct Weight {
    processes: f64,
    kernel: f64,
}

/// Weighs `hulls` hulls.
pub(super) async fn measure(run: RunDir, release: Release, hulls: u32) -> Result<Figure> {
    let mut bench = Bench::start(run, release, 1).await?;
    // The first one brings what all share.
    bench.filled(1).await?;
    bench.prewarm.process().stop()?;
    bench.prewarm = Prewarm::start(&bench.run, &relay(&bench.containerd, 1))?;
    bench.filled(1).await?;
    let before = Weight::take(&bench.run).await?;
    bench.prewarm.process().stop()?;
    bench.prewarm = Prewarm::start(&bench.run, &relay(&bench.containerd, hulls + 1))?;
    bench.filled(hulls + 1).await?;
    let after = Weight::take(&bench.run).await?;
    let each = |growth: f64| growth / f64::from(hulls) / 1024.0;
    let (processes, kernel) = (
        each(after.processes - before.processes),
        each(after.kernel - before.kernel),
    );
    let said = format!("growth by hull: processes {processes:.2} MiB (PSS), kernel {kernel:.2} MiB");
    Ok(bench.figure(
        ("hulls.memory_mib_per_hull", "MiB"),
        processes + kernel,
        Some(6.0),
        &said,
        hulls as usize,
    ))
}

impl Weight {
    /// At rest.
    async fn take(run: &RunDir) -> Result<Self> {
        tokio::time::sleep(REST).await;
        let mut pids: BTreeSet<u32> = PROGRAMS
            .iter()
            .flat_map(|name| census::pids(run.path(), name))
            .collect();
        pids.extend(census::hull_processes(run));
        let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
        let kernel = KERNEL.iter().map(|name| kib(&text, name)).sum::<Result<f64>>()?;
        let processes = pids.iter().map(|pid| {
            let path = format!("/proc/{pid}/smaps_rollup");
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            kib(&text, "Pss:")
        });
        Ok(Self {
            processes: processes.sum::<Result<f64>>()?,
            kernel,
        })
    }
}

/// The number of KiB in the line that begins with `name`.
fn kib(text: &str, name: &str) -> Result<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let number = line.and_then(|line| line.trim().strip_suffix("kB")?.trim().parse().ok());
    number.with_context(|| format!("there is no {name} in\n{text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kibibytes_are_read() {
        let text = "Rss:  9 kB\nPss:                1234 kB\nPss_Anon:   7 kB\n";
        assert_eq!(kib(text, "Pss:").unwrap(), 1234.0);
        assert!(kib(text, "Swap:").is_err());
    }
}
