//! The setting that most integration tests share: the fixture image converted by our converter, in a real registry
//! behind the proxy, a containerd whose CRI uses our snapshotter.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use crate::cri::Cri;
use crate::layout::{LayoutImage, blob_path};
use crate::network::Network;
use crate::proxy::{LinkOptions, Proxy};
use crate::registry::Registry;
use crate::release::Release;
use crate::run::RunDir;
use crate::snapshots::{Snapshots, View, chain_id};
use crate::snapshotter::Snapshotter;
use crate::tree::{self, Tree};
use crate::{fixture, pause, programs, requirements};

const CONVERT_LIMIT: Duration = Duration::from_secs(300);

/// Where images are in the registry.
const REPOSITORY: &str = "test/image";

/// Tag of converted images.
pub const CONVERTED: &str = "esgz";

/// A registry with a plain image and its converted form, behind the proxy.
///
/// Fields are dropped in order: the run last, for it takes everything else away.
pub struct Scenario {
    /// The proxy in front of the registry.
    pub proxy: Proxy,
    /// The registry.
    pub registry: Registry,
    /// The pods' network.
    pub network: Network,
    /// Layout of the plain image.
    pub plain_layout: PathBuf,
    /// The plain image.
    pub plain: LayoutImage,
    /// Tag of the plain image, in its layout and in the registry.
    pub plain_tag: String,
    /// Layout of the converted image.
    pub converted_layout: PathBuf,
    /// The converted image.
    pub converted: LayoutImage,
    /// The run.
    pub run: RunDir,
}

impl Scenario {
    /// The fixture image, over an unshaped link.
    pub async fn fixture() -> Result<Self> {
        let run = Self::prepare()?;
        let layout = run.path().join("fixture");
        let program = pause::compile(&run.directory("pause-program")?)?;
        fixture::build(&layout, &fs::read(&program).context("cannot read the pause program")?)?;
        Self::with_image(run, &layout, fixture::TAG, &[]).await
    }

    /// A run directory, on a machine that has what it takes.
    pub fn prepare() -> Result<RunDir> {
        requirements::check()?;
        RunDir::temporary()
    }

    /// Any image in a layout; `arguments` go to the converter.
    pub async fn with_image(run: RunDir, layout: &Path, tag: &str, arguments: &[&str]) -> Result<Self> {
        let registry = Registry::start(&run, &run.directory("storage")?)?;
        let pause_layout = run.path().join("pause-image");
        pause::build(&pause_layout, run.path())?;
        registry.push(&format!("oci:{}:latest", pause_layout.display()), "pause:latest")?;
        let source = format!("oci:{}:{tag}", layout.display());
        registry.push(&source, &format!("{REPOSITORY}:{tag}"))?;
        let converted_layout = run.path().join("converted");
        let target = format!("oci:{}:{CONVERTED}", converted_layout.display());
        estargz(&run, &[&["convert"], arguments, &[&source, &target]].concat())?;
        registry.push(&target, &format!("{REPOSITORY}:{CONVERTED}"))?;
        let proxy = Proxy::start(registry.address(), LinkOptions::default()).await?;
        let network = Network::create(&run)?;
        let (plain, converted) = (
            LayoutImage::read(layout, tag)?,
            LayoutImage::read(&converted_layout, CONVERTED)?,
        );
        let (plain_layout, plain_tag) = (layout.into(), tag.into());
        Ok(Self {
            proxy,
            registry,
            network,
            plain_layout,
            plain,
            plain_tag,
            converted_layout,
            converted,
            run,
        })
    }

    /// Reference of a tag of the image, through the proxy.
    #[must_use]
    pub fn reference(&self, tag: &str) -> String {
        format!("{}/{REPOSITORY}:{tag}", self.proxy.address())
    }

    /// Reference of the plain image.
    #[must_use]
    pub fn plain_reference(&self) -> String {
        self.reference(&self.plain_tag)
    }

