//! Images mounted by the snapshotter alone, asked over its socket as containerd asks: for the tests and figures of the
//! fetch engine, which need no containers.

use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context as _, Result, ensure};
use estargz::index::LayerIndex;
use serde_json::Value;

use crate::content::{self, ContentFile};
use crate::layout::LayoutImage;
use crate::proxy::{LinkOptions, Proxy};
use crate::registry::Registry;
use crate::run::RunDir;
use crate::scenario::{CONVERTED, estargz};
use crate::snapshots::{Snapshots, View, chain_id};
use crate::snapshotter::Snapshotter;
use crate::unasked;
use crate::way::Way;

/// Annotations with this prefix are handed to the snapshotter as labels.
const INHERITED_PREFIX: &str = "containerd.io/snapshot/";

/// No reader of a test waits longer: several times the deadlines that tests configure.
const READ_LIMIT: Duration = Duration::from_secs(60);

/// A registry behind a proxy.
///
/// Fields are dropped in order: the run last, for it takes everything else away.
pub struct Source {
    /// The proxy in front of the registry.
    pub proxy: Proxy,
    /// The registry.
    pub registry: Registry,
    /// The run.
    pub run: RunDir,
}

/// An image in the registry.
#[derive(Debug, Clone)]
pub struct Published {
    /// `repository:tag`.
    pub name: String,
    /// The converted image.
    pub image: LayoutImage,
    /// Its layout.
    pub layout: PathBuf,
}

impl Published {
    /// Digest of the blob of layer `number`.
    pub fn layer(&self, number: usize) -> Result<String> {
        let digests = self.image.layer_digests();
        digests.get(number).cloned().context("the image has no such layer")
    }

    /// Size of the blob of layer `number`.
    pub fn blob_size(&self, number: usize) -> Result<u64> {
        let layers = self.image.layers();
        let size = layers.get(number).and_then(|layer| layer["size"].as_u64());
        size.context("the image has no such layer")
    }

    /// TOC digest of layer `number`.
    pub fn toc_digest(&self, number: usize) -> Result<String> {
        let layers = self.image.layers();
        let digest = layers
            .get(number)
            .and_then(|layer| layer["annotations"][estargz::toc::TOC_DIGEST_ANNOTATION].as_str());
        Ok(digest.context("the layer has no TOC digest")?.to_owned())
    }
}

impl Source {
    /// Starts registry and proxy.
    pub async fn start(run: RunDir, link: LinkOptions) -> Result<Self> {
        let registry = Registry::start(&run, &run.directory("storage")?)?;
        let proxy = Proxy::start(registry.address(), link).await?;
        Ok(Self { proxy, registry, run })
    }

    /// Another proxy in front of the same registry: a mirror, or the store behind redirects.
    pub async fn mirror(&self, link: LinkOptions) -> Result<Proxy> {
        Proxy::start(self.registry.address(), link).await
    }

    /// Makes, converts and pushes an image of these layers; `arguments` go to the converter.
    pub fn publish(&self, name: &str, layers: &[Vec<ContentFile>], arguments: &[&str]) -> Result<Published> {
        let plain = self.run.path().join("plain").join(name);
        content::build(&plain, layers, None)?;
        let published = self.convert(name, &plain, content::TAG, arguments)?;
        fs::remove_dir_all(&plain).with_context(|| format!("cannot remove {}", plain.display()))?;
        Ok(published)
    }

    /// Converts an image in a layout, and pushes it as `name`.
    pub fn convert(&self, name: &str, layout: &Path, tag: &str, arguments: &[&str]) -> Result<Published> {
        let converted = self.run.directory("converted")?.join(name);
        let source = format!("oci:{}:{tag}", layout.display());
        let target = format!("oci:{}:{CONVERTED}", converted.display());
        estargz(&self.run, &[&["convert"], arguments, &[&source, &target]].concat())?;
        let name = format!("fetch/{name}:{CONVERTED}");
        self.registry.push(&target, &name)?;
        Ok(Published {
            name,
            image: LayoutImage::read(&converted, CONVERTED)?,
            layout: converted,
        })
    }

    /// A snapshotter that mounts images from here; `config` is appended to its configuration.
    pub async fn node(&self, name: &str, config: &str) -> Result<LazyNode> {
        LazyNode::start(&self.run, name, self.proxy.address(), config).await
    }

