//! `AREA=hulls`: what a pod hull saves and what it costs, on a real containerd of each line, with our own daemon in front.
//!
//! Native and relayed calls go to the same containerd and alternate, so a busy machine slows both. Each part brings the
//! pool to the level it needs first; docs/benchmarks.md says what each figure is.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hullspeed_tests::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use hullspeed_tests::cri::{Cri, Pod};
use hullspeed_tests::network::Network;
use hullspeed_tests::pause;
use hullspeed_tests::prewarm::{Prewarm, PrewarmOptions};
use hullspeed_tests::registry::Registry;
use hullspeed_tests::release::Release;
use hullspeed_tests::run::RunDir;

use crate::figure::{Figure, Side};

mod burst;
mod hits;
mod leaks;
mod memory;
mod overhead;

/// Hulls that the pool is brought to before a batch of pods.
pub const BATCH: u32 = 25;

/// Time for daemons and kernel to come to rest.
const REST: Duration = Duration::from_secs(3);

/// How many samples each part takes.
#[derive(Debug, Clone)]
pub struct Amounts {
    /// Adoptions timed.
    pub hits: usize,
    /// Bursts of each kind.
    pub bursts: usize,
    /// Pass-through calls of each kind.
    pub calls: usize,
    /// Hulls weighed.
    pub hulls: u32,
    /// Pods that come and go before leaks are counted.
    pub cycles: usize,
}

/// A containerd with our relay in front of it.
///
/// Fields are dropped in order: the run last, for it takes everything else away.
pub struct Bench {
    /// A client of containerd itself.
    pub native: Cri,
    /// A client of the relay.
    pub relay: Cri,
    /// Our daemon.
    pub prewarm: Prewarm,
    /// containerd.
    pub containerd: Containerd,
    /// Its version.
    pub version: String,
    /// The pods' network.
    pub network: Network,
    /// Reference of the pause image, which serves as the pods' image, too.
    pub image: String,
    logs: PathBuf,
    _registry: Registry,
    /// The run.
    pub run: RunDir,
}

impl Bench {
    /// Starts everything; the pool keeps `hulls` hulls.
    pub async fn start(run: RunDir, release: Release, hulls: u32) -> Result<Self> {
        let registry = Registry::start(&run, &run.directory("storage")?)?;
        let layout = run.path().join("pause");
        pause::build(&layout, run.path())?;
        registry.push(&format!("oci:{}:latest", layout.display()), "pause:latest")?;
        let image = format!("{}/pause:latest", registry.address());
        let network = Network::create(&run)?;
        let options = ContainerdOptions {
            name: "containerd".into(),
            snapshotter: SnapshotterChoice::Overlayfs,
            pause_image: image.clone(),
            release,
        };
        let containerd = Containerd::start(&run, &network, &options).await?;
        let mut native = containerd.cri().await?;
        let version = native.version().await?;
        native.pull(&image).await?;
        let prewarm = Prewarm::start(&run, &relay(&containerd, hulls))?;
        let relay = prewarm.cri().await?;
        let logs = run.directory("pods")?;
        Ok(Self {
            native,
            relay,
            prewarm,
            containerd,
            version,
            network,
            image,
            logs,
            _registry: registry,
            run,
        })
    }

    /// A pod as an ordinary Deployment's.
    pub fn pod(&self, name: &str) -> Pod {
        Pod::new(name, &self.logs, &self.run.names().cgroup)
    }

    /// Waits until at least `count` hulls are ready.
    pub async fn filled(&mut self, count: u32) -> Result<()> {
        self.prewarm.wait_for_hulls(count).await
    }

    /// Waits until the pool is at its level and nothing is under way.
    pub async fn settle(&mut self) -> Result<()> {
        self.filled(BATCH).await?;
        tokio::time::sleep(REST).await;
        Ok(())
    }

    /// Adoptions so far.
    pub async fn adoptions(&self) -> Result<u64> {
        self.prewarm.requests("hit").await
    }

    /// A figure of this containerd.
    pub fn figure(
        &self,
        (figure, unit): (&'static str, &'static str),
        value: f64,
        bound: Option<f64>,
        against: &str,
        n: usize,
    ) -> Figure {
        Figure {
            figure,
            value: crate::figure::rounded(value),
            unit,
            against: against.into(),
            n,
            containerd: Some(self.version.clone()),
            bound,
            side: Side::AtMost,
        }
    }
}

/// Our daemon in front of `containerd`, with this many hulls.
fn relay(containerd: &Containerd, hulls: u32) -> PrewarmOptions {
    PrewarmOptions {
        as_shipped: true,
        ..PrewarmOptions::new(containerd.socket(), Some(hulls))
    }
}

/// Measures everything on one containerd; `report` gets each figure as soon as it is there.
pub async fn measure(
    open_run: impl Fn() -> Result<RunDir>,
    release: Release,
    amounts: &Amounts,
    mut report: impl FnMut(Figure) -> Result<()>,
) -> Result<()> {
    let mut bench = Bench::start(open_run()?, release, BATCH).await?;
    let version = bench.version.clone();
    let said = |part: &str| format!("{part} on {version}");
    for figure in hits::measure(&mut bench, amounts.hits)
        .await
        .with_context(|| said("hits"))?
    {
        report(figure)?;
    }
    report(
        burst::measure(&mut bench, amounts.bursts)
            .await
            .with_context(|| said("bursts"))?,
    )?;
    report(
        overhead::measure(&mut bench, amounts.calls)
            .await
            .with_context(|| said("overhead"))?,
    )?;
    report(
        leaks::measure(&mut bench, amounts.cycles)
            .await
            .with_context(|| said("leaks"))?,
    )?;
    drop(bench);
    report(
        memory::measure(open_run()?, release, amounts.hulls)
            .await
            .with_context(|| said("memory"))?,
    )
}
