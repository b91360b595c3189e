//! The directory of everything that is kept: what its filesystem can do, and how much room there is.

use std::path::Path;

use hullspeed_daemon::answer::size;
use hullspeed_daemon::doctor::Report;

use crate::config::Config;
use crate::explain::filesystem;
use crate::layer::layers::inspector::Space;

pub(super) fn examine(config: &Config, report: &mut Report) {
    let place = existing(&config.root);
    match filesystem::measure(place, Space::default()) {
        Ok(space) => {
            judge_filesystem(&config.root, space.filesystem, report);
            judge_room(config, &space, report);
        }
        Err(error) => report.fail(
            "filesystem",
            format!("{} cannot be looked at: {error}", place.display()),
            "make the root a directory that root can use",
        ),
    }
}

/// The directory, or the one that it will be made in.
pub(super) fn existing(root: &Path) -> &Path {
    root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn judge_filesystem(root: &Path, kind: &str, report: &mut Report) {
    let says = format!("{} is on {kind}", root.display());
    match kind {
        "ext4" | "xfs" | "btrfs" => report.ok("filesystem", says),
        // What containers write goes to directories of overlayfs there.
        "overlayfs" | "nfs" | "fuse" => report.fail(
            "filesystem",
            format!("{says}, which overlayfs does not take for what containers write"),
            "put the root on ext4, XFS or btrfs",
        ),
        _ => report.warn(
            "filesystem",
            format!("{says}, which has no pre-content events"),
            "layers are mounted by FUSE; ext4, XFS and btrfs can do better",
        ),
    }
}

fn judge_room(config: &Config, space: &Space, report: &mut Report) {
    let wanted = config.cache.min_free.of(space.size);
    let says = format!("{} of {} are free", size(space.free), size(space.size));
    if space.free <= wanted {
        report.warn(
            "room",
            format!("{says}, and cache.min_free keeps {} free", size(wanted)),
            "make room, or lower cache.min_free; what containers read is fetched, and nothing ahead of them",
        );
    } else {
        report.ok("room", says);
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    fn level(look: impl FnOnce(&mut Report)) -> Level {
        let mut report = Report::default();
        look(&mut report);
        report.findings[0].level
    }

    #[test]
    fn filesystems_are_told_apart() {
        for (kind, expected) in [
            ("ext4", Level::Ok),
            ("xfs", Level::Ok),
            ("btrfs", Level::Ok),
            ("tmpfs", Level::Warn),
            ("zfs", Level::Warn),
            ("other", Level::Warn),
            ("overlayfs", Level::Fail),
            ("nfs", Level::Fail),
        ] {
            let found = level(|report| judge_filesystem(Path::new("/r"), kind, report));
            assert_eq!(found, expected, "{kind}");
        }
    }

    #[test]
    fn room_is_what_the_configuration_leaves() {
        let free = |free| Space {
            size: 1000,
            free,
            ..Space::default()
        };
        // Five hundredths are to stay free.
        let config = Config::default();
        assert_eq!(level(|report| judge_room(&config, &free(51), report)), Level::Ok);
        assert_eq!(level(|report| judge_room(&config, &free(50), report)), Level::Warn);
    }

    #[test]
    fn a_root_that_is_not_there_yet_is_looked_for_above() {
        let place = tempfile::tempdir().unwrap();
        assert_eq!(existing(&place.path().join("a/b")), place.path());
    }
}
