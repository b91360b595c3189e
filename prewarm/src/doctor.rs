//! `doctor`: looks at everything the daemon depends on and says, for each thing, how it is and what to do. See
//! [`hullspeed_daemon::doctor`].

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use hullspeed_daemon::answer::Form;
use hullspeed_daemon::doctor::{ANSWER_LIMIT, Report};

use crate::config::Config;

mod containerd;
mod hulls;
mod kubelet;
mod node;
mod sockets;
#[cfg(test)]
mod tests;

/// Where things are on a node; tests have them elsewhere.
#[derive(Debug, Clone)]
struct Places {
    proc: PathBuf,
    kubelet: PathBuf,
    cgroup: PathBuf,
    selinux: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            kubelet: "/var/lib/kubelet".into(),
            cgroup: "/sys/fs/cgroup".into(),
            selinux: "/sys/fs/selinux".into(),
        }
    }
}

/// Looks at this node and prints what it finds.
pub async fn run(config: &Config, form: Form, out: &mut dyn Write) -> ExitCode {
    examine(config, &Places::default()).await.show(form, out)
}

async fn examine(config: &Config, places: &Places) -> Report {
    let mut report = Report::default();
    node::examine(config, places, &mut report);
    let facts = containerd::examine(config, &mut report).await;
    if let Some(facts) = &facts {
        node::examine_cgroup(config, places, facts.systemd_cgroup, &mut report);
    }
    let daemon = sockets::examine(config, places, &mut report).await;
    kubelet::examine(config, places, &mut report);
    hulls::examine(config, facts.is_some(), daemon, &mut report).await;
    report
}
