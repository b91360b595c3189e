//! Values as a configuration file has them, for `check-config`.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use toml::Value;

use super::{LogConfig, MetricsConfig};
use crate::units::display_duration;

/// A text in quotes.
#[must_use]
pub fn text(text: &dyn fmt::Display) -> String {
    Value::String(text.to_string()).to_string()
}

/// A time.
#[must_use]
pub fn time(time: Duration) -> String {
    text(&display_duration(time))
}

/// A path.
#[must_use]
pub fn path(path: &Path) -> String {
    text(&path.display())
}

/// A list of texts.
#[must_use]
pub fn list(texts: &[String]) -> String {
    Value::Array(texts.iter().cloned().map(Value::String).collect()).to_string()
}

/// The section `[log]`.
#[must_use]
pub fn log(config: &LogConfig) -> String {
    let LogConfig { level, format } = config;
    format!("\n[log]\nlevel = {}\nformat = {}", text(level), text(&format.name()))
}

/// The section `[metrics]`.
#[must_use]
pub fn metrics(config: &MetricsConfig) -> String {
    let MetricsConfig { address, explicit: _ } = config;
    let address = address.map(|address| address.to_string()).unwrap_or_default();
    format!("\n[metrics]\naddress = {}", text(&address))
}
