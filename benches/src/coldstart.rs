//! One cold start, measured.
//!
//! What is warm, on purpose, because it is warm on a node at work: the programs (containerd, runc, the shim), the pause
//! image, the registry's memory. What is cold, and checked to be: everything of the image.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use hullspeed_tests::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use hullspeed_tests::cri::{Cri, Pod};
use hullspeed_tests::layout::LayoutImage;
use hullspeed_tests::network::Network;
use hullspeed_tests::prewarm::{Prewarm, PrewarmOptions};
use hullspeed_tests::probe;
use hullspeed_tests::proxy::Proxy;
use hullspeed_tests::registry::Registry;
use hullspeed_tests::release::Release;
use hullspeed_tests::run::{RunDir, remove_tree};
use hullspeed_tests::snapshotter::Snapshotter;
use hullspeed_tests::{demo_image, sweep};

use crate::report::{Mode, Sample};

/// A start that takes longer than this has failed.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// Directories of a round below the run; they are removed after each.
const CONTAINERD: &str = "containerd";
const SNAPSHOTTER: &str = "snapshotter";
const PREWARM: &str = "prewarm";

/// Hulls in the pool when the pod comes.
const HULLS: u32 = 2;

/// What all rounds share.
pub struct Stage<'a> {
    /// The run.
    pub run: &'a RunDir,
    /// The pods' network.
    pub network: Network,
    /// The registry behind the link.
    pub registry: Registry,
    /// The link.
    pub proxy: Proxy,
    /// Reference of the pause image, past the link.
    pub pause: String,
    /// Whether each round's requests are listed on standard error.
    pub list_requests: bool,
}

/// The image of one mode.
pub struct Subject {
    /// Which mode it is for.
    pub mode: Mode,
    /// Its reference, through the link.
    pub reference: String,
    /// Its manifest and configuration.
    pub image: LayoutImage,
}

struct Node {
    prewarm: Option<Prewarm>,
    snapshotter: Option<Snapshotter>,
    containerd: Containerd,
    cri: Cri,
}

/// Runs one round: a fresh node, one start, everything removed again.
pub async fn measure(stage: &Stage<'_>, subject: &Subject, round: u32) -> Result<Sample> {
    sweep::unmount_below(&stage.run.path().join(SNAPSHOTTER))?;
    for name in [CONTAINERD, SNAPSHOTTER, PREWARM] {
        remove_tree(&stage.run.path().join(name))?;
    }
    drop_caches()?;
    stage.registry.warm()?;
    let mut node = start_node(stage, subject.mode).await?;
    check_cold(&mut node, subject).await?;
    // The pause image is a plain one, so some are counted already.
    let fallbacks_before = fallbacks(&node).await?;
    stage.proxy.reset();
    let name = format!("{}-{round}", subject.mode.name());
    let sample = start(stage, &mut node, subject, &name)
        .await
        .with_context(|| format!("round {round} of {}", subject.mode.name()))?;
    if stage.list_requests {
        list_requests(&stage.proxy);
    }
    let fallbacks = fallbacks(&node).await? - fallbacks_before;
    check_honest(&node, subject, &sample, fallbacks).await?;
    if let Some(prewarm) = &mut node.prewarm {
        prewarm.control(&["drain", "--wait"])?;
    }
    node.cri.remove_everything().await?;
    if let Some(prewarm) = &mut node.prewarm {
        prewarm.process().stop()?;
    }
    node.containerd.stop()?;
    if let Some(snapshotter) = &mut node.snapshotter {
        snapshotter.process().stop()?;
    }
    Ok(sample)
}

/// containerd on empty directories, its programs in memory: a first pod of the pause image alone has come and gone.
async fn start_node(stage: &Stage<'_>, mode: Mode) -> Result<Node> {
    let snapshotter = match mode {
        Mode::Overlayfs => None,
        Mode::Hullspeed | Mode::Hulls => Some(Snapshotter::start(stage.run, SNAPSHOTTER, "").await?),
    };
    let choice = snapshotter
        .as_ref()
        .map_or(SnapshotterChoice::Overlayfs, Snapshotter::choice);
    let options = ContainerdOptions {
        name: CONTAINERD.into(),
        snapshotter: choice,
        pause_image: stage.pause.clone(),
        release: Release::default(),
    };
    let containerd = Containerd::start(stage.run, &stage.network, &options).await?;
    let mut cri = containerd.cri().await?;
    cri.pull(&stage.pause).await?;
    let first = Pod::new("warm-up", &stage.run.directory("pods")?, &stage.run.names().cgroup);
    let sandbox = cri.run_sandbox(&first).await?;
    let container = cri.create_container(&sandbox, &first, "pause", &stage.pause).await?;
    cri.start_container(&container).await?;
    cri.remove_container(&container).await?;
    cri.remove_sandbox(&sandbox).await?;
    let prewarm = match mode {
        Mode::Overlayfs | Mode::Hullspeed => None,
        Mode::Hulls => {
            let options = PrewarmOptions {
                name: PREWARM.into(),
                as_shipped: true,
                ..PrewarmOptions::new(containerd.socket(), Some(HULLS))
            };
            let mut prewarm = Prewarm::start(stage.run, &options)?;
            prewarm.wait_for_hulls(HULLS).await?;
            cri = prewarm.cri().await?;
            Some(prewarm)
        }
    };
    Ok(Node {
        prewarm,
        snapshotter,
        containerd,
        cri,
    })
}

