//! Complete layers, side by side with the same tree on ext4.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::{LazyNode, Published, Source, stored};
use hullspeed_tests::process;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::snapshots::View;
use hullspeed_tests::way::Way;
use rustix::mount::UnmountFlags;

use super::workload::Workload;
use super::{Amounts, Goal, blocking, drop_caches, figure, node};
use crate::figure::{Figure, median};

/// The large file.
const LARGE: &str = "large";
const LARGE_BYTES: usize = 192 << 20;

/// Small files of each layer, 50 in a directory.
const SMALL: usize = 8000;
const SMALL_BYTES: usize = 700;

/// Files of one directory.
const WIDE: usize = 4000;

/// How often a workload goes over the tree within one sample, so that a sample takes some tenths of a second.
const READ_PASSES: usize = 6;
const STAT_PASSES: usize = 8;
const LIST_PASSES: usize = 12;
const RANDOM_READS: u64 = 250_000;
/// As many are enough where each comes from the disk.
const RANDOM_READS_DISK: u64 = 3000;

/// Rounds with everything on disk alone.
const DISK_ROUNDS: usize = 5;

/// The longest wait until layers are complete and the kernel has been left alone with them.
const COMPLETE_LIMIT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(500);

/// The roots that are compared, the unit first.
const WAYS: [&str; 3] = ["native", "erofs", "fuse"];

/// What is done, and its figures: for EROFS and FUSE, warm and from the disk.
struct Subject {
    workload: fn(&Stage, way: usize, warm: bool) -> Workload,
    what: &'static str,
    warm: [(&'static str, Option<Goal>); 2],
    disk: [&'static str; 2],
}

const SUBJECTS: [Subject; 4] = [
    Subject {
        workload: |stage, way, warm| Workload::Sequential {
            file: stage.roots[way].join(LARGE),
            passes: if warm { READ_PASSES } else { 1 },
        },
        what: "bytes of a file of 192 MiB, from front to end in pieces of 128 KiB",
        warm: [
            ("native.erofs_seq_read", Some(Goal::AtLeast(0.95))),
            ("native.fuse_seq_read", Some(Goal::AtLeast(0.6))),
        ],
        disk: ["native.erofs_seq_read_disk", "native.fuse_seq_read_disk"],
    },
    Subject {
        workload: |stage, way, warm| Workload::Random {
            file: stage.roots[way].join(LARGE),
            reads: if warm { RANDOM_READS } else { RANDOM_READS_DISK },
        },
        what: "reads of random 4 KiB of it",
        warm: [
            ("native.erofs_rand4k", Some(Goal::AtLeast(0.9))),
            ("native.fuse_rand4k", None),
        ],
        disk: ["native.erofs_rand4k_disk", "native.fuse_rand4k_disk"],
    },
    Subject {
        workload: |stage, way, warm| Workload::Stat {
            list: stage.lists[way].clone(),
            passes: if warm { STAT_PASSES } else { 1 },
        },
        what: "lstat of every file, by path",
        warm: [
            ("native.erofs_stat", Some(Goal::AtLeast(0.9))),
            ("native.fuse_stat", Some(Goal::AtLeast(0.5))),
        ],
        disk: ["native.erofs_stat_disk", "native.fuse_stat_disk"],
    },
    Subject {
        workload: |stage, way, warm| Workload::List {
            root: stage.roots[way].clone(),
            passes: if warm { LIST_PASSES } else { 1 },
        },
        what: "entries of every directory, listed without a look at them",
        warm: [
            ("native.erofs_readdir", Some(Goal::AtLeast(0.9))),
            ("native.fuse_readdir", None),
        ],
        disk: ["native.erofs_readdir_disk", "native.fuse_readdir_disk"],
    },
];

pub(super) async fn measure(run: RunDir, amounts: &Amounts) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::default()).await?;
    let layers = layers();
    let image = source.publish("warm", &layers, &[])?;
    let mut erofs = Served::start(&source, &image, Way::Erofs).await?;
    let mut fuse = Served::start(&source, &image, Way::Fuse).await?;
    let native = Native::mount(&source.run.path().join("native"), &layers)?;
    let roots = [native.root.clone(), erofs.path(), fuse.path()];
    let stage = Stage::new(&source.run, roots, &layers)?;
    for served in [&mut erofs, &mut fuse] {
        served.wait_alone(&image, &layers).await?;
    }
    let events = erofs.events().await?;
    let rounds = amounts.rounds;
    let (figures, erofs, fuse) = blocking(move || {
        let mut figures = stage.figures(true, rounds)?;
        figures.extend(stage.figures(false, DISK_ROUNDS)?);
        Ok((figures, erofs, fuse))
    })
    .await?;
    ensure!(
        erofs.events().await? == events,
        "the kernel asked about layers that are complete: the mark was not gone"
    );
    drop(native);
    for served in [erofs, fuse] {
        served.end(&image).await?;
    }
    Ok(figures)
}

fn layers() -> [Vec<ContentFile>; 2] {
    let wide = (0..WIDE).map(|number| ContentFile::new(format!("wide/f{number:05}"), 64));
    let mut lower = vec![ContentFile::new(LARGE, LARGE_BYTES)];
    lower.extend(small_files("lower", SMALL, SMALL_BYTES));
    lower.extend(wide);
    [lower, small_files("upper", SMALL, SMALL_BYTES)]
}

/// A snapshotter and a container's root of the image on it.
struct Served {
    node: LazyNode,
    view: View,
}

impl Served {
    async fn start(source: &Source, image: &Published, way: Way) -> Result<Self> {
        let mut node = node(source, &format!("warm-{}", way.name()), way).await?;
        node.mount(image).await?;
        let view = node.container(image, "container").await?;
        Ok(Self { node, view })
    }

