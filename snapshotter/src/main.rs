//! `hullspeed-snapshotter`: arguments, configuration, log lines, runtime; the daemon itself is in the library.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use hullspeed_daemon::cli::{EX_USAGE, mistake};
use hullspeed_daemon::error::chain;
use hullspeed_daemon::{signal, telemetry};
use hullspeed_snapshotter::cli::{Cli, Command, ask};
use hullspeed_snapshotter::config::{self, Config};
use hullspeed_snapshotter::doctor;
use hullspeed_snapshotter::layer::mounts::fuse;
use hullspeed_snapshotter::layer::native::probe;
use hullspeed_snapshotter::run::{self, RunError};
use hullspeed_snapshotter::{client::Client, heap};

const PROGRAM: &str = env!("CARGO_PKG_NAME");

fn main() -> ExitCode {
    if let Some(code) = probe::stand_in().or_else(fuse::helper) {
        return code;
    }
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return fail(&mistake(PROGRAM, &error), EX_USAGE),
        Err(help) => {
            // Nothing can be said if the terminal is gone.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    let loaded = match config::load(&cli.options.sources()) {
        Ok(loaded) => loaded,
        Err(error) => return fail(&chain(&error), EX_USAGE),
    };
    match cli.command() {
        Command::CheckConfig => {
            let text = loaded.checked(&loaded.config.to_toml());
            let printed = std::io::stdout().write_all(text.as_bytes());
            printed.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
        }
        Command::Serve => {
            if let Err(error) = telemetry::start(&loaded.config.log) {
                return fail(&chain(&error), EX_USAGE);
            }
            loaded.warn();
            let served = serve(loaded.config);
            served.map_or_else(|error| fail(&chain(&error), error.exit_code()), |()| ExitCode::SUCCESS)
        }
        command => ask(&command, &loaded.config),
    }
}

/// The commands that print something and end.
#[tokio::main(flavor = "current_thread")]
async fn ask(command: &Command, config: &Config) -> ExitCode {
    let client = Client::at(&config.socket);
    let out = &mut std::io::stdout();
    let asked = match command {
        Command::Status(form) => ask::status(&client, *form, out).await,
        Command::Explain { subject, form } => ask::explain(&client, subject, *form, out).await,
        Command::Cache { verb } => ask::cache(&client, verb, out).await,
        Command::Doctor { containerd, form } => return doctor::run(config, containerd, *form, out).await,
        Command::Serve | Command::CheckConfig => Ok(()),
    };
    asked.map_or_else(|error| fail(&chain(&error), error.exit_code()), |()| ExitCode::SUCCESS)
}

fn serve(config: Config) -> Result<(), RunError> {
    heap::share();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(RunError::Process)?;
    runtime.block_on(async {
        let stop = signal::stop().map_err(RunError::Process)?;
        run::run(config, run::layers, stop).await
    })
}

fn fail(message: &str, code: u8) -> ExitCode {
    // Nothing can be said if the terminal is gone.
    let _ = writeln!(std::io::stderr(), "{PROGRAM}: {message}");
    code.into()
}
