//! `startup`: measures cold starts side by side and prints one table. Run by `make demo`.

use std::io::Write as _;
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
use tokio::task::JoinHandle;

/// Exit code after SIGINT, SIGTERM or SIGHUP, as shells have it for SIGINT.
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
    // A terminal that is closed in the middle of a demo.
    let mut hangup = signal(SignalKind::hangup()).context("cannot watch for SIGHUP")?;
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
    let mut work = tokio::spawn(async move { demo::run(&worker, &options).await });
    tokio::select! {
        done = &mut work => done.context("the demo panicked")?.map(|()| ExitCode::SUCCESS),
        _ = interrupt.recv() => interrupted(&run, &work),
        _ = terminate.recv() => interrupted(&run, &work),
        _ = hangup.recv() => interrupted(&run, &work),
    }
}

/// The work may be anywhere, so it is not waited for: it ends at its next await, everything is taken from under it, and
/// the process ends.
fn interrupted(run: &RunDir, work: &JoinHandle<Result<()>>) -> ! {
    // Not `eprintln!`, which panics when the terminal has gone: it is gone after SIGHUP.
    let say = |text: &str| drop(writeln!(std::io::stderr(), "{text}"));
    say("interrupted: cleaning up");
    work.abort();
    if let Err(error) = run.abort() {
        say(&format!("warning: {error:#}; the next run sweeps the rest"));
    }
    std::process::exit(INTERRUPTED.into())
}
