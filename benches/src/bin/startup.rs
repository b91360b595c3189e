//! `startup`: measures cold starts side by side and prints one table. Run by `make demo`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use clap::Parser;
use hullspeed_benches::demo::{self, DemoOptions};
use hullspeed_benches::report::Mode;
use hullspeed_tests::requirements;
use hullspeed_tests::run::RunDir;
use tokio::signal::unix::{SignalKind, signal};

/// Exit code after SIGINT or SIGTERM, as shells have it for SIGINT.
const INTERRUPTED: u8 = 130;

/// Cold starts of one real image through CRI: overlayfs with the plain image beside Hullspeed with the converted one.
#[derive(Parser)]
#[command(version)]
struct Cli {
    /// Directory for the cached image, the run and result.json.
    #[arg(long, value_name = "DIR", default_value = "target/demo")]
    directory: PathBuf,
    /// Rounds of each mode.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Measure one mode only; result.json is then not written.
    #[arg(long, value_name = "MODE")]
    only: Option<Mode>,
    /// List each round's requests on standard error.
    #[arg(long)]
    requests: bool,
    /// Keep logs and state in DIR/run, to look into a failure.
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => return failed(&error.into()),
    };
    match runtime.block_on(run(cli)) {
        Ok(code) => code,
        Err(error) => failed(&error),
    }
}

fn failed(error: &anyhow::Error) -> ExitCode {
    eprintln!("error: {error:#}");
    ExitCode::FAILURE
}

async fn run(cli: Cli) -> Result<ExitCode> {
    requirements::check()?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let mut run = RunDir::open_near(&cli.directory.join("run"))?;
    run.keep_files(cli.keep);
    let run = Arc::new(run);
    let options = DemoOptions {
        directory: cli.directory,
        rounds: cli.rounds,
        only: cli.only,
        list_requests: cli.requests,
    };
    let worker = Arc::clone(&run);
    let work = tokio::spawn(async move { demo::run(&worker, &options).await });
    tokio::select! {
        done = work => done.context("the demo panicked")?.map(|()| ExitCode::SUCCESS),
        _ = interrupt.recv() => interrupted(&run),
        _ = terminate.recv() => interrupted(&run),
    }
}

/// The work may be anywhere, so it is not waited for: everything is taken from under it, and the process ends.
fn interrupted(run: &RunDir) -> ! {
    eprintln!("interrupted: cleaning up");
    if let Err(error) = run.abort() {
        eprintln!("warning: {error:#}; the next run sweeps the rest");
    }
    std::process::exit(INTERRUPTED.into())
}
