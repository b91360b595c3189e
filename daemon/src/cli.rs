//! What the command lines of all daemons have in common.

use std::path::PathBuf;

use clap::Args;

use crate::config::{LogFormat, Override, Sources};

/// Wrong flags or configuration, as sysexits.h has it.
pub const EX_USAGE: u8 = 64;

/// Flags that all subcommands take.
#[derive(Debug, Args)]
pub struct Options {
    /// Configuration file [default: the daemon's own in /etc/hullspeed, if it exists]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory of everything that is kept (key root)
    #[arg(long, global = true, value_name = "DIR")]
    pub root: Option<String>,
    /// Unix socket to listen on (key socket)
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<String>,
    /// error, warn, info, debug, trace, or a list such as info,hyper=warn (key log.level)
    #[arg(long, global = true, value_name = "LEVEL")]
    pub log_level: Option<String>,
    /// Form of log lines (key log.format)
    #[arg(long, global = true, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Refuse a configuration file with unknown keys
    #[arg(long, global = true)]
    pub strict_config: bool,
}

impl Options {
    /// Where the configuration comes from.
    #[must_use]
    pub fn sources(&self) -> Sources {
        let Self {
            config,
            root,
            socket,
            log_level,
            log_format,
            strict_config,
        } = self;
        let overrides = [
            (Override::Root, root.clone()),
            (Override::Socket, socket.clone()),
            (Override::LogLevel, log_level.clone()),
            (Override::LogFormat, log_format.map(|format| format.name().to_owned())),
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

/// A mistake on the command line of `program`, in one line.
#[must_use]
pub fn mistake(program: &str, error: &clap::Error) -> String {
    let text = error.to_string();
    // What is wrong or missing stands on lines of its own, up to tips and the usage.
    let ends = ["Usage:", "tip:", "For more information"];
    let lines = text
        .lines()
        .map(str::trim)
        .take_while(|line| !ends.iter().any(|end| line.starts_with(end)));
    let line = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    format!("{line} ({program} --help shows what there is)")
}
