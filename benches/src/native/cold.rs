//! Layers of which nothing is there: the way by EROFS against the way by FUSE.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::demo_image::{self, DemoImage};
use hullspeed_tests::lazy::{Published, Source};
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::{RunDir, remove_tree};
use hullspeed_tests::way::Way;

use super::workload::{Done, Workload};
use super::{Amounts, Goal, blocking, drop_caches, figure, node};
use crate::figure::{Figure, median};

/// The large file.
const LARGE: &str = "large";
const LARGE_BYTES: usize = 64 << 20;
const RANDOM_READS: u64 = 1500;

/// The layer of small files.
const SMALL: usize = 4000;
const SMALL_BYTES: usize = 4750;

/// Files that are read of it, in an order that follows nothing.
const SCATTERED: usize = 400;
const STRIDE: usize = 1471;

/// What readers at once read: each takes the next file.
const MANY: usize = 24;
const MANY_BYTES: usize = 2 << 20;
const READERS: usize = 8;

/// The demo's function without its server: an interpreter with the large libraries of a package.
const PROGRAM: &str = "/usr/bin/python3";
const ARGUMENTS: [&str; 2] = [
    "-c",
    "import numpy, json, decimal, jinja2, yaml; print(numpy.arange(10).sum())",
];

const WAYS: [Way; 2] = [Way::Erofs, Way::Fuse];

/// A workload, with its figure and the image that it is done to.
struct Subject {
    figure: &'static str,
    what: &'static str,
    image: fn(&Images) -> &Published,
    workload: fn(&Path, &Path) -> Result<Workload>,
}

const SUBJECTS: [Subject; 6] = [
    Subject {
        figure: "native.erofs_cold_vs_fuse.sequential",
        what: "a file of 64 MiB from front to end",
        image: |images| &images.large,
        workload: |root, _| {
            Ok(Workload::Sequential {
                file: root.join(LARGE),
                passes: 1,
            })
        },
    },
    Subject {
        figure: "native.erofs_cold_vs_fuse.random_4k",
        what: "1500 random reads of 4 KiB of a file of 64 MiB",
        image: |images| &images.large,
        workload: |root, _| {
            Ok(Workload::Random {
                file: root.join(LARGE),
                reads: RANDOM_READS,
            })
        },
    },
    Subject {
        figure: "native.erofs_cold_vs_fuse.scattered_files",
        what: "400 of 4000 files of 4750 bytes, all over the layer, one after the other",
        image: |images| &images.small,
        workload: |root, list| {
            let files = small_files("small", SMALL, SMALL_BYTES);
            let chosen = (0..SCATTERED).map(|number| &files[number * STRIDE % SMALL]);
            of_files(root, list, chosen, 1)
        },
    },
    Subject {
        figure: "native.erofs_cold_vs_fuse.find",
        what: "every directory of 4000 files listed, and lstat of everything",
        image: |images| &images.small,
        workload: |root, _| Ok(Workload::Find { root: root.into() }),
    },
    Subject {
        figure: "native.erofs_cold_vs_fuse.exec",
        what: "python3 of the demo's image imports numpy and others, until it ends",
        image: |images| &images.program,
        workload: |root, _| {
            Ok(Workload::Execute {
                root: root.into(),
                program: PROGRAM.into(),
                arguments: ARGUMENTS.map(str::to_owned).into(),
            })
        },
    },
    Subject {
        figure: "native.erofs_cold_vs_fuse.parallel",
        what: "24 files of 2 MiB by 8 readers at once",
        image: |images| &images.many,
        workload: |root, list| of_files(root, list, &many(), READERS),
    },
];

/// The images, in the registry.
struct Images {
    large: Published,
    small: Published,
    many: Published,
    program: Published,
}

pub(super) async fn measure(run: RunDir, amounts: &Amounts) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::default()).await?;
    let large = ContentFile::new(LARGE, LARGE_BYTES);
    let demo = DemoImage::cached(&source.run, &demo_image::shared_cache()).await?;
    let images = Images {
        large: source.publish("large", &[vec![large]], &[])?,
        small: source.publish("small", &[small_files("small", SMALL, SMALL_BYTES)], &[])?,
        many: source.publish("many", &[many()], &[])?,
        program: source.convert("program", &demo.layout, demo_image::TAG, &[])?,
    };
    let mut figures = Vec::new();
    for subject in &SUBJECTS {
        figures.push(subject.measure(&source, &images, amounts).await?);
    }
    Ok(figures)
}

