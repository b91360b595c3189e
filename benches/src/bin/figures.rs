//! `figures`: measures what an area promises and prints one JSON object per line. Run by `make figures AREA=…`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result, anyhow, bail};
use clap::{Parser, ValueEnum};
use hullspeed_benches::fetch;
use hullspeed_benches::figure::{self, Figure};
use hullspeed_benches::hulls::{self, Amounts};
use hullspeed_benches::native;
use hullspeed_tests::release::Release;
use hullspeed_tests::requirements;
use hullspeed_tests::run::RunDir;

/// Figures of one area.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// What to measure.
    #[arg(value_enum)]
    area: Area,
    /// Directory of the run.
    #[arg(long, value_name = "DIR", default_value = "target/figures")]
    directory: PathBuf,
    /// One containerd alone.
    #[arg(long, value_name = "LINE")]
    containerd: Option<Line>,
    /// Adoptions timed.
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = at_least_one)]
    hits: usize,
    /// Bursts of each kind.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = at_least_one)]
    bursts: usize,
    /// Pass-through calls of each kind.
    #[arg(long, value_name = "N", default_value_t = 2000, value_parser = at_least_one)]
    calls: usize,
    /// Hulls weighed.
    #[arg(long, value_name = "N", default_value_t = 40, value_parser = clap::value_parser!(u32).range(1..=200))]
    hulls: u32,
    /// Pods that come and go before leaks are counted.
    #[arg(long, value_name = "N", default_value_t = 1000, value_parser = at_least_one)]
    cycles: usize,
    /// One part of the fetch or the native area alone.
    #[arg(long, value_name = "PART")]
    part: Vec<String>,
    /// Rounds of what the fetch and the native area time.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = at_least_one)]
    rounds: usize,
    /// Images of ten layers mounted when the snapshotter's memory is weighed.
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = at_least_one)]
    images: usize,
    /// Files of each of their layers.
    #[arg(long, value_name = "N", default_value_t = 5000, value_parser = at_least_one)]
    files: usize,
    /// Keep logs and state in DIR/run, to look into a failure.
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Area {
    /// Pod hulls.
    Hulls,
    /// The fetch engine and the layer cache.
    Fetch,
    /// The ways to mount lazy layers, beside native overlayfs.
    Native,
}

#[derive(Clone, Copy, ValueEnum)]
enum Line {
    /// Debian's 1.6.
    One,
    /// 2.x.
    Two,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(number) => Ok(number),
        Err(error) => Err(format!("{error}")),
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let done = runtime
        .context("cannot start the runtime")
        .and_then(|runtime| runtime.block_on(run(&cli)));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: &Cli) -> Result<()> {
    requirements::check()?;
    let open_run = || {
        let mut run = RunDir::open_near(&cli.directory.join("run"))?;
        run.keep_files(cli.keep);
        Ok(run)
    };
    let mut missed = Vec::new();
    let mut report = |figure: Figure| {
        figure::print(&mut std::io::stdout().lock(), &figure)?;
        if !figure.holds() {
            let place = figure
                .containerd
                .map_or_else(String::new, |version| format!(" on {version}"));
            missed.push(format!("{} = {}{place}", figure.figure, figure.value));
        }
        Ok(())
    };
    let amounts = Amounts {
        hits: cli.hits,
        bursts: cli.bursts,
        calls: cli.calls,
        hulls: cli.hulls,
        cycles: cli.cycles,
    };
    match cli.area {
        Area::Hulls => {
            for release in releases(cli.containerd) {
                hulls::measure(open_run, release, &amounts, &mut report).await?;
            }
        }
        Area::Fetch => {
            let parts = parts(&cli.part, &fetch::Part::ALL)?;
            let amounts = fetch::Amounts {
                rounds: cli.rounds,
                images: cli.images,
                files: cli.files,
            };
            fetch::measure(open_run, &parts, &amounts, &mut report).await?;
        }
        Area::Native => {
            let parts = parts(&cli.part, &native::Part::ALL)?;
            let amounts = native::Amounts { rounds: cli.rounds };
            native::measure(open_run, &parts, &amounts, &mut report).await?;
        }
    }
    if missed.is_empty() {
        return Ok(());
    }
    bail!("a promise is missed: {}", missed.join("; "))
}

/// The parts of these names; all of an area without a name.
fn parts<P: ValueEnum>(names: &[String], all: &[P]) -> Result<Vec<P>> {
    if names.is_empty() {
        return Ok(all.to_vec());
    }
    let part = |name: &String| P::from_str(name, false).map_err(|error| anyhow!("{error}: {name}"));
    names.iter().map(part).collect()
}

fn releases(line: Option<Line>) -> Vec<Release> {
    match line {
        None => Release::ALL.to_vec(),
        Some(Line::One) => vec![Release::One],
        Some(Line::Two) => vec![Release::Two],
    }
}
