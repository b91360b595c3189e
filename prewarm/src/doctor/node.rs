//! The machine: rights, kernel, directories, cgroups, SELinux.

use std::fs;
use std::path::{Path, PathBuf};

use hullspeed_daemon::doctor::machine;
use rustix::fs::statfs;

use super::{Places, Report};
use crate::config::Config;

/// The first kernel with everything that an adoption needs: waiting for processes by descriptor.
const KERNEL: (u32, u32) = (5, 3);

/// File system type of a tmpfs, as the kernel numbers it.
const TMPFS_MAGIC: i64 = 0x0102_1994;

pub(super) fn examine(config: &Config, places: &Places, report: &mut Report) {
    machine::examine_rights("hullspeed-prewarm", report);
    examine_kernel(&machine::kernel_release(), report);
    examine_state(&config.state, report);
    if places.selinux.join("enforce").exists() && config.adoption.privileged {
        report.warn(
            "selinux",
            "SELinux is on",
            "privileged pods take the ordinary way, whatever adoption.privileged says; nothing has to be done",
        );
    } else {
        report.ok("selinux", "nothing stands in the way");
    }
}

fn examine_kernel(release: &str, report: &mut Report) {
    let needed = format!("Linux {}.{} or later is needed", KERNEL.0, KERNEL.1);
    match machine::kernel_version(release) {
        Some(version) if version >= KERNEL => report.ok("kernel", format!("Linux {release}")),
        Some(_) => report.fail("kernel", format!("Linux {release} is too old"), needed),
        None => report.warn("kernel", format!("no version can be read from {release:?}"), needed),
    }
}

fn examine_state(state: &Path, report: &mut Report) {
    // One that is not there yet will be made in the file system above it.
    let there = state.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match statfs(there) {
        Ok(found) if is_tmpfs(&found) => report.ok("state", format!("{} is on a tmpfs", state.display())),
        Ok(_) => report.warn(
            "state",
            format!("{} is not on a tmpfs", state.display()),
            "set state to a directory below /run: the journal is slower on a disk, and of no use after a reboot",
        ),
        Err(error) => report.fail(
            "state",
            format!("{} cannot be looked at: {error}", there.display()),
            "make it a directory that root can use",
        ),
    }
}

fn is_tmpfs(found: &rustix::fs::StatFs) -> bool {
    #[allow(clippy::unnecessary_cast, reason = "its width depends on the architecture")]
    let kind = found.f_type as i64;
    kind == TMPFS_MAGIC
}

/// The hierarchies that processes are sorted into: one of the second version, or each of the first.
fn hierarchies(cgroup: &Path) -> Option<(&'static str, Vec<PathBuf>)> {
    if cgroup.join("cgroup.controllers").exists() {
        return Some(("v2", vec![cgroup.to_owned()]));
    }
    let entries = fs::read_dir(cgroup).ok()?.filter_map(Result::ok);
    // cpu and the like may be links to cpu,cpuacct.
    let found = entries
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path());
    let found: Vec<_> = found.filter(|path| path.join("tasks").exists()).collect();
    (!found.is_empty()).then_some(("v1", found))
}

pub(super) fn examine_cgroup(config: &Config, places: &Places, systemd: bool, report: &mut Report) {
    let Some((version, hierarchies)) = hierarchies(&places.cgroup) else {
        let says = format!("no cgroup hierarchy is mounted below {}", places.cgroup.display());
        return report.fail("cgroup", says, "mount cgroups as containerd needs them");
    };
    let name = match systemd {
        true => format!("{}.slice", config.pool.cgroup),
        false => config.pool.cgroup.clone(),
    };
    let driver = if systemd { "systemd" } else { "cgroupfs" };
    let there = hierarchies.iter().filter(|path| path.join(&name).is_dir()).count();
    let of = hierarchies.len();
    // Nothing has to be done about a missing one: the daemon makes it before the first hull.
    report.ok(
        "cgroup",
        format!("{version}, driver {driver}, parent of hulls {name} is in {there} of {of} hierarchies"),
    );
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    #[test]
    fn old_and_odd_kernels_are_told() {
        for (release, level) in [
            ("6.18.0-rc1", Level::Ok),
            ("5.3", Level::Ok),
            ("5.2.21", Level::Fail),
            ("4.19.0-amd64", Level::Fail),
            ("", Level::Warn),
            ("x.y", Level::Warn),
            ("99999999999.1", Level::Warn),
        ] {
            let mut report = Report::default();
            examine_kernel(release, &mut report);
            assert_eq!(report.findings[0].level, level, "{release}");
        }
    }

    #[test]
    fn state_must_be_on_a_tmpfs() {
        let mut report = Report::default();
        examine_state(Path::new("/dev/shm/none/yet"), &mut report);
        examine_state(Path::new("/proc"), &mut report);
        let levels: Vec<_> = report.findings.iter().map(|finding| finding.level).collect();
        assert_eq!(levels, [Level::Ok, Level::Warn]);
    }

    #[test]
    fn both_versions_of_cgroups_are_seen() {
        let place = tempfile::tempdir().unwrap();
        let places = Places {
            cgroup: place.path().to_owned(),
            ..Places::default()
        };
        let mut report = Report::default();
        examine_cgroup(&Config::default(), &places, false, &mut report);
        for name in ["cpu", "memory"] {
            fs::create_dir(place.path().join(name)).unwrap();
            fs::write(place.path().join(name).join("tasks"), "").unwrap();
        }
        fs::create_dir(place.path().join("cpu/hullspeed")).unwrap();
        examine_cgroup(&Config::default(), &places, false, &mut report);
        fs::write(place.path().join("cgroup.controllers"), "").unwrap();
        fs::create_dir(place.path().join("hullspeed.slice")).unwrap();
        examine_cgroup(&Config::default(), &places, true, &mut report);
        let says: Vec<_> = report.findings.iter().map(|finding| finding.says.as_str()).collect();
        assert_eq!(report.findings[0].level, Level::Fail);
        assert!(
            says[1].contains("v1, driver cgroupfs") && says[1].contains("hullspeed is in 1 of 2"),
            "{says:?}"
        );
        assert!(
            says[2].contains("v2, driver systemd") && says[2].contains("hullspeed.slice is in 1 of 1"),
            "{says:?}"
        );
    }
}
