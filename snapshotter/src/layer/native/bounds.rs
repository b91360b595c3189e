//! The bounds of the node that native mounts run into: descriptors of this process, and fanotify groups of a user.

use std::fs;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The kernel's bound on groups; 128 as it comes, and each layer that is not complete has one.
const GROUPS: &str = "/proc/sys/fs/fanotify/max_user_groups";
/// What it is raised to: as many as the journal has slots, and others' besides.
const WANTED_GROUPS: u64 = 4096;

/// Raises what may be raised. What stays low costs layers that are mounted by FUSE instead, and says so.
pub fn raise() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(errno) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(limit = limit.current, %errno, "the limit of open files stays");
    }
    let groups = fs::read_to_string(GROUPS)
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    match groups {
        Some(groups) if groups < WANTED_GROUPS => match fs::write(GROUPS, WANTED_GROUPS.to_string()) {
            Ok(()) => tracing::info!(was = groups, now = WANTED_GROUPS, "raised {GROUPS}"),
            Err(error) => {
                tracing::warn!(groups, %error, "{GROUPS} stays: so many incomplete layers can be mounted natively")
            }
        },
        Some(_) | None => {}
    }
}