    /// As [`Self::node`], under a keeper on either way: a killed daemon comes back by itself, and mounts go on.
    pub async fn kept_node(&self, name: &str, config: &str) -> Result<LazyNode> {
        let snapshotter = Snapshotter::start_kept(&self.run, name, config).await?;
        LazyNode::with(&self.run, name, self.proxy.address(), snapshotter).await
    }
}

/// A snapshotter without a containerd.
pub struct LazyNode {
    /// Its service.
    pub snapshots: Snapshots,
    /// The daemon.
    pub snapshotter: Snapshotter,
    host: SocketAddr,
    views: PathBuf,
}

impl LazyNode {
    /// Starts a daemon in `<run>/<name>` that gets its images from `host`.
    pub async fn start(run: &RunDir, name: &str, host: SocketAddr, config: &str) -> Result<Self> {
        Self::start_on(run, name, host, config, Way::of_this_run()?).await
    }

    /// As [`Self::start`], on a way that the caller names.
    pub async fn start_on(run: &RunDir, name: &str, host: SocketAddr, config: &str, way: Way) -> Result<Self> {
        let snapshotter = Snapshotter::start_with(run, name, config, way, way.needs_keeper()).await?;
        Self::with(run, name, host, snapshotter).await
    }

    async fn with(run: &RunDir, name: &str, host: SocketAddr, snapshotter: Snapshotter) -> Result<Self> {
        let snapshots = Snapshots::connect(&snapshotter.socket(), "").await?;
        let views = run.directory(&format!("{name}-views"))?;
        Ok(Self {
            snapshots,
            snapshotter,
            host,
            views,
        })
    }

    /// Starts the daemon again after it was stopped or killed.
    pub async fn start_again(&mut self, run: &RunDir) -> Result<()> {
        self.snapshotter.start_again(run).await?;
        self.snapshots = Snapshots::connect(&self.snapshotter.socket(), "").await?;
        Ok(())
    }

    /// Waits for the daemon that its keeper starts again.
    pub async fn wait_again(&mut self) -> Result<()> {
        self.snapshotter
            .process()
            .kept()
            .context("there is no keeper")?
            .find()?;
        self.snapshotter.wait_ready()?;
        self.snapshots = Snapshots::connect(&self.snapshotter.socket(), "").await?;
        Ok(())
    }

    /// SIGKILL, whatever the daemon is at; its keeper starts another one. Whether it was there: it may not be just now.
    pub fn kill(&mut self) -> bool {
        let running = self.snapshotter.process().kept().and_then(|kept| kept.running());
        running.is_some_and(|pid| crate::process::kill(pid).is_ok())
    }

    /// Where it gets its images from.
    #[must_use]
    pub fn host(&self) -> SocketAddr {
        self.host
    }

    /// Reference of an image.
    #[must_use]
    pub fn reference(&self, image: &Published) -> String {
        format!("{}/{}", self.host, image.name)
    }

    /// Offers every layer of an image as containerd does on a pull, lowest first; fails unless all are mounted lazily, on
    /// the way of this daemon.
    pub async fn mount(&mut self, image: &Published) -> Result<()> {
        self.mount_somehow(image).await?;
        self.snapshotter.check_way()
    }

    /// As [`Self::mount`], on any way: a layer that may have to give something up is never mounted natively.
    pub async fn mount_somehow(&mut self, image: &Published) -> Result<()> {
        let (layers, diff_ids) = (image.image.layers(), image.image.diff_ids());
        for number in 0..layers.len() {
            let (below, chain) = (chain_id(&diff_ids[..number]), chain_id(&diff_ids[..=number]));
            let labels = self.labels(image, number);
            let lazy = self.snapshots.offer(&chain, &below, labels).await?;
            ensure!(
                lazy,
                "layer {number} of {} is not lazy; log:\n{}",
                image.name,
                self.snapshotter.process().log_tail()
            );
        }
        Ok(())
    }

    /// What CRI tells of a layer.
    fn labels(&self, image: &Published, number: usize) -> Vec<(String, String)> {
        let layers = image.image.layers();
        let digests = image.image.layer_digests();
        let cri = |name: &str| format!("{INHERITED_PREFIX}cri.{name}");
        let mut labels = vec![
            (cri("image-ref"), self.reference(image)),
            (cri("manifest-digest"), image.image.manifest_digest.clone()),
            (cri("layer-digest"), digests[number].clone()),
            (cri("image-layers"), digests[number..].join(",")),
        ];
        let annotations = layers[number]["annotations"].as_object();
        let texts = annotations
            .into_iter()
            .flatten()
            .filter_map(|(key, value): (&String, &Value)| Some((key.clone(), value.as_str()?.to_owned())));
        labels.extend(texts.filter(|(key, _)| key.starts_with(INHERITED_PREFIX)));
        labels
    }

