//! Log lines, to the standard error.

mod json;

use std::io::IsTerminal as _;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::fmt;
use tracing_subscriber::util::SubscriberInitExt;

use self::json::JsonLines;
use crate::config::{LogConfig, LogFormat};

/// Checks a level or filter as `log.level` has it.
pub fn parse_level(level: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(level)
}

/// Sends log lines where the configuration wants them, for the rest of the process; later calls change nothing.
pub fn start(config: &LogConfig) -> Result<(), ParseError> {
    let filter = parse_level(&config.level)?;
    let colours = std::io::stderr().is_terminal();
    let lines = fmt()
        .with_env_filter(filter)
        .with_ansi(colours)
        .with_writer(std::io::stderr);
    // An error means that there is a subscriber already, as in tests.
    let _ = match config.format {
        LogFormat::Json => lines.event_format(JsonLines).finish().try_init(),
        LogFormat::Text => lines.with_target(false).finish().try_init(),
    };
    Ok(())
}
