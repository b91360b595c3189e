//! The command line: arguments, signals, exit codes. What the verbs do is in their modules.
//!
//! stdout carries results only (a digest, a table, JSON); everything else goes to stderr, one line for each fault.

mod convert;
mod document;
mod failure;
mod image;
mod inspect;
mod location;
mod progress;
mod stream;
mod transport;
mod verify;

use std::ffi::OsString;
use std::io::Write as _;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use hullspeed_registry::{Client, ClientOptions, Credentials};
use tokio::signal::unix::{SignalKind, signal};

use failure::{Code, Failure};
use stream::Cancel;

/// Time that work has to clean up after a signal.
const CLEANUP_TIME: Duration = Duration::from_secs(20);

/// Converts container images to eStargz, shows what is in them and checks them.
#[derive(Debug, Parser)]
#[command(name = "estargz", version, after_help = EXIT_CODES)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "Images are named oci:DIR[:TAG], oci-archive:FILE[:TAG] or docker://REF.\n\
    Exit codes: 0 done, 1 failure, 2 usage, 3 source not found or access denied, 4 content is not what it must be, \
    5 destination cannot be written or access denied, 130/143 interrupted.";

#[derive(Debug, Subcommand)]
enum Verb {
    /// Converts every layer of an image; prints the digest of the result.
    #[command(after_help = EXIT_CODES)]
    Convert(convert::Options),
    /// Shows each layer: eStargz or not and why, TOC digest, files, chunks, prefetched bytes, sizes.
    #[command(after_help = EXIT_CODES)]
    Inspect(inspect::Options),
    /// Checks blob digests, TOC digests, every chunk and the diffIDs of all manifests and platforms.
    #[command(after_help = EXIT_CODES)]
    Verify(verify::Options),
}

/// How registries are reached.
#[derive(Debug, Clone, Args)]
struct RegistryArgs {
    /// Registry without TLS, as HOST or HOST:PORT (repeatable); loopback addresses always are.
    #[arg(long, value_name = "HOST")]
    plain_http: Vec<String>,
    /// Docker or podman auth file that is asked before the usual ones.
    #[arg(long, value_name = "FILE")]
    authfile: Option<PathBuf>,
    /// PEM file of certificate authorities to trust besides the system's.
    #[arg(long, value_name = "FILE")]
    ca_file: Option<PathBuf>,
}

impl RegistryArgs {
    fn client(&self) -> Result<Client, Failure> {
        let credentials = Credentials::from_environment();
        let credentials = match &self.authfile {
            Some(path) => credentials.with_file(path),
            None => credentials,
        };
        let options = ClientOptions {
            plain_http: self.plain_http.clone(),
            credentials,
            ca_file: self.ca_file.clone(),
            ..ClientOptions::default()
        };
        Client::new(options).map_err(|error| Failure::new(Code::Usage, failure::chain(&error)))
    }
}

/// Which platforms of an index are meant.
#[derive(Debug, Clone, Args)]
struct PlatformArgs {
    /// Platform as os/arch[/variant] (repeatable); all by default.
    #[arg(long = "platform", value_name = "P", value_parser = image::Platform::parse)]
    platforms: Vec<image::Platform>,
}

/// How progress is shown on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ProgressStyle {
    /// Bars on a terminal, lines elsewhere.
    Auto,
    /// Lines.
    Plain,
    /// Nothing.
    None,
}

/// The number of usable processors.
fn processors() -> NonZeroUsize {
    std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
}

/// Runs the command and returns its exit code.
pub(crate) fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(arguments) {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "off".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return Failure::new(Code::Runtime, format!("cannot start threads: {error}")).report(),
    };
    let cancel = Cancel::default();
    let outcome = runtime.block_on(interruptible(run(cli.verb, cancel.clone()), cancel));
    // A helper thread that hangs (a credential helper, a dead disk) must not keep the process.
    runtime.shutdown_timeout(Duration::from_secs(1));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

async fn run(verb: Verb, cancel: Cancel) -> Result<(), Failure> {
    match verb {
        Verb::Convert(options) => convert::run(options, cancel).await,
        Verb::Inspect(options) => inspect::run(options).await,
        Verb::Verify(options) => verify::run(options, cancel).await,
    }
}

/// Runs `work`; on a signal its readers and writers start to fail, so that it ends and takes its temporary files along.
async fn interruptible(work: impl Future<Output = Result<(), Failure>>, cancel: Cancel) -> Result<(), Failure> {
    let listen =
        |kind| signal(kind).map_err(|error| Failure::new(Code::Runtime, format!("cannot catch signals: {error}")));
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    let mut work = std::pin::pin!(work);
    let code = tokio::select! {
        outcome = &mut work => return outcome,
        _ = interrupt.recv() => Code::Interrupted,
        _ = terminate.recv() => Code::Terminated,
    };
    cancel.set();
    let ended = tokio::select! {
        ended = tokio::time::timeout(CLEANUP_TIME, work) => ended.ok(),
        _ = interrupt.recv() => None,
    };
    match ended {
        // The signal came when everything was done.
        Some(Ok(())) => Ok(()),
        _ => Err(Failure::new(
            code,
            "interrupted; nothing was changed at the destination's name",
        )),
    }
}

/// Help and version as they are; a mistake in one line.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if error.kind() == clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let _ = error.print();
        return Code::Usage.into();
    }
    let text = error.to_string();
    // What is missing stands on lines of its own, up to the usage.
    let ends = ["Usage:", "tip:", "For more information"];
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !ends.iter().any(|end| line.starts_with(end)));
    let line = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    let line = line.trim_start_matches("error: ");
    Failure::new(Code::Usage, format!("{line} (estargz --help shows what there is)")).report()
}

/// Writes a result to stdout.
fn print(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    let written = out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(b"\n"))
        .and_then(|()| out.flush());
    written.map_err(|error| Failure::new(Code::Runtime, format!("cannot write the result to stdout: {error}")))
}
