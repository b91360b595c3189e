//! The command line.

use std::path::PathBuf;

use clap::{Parser, Subcommand};
use hullspeed_daemon::answer::Form;
use hullspeed_daemon::cli::Options;

use crate::doctor::CONTAINERD;

pub mod ask;
mod table;

/// Serves container image layers lazily to containerd.
#[derive(Debug, Parser)]
#[command(name = "hullspeed-snapshotter", version, args_conflicts_with_subcommands = false)]
#[command(
    after_help = "Exit codes: 0 done or stopped as asked, 1 the daemon refused, or a verification or doctor found something wrong, 64 wrong flags \
    or configuration, 65 damaged metadata, 66 the image, snapshot or layer is unknown, 69 no daemon answers or something needed is \
    missing (as /dev/fuse), 70 defect, 73 root or socket cannot be made, 75 already running."
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
    /// Serves containerd (the default)
    Serve,
    /// Shows how the running daemon is
    Status(Form),
    /// Shows why an image, a snapshot or a layer is lazy or not, and what it has cost
    Explain {
        /// Image reference, digest of a manifest, blob or table of contents, container id, or snapshot key
        #[arg(value_name = "IMAGE|SNAPSHOT|LAYER")]
        subject: String,
        /// How it is shown.
        #[command(flatten)]
        form: Form,
    },
    /// Shows the layer cache of the running daemon, or has something done to it
    Cache {
        /// What to do with it
        #[command(subcommand)]
        verb: CacheVerb,
    },
    /// Checks this node and says what to do about what it finds
    Doctor {
        /// Socket of containerd
        #[arg(long, value_name = "SOCKET", default_value = CONTAINERD)]
        containerd: PathBuf,
        /// How it is shown.
        #[command(flatten)]
        form: Form,
    },
    /// Checks the configuration, prints it with all defaults filled in, and exits
    CheckConfig,
}

/// What can be done with the cache.
#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum CacheVerb {
    /// Lists the layers
    Ls(Form),
    /// Shows what the cache takes and may take
    Usage(Form),
    /// Removes layers that no snapshot refers to, as many as it takes to be within the limits
    Prune {
        /// Removes all of them
        #[arg(long)]
        all_unused: bool,
        /// How the result is shown.
        #[command(flatten)]
        form: Form,
    },
    /// Compares what is cached with the digests that the image's maker gave, and drops what is wrong
    Verify {
        /// Only the layer with this digest (of its blob or its table of contents)
        layer: Option<String>,
        /// How the result is shown.
        #[command(flatten)]
        form: Form,
    },
}

impl Cli {
    /// The subcommand, with its default.
    pub fn command(&self) -> Command {
        self.command.clone().unwrap_or(Command::Serve)
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
    fn every_command_is_understood() {
        let (tables, json) = (Form { json: false }, Form { json: true });
        let explain = |subject: &str, form| Command::Explain {
            subject: subject.to_owned(),
            form,
        };
        let doctor = |containerd: &str, form| Command::Doctor {
            containerd: containerd.into(),
            form,
        };
        let cache = |verb| Command::Cache { verb };
        let prune = |all_unused, form| cache(CacheVerb::Prune { all_unused, form });
        let verify = |layer: Option<&str>, form| {
            cache(CacheVerb::Verify {
                layer: layer.map(str::to_owned),
                form,
            })
        };
        for (line, command) in [
            ("x status", Command::Status(tables)),
            ("x status --json", Command::Status(json)),
            ("x explain nginx:1", explain("nginx:1", tables)),
            ("x explain --json sha256:00", explain("sha256:00", json)),
            ("x doctor", doctor(CONTAINERD, tables)),
            ("x doctor --containerd /c.sock --json", doctor("/c.sock", json)),
            ("x cache ls", cache(CacheVerb::Ls(tables))),
            ("x cache usage --json", cache(CacheVerb::Usage(json))),
            ("x cache prune", prune(false, tables)),
            ("x cache prune --all-unused --json", prune(true, json)),
            ("x cache verify", verify(None, tables)),
            ("x cache verify sha256:00 --json", verify(Some("sha256:00"), json)),
        ] {
            assert_eq!(
                Cli::try_parse_from(line.split(' ')).unwrap().command(),
                command,
                "{line}"
            );
        }
        for line in ["x explain", "x cache", "x cache drop", "x status now"] {
            assert!(Cli::try_parse_from(line.split(' ')).unwrap_err().use_stderr(), "{line}");
        }
    }

    #[test]
    fn the_document_shows_every_command() {
        fn check(document: &str, name: &str, command: &clap::Command) {
            for command in command.get_subcommands() {
                let name = format!("{name} {}", command.get_name());
                assert!(document.contains(&name), "{name}");
                for flag in command.get_arguments().filter_map(|argument| argument.get_long()) {
                    assert!(document.contains(&format!("--{flag}")), "{flag}");
                }
                check(document, &name, command);
            }
        }
        let document = include_str!("../../docs/snapshotter-cli.md");
        check(document, "hullspeed-snapshotter", &<Cli as CommandFactory>::command());
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
