//! The kernel: rights, its version, FUSE and EROFS.

use std::fs::File;
use std::io;

use hullspeed_daemon::doctor::Report;
use hullspeed_daemon::doctor::machine::{examine_rights, kernel_release, kernel_version};
use rustix::thread::CapabilitySet;

use super::Places;
use crate::config::Config;

/// The first kernel that asks before somebody reads of a file.
const NATIVE: (u32, u32) = (6, 14);

pub(super) fn examine(config: &Config, places: &Places, report: &mut Report) {
    if examine_rights("hullspeed-snapshotter", report) {
        examine_capability(rustix::thread::capabilities(None).map(|sets| sets.effective), report);
    }
    examine_kernel(&kernel_release(), report);
    let fuse = File::options().read(true).write(true).open(&places.fuse);
    judge_fuse(fuse.map(drop), config.layers.lazy, places, report);
    judge_erofs(hullspeed_erofs::mount::is_supported(), report);
}

/// Mounting anything at all needs this one; containers have root often without it.
fn examine_capability(effective: rustix::io::Result<CapabilitySet>, report: &mut Report) {
    match effective {
        Ok(effective) if effective.contains(CapabilitySet::SYS_ADMIN) => report.ok("capability", "CAP_SYS_ADMIN"),
        Ok(_) => report.fail(
            "capability",
            "CAP_SYS_ADMIN is missing, so nothing can be mounted",
            "run hullspeed-snapshotter on the host, not in a container; or in one that is privileged",
        ),
        Err(errno) => report.warn("capability", format!("unknown: {errno}"), "CAP_SYS_ADMIN is needed"),
    }
}

fn examine_kernel(release: &str, report: &mut Report) {
    let advice = format!(
        "layers are mounted by FUSE; from Linux {}.{} on the kernel can serve them itself",
        NATIVE.0, NATIVE.1
    );
    match kernel_version(release) {
        Some(version) if version >= NATIVE => report.ok("kernel", format!("Linux {release}")),
        Some(_) => report.warn("kernel", format!("Linux {release} cannot fill files on demand"), advice),
        None => report.warn("kernel", format!("no version can be read from {release:?}"), advice),
    }
}

fn judge_fuse(opened: io::Result<()>, lazy: bool, places: &Places, report: &mut Report) {
    let path = places.fuse.display();
    match opened {
        Ok(()) => report.ok("fuse", format!("{path} can be opened")),
        Err(error) if lazy => report.fail(
            "fuse",
            format!("{path} cannot be opened: {error}"),
            "modprobe fuse; without it the daemon does not start, unless layers.lazy = false",
        ),
        Err(error) => report.warn(
            "fuse",
            format!("{path} cannot be opened: {error}"),
            "layers.lazy is false, so nothing is mounted by FUSE",
        ),
    }
}

fn judge_erofs(supported: bool, report: &mut Report) {
    if supported {
        report.ok("erofs", "the kernel has EROFS");
    } else {
        report.warn(
            "erofs",
            "the kernel has no EROFS",
            "modprobe erofs, or a kernel with CONFIG_EROFS_FS and CONFIG_EROFS_FS_BACKED_BY_FILE (6.12); layers are mounted by FUSE",
        );
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use hullspeed_daemon::doctor::Level;

    use super::*;

    fn level(look: impl FnOnce(&mut Report)) -> Level {
        let mut report = Report::default();
        look(&mut report);
        assert_eq!(report.findings.len(), 1);
        report.findings[0].level
    }

    #[test]
    fn old_kernels_mount_by_fuse() {
        for (release, expected) in [
            ("6.18.5", Level::Ok),
            ("6.14.0-rc1", Level::Ok),
            ("6.13.9", Level::Warn),
            ("5.10", Level::Warn),
            ("", Level::Warn),
        ] {
            assert_eq!(level(|report| examine_kernel(release, report)), expected, "{release}");
        }
    }

    #[test]
    fn without_the_right_to_mount_nothing_goes() {
        let with = |set| level(|report| examine_capability(set, report));
        assert_eq!(with(Ok(CapabilitySet::all())), Level::Ok);
        assert_eq!(with(Ok(CapabilitySet::CHOWN)), Level::Fail);
        assert_eq!(with(Err(rustix::io::Errno::PERM)), Level::Warn);
    }

    #[test]
    fn fuse_is_needed_for_lazy_layers_and_erofs_is_not() {
        let places = Places::with_containerd(Path::new("/x"));
        let missing = || Err(io::ErrorKind::NotFound.into());
        assert_eq!(level(|report| judge_fuse(Ok(()), true, &places, report)), Level::Ok);
        assert_eq!(
            level(|report| judge_fuse(missing(), true, &places, report)),
            Level::Fail
        );
        assert_eq!(
            level(|report| judge_fuse(missing(), false, &places, report)),
            Level::Warn
        );
        assert_eq!(level(|report| judge_erofs(true, report)), Level::Ok);
        assert_eq!(level(|report| judge_erofs(false, report)), Level::Warn);
    }
}
