//! The whole demo: image, conversion, registry, link, alternating rounds, report.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use hullspeed_tests::demo_image::{self, DemoImage};
use hullspeed_tests::layout::LayoutImage;
use hullspeed_tests::network::Network;
use hullspeed_tests::proxy::{LinkOptions, Proxy};
use hullspeed_tests::registry::Registry;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::{pause, programs};

use crate::coldstart::{self, Stage, Subject};
use crate::report::{Medians, Mode, Modes, Report, Sample, table};

const CONVERT_LIMIT: Duration = Duration::from_secs(300);

/// The repository of the demo's images.
const REPOSITORY: &str = "demo/function";

/// Tag of the converted image, in layouts and in the registry.
const CONVERTED: &str = "esgz";

/// The figures, in the demo's directory.
const RESULT: &str = "result.json";

/// What to run.
#[derive(Debug, Clone)]
pub struct DemoOptions {
    /// Directory of the image cache and of result.json.
    pub directory: PathBuf,
    /// Rounds of each mode.
    pub rounds: u32,
    /// One mode alone.
    pub only: Option<Mode>,
    /// Whether each round's requests are listed on standard error.
    pub list_requests: bool,
}

/// Runs the demo in `run`; prints the table on standard output and progress on standard error. Fails, with the table
/// printed and result.json written, when the figures miss a promise ([`Report::missed`]).
pub async fn run(run: &RunDir, options: &DemoOptions) -> Result<()> {
    remove_result(&options.directory)?;
    let modes: Vec<Mode> = Mode::ALL
        .into_iter()
        .filter(|mode| options.only.is_none_or(|only| only == *mode))
        .collect();
    eprintln!("image: Debian with python3, packages and a function (a minute at first, then cached)");
    let image = DemoImage::cached(run, &options.directory).await?;
    let stage = stage(run, options.list_requests).await?;
    let mut subjects = Vec::new();
    for mode in modes {
        subjects.push(subject(run, &stage, &image, mode)?);
    }
    let compressed = image.read()?.compressed_bytes();
    describe(&stage, &image, compressed)?;
    let mut samples = vec![Vec::new(); subjects.len()];
    for round in 1..=options.rounds {
        for (subject, samples) in subjects.iter().zip(&mut samples) {
            let sample = coldstart::measure(&stage, subject, round).await?;
            eprintln!(
                "round {round}/{} {}: {}",
                options.rounds,
                subject.mode.name(),
                line(&sample)
            );
            samples.push(sample);
        }
    }
    publish(&subjects, &samples, compressed, &options.directory)
}

/// Removes the figures of an earlier demo, so that those of a demo that fails are not taken for its own.
fn remove_result(directory: &Path) -> Result<()> {
    let path = directory.join(RESULT);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn line(sample: &Sample) -> String {
    let ms = |phase: Duration| phase.as_millis();
    format!(
        "{} ms (pull {}, sandbox {}, create {}, start {}, first 200 {}), {:.1} MB in {} requests",
        ms(sample.total()),
        ms(sample.pull),
        ms(sample.sandbox),
        ms(sample.create),
        ms(sample.start),
        ms(sample.first_200),
        sample.wire_bytes as f64 / 1e6,
        sample.requests,
    )
}

/// The registry with the pause image, the link in front of it, the pods' network.
async fn stage(run: &RunDir, list_requests: bool) -> Result<Stage<'_>> {
    let storage = run.directory("storage")?;
    let registry = Registry::start(run, &storage)?;
    let pause_layout = run.path().join("pause");
    pause::build(&pause_layout, run.path())?;
    registry.push(&format!("oci:{}:latest", pause_layout.display()), "pause:latest")?;
    let proxy = Proxy::start(registry.address(), LinkOptions::WIDE_AREA).await?;
    let pause = format!("{}/pause:latest", registry.address());
    Ok(Stage {
        run,
        network: Network::create(run)?,
        registry,
        proxy,
        pause,
        list_requests,
    })
}

/// Puts a mode's image into the registry.
fn subject(run: &RunDir, stage: &Stage<'_>, image: &DemoImage, mode: Mode) -> Result<Subject> {
    let (source, tag, read) = match mode {
        Mode::Overlayfs => (image.source(), demo_image::TAG, image.read()?),
        Mode::Hullspeed | Mode::Hulls => {
            let layout = converted(run, image)?;
            (
                format!("oci:{}:{CONVERTED}", layout.display()),
                CONVERTED,
                LayoutImage::read(&layout, CONVERTED)?,
            )
        }
    };
    stage.registry.push(&source, &format!("{REPOSITORY}:{tag}"))?;
    Ok(Subject {
        mode,
        reference: format!("{}/{REPOSITORY}:{tag}", stage.proxy.address()),
        image: read,
    })
}

/// The image converted by our converter, what the function reads first in front; once for all modes.
fn converted(run: &RunDir, image: &DemoImage) -> Result<PathBuf> {
    let layout = run.path().join("converted");
    if layout.exists() {
        return Ok(layout);
    }
    let mut command = Command::new(programs::find("estargz")?);
    command
        .arg("convert")
        .arg("--prioritize")
        .arg(&image.access)
        .arg(image.source());
    command.arg(format!("oci:{}:{CONVERTED}", layout.display()));
    let mut process = run.spawn("convert", command)?;
    let status = process.wait(CONVERT_LIMIT)?;
    if !status.success() {
        bail!("estargz convert failed ({status}); it said:\n{}", process.log_tail());
    }
    Ok(layout)
}

fn describe(stage: &Stage<'_>, image: &DemoImage, compressed: u64) -> Result<()> {
    let layers = image.read()?.layers().len();
    let LinkOptions {
        delay,
        bytes_per_second,
    } = LinkOptions::WIDE_AREA;
    let rate = bytes_per_second.map_or_else(|| "no".into(), |rate| format!("{} Mbit/s", rate * 8 / 1_000_000));
    eprintln!(
        "image: {layers} layers, {:.1} MB compressed; link {}: {} ms a request, {rate} cap",
        compressed as f64 / 1e6,
        stage.proxy.address(),
        delay.as_millis(),
    );
    Ok(())
}

fn publish(subjects: &[Subject], samples: &[Vec<Sample>], compressed: u64, directory: &Path) -> Result<()> {
    let medians: Vec<_> = samples.iter().filter_map(|samples| Medians::of(samples)).collect();
    let columns: Vec<_> = subjects.iter().map(|subject| subject.mode).zip(medians).collect();
    println!("{}", table(&columns));
    let [
        (Mode::Overlayfs, overlayfs),
        (Mode::Hullspeed, hullspeed),
        (Mode::Hulls, hulls),
    ] = columns[..]
    else {
        return Ok(());
    };
    let modes = Modes {
        overlayfs,
        hullspeed,
        hulls,
    };
    let report = Report::new(modes, compressed);
    println!(
        "total with hullspeed: {:.1} % of overlayfs, with hulls: {:.1} %; on the wire: {:.1} % of the image's {:.1} MB compressed",
        report.ratio_total * 100.0,
        report.ratio_total_hulls * 100.0,
        report.wire_share() * 100.0,
        compressed as f64 / 1e6,
    );
    let path = directory.join(RESULT);
    let text = serde_json::to_string_pretty(&report).context("cannot write the report as JSON")?;
    fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))?;
    println!("written: {}", path.display());
    match report.missed() {
        None => Ok(()),
        Some(missed) => bail!("{missed}"),
    }
}
