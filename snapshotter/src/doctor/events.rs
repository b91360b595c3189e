//! fanotify's pre-content events, by which the kernel asks for what is missing: whether there are any on the filesystem of the cache.

use std::fs::File;
use std::io;
use std::path::Path;

use hullspeed_daemon::doctor::Report;
use hullspeed_daemon::doctor::processes::read;
use rustix::fs::{Mode, OFlags};

use super::{Places, cache};
use crate::config::{Config, MountChoice};
use crate::layer::native::group::Group;

/// Each layer that is mounted natively and not complete has a group; fewer than this are soon used up.
const FEW_GROUPS: u64 = 1024;

/// Where it ended.
#[derive(Debug)]
enum Refusal {
    /// No group can be made.
    Group(io::Error),
    /// There is a group, and no file can be made to try it on.
    File(io::Error),
    /// The file cannot be marked.
    Mark(io::Error),
}

pub(super) fn examine(config: &Config, places: &Places, report: &mut Report) {
    if config.layers.mount == MountChoice::Fuse || !config.layers.lazy {
        return report.ok(
            "fanotify",
            "not looked at: by the configuration no layer is mounted natively",
        );
    }
    judge(attempt(cache::existing(&config.root)), report);
    let limit = read(&places.proc.join("sys/fs/fanotify/max_user_groups"));
    judge_limit(limit.and_then(|text| text.trim().parse().ok()), report);
}

/// Marks a file without a name on the filesystem of `directory`; it goes with its descriptor, and the mark with it.
fn attempt(directory: &Path) -> Result<(), Refusal> {
    let group = Group::new().map_err(Refusal::Group)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR);
    let file = File::from(file.map_err(|errno| Refusal::File(errno.into()))?);
    group.mark(&file).map_err(Refusal::Mark)
}

fn judge(outcome: Result<(), Refusal>, report: &mut Report) {
    let Err(refusal) = outcome else {
        return report.ok(
            "fanotify",
            "the kernel asks before somebody reads of the cache's filesystem",
        );
    };
    let (says, error) = match &refusal {
        Refusal::Group(error) => ("no group for pre-content events can be made", error),
        Refusal::File(error) => ("cannot be tried: no file can be made on the cache's filesystem", error),
        Refusal::Mark(error) => ("no file of the cache can be marked for pre-content events", error),
    };
    let advice = match (&refusal, error.raw_os_error()) {
        (Refusal::File(_), _) => "make the root a directory on a filesystem that can be written to",
        (_, Some(libc::EPERM)) => "CAP_SYS_ADMIN in the first user namespace is needed: run the daemon on the host",
        (_, Some(libc::EMFILE)) => "all groups of the user are taken: raise fs.fanotify.max_user_groups",
        (_, Some(libc::EINVAL | libc::ENOSYS)) => {
            "the kernel has no pre-content events: Linux 6.14 with CONFIG_FANOTIFY_ACCESS_PERMISSIONS has"
        }
        (_, Some(libc::EOPNOTSUPP)) => "the filesystem has no pre-content events: put the root on ext4, XFS or btrfs",
        _ => "see dmesg",
    };
    report.warn(
        "fanotify",
        format!("{says}: {error}"),
        format!("{advice}; layers are mounted by FUSE"),
    );
}

fn judge_limit(limit: Option<u64>, report: &mut Report) {
    match limit {
        Some(limit) if limit < FEW_GROUPS => report.warn(
            "groups",
            format!("fs.fanotify.max_user_groups is {limit}: so many incomplete layers are mounted natively, and the rest by FUSE"),
            "echo fs.fanotify.max_user_groups=8192 > /etc/sysctl.d/90-hullspeed.conf && sysctl --system",
        ),
        Some(limit) => report.ok("groups", format!("fs.fanotify.max_user_groups is {limit}")),
        None => report.warn(
            "groups",
            "fs.fanotify.max_user_groups cannot be read",
            "if fanotify is reported to work above, nothing has to be done",
        ),
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    fn found(look: impl FnOnce(&mut Report)) -> (Level, String) {
        let mut report = Report::default();
        look(&mut report);
        let finding = report.findings.remove(0);
        (finding.level, finding.says + " " + &finding.advice.unwrap_or_default())
    }

    #[test]
    fn each_refusal_has_its_own_advice() {
        let error = io::Error::from_raw_os_error;
        for (outcome, level, word) in [
            (Ok(()), Level::Ok, "asks before"),
            (Err(Refusal::Group(error(libc::EPERM))), Level::Warn, "CAP_SYS_ADMIN"),
            (Err(Refusal::Group(error(libc::EMFILE))), Level::Warn, "max_user_groups"),
            (Err(Refusal::Group(error(libc::ENOSYS))), Level::Warn, "6.14"),
            (Err(Refusal::Mark(error(libc::EINVAL))), Level::Warn, "6.14"),
            (
                Err(Refusal::Mark(error(libc::EOPNOTSUPP))),
                Level::Warn,
                "ext4, XFS or btrfs",
            ),
            (Err(Refusal::File(error(libc::EROFS))), Level::Warn, "written to"),
            (Err(Refusal::Mark(error(libc::ENOMEM))), Level::Warn, "dmesg"),
        ] {
            let said = found(|report| judge(outcome, report));
            assert!(said.0 == level && said.1.contains(word), "{word}: {said:?}");
        }
    }

    #[test]
    fn few_groups_are_told() {
        assert_eq!(found(|report| judge_limit(Some(128), report)).0, Level::Warn);
        assert_eq!(found(|report| judge_limit(Some(8192), report)).0, Level::Ok);
        assert_eq!(found(|report| judge_limit(None, report)).0, Level::Warn);
    }

    #[test]
    fn privileged_a_filesystem_without_events_is_told_from_one_that_has_them() {
        let has = |path: &str| attempt(Path::new(path));
        assert!(matches!(has("/dev/shm"), Err(Refusal::Mark(error)) if error.raw_os_error() == Some(libc::EOPNOTSUPP)));
        assert!(matches!(has("/proc"), Err(Refusal::File(_))));
        let here = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        attempt(here.path()).unwrap();
        assert_eq!(std::fs::read_dir(here.path()).unwrap().count(), 0);
    }
}
