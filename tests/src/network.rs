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
    addresses: PathBuf,
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
        let ipam = run.directory("cni/ipam")?;
        let list = serde_json::json!({
            "cniVersion": "0.4.0",
            "name": bridge,
            "plugins": [{
                "type": "bridge",
                "bridge": bridge,
                "ipam": {
                    "type": "host-local",
                    "dataDir": ipam,
                    "ranges": [[{
                        "subnet": format!("10.213.{third}.0/24"),
                        "rangeStart": format!("10.213.{third}.10"),
                        "rangeEnd": format!("10.213.{third}.250"),
                    }]],
                },
            }],
        });
        let network = Self {
            conf_dir,
            addresses: ipam.join(bridge),
        };
        let path = network.conflist();
        fs::write(&path, list.to_string()).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(network)
    }

    /// The configuration's file.
    #[must_use]
    pub fn conflist(&self) -> PathBuf {
        self.conf_dir.join("10-hullspeed.conflist")
    }

    /// The configuration.
    pub fn configuration(&self) -> Result<serde_json::Value> {
        let path = self.conflist();
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(serde_json::from_slice(&text)?)
    }

    /// Replaces the configuration by a changed one, in one step.
    pub fn edit(&self, change: impl FnOnce(&mut serde_json::Value)) -> Result<()> {
        let mut list = self.configuration()?;
        change(&mut list);
        // CNI does not read a file of this name.
        let other = self.conf_dir.join("new");
        fs::write(&other, list.to_string()).with_context(|| format!("cannot write {}", other.display()))?;
        fs::rename(&other, self.conflist()).context("cannot replace the network's configuration")
    }

    /// Leaves pods and hulls `count` addresses, from `10.213.X.first` on.
    pub fn narrow(&self, first: u8, count: u8) -> Result<()> {
        let prefix = self.address_prefix()?;
        self.edit(|list| {
            let range = &mut list["plugins"][0]["ipam"]["ranges"][0][0];
            range["rangeStart"] = format!("{prefix}{first}").into();
            range["rangeEnd"] = format!("{prefix}{}", first + count - 1).into();
        })
    }

    /// All addresses begin with this text: three numbers with their points.
    pub fn address_prefix(&self) -> Result<String> {
        let list = self.configuration()?;
        let start = list["plugins"][0]["ipam"]["ranges"][0][0]["rangeStart"].as_str();
        let prefix = start.and_then(|start| Some(&start[..=start.rfind('.')?]));
        prefix.map(str::to_string).context("a network without a range")
    }

    /// Where host-local keeps a file for each address that it has given away.
    #[must_use]
    pub fn address_files(&self) -> &Path {
        &self.addresses
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
