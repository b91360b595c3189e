//! `doctor`: what is in the way of lazy layers on this node, and what to do. See [`hullspeed_daemon::doctor`].

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use hullspeed_daemon::answer::Form;
use hullspeed_daemon::doctor::{ANSWER_LIMIT, Report};

use crate::config::Config;

mod cache;
mod containerd;
mod credentials;
mod daemon;
mod events;
mod kernel;
mod mounts;
#[cfg(test)]
mod tests;

/// Where containerd answers if nobody says otherwise.
pub const CONTAINERD: &str = "/run/containerd/containerd.sock";

/// Where things are on a node; tests have them elsewhere.
#[derive(Debug, Clone)]
struct Places {
    proc: PathBuf,
    fuse: PathBuf,
    containerd: PathBuf,
    containerd_config: PathBuf,
}

impl Places {
    fn with_containerd(socket: &Path) -> Self {
        Self {
            proc: "/proc".into(),
            fuse: "/dev/fuse".into(),
            containerd: socket.to_owned(),
            containerd_config: "/etc/containerd/config.toml".into(),
        }
    }
}

/// Looks at this node, whose containerd is at `containerd`, and prints what it finds.
pub async fn run(config: &Config, containerd: &Path, form: Form, out: &mut dyn Write) -> ExitCode {
    let places = Places::with_containerd(containerd);
    examine(config, &places).await.show(form, out)
}

async fn examine(config: &Config, places: &Places) -> Report {
    let mut report = Report::default();
    kernel::examine(config, places, &mut report);
    events::examine(config, places, &mut report);
    cache::examine(config, &mut report);
    let process = daemon::examine(config, places, &mut report).await;
    containerd::examine(config, places, &mut report).await;
    credentials::examine(config, places, process, &mut report);
    report
}