    fn path(&self) -> PathBuf {
        self.view.path().to_path_buf()
    }

    async fn events(&self) -> Result<f64> {
        self.node.snapshotter.metric("hullspeed_native_events_total", &[]).await
    }

    /// Waits until every layer is complete and no mark is left.
    async fn wait_alone(&mut self, image: &Published, layers: &[Vec<ContentFile>]) -> Result<()> {
        let end = Instant::now() + COMPLETE_LIMIT;
        loop {
            let mut complete = !self.is_asked()?;
            for (number, files) in layers.iter().enumerate() {
                let stored = stored(&self.node.cache(image, number)?, files)?;
                ensure!(stored.wrong == 0, "the cache is wrong: {stored:?}");
                complete &= stored.absent == 0;
            }
            if complete {
                return Ok(());
            }
            ensure!(
                Instant::now() < end,
                "the layers are not complete, or asked about, after {COMPLETE_LIMIT:?}"
            );
            tokio::time::sleep(POLL).await;
        }
    }

    /// Whether the kernel has a mark of the daemon.
    fn is_asked(&mut self) -> Result<bool> {
        let path = format!("/proc/{}/fdinfo", self.node.snapshotter.process().pid());
        for entry in fs::read_dir(&path).with_context(|| format!("cannot list {path}"))? {
            // Descriptors come and go.
            let text = fs::read_to_string(entry?.path()).unwrap_or_default();
            if text.contains("fanotify ino:") {
                return Ok(true);
            }
        }
        Ok(false)
    }

