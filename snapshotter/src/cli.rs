//! The command line.

use clap::{Parser, Subcommand};
use hullspeed_daemon::cli::Options;

/// Serves container image layers lazily to containerd.
#[derive(Debug, Parser)]
#[command(name = "hullspeed-snapshotter", version, args_conflicts_with_subcommands = false)]
#[command(
    after_help = "Exit codes: 0 stopped as asked, 64 wrong flags or configuration, 65 damaged metadata, \
    69 something needed is missing (as /dev/fuse), 70 defect, 73 root or socket cannot be made, 75 already running."
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Serves containerd (the default)
    Serve,
    /// Checks the configuration, prints it with all defaults filled in, and exits
    CheckConfig,
}

impl Cli {
    /// The subcommand, with its default.
    pub fn command(&self) -> Command {
        self.command.unwrap_or(Command::Serve)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use hullspeed_daemon::cli::mistake;
    use hullspeed_daemon::config::Override;

    use super::*;

    #[test]
    fn flags_work_before_and_after_the_subcommand() {
        <Cli as CommandFactory>::command().debug_assert();
        for line in ["x --root /r serve", "x serve --root /r", "x --root /r"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.command(), Command::Serve);
            assert_eq!(cli.options.sources().overrides, [(Override::Root, "/r".to_owned())]);
        }
        let cli = Cli::try_parse_from(["x", "check-config", "--strict-config", "--log-format", "text"]).unwrap();
        assert_eq!(cli.command(), Command::CheckConfig);
        assert!(cli.options.sources().strict);
    }

    #[test]
    fn a_mistake_is_one_line_that_names_it() {
        for (line, word) in [
            ("x --nonsense", "'--nonsense'"),
            ("x --rot /r", "'--rot'"),
            ("x --log-format xml", "'xml'"),
            ("x --root", "'--root <DIR>'"),
            ("x sevre", "'sevre'"),
            ("x a\nb", "'a b'"),
        ] {
            let error = Cli::try_parse_from(line.split(' ')).unwrap_err();
            let said = mistake("x", &error);
            assert!(error.use_stderr() && said.lines().count() == 1, "{said}");
            assert!(
                said.contains(word) && !said.contains("Usage") && !said.contains("For more"),
                "{said}"
            );
        }
    }
}
