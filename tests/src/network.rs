//! The pods' network: a bridge of our own and a CNI configuration for it, in the run directory.
//!
//! We make the bridge and give it its address ourselves. Left to the CNI plugin, that would switch on IP forwarding for
//! the whole host; our pods talk to this host only.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::process;
use crate::run::RunDir;

/// Where Debian's containernetworking-plugins puts the plugins.
pub const CNI_PLUGINS: &str = "/usr/lib/cni";

/// Subnets tried, beginning at one that the run's id picks: 10.213.0.0/24 and up.
const SUBNETS: u16 = 256;

/// The bridge and the CNI configuration. The bridge goes with the run.
pub struct Network {
    conf_dir: PathBuf,
}

impl Network {
    /// Makes the bridge and writes the configuration.
    pub fn create(run: &RunDir) -> Result<Self> {
        let bridge = &run.names().bridge;
        let third = free_subnet(&run.names().id)?;
        ip(&["link", "add", bridge, "type", "bridge"])?;
        ip(&["address", "add", &format!("10.213.{third}.1/24"), "dev", bridge])?;
        ip(&["link", "set", bridge, "up"])?;
        let conf_dir = run.directory("cni/conf")?;
        let list = serde_json::json!({
            "cniVersion": "0.4.0",
            "name": bridge,
            "plugins": [{
                "type": "bridge",
                "bridge": bridge,
                "ipam": {
                    "type": "host-local",
                    "dataDir": run.directory("cni/ipam")?,
                    "ranges": [[{
                        "subnet": format!("10.213.{third}.0/24"),
                        "rangeStart": format!("10.213.{third}.10"),
                        "rangeEnd": format!("10.213.{third}.250"),
                    }]],
                },
            }],
        });
        let path = conf_dir.join("10-hullspeed.conflist");
        fs::write(&path, list.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self { conf_dir })
    }

    /// The directory for containerd's `cni.conf_dir`.
    #[must_use]
    pub fn conf_dir(&self) -> &Path {
        &self.conf_dir
    }
}

fn ip(arguments: &[&str]) -> Result<Vec<u8>> {
    process::output(Command::new("ip").args(arguments))
}

/// The third byte of a subnet that no route of this host touches.
fn free_subnet(id: &str) -> Result<u16> {
    let routes = String::from_utf8_lossy(&ip(&["-4", "route", "show", "table", "all"])?).into_owned();
    let first = u16::from_str_radix(&id[..2], 16).context("a run id that is not hexadecimal")?;
    let free = (0..SUBNETS).map(|step| (first + step) % SUBNETS).find(|third| {
        let prefix = format!("10.213.{third}.");
        !routes
            .split_whitespace()
            .any(|word| word.starts_with(&prefix) || word.starts_with("10.213.0.0/16"))
    });
    match free {
        Some(third) => Ok(third),
        None => bail!("every subnet of 10.213.0.0/16 is in use on this host"),
    }
}
