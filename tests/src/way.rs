//! How the snapshotter of a test mounts lazy layers: the whole suite runs on each way.

use std::ffi::OsStr;

use anyhow::{Context as _, Result, bail};
use toml::{Table, Value};

/// Says which way the tests of this process run on: `fuse` or `erofs`.
pub const VARIABLE: &str = "HULLSPEED_TEST_MOUNT";

/// A way to mount lazy layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Way {
    /// By FUSE.
    #[default]
    Fuse,
    /// Natively.
    Erofs,
}

impl Way {
    /// The way that the environment names.
    pub fn of_this_run() -> Result<Self> {
        std::env::var_os(VARIABLE).map_or(Ok(Self::default()), |value| Self::named(&value))
    }

    /// As `layers.mount` has it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Erofs => "erofs",
        }
    }

    /// What the kernel calls such a mount.
    #[must_use]
    pub fn file_system(self) -> &'static str {
        match self {
            Self::Fuse => "fuse.hullspeed",
            Self::Erofs => "erofs",
        }
    }

    /// Whether the daemon needs somebody who keeps its descriptors.
    #[must_use]
    pub fn needs_keeper(self) -> bool {
        self == Self::Erofs
    }

    /// A configuration with this way in it, unless it names one itself.
    pub fn configure(self, text: &str) -> Result<String> {
        let mut config: Table = text
            .parse()
            .with_context(|| format!("the configuration is not TOML:\n{text}"))?;
        let layers = config
            .entry("layers")
            .or_insert_with(|| Table::new().into())
            .as_table_mut()
            .context("layers is not a table")?;
        layers.entry("mount").or_insert_with(|| Value::from(self.name()));
        Ok(config.to_string())
    }

    fn named(name: &OsStr) -> Result<Self> {
        let found = [Self::Fuse, Self::Erofs].into_iter().find(|way| name == way.name());
        match found {
            Some(way) => Ok(way),
            None => bail!("{VARIABLE} is {}, and has to be fuse or erofs", name.display()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_way_joins_what_a_test_configures_and_gives_way_to_it() {
        let text = "root = \"/r\"\n\n[layers]\nmount_timeout = \"1s\"\n";
        let config: Table = Way::Erofs.configure(text).unwrap().parse().unwrap();
        assert_eq!(config["root"].as_str(), Some("/r"));
        assert_eq!(config["layers"]["mount"].as_str(), Some("erofs"));
        assert_eq!(config["layers"]["mount_timeout"].as_str(), Some("1s"));
        let own = Way::Fuse.configure("[layers]\nmount = \"auto\"\n").unwrap();
        assert_eq!(own.parse::<Table>().unwrap()["layers"]["mount"].as_str(), Some("auto"));
        assert!(Way::Fuse.configure("layers = 1\n").is_err());
        assert!(Way::Fuse.configure("[layers\n").is_err());
    }

    #[test]
    fn other_ways_are_refused() {
        assert_eq!(Way::named(OsStr::new("erofs")).unwrap(), Way::Erofs);
        assert!(Way::named(OsStr::new("auto")).is_err());
    }
}
