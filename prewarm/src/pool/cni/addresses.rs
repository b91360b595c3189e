//! How many addresses the `host-local` plugin has left: its ranges without the files that it keeps, one for each address.

use std::net::IpAddr;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::Network;
use super::verdict::{flannel_subnet_file, text};

/// Where `host-local` keeps its files unless told otherwise.
const DATA_DIR: &str = "/var/lib/cni/networks";

/// Ranges of one network that are counted; more are not a configuration that somebody wrote.
const MAX_RANGES: usize = 256;

/// Allocated addresses that are counted; with more, the number left is unknown.
const MAX_ALLOCATED: usize = 1 << 20;

/// Largest file of flannel's.
const MAX_SUBNET_FILE: u64 = 64 << 10;

/// Both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    v4: bool,
    first: u128,
    last: u128,
    /// Never handed out.
    gateway: u128,
}

impl Range {
    fn contains(&self, v4: bool, number: u128) -> bool {
        self.v4 == v4 && (self.first..=self.last).contains(&number)
    }

    fn size(&self) -> u128 {
        let all = (self.last - self.first).saturating_add(1);
        all - u128::from(self.contains(self.v4, self.gateway))
    }
}

/// Ranges of which every pod gets one address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct AddressSet {
    directory: PathBuf,
    ranges: Vec<Range>,
}

/// The sets of a network whose addresses `host-local` hands out; `None` for others, or if they cannot be told.
pub(super) fn of_network(network: &Network) -> Option<Vec<AddressSet>> {
    let mut sets = Vec::new();
    for plugin in &network.plugins {
        if text(plugin, "type") == "flannel" {
            let range = flannel_range(plugin)?;
            let directory = PathBuf::from(DATA_DIR).join(&network.name);
            sets.push(AddressSet {
                directory,
                ranges: vec![range],
            });
        } else if let Some(Value::Object(ipam)) = plugin.get("ipam")
            && !ipam.is_empty()
        {
            sets.extend(of_ipam(&network.name, ipam)?);
        }
    }
    (!sets.is_empty()).then_some(sets)
}

fn of_ipam(network: &str, ipam: &Map<String, Value>) -> Option<Vec<AddressSet>> {
    if text(ipam, "type") != "host-local" {
        return None;
    }
    let directory = match text(ipam, "dataDir") {
        "" => PathBuf::from(DATA_DIR),
        path => PathBuf::from(path),
    };
    let mut sets = Vec::new();
    if ipam.contains_key("subnet") {
        sets.push(vec![range(ipam)?]);
    }
    if let Some(list) = ipam.get("ranges").filter(|value| !value.is_null()) {
        for set in list.as_array()? {
            let ranges = set.as_array()?.iter().map(|item| range(item.as_object()?));
            sets.push(ranges.collect::<Option<Vec<_>>>()?);
        }
    }
    if sets.iter().map(Vec::len).sum::<usize>() > MAX_RANGES || sets.iter().any(Vec::is_empty) {
        return None;
    }
    let sets = sets.into_iter().map(|ranges| AddressSet {
        directory: directory.join(network),
        ranges,
    });
    Some(sets.collect())
}

fn number(address: IpAddr) -> (bool, u128) {
    match address {
        IpAddr::V4(v4) => (true, u128::from(u32::from(v4))),
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => (true, u128::from(u32::from(v4))),
            None => (false, u128::from(v6)),
        },
    }
}

/// A range as the plugin reads it: from the network's first address, which is the gateway unless told otherwise, to its
/// last, which in IPv4 is not handed out.
fn range(map: &Map<String, Value>) -> Option<Range> {
    let mut range = subnet(text(map, "subnet"))?;
    let given = |key: &str| -> Option<Option<u128>> {
        match text(map, key) {
            "" => Some(None),
            address => {
                let (v4, number) = number(address.parse().ok()?);
                (v4 == range.v4).then_some(Some(number))
            }
        }
    };
    let (first, last, gateway) = (given("rangeStart")?, given("rangeEnd")?, given("gateway")?);
    range.first = first.unwrap_or(range.first);
    range.last = last.unwrap_or(range.last);
    range.gateway = gateway.unwrap_or(range.gateway);
    (range.first <= range.last).then_some(range)
}

fn subnet(text: &str) -> Option<Range> {
    let (address, length) = text.split_once('/')?;
    let (v4, address) = number(address.parse().ok()?);
    let bits: u32 = if v4 { 32 } else { 128 };
    let host_bits = bits.checked_sub(length.parse().ok()?)?;
    // The plugin refuses networks that have no room.
    if host_bits < 2 {
        return None;
    }
    let mask = if host_bits == 128 {
        u128::MAX
    } else {
        (1 << host_bits) - 1
    };
    let network = address & !mask;
    Some(Range {
        v4,
        first: network + 1,
        last: (network | mask) - u128::from(v4),
        gateway: network + 1,
    })
}

fn flannel_range(plugin: &Map<String, Value>) -> Option<Range> {
    let path = flannel_subnet_file(plugin);
    if std::fs::metadata(&path).ok()?.len() > MAX_SUBNET_FILE {
        return None;
    }
    let content = std::fs::read_to_string(path).ok()?;
    let mut lines = content.lines();
    // The file names the node's own address in the subnet, which is its gateway.
    subnet(lines.find_map(|line| line.trim().strip_prefix("FLANNEL_SUBNET="))?)
}

/// Addresses that further pods can get; `None` if that cannot be told.
pub(in super::super) fn free<'a>(networks: impl Iterator<Item = &'a Network>) -> Option<u64> {
    let mut least: Option<u64> = None;
    for network in networks {
        for set in network.addresses.as_ref()? {
            let free = free_in(set)?;
            least = Some(least.map_or(free, |least| least.min(free)));
        }
    }
    least
}

fn free_in(set: &AddressSet) -> Option<u64> {
    let size = set
        .ranges
        .iter()
        .fold(0u128, |sum, range| sum.saturating_add(range.size()));
    let mut allocated: u128 = 0;
    match std::fs::read_dir(&set.directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(_) => return None,
        Ok(entries) => {
            for (count, entry) in entries.enumerate() {
                if count >= MAX_ALLOCATED {
                    return None;
                }
                let name = entry.ok()?.file_name();
                let Some(Ok(address)) = name.to_str().map(str::parse::<IpAddr>) else {
                    continue;
                };
                let (v4, number) = number(address);
                let taken = |range: &Range| range.contains(v4, number) && number != range.gateway;
                allocated += u128::from(set.ranges.iter().any(taken));
            }
        }
    }
    Some(u64::try_from(size.saturating_sub(allocated)).unwrap_or(u64::MAX))
}
