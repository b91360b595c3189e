//! `hullspeed-snapshotter`: arguments, configuration, log lines, runtime; the daemon itself is in the library.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use hullspeed_daemon::cli::{EX_USAGE, mistake};
use hullspeed_daemon::error::chain;
use hullspeed_daemon::{signal, telemetry};
use hullspeed_snapshotter::cli::{Cli, Command};
use hullspeed_snapshotter::config::{self, Config};
use hullspeed_snapshotter::run::{self, RunError};

const PROGRAM: &str = env!("CARGO_PKG_NAME");

fn main() -> ExitCode {
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
    if cli.command() == Command::CheckConfig {
        let text = loaded.checked(&loaded.config.to_toml());
        let printed = std::io::stdout().write_all(text.as_bytes());
        return if printed.is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    if let Err(error) = telemetry::start(&loaded.config.log) {
        return fail(&chain(&error), EX_USAGE);
    }
    loaded.warn();
    match serve(loaded.config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&chain(&error), error.exit_code()),
    }
}

fn serve(config: Config) -> Result<(), RunError> {
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
