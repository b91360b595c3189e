//! The command line.

use clap::{Parser, Subcommand, ValueEnum};
use hullspeed_daemon::answer::Form;
use hullspeed_daemon::cli::Options;
use hullspeed_proto::hullspeed::prewarm::v1::PoolAction;

pub mod ask;
pub(crate) mod table;

/// Relays CRI to containerd and gives pods sandboxes that were made ahead.
#[derive(Debug, Parser)]
#[command(name = "hullspeed-prewarm", version, args_conflicts_with_subcommands = false)]
#[command(
    after_help = "Exit codes: 0 stopped as asked, 1 doctor found something broken or the daemon refused, 64 wrong flags or \
    configuration, 65 damaged mark, 69 no daemon answers or something needed is missing, 70 defect, 73 directory or \
    socket cannot be made, 75 already running."
)]
pub struct Cli {
    /// What to do; serve if nothing is said.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Where the configuration comes from.
    #[command(flatten)]
    pub options: Options,
}

/// A subcommand.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Serves the kubelet (the default)
    Serve,
    /// Shows how the running daemon is
    Status(Form),
    /// Shows the pool of the running daemon, or changes what it does
    Pool {
        /// What to do with it; show it if nothing is said
        #[arg(value_enum)]
        action: Option<Action>,
        /// How it is shown.
        #[command(flatten)]
        form: Form,
    },
    /// Removes all hulls; the running daemon only relays from then on, until `pool resume` or a restart
    Drain {
        /// Waits until none is left and containerd knows all pods, and says how many are not there yet
        #[arg(long)]
        wait: bool,
        /// How it is shown.
        #[command(flatten)]
        form: Form,
    },
    /// Checks this node and says what to do about what it finds
    Doctor(Form),
    /// Checks the configuration, prints it with all defaults filled in, and exits
    CheckConfig,
}

/// What the pool can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Action {
    /// Replaces all hulls by new ones
    Flush,
    /// Makes no hulls; those that are there are handed out
    Pause,
    /// Ends a pause or a drain
    Resume,
}

impl Action {
    /// As the API has it.
    #[must_use]
    pub fn in_api(self) -> PoolAction {
        match self {
            Self::Flush => PoolAction::Flush,
            Self::Pause => PoolAction::Pause,
            Self::Resume => PoolAction::Resume,
        }
    }
}

impl Cli {
    /// The subcommand, with its default.
    #[must_use]
    pub fn command(&self) -> Command {
        self.command.clone().unwrap_or(Command::Serve)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;
    use hullspeed_daemon::config::Override;

    use super::*;

    fn parsed(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn every_command_is_understood() {
        <Cli as CommandFactory>::command().debug_assert();
        let tables = Form { json: false };
        let json = Form { json: true };
        let pool = |action, form| Command::Pool { action, form };
        for (line, command) in [
            ("x", Command::Serve),
            ("x serve", Command::Serve),
            ("x status", Command::Status(tables)),
            ("x status --json", Command::Status(json)),
            ("x pool", pool(None, tables)),
            ("x pool flush --json", pool(Some(Action::Flush), json)),
            ("x pool pause", pool(Some(Action::Pause), tables)),
            ("x pool resume", pool(Some(Action::Resume), tables)),
            (
                "x drain",
                Command::Drain {
                    wait: false,
                    form: tables,
                },
            ),
            ("x drain --wait --json", Command::Drain { wait: true, form: json }),
            ("x doctor", Command::Doctor(tables)),
            ("x check-config", Command::CheckConfig),
        ] {
            assert_eq!(parsed(line).unwrap().command(), command, "{line}");
        }
        for line in ["x pool fill", "x status --wait", "x drain all", "x nothing"] {
            assert!(parsed(line).unwrap_err().use_stderr(), "{line}");
        }
    }

    #[test]
    fn flags_work_before_and_after_the_subcommand() {
        for line in ["x --root /r status", "x status --root /r", "x --root /r"] {
            let sources = parsed(line).unwrap().options.sources();
            assert_eq!(sources.overrides, [(Override::Root, "/r".to_owned())]);
        }
    }

    #[test]
    fn the_document_shows_every_command() {
        let document = include_str!("../../docs/prewarm-cli.md");
        for command in <Cli as CommandFactory>::command().get_subcommands() {
            let name = command.get_name();
            assert!(document.contains(&format!("hullspeed-prewarm {name}")), "{name}");
            for flag in command.get_arguments().filter_map(|argument| argument.get_long()) {
                assert!(document.contains(&format!("--{flag}")), "{flag}");
            }
        }
        for action in Action::value_variants() {
            let name = action.to_possible_value().unwrap();
            assert!(document.contains(&format!("pool {}", name.get_name())));
        }
    }
}