    async fn end(mut self, image: &Published) -> Result<()> {
        self.node.snapshots.remove(self.view).await?;
        self.node.forget(image).await
    }
}

/// The tree on ext4, below an overlay as containerd's overlayfs mounts it. Dropping it unmounts.
struct Native {
    root: PathBuf,
}

impl Native {
    fn mount(directory: &Path, layers: &[Vec<ContentFile>]) -> Result<Self> {
        let place = |name: &str| -> Result<PathBuf> {
            let path = directory.join(name);
            fs::create_dir_all(&path).with_context(|| format!("cannot create {}", path.display()))?;
            Ok(path)
        };
        let mut lower = Vec::new();
        for (number, files) in layers.iter().enumerate() {
            let layer = place(&number.to_string())?;
            for file in files {
                let path = layer.join(&file.path);
                if let Some(parent) = path.parent() {
                    fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
                }
                fs::write(&path, file.content()).with_context(|| format!("cannot write {}", path.display()))?;
            }
            lower.insert(0, layer.display().to_string());
        }
        let (upper, work, root) = (place("upper")?, place("work")?, place("root")?);
        let options = format!(
            "index=off,workdir={},upperdir={},lowerdir={}",
            work.display(),
            upper.display(),
            lower.join(":")
        );
        let mut command = Command::new("mount");
        command.args(["-t", "overlay", "-o", &options, "overlay"]).arg(&root);
        process::output(&mut command)?;
        Ok(Self { root })
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // The run takes away what is left.
        let _ = rustix::mount::unmount(&self.root, UnmountFlags::DETACH);
    }
}

/// What the workloads are done to, by way.
struct Stage {
    roots: [PathBuf; 3],
    lists: [PathBuf; 3],
}

impl Stage {
    fn new(run: &RunDir, roots: [PathBuf; 3], layers: &[Vec<ContentFile>]) -> Result<Self> {
        let directory = run.directory("lists")?;
        let lists = WAYS.map(|way| directory.join(way));
        for (list, root) in lists.iter().zip(&roots) {
            let mut text = String::new();
            for file in layers.iter().flatten() {
                // Writing to a String cannot fail.
                let _ = writeln!(text, "{}", root.join(&file.path).display());
            }
            fs::write(list, text).with_context(|| format!("cannot write {}", list.display()))?;
        }
        Ok(Self { roots, lists })
    }

    /// Every workload on every way, in turn; the ratios to the unit are those of the same round.
    fn figures(&self, warm: bool, rounds: usize) -> Result<Vec<Figure>> {
        let mut figures = Vec::new();
        // What was written just now is in the page cache in larger pieces than what was read; all three are to have it from reading.
        drop_caches()?;
        for subject in &SUBJECTS {
            // The first pass fills the caches.
            for way in 0..WAYS.len() {
                (subject.workload)(self, way, warm).run_apart()?;
            }
            let mut rates = [const { Vec::new() }; 3];
            for round in 0..rounds {
                for step in 0..WAYS.len() {
                    let way = (round + step) % WAYS.len();
                    if !warm {
                        drop_caches()?;
                    }
                    rates[way].push((subject.workload)(self, way, warm).run_apart()?);
                }
            }
            let amount = rates[0][0].amount;
            ensure!(
                rates.iter().flatten().all(|done| done.amount == amount),
                "the trees are not the same: {rates:?}"
            );
            let rate = |way: usize| rates[way].iter().map(|done| done.rate()).collect::<Vec<_>>();
            let unit = rate(0);
            for (way, by) in WAYS.iter().enumerate().skip(1) {
                let own = rate(way);
                let ratios: Vec<f64> = own.iter().zip(&unit).map(|(own, unit)| own / unit).collect();
                let (name, goal) = if warm {
                    subject.warm[way - 1]
                } else {
                    (subject.disk[way - 1], None)
                };
                let state = if warm {
                    "everything in the page cache and known to the kernel"
                } else {
                    "caches dropped, everything on disk"
                };
                let said = format!(
                    "{}, per second: {:.0} by {}, {:.0} by overlayfs on ext4; {state}",
                    subject.what,
                    median(&own)?,
                    by,
                    median(&unit)?
                );
                figures.push(figure((name, "ratio"), median(&ratios)?, goal, said, rounds));
            }
        }
        Ok(figures)
    }
}