    /// Mounts a read-only view of an image whose layers are mounted.
    pub async fn view(&mut self, image: &Published, key: &str) -> Result<View> {
        let chain = chain_id(&image.image.diff_ids());
        self.snapshots.view(key, &chain, &self.views.join(key)).await
    }

    /// Mounts what a container of the image would have as its root, to be written to.
    pub async fn container(&mut self, image: &Published, key: &str) -> Result<View> {
        let chain = chain_id(&image.image.diff_ids());
        self.snapshots.container(key, &chain, &self.views.join(key)).await
    }

    /// Removes an image's snapshots, top first. Its views have to be gone.
    pub async fn forget(&mut self, image: &Published) -> Result<()> {
        let diff_ids = image.image.diff_ids();
        for number in (0..diff_ids.len()).rev() {
            self.snapshots.remove_key(&chain_id(&diff_ids[..=number])).await?;
        }
        Ok(())
    }

    /// The cache directory of layer `number` of an image.
    pub fn cache(&self, image: &Published, number: usize) -> Result<PathBuf> {
        Ok(self.snapshotter.layer(&image.toc_digest(number)?))
    }
}

/// Reads these files below `root` on a thread of its own, each as far as it goes; a reader that hangs is an error.
pub async fn read_all(root: &Path, files: &[ContentFile]) -> Result<Vec<io::Result<Vec<u8>>>> {
    let paths: Vec<PathBuf> = files.iter().map(|file| root.join(&file.path)).collect();
    let reading = tokio::task::spawn_blocking(move || paths.iter().map(fs::read).collect());
    let done = tokio::time::timeout(READ_LIMIT, reading).await;
    done.with_context(|| format!("a reader hangs: no answer within {READ_LIMIT:?}"))?
        .context("a reader panicked")
}

/// Fails unless these files below `root` can be read and are right.
pub async fn check_all(root: &Path, files: &[ContentFile]) -> Result<()> {
    for (file, read) in files.iter().zip(read_all(root, files).await?) {
        let read = read.with_context(|| format!("cannot read {}", file.path))?;
        ensure!(read == file.content(), "{} is read wrongly", file.path);
    }
    Ok(())
}

/// How the content of a layer's files is in its cache directory, looked at from outside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stored {
    /// Chunks that are there and right.
    pub right: usize,
    /// Chunks of which nothing is there.
    pub absent: usize,
    /// Chunks that are neither: torn or wrong.
    pub wrong: usize,
}

/// Compares the cache directory of a layer with what its files are. `files` may be some of the layer's; none may be
/// empty or all zeros.
pub fn stored(cache: &Path, files: &[ContentFile]) -> Result<Stored> {
    let index = fs::read(cache.join("index")).context("cannot read a layer's index")?;
    let index = LayerIndex::open(index).map_err(|error| anyhow::anyhow!("{error}"))?;
    let data = unasked::open(&cache.join("data"))?;
    let mut found = Stored::default();
    for file in files {
        let names = file.path.split('/');
        let ino = names
            .into_iter()
            .try_fold(1, |ino, name| index.lookup(ino, name.as_bytes()));
        let ino = ino.with_context(|| format!("{} is not in the layer", file.path))?;
        let content = file.content();
        for chunk in index.chunks_in(ino, 0..content.len() as u64) {
            let chunk = index.chunk(chunk).context("a chunk that is not in the index")?;
            let begin = usize::try_from(chunk.file_offset)?;
            let mut bytes = vec![0; usize::try_from(chunk.size)?];
            data.read_exact_at(&mut bytes, chunk.data_offset)
                .with_context(|| format!("cannot read {} in {}", file.path, cache.display()))?;
            if bytes == content[begin..begin + bytes.len()] {
                found.right += 1;
            } else if bytes.iter().all(|&byte| byte == 0) {
                found.absent += 1;
            } else {
                found.wrong += 1;
            }
        }
    }
    Ok(found)
}