/// Nothing of the image is on the node: no record, no blob, no layer.
async fn check_cold(node: &mut Node, subject: &Subject) -> Result<()> {
    ensure!(
        node.cri.image(&subject.reference).await?.is_none(),
        "not cold: containerd knows the image"
    );
    for digest in subject.image.layer_digests() {
        ensure!(
            !node.containerd.has_blob(&digest),
            "not cold: containerd has the layer {digest}"
        );
    }
    if let Some(snapshotter) = &node.snapshotter {
        let layers = snapshotter.root().join("layers");
        let cached = fs::read_dir(&layers).map_or(0, Iterator::count);
        ensure!(cached == 0, "not cold: {cached} layers in {}", layers.display());
    }
    Ok(())
}

/// Does what a kubelet does for a new pod, and asks it until it answers.
async fn start(stage: &Stage<'_>, node: &mut Node, subject: &Subject, name: &str) -> Result<Sample> {
    let pod = Pod::new(name, &stage.run.directory("pods")?, &stage.run.names().cgroup);
    let cri = &mut node.cri;
    let mut clock = Clock::new();
    cri.pull(&subject.reference).await?;
    let pull = clock.lap();
    let sandbox = cri.run_sandbox(&pod).await?;
    let ip = cri.sandbox_ip(&sandbox).await?;
    let sandbox_time = clock.lap();
    let container = cri
        .create_container(&sandbox, &pod, "function", &subject.reference)
        .await?;
    let create = clock.lap();
    cri.start_container(&container).await?;
    let start = clock.lap();
    let answer = probe::first_200(SocketAddr::new(ip, demo_image::PORT), demo_image::PATH, ANSWER_LIMIT).await;
    let first_200 = clock.lap();
    let wire = stage.proxy.totals();
    let body = match answer {
        Ok(body) => String::from_utf8_lossy(&body).into_owned(),
        Err(error) => {
            let log = fs::read_to_string(pod.log("function")).unwrap_or_default();
            bail!("{error:#}; the container's log:\n{log}");
        }
    };
    ensure!(body.contains("\"count\": 7"), "the function answered wrongly: {body}");
    Ok(Sample {
        pull,
        sandbox: sandbox_time,
        create,
        start,
        first_200,
        wire_bytes: wire.wire_bytes(),
        requests: wire.requests,
    })
}

/// Layers that the snapshotter left to containerd to unpack so far.
async fn fallbacks(node: &Node) -> Result<f64> {
    match &node.snapshotter {
        None => Ok(0.0),
        Some(snapshotter) => {
            snapshotter
                .metric("hullspeed_snapshot_prepare_total", &["result=\"fallback\""])
                .await
        }
    }
}

/// The numbers mean what they say: overlayfs moved the whole image, Hullspeed mounted every layer and unpacked none, and
/// the pod got a hull where it should.
async fn check_honest(node: &Node, subject: &Subject, sample: &Sample, fallbacks: f64) -> Result<()> {
    match &node.snapshotter {
        None => {
            let whole = subject.image.compressed_bytes();
            ensure!(
                sample.wire_bytes >= whole,
                "not cold: {} bytes on the wire for an image of {whole}",
                sample.wire_bytes
            );
        }
        Some(snapshotter) => {
            let layers = subject.image.layer_digests();
            let mounted = sweep::mounts_below(&snapshotter.root().join("layers"))?.len();
            ensure!(
                mounted == layers.len(),
                "not lazy: {mounted} layers are mounted, the image has {}",
                layers.len()
            );
            ensure!(fallbacks == 0.0, "not lazy: {fallbacks} layers were unpacked");
        }
    }
    if let Some(prewarm) = &node.prewarm {
        let hits = prewarm.requests("hit").await?;
        ensure!(hits == 1, "not a hull: {hits} pods got one");
    }
    Ok(())
}

/// One line a request, in the order of arrival.
fn list_requests(proxy: &Proxy) {
    for request in proxy.requests() {
        let range = request.range.unwrap_or_default();
        let at = request.at.as_millis();
        eprintln!(
            "{at:>6} ms {} {} {range} {} {} bytes",
            request.method, request.path, request.status, request.body_bytes
        );
    }
}

fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")
}

struct Clock(Instant);

impl Clock {
    fn new() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}