    /// Starts a containerd in the directory `name`.
    pub async fn containerd(&self, name: &str, snapshotter: SnapshotterChoice) -> Result<Containerd> {
        let pause_image = format!("{}/pause:latest", self.registry.address());
        let release = Release::default();
        Containerd::start(
            &self.run,
            &self.network,
            &ContainerdOptions {
                name: name.into(),
                snapshotter,
                pause_image,
                release,
            },
        )
        .await
    }

    /// Starts our snapshotter, and a containerd that uses it.
    pub async fn lazy_node(&self, config: &str) -> Result<Node> {
        let snapshotter = Snapshotter::start(&self.run, "snapshotter", config).await?;
        let containerd = self.containerd("lazy", snapshotter.choice()).await?;
        Node::new(containerd, Some(snapshotter)).await
    }

    /// Starts a containerd with its own overlayfs.
    pub async fn plain_node(&self) -> Result<Node> {
        Node::new(self.containerd("plain", SnapshotterChoice::Overlayfs).await?, None).await
    }

    /// The file of a layer of the converted image.
    #[must_use]
    pub fn converted_blob(&self, digest: &str) -> PathBuf {
        blob_path(&self.converted_layout, digest)
    }
}

/// A containerd with its clients.
pub struct Node {
    /// CRI.
    pub cri: Cri,
    /// Its snapshotter's snapshots.
    pub snapshots: Snapshots,
    /// The daemon.
    pub containerd: Containerd,
    /// Our snapshotter, if it uses it.
    pub snapshotter: Option<Snapshotter>,
}

impl Node {
    async fn new(containerd: Containerd, snapshotter: Option<Snapshotter>) -> Result<Self> {
        let cri = containerd.cri().await?;
        let snapshots = Snapshots::connect(&containerd.socket(), containerd.snapshotter()).await?;
        Ok(Self {
            cri,
            snapshots,
            containerd,
            snapshotter,
        })
    }

    /// Our snapshotter.
    pub fn snapshotter(&mut self) -> Result<&mut Snapshotter> {
        self.snapshotter
            .as_mut()
            .context("this node has no snapshotter of ours")
    }

    /// Mounts a read-only view of a pulled image at `<run>/view-<key>`.
    pub async fn view(&mut self, run: &RunDir, key: &str, image: &LayoutImage) -> Result<View> {
        let target = run.directory(&format!("view-{key}"))?;
        self.snapshots.view(key, &chain_id(&image.diff_ids()), &target).await
    }

    /// The tree of a pulled image.
    pub async fn tree(&mut self, run: &RunDir, key: &str, image: &LayoutImage) -> Result<Tree> {
        let view = self.view(run, key, image).await?;
        let tree = tree::read(view.path())?;
        self.snapshots.remove(view).await?;
        Ok(tree)
    }

    /// Fails unless every layer of `image` is mounted lazily.
    pub fn check_lazy(&mut self, image: &LayoutImage) -> Result<()> {
        let layers = image.layer_digests().len();
        let snapshotter = self.snapshotter()?;
        let mounted = crate::sweep::mounts_below(&snapshotter.root().join("layers"))?.len();
        ensure!(
            mounted == layers,
            "{mounted} layers are mounted, the image has {layers}; log:\n{}",
            snapshotter.process().log_tail()
        );
        snapshotter.check_way()
    }
}

/// Runs our converter to its end; returns its standard output.
pub fn estargz(run: &RunDir, arguments: &[&str]) -> Result<String> {
    let output = run.path().join("estargz.out");
    let mut command = Command::new("sh");
    command
        .args(["-c", "exec \"$@\" > \"$OUTPUT\"", "sh"])
        .arg(programs::find("estargz")?)
        .args(arguments)
        .env("OUTPUT", &output);
    let mut process = run.spawn("estargz", command)?;
    let status = process.wait(CONVERT_LIMIT)?;
    ensure!(
        status.success(),
        "estargz {} failed ({status}); it said:\n{}",
        arguments.join(" "),
        process.log_tail()
    );
    fs::read_to_string(&output).context("cannot read what estargz printed")
}
