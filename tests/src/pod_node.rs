//! The setting of the tests about sandboxes: a containerd of either release with the toolbox image pulled, and our relay
//! in front of it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use hullspeed_proto::cri::v1::{PodSandbox, PodSandboxFilter};

use crate::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use crate::cri::{Cri, Pod};
use crate::network::Network;
use crate::prewarm::{Prewarm, PrewarmOptions};
use crate::registry::Registry;
use crate::release::Release;
use crate::run::RunDir;
use crate::scenario::Scenario;
use crate::{pause, toolbox};

/// The label that marks hulls.
pub const HULL_LABEL: &str = "io.hullspeed.hull";

/// A node.
///
/// Fields are dropped in order: the run last, for it takes everything else away.
pub struct PodNode {
    /// Our relay, once it was started.
    pub prewarm: Option<Prewarm>,
    /// CRI of containerd itself.
    pub native: Cri,
    /// The daemon.
    pub containerd: Containerd,
    /// Reference of the toolbox image, pulled.
    pub image: String,
    /// Where pods log.
    pub logs: PathBuf,
    /// The pods' network.
    pub network: Network,
    /// The registry, which containerd asks no more.
    pub registry: Registry,
    /// The run.
    pub run: RunDir,
}

impl PodNode {
    /// A containerd of this release, without a relay.
    pub async fn start(release: Release) -> Result<Self> {
        let run = Scenario::prepare()?;
        let registry = Registry::start(&run, &run.directory("storage")?)?;
        let layouts = run.directory("layouts")?;
        pause::build(&layouts.join("pause"), run.path())?;
        toolbox::build(&layouts.join("toolbox"), run.path())?;
        for name in ["pause", "toolbox"] {
            let source = format!("oci:{}:latest", layouts.join(name).display());
            registry.push(&source, &format!("{name}:latest"))?;
        }
        let network = Network::create(&run)?;
        let reference = |name: &str| format!("{}/{name}:latest", registry.address());
        let (pause_image, image) = (reference("pause"), reference("toolbox"));
        let options = ContainerdOptions {
            name: "containerd".into(),
            snapshotter: SnapshotterChoice::Overlayfs,
            pause_image: pause_image.clone(),
            release,
        };
        let containerd = Containerd::start(&run, &network, &options).await?;
        let mut native = containerd.cri().await?;
        for image in [&pause_image, &image] {
            native.pull(image).await?;
        }
        Ok(Self {
            prewarm: None,
            native,
            containerd,
            image,
            logs: run.directory("pods")?,
            network,
            registry,
            run,
        })
    }

    /// As [`Self::start`], then the relay with `hulls` hulls ready.
    pub async fn with_hulls(release: Release, hulls: u32) -> Result<Self> {
        let mut node = Self::start(release).await?;
        node.start_prewarm(hulls, "")?;
        node.prewarm()?.wait_for_hulls(hulls).await?;
        Ok(node)
    }

    /// Starts the relay, with more lines of configuration.
    pub fn start_prewarm(&mut self, hulls: u32, extra: &str) -> Result<()> {
        self.start_prewarm_as(PrewarmOptions {
            extra: extra.into(),
            ..PrewarmOptions::new(self.containerd.socket(), Some(hulls))
        })
    }

    /// Starts the relay; one that is there is stopped before.
    pub fn start_prewarm_as(&mut self, options: PrewarmOptions) -> Result<()> {
        if let Some(before) = &mut self.prewarm {
            before.process().stop()?;
        }
        self.prewarm = Some(Prewarm::start(&self.run, &options)?);
        Ok(())
    }

    /// The relay.
    pub fn prewarm(&mut self) -> Result<&mut Prewarm> {
        self.prewarm.as_mut().context("this node has no relay")
    }

    /// Starts the relay again after it ended.
    pub fn start_prewarm_again(&mut self, fault: Option<&str>) -> Result<()> {
        let prewarm = self.prewarm.as_mut().context("this node has no relay")?;
        prewarm.start_again(&self.run, fault)
    }

    /// CRI through the relay.
    pub async fn relayed(&self) -> Result<Cri> {
        self.prewarm.as_ref().context("this node has no relay")?.cri().await
    }

    /// A pod in a cgroup of its own, as a kubelet makes them.
    #[must_use]
    pub fn pod(&self, name: &str) -> Pod {
        let logs = self.logs.join(name);
        Pod::new(name, &logs, &format!("{}/pod-{name}", self.run.names().cgroup))
    }

    /// Runs a pod with a sleeping container by `cri`; returns the ids of both.
    pub async fn run_pod(&self, cri: &mut Cri, pod: &Pod) -> Result<(String, String)> {
        let sandbox = cri.run_sandbox(pod).await?;
        let container = cri.create_container(&sandbox, pod, "main", &self.image).await?;
        cri.start_container(&container).await?;
        Ok((sandbox, container))
    }

    /// The hulls that containerd knows: sandboxes with the mark of one that are no pod's yet.
    pub async fn hulls(&mut self) -> Result<Vec<PodSandbox>> {
        let mut all = self.native.sandboxes(PodSandboxFilter::default()).await?;
        all.retain(|sandbox| sandbox.labels.contains_key(HULL_LABEL));
        Ok(all)
    }

    /// The process ids of a sandbox's first process and of its shim.
    pub async fn processes(&mut self, sandbox: &str) -> Result<(u32, u32)> {
        let status = self.native.sandbox(sandbox).await?;
        let info = status.info.get("info").context("no verbose information")?;
        let info: serde_json::Value = serde_json::from_str(info)?;
        let pid = info["pid"].as_u64().context("no pid in the verbose information")?;
        let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let parent = text
            .lines()
            .find_map(|line| line.strip_prefix("PPid:"))
            .context("no parent")?;
        Ok((pid.try_into()?, parent.trim().parse()?))
    }

    /// containerd's directory of a sandbox's files.
    #[must_use]
    pub fn sandbox_files(&self, sandbox: &str) -> PathBuf {
        let sandboxes = self.containerd.root().join("io.containerd.grpc.v1.cri/sandboxes");
        sandboxes.join(Path::new(sandbox))
    }
}
