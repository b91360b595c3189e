//! What the system lets the keeper have.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::child::lower_oom_score;
use crate::log::Log;
use crate::options::Options;

/// The keeper's score for the kernel's killer: nearly never.
const OOM_SCORE: i32 = -999;

/// Descriptors that the keeper needs for itself, and those of one message.
const OWN_DESCRIPTORS: u64 = 512;

/// The most descriptors that can be kept: in a new process each may be open twice for a moment.
pub(super) fn capacity(options: &Options, log: &mut Log) -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    let most = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    let room = most.map_or(u64::MAX, |most| most.saturating_sub(OWN_DESCRIPTORS) / 2);
    let room = usize::try_from(room).unwrap_or(usize::MAX);
    if room < options.max_descriptors {
        let fields = [
            ("wanted", options.max_descriptors.into()),
            ("kept_at_most", room.into()),
        ];
        log.warn(
            "the limit of open files is too low for all descriptors that should be kept",
            &fields,
        );
    }
    options.max_descriptors.min(room)
}

/// Lowers the keeper's score, and says which one the program has to have.
pub(super) fn lower(log: &mut Log) -> Option<i32> {
    match lower_oom_score(OOM_SCORE) {
        Ok(before) => Some(before),
        Err(error) => {
            log.warn(
                "the keeper is not protected from the kernel's killer",
                &[("error", error.to_string().as_str().into())],
            );
            None
        }
    }
}
