//! `hullspeed-prewarm`: arguments, configuration, log lines, runtime; the daemon itself is in the library.

use std::io::Write as _;
use std::process::ExitCode;

use clap::Parser as _;
use hullspeed_daemon::activation::Announced;
use hullspeed_daemon::cli::{EX_USAGE, mistake};
use hullspeed_daemon::error::chain;
use hullspeed_daemon::{signal, telemetry};
use hullspeed_prewarm::cli::{Cli, Command, ask};
use hullspeed_prewarm::client::Client;
use hullspeed_prewarm::config::{self, Config};
use hullspeed_prewarm::doctor;
use hullspeed_prewarm::run::{self, RunError};

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

#[tokio::main]
async fn serve(config: Config) -> Result<(), RunError> {
    let stop = signal::stop().map_err(RunError::Process)?;
    run::run(config, &Announced::to_this_process(), stop).await
}

/// The commands that print something and end.
#[tokio::main(flavor = "current_thread")]
async fn ask(command: &Command, config: &Config) -> ExitCode {
    let client = Client::at(&config.control_socket);
    let out = &mut std::io::stdout();
    let asked = match *command {
        Command::Status(form) => ask::status(&client, form, out).await,
        Command::Pool { action, form } => ask::pool(&client, action, form, out).await,
        Command::Drain { wait, form } => ask::drain(&client, wait, form, out).await,
        Command::Doctor(form) => return doctor::run(config, form, out).await,
        Command::Serve | Command::CheckConfig => Ok(()),
    };
    asked.map_or_else(|error| fail(&chain(&error), error.exit_code()), |()| ExitCode::SUCCESS)
}

fn fail(message: &str, code: u8) -> ExitCode {
    // Nothing can be said if the terminal is gone.
    let _ = writeln!(std::io::stderr(), "{PROGRAM}: {message}");
    code.into()
}
