//! `hullspeed-snapshotter`: arguments, configuration, log lines, runtime; the daemon itself is in the library.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use hullspeed_snapshotter::cli::{self, Cli, Command};
use hullspeed_snapshotter::config::{self, Config, Loaded};
use hullspeed_snapshotter::run::{self, RunError};
use hullspeed_snapshotter::telemetry;

/// Wrong flags or configuration, as sysexits.h has it.
const EX_USAGE: u8 = 64;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return fail(&cli::mistake(&error), EX_USAGE),
        Err(help) => {
            // Nothing can be said if the terminal is gone.
            let _ = help.print();
            return ExitCode::SUCCESS;
        }
    };
    let Loaded { config, unknown } = match config::load(&cli.options.sources()) {
        Ok(loaded) => loaded,
        Err(error) => return fail(&run::describe(&error), EX_USAGE),
    };
    if cli.command() == Command::CheckConfig {
        let lines = unknown
            .iter()
            .map(|key| format!("# warning: {key} is unknown and ignored\n"));
        let text = lines.collect::<String>() + &config.to_toml();
        let printed = std::io::stdout().write_all(text.as_bytes());
        return if printed.is_ok() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        };
    }
    if let Err(error) = telemetry::start(&config.log) {
        return fail(&run::describe(&error), EX_USAGE);
    }
    for key in unknown {
        tracing::warn!(key, "unknown key in the configuration is ignored");
    }
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => fail(&run::describe(&error), error.exit_code()),
    }
}

fn serve(config: Config) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(RunError::Process)?;
    runtime.block_on(async {
        let stop = run::stop_signal()?;
        run::run(config, run::layers, stop).await
    })
}

fn fail(message: &str, code: u8) -> ExitCode {
    // Nothing can be said if the terminal is gone.
    let _ = writeln!(std::io::stderr(), "hullspeed-snapshotter: {message}");
    code.into()
}
