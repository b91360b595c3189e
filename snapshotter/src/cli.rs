//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::config::{LogFormat, Override, Sources};

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

/// Flags that all subcommands take.
#[derive(Debug, Args)]
pub struct Options {
    /// Configuration file [default: /etc/hullspeed/snapshotter.toml, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of everything that is kept (key root)
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<String>,
    /// Unix socket to listen on (key socket)
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<String>,
    /// error, warn, info, debug, trace, or a list such as info,hullspeed_snapshotter=debug (key log.level)
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Form of log lines (key log.format)
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Refuse a configuration file with unknown keys
    #[arg(long, global = true)]
    pub strict_config: bool,
}

/// A mistake on the command line, in one line.
pub fn mistake(error: &clap::Error) -> String {
    let text = error.to_string();
    // What is wrong or missing stands on lines of its own, up to tips and the usage.
    let ends = ["Usage:", "tip:", "For more information"];
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !ends.iter().any(|end| line.starts_with(end)));
    let line = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    format!("{line} (hullspeed-snapshotter --help shows what there is)")
}

impl Cli {
    /// The subcommand, with its default.
    pub fn command(&self) -> Command {
        self.command.unwrap_or(Command::Serve)
    }
}

impl Options {
    /// Where the configuration comes from.
    pub fn sources(&self) -> Sources {
        let Self {
            config,
            root,
            socket,
            log_level,
            log_format,
            strict_config,
        } = self;
        let log_format = log_format.map(|format| match format {
            LogFormat::Json => "json".to_owned(),
            LogFormat::Text => "text".to_owned(),
        });
        let overrides = [
            (Override::Root, root.clone()),
            (Override::Socket, socket.clone()),
            (Override::LogLevel, log_level.clone()),
            (Override::LogFormat, log_format),
        ];
        Sources {
            file: config.clone(),
            overrides: overrides
                .into_iter()
                .filter_map(|(key, value)| Some((key, value?)))
                .collect(),
            strict: *strict_config,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

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
            let said = mistake(&error);
            assert!(error.use_stderr() && said.lines().count() == 1, "{said}");
            assert!(
                said.contains(word) && !said.contains("Usage") && !said.contains("For more"),
                "{said}"
            );
        }
    }
}
