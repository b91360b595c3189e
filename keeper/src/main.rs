//! `hullspeed-keeper`: the command line; the keeper itself is in the library.

use std::io::Write as _;
use std::process::ExitCode;

use hullspeed_keeper::handover;
use hullspeed_keeper::log::Log;
use hullspeed_keeper::options::{Command, HELP, Options};
use hullspeed_keeper::supervisor::{KeeperError, Supervisor};

const PROGRAM: &str = env!("CARGO_PKG_NAME");

/// Wrong command line, as sysexits.h has it.
const EX_USAGE: u8 = 64;
/// Something that the system should have given is missing.
const EX_OSERR: u8 = 71;
/// A socket cannot be made.
const EX_CANTCREAT: u8 = 73;

fn main() -> ExitCode {
    match Command::parse(std::env::args_os().skip(1)) {
        Ok(Command::Help) => show(HELP),
        Ok(Command::Version) => show(concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION"), "\n")),
        Ok(Command::Accepts(format, _)) if format == handover::FORMAT => ExitCode::SUCCESS,
        Ok(Command::Accepts(..)) => EX_USAGE.into(),
        Ok(Command::Run(options)) => run(options),
        Err(error) => fail(&format!("{error} ({PROGRAM} --help shows what there is)"), EX_USAGE),
    }
}

fn run(options: Options) -> ExitCode {
    let handover = std::env::var_os(handover::VARIABLE).map(|value| value.to_string_lossy().into_owned());
    match Supervisor::new(options, handover.as_deref(), Log::to_standard_error()) {
        Ok(supervisor) => {
            supervisor.run();
            ExitCode::SUCCESS
        }
        Err(error) => {
            let code = match &error {
                KeeperError::Listener(_) | KeeperError::Inbox(_) => EX_CANTCREAT,
                KeeperError::Part { .. } | KeeperError::Handover(_) => EX_OSERR,
            };
            fail(&chain(&error), code)
        }
    }
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn show(text: &str) -> ExitCode {
    let shown = std::io::stdout().write_all(text.as_bytes());
    shown.map_or(ExitCode::FAILURE, |()| ExitCode::SUCCESS)
}

fn fail(message: &str, code: u8) -> ExitCode {
    // Nothing can be said if the terminal is gone.
    let _ = writeln!(std::io::stderr(), "{PROGRAM}: {message}");
    code.into()
}
