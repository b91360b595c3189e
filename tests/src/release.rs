//! Which containerd is started: the machine's, or the newer one that tests/install-containerd-2.sh keeps beside it.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::{Result, bail};

/// Where tests/install-containerd-2.sh puts its containerd, unless [`DIRECTORY_VARIABLE`] says otherwise.
const DIRECTORY: &str = "/var/cache/hullspeed/containerd-2";

/// Overrides [`DIRECTORY`], as it does for the script.
const DIRECTORY_VARIABLE: &str = "HULLSPEED_CONTAINERD_2";

/// A line of containerd releases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Release {
    /// Debian 12's 1.6.20, with the machine's runc.
    #[default]
    One,
    /// A 2.x, with a runc of its own.
    Two,
}

impl Release {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::One, Self::Two];

    /// A short name, for directories and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::One => "one",
            Self::Two => "two",
        }
    }

    /// The program, and the `PATH` on which it finds its shim and runc.
    pub(crate) fn program(self) -> Result<(PathBuf, OsString)> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        if self == Self::One {
            return Ok(("containerd".into(), path));
        }
        let directory = std::env::var_os(DIRECTORY_VARIABLE).map_or_else(|| PathBuf::from(DIRECTORY), PathBuf::from);
        if !directory.join("stamp").is_file() {
            bail!(
                "there is no containerd 2.x in {}; run tests/install-containerd-2.sh",
                directory.display()
            );
        }
        let programs = directory.join("bin");
        let containerd = programs.join("containerd");
        let directories = std::iter::once(programs).chain(std::env::split_paths(&path));
        Ok((containerd, std::env::join_paths(directories)?))
    }
}
