//! The cgroup that hulls are in. Statistics of a sandbox whose parent does not exist fail, and with them those of all
//! others, so it has to be there first.

use std::io;
use std::path::{Path, PathBuf};

/// Cannot make the cgroup.
#[derive(Debug, thiserror::Error)]
pub(super) enum CgroupError {
    /// The mounts cannot be read.
    #[error("cannot read the table of mounts")]
    Mounts(#[source] io::Error),
    /// There is no hierarchy.
    #[error("no cgroup hierarchy is mounted")]
    None,
    /// It cannot be made.
    #[error("cannot make the cgroup {}", path.display())]
    Make {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The parent of hulls as CRI is told. systemd wants a slice, of which runc uses only the last part; containerd reads
/// statistics at the whole path, and on cgroup v2 refuses one that is not absolute.
pub(super) fn parent(name: &str, systemd: bool) -> String {
    if systemd {
        format!("/{name}.slice")
    } else {
        format!("/{name}")
    }
}

/// Makes the cgroup in every hierarchy. systemd's slices are made by systemd, with the first hull in them.
pub(super) fn ensure(name: &str, systemd: bool) -> Result<(), CgroupError> {
    if systemd {
        return Ok(());
    }
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::Mounts)?;
    let hierarchies = hierarchies(&table);
    if hierarchies.is_empty() {
        return Err(CgroupError::None);
    }
    for hierarchy in hierarchies {
        let path = hierarchy.join(name);
        std::fs::create_dir_all(&path).map_err(|source| CgroupError::Make { path, source })?;
    }
    Ok(())
}

/// Where hierarchies of either version are mounted.
fn hierarchies(mountinfo: &str) -> Vec<PathBuf> {
    let mounts = mountinfo.lines().filter_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let kind = right.split(' ').next()?;
        let point = left.split(' ').nth(4)?;
        // Points with spaces are escaped; no cgroup is mounted at one.
        matches!(kind, "cgroup" | "cgroup2").then(|| Path::new(point).to_owned())
    });
    mounts.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_hierarchies_of_both_versions_are_found() {
        let table = "24 30 0:22 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
                     25 24 0:23 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n\
                     26 24 0:24 / /sys/fs/cgroup/cpu,cpuacct rw shared:9 - cgroup cgroup rw,cpu\n\
                     27 1 0:25 / /sys rw - sysfs sysfs rw\nrubbish\n";
        let expected = [
            PathBuf::from("/sys/fs/cgroup/unified"),
            PathBuf::from("/sys/fs/cgroup/cpu,cpuacct"),
        ];
        assert_eq!(hierarchies(table), expected);
        assert_eq!(
            (parent("hullspeed", false).as_str(), parent("hullspeed", true).as_str()),
            ("/hullspeed", "/hullspeed.slice")
        );
    }
}