fn many() -> Vec<ContentFile> {
    let one = |number| ContentFile::new(format!("many/{number:02}"), MANY_BYTES);
    (0..MANY).map(one).collect()
}

/// The workload that reads these files.
fn of_files<'a>(
    root: &Path,
    list: &Path,
    files: impl IntoIterator<Item = &'a ContentFile>,
    readers: usize,
) -> Result<Workload> {
    let text = files.into_iter().fold(String::new(), |mut text, file| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{}", root.join(&file.path).display());
        text
    });
    fs::write(list, text).with_context(|| format!("cannot write {}", list.display()))?;
    Ok(Workload::Files {
        list: list.into(),
        readers,
    })
}

/// One cold run.
struct Sample {
    done: Done,
    /// What the kernel asked meanwhile: events, or requests that were worked on by FUSE.
    asked: f64,
}

impl Subject {
    async fn measure(&self, source: &Source, images: &Images, amounts: &Amounts) -> Result<Figure> {
        let mut samples = [const { Vec::<Sample>::new() }; 2];
        for round in 0..amounts.rounds {
            for step in 0..WAYS.len() {
                let way = (round + step) % WAYS.len();
                samples[way].push(self.sample(source, images, WAYS[way], round).await?);
            }
        }
        let amount = samples[0][0].done.amount;
        ensure!(
            samples.iter().flatten().all(|sample| sample.done.amount == amount),
            "{}: the samples did not do the same",
            self.figure
        );
        let seconds = |way: usize| {
            samples[way]
                .iter()
                .map(|sample| sample.done.seconds)
                .collect::<Vec<_>>()
        };
        let asked = |way: usize| median(&samples[way].iter().map(|sample| sample.asked).collect::<Vec<_>>());
        let (erofs, fuse) = (seconds(0), seconds(1));
        let ratios: Vec<f64> = erofs.iter().zip(&fuse).map(|(erofs, fuse)| erofs / fuse).collect();
        let said = format!(
            "{}: {:.1} ms by EROFS with {:.0} events, {:.1} ms by FUSE with {:.0} requests; the registry on loopback, everything as shipped",
            self.what,
            median(&erofs)? * 1e3,
            asked(0)?,
            median(&fuse)? * 1e3,
            asked(1)?
        );
        Ok(figure(
            (self.figure, "ratio"),
            median(&ratios)?,
            Some(Goal::AtMost(1.0)),
            said,
            amounts.rounds,
        ))
    }

    async fn sample(&self, source: &Source, images: &Images, way: Way, round: usize) -> Result<Sample> {
        let image = (self.image)(images);
        let kind = self.figure.rsplit('.').next().unwrap_or_default();
        let name = format!("cold-{kind}-{}-{round}", way.name());
        let mut node = node(source, &name, way).await?;
        drop_caches()?;
        // It answers from memory, as a busy one does.
        source.registry.warm()?;
        node.mount(image).await?;
        let view = node.container(image, "container").await?;
        let root: PathBuf = view.path().into();
        let workload = (self.workload)(&root, &source.run.path().join("list"))?;
        let done = blocking(move || workload.run_apart()).await?;
        let asked = match way {
            // A sum of nothing is minus zero.
            Way::Erofs => node.snapshotter.metric("hullspeed_native_events_total", &[]).await? + 0.0,
            Way::Fuse => {
                let counted = "hullspeed_fuse_operation_duration_seconds_count";
                node.snapshotter.metric(counted, &[]).await?
            }
        };
        node.snapshots.remove(view).await?;
        node.forget(image).await?;
        let directory = node.snapshotter.root();
        drop(node);
        hullspeed_tests::sweep::unmount_below(&directory)?;
        remove_tree(&directory)?;
        Ok(Sample { done, asked })
    }
}
