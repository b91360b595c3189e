//! What is there of hulls: sandboxes in containerd, the mark, the journal.

use std::fs;

use hullspeed_proto::cri::v1::{ListPodSandboxRequest, PodSandboxState};

use super::Report;
use super::containerd::limited;
use crate::adopt::JOURNAL;
use crate::config::Config;
use crate::containerd::Containerd;
use crate::ledger::HULL_LABEL;

/// Sandboxes with the label of hulls.
#[derive(Debug, Default, PartialEq, Eq)]
struct Marked {
    /// With this node's mark.
    ours: usize,
    /// Of those, not running.
    dead: usize,
    /// With another mark.
    foreign: usize,
}

/// Looks at hulls; `daemon` tells whether somebody takes care of them.
pub(super) async fn examine(config: &Config, containerd: bool, daemon: bool, report: &mut Report) {
    let path = config.root.join("mark");
    // Read as it is: making one is the daemon's affair.
    let mark = fs::read_to_string(&path).unwrap_or_default();
    let mark = mark.trim_end();
    if containerd {
        match list(config, mark).await {
            Ok(marked) => judge(&marked, daemon, report),
            Err(status) => report.fail(
                "hulls",
                format!("cannot be listed: {}", status.message()),
                "see containerd's log",
            ),
        }
    }
    let journal = config.state.join(JOURNAL);
    match fs::metadata(&journal) {
        Ok(metadata) => report.ok("journal", format!("{} has {} bytes", journal.display(), metadata.len())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            report.ok(
                "journal",
                format!("{} is not there: no adoption since the boot", journal.display()),
            );
        }
        Err(error) => {
            let advice = "without a journal adoptions are not remembered; make the state directory usable";
            report.fail("journal", format!("{}: {error}", journal.display()), advice);
        }
    }
}

async fn list(config: &Config, mark: &str) -> Result<Marked, tonic::Status> {
    let mut runtime = Containerd::at(&config.containerd.address).runtime();
    let answer = limited(runtime.list_pod_sandbox(ListPodSandboxRequest::default())).await?;
    let mut marked = Marked::default();
    for sandbox in answer.items {
        match sandbox.labels.get(HULL_LABEL) {
            Some(value) if !mark.is_empty() && value == mark => {
                marked.ours += 1;
                marked.dead += usize::from(sandbox.state != i32::from(PodSandboxState::SandboxReady));
            }
            Some(_) => marked.foreign += 1,
            None => {}
        }
    }
    Ok(marked)
}

fn judge(marked: &Marked, daemon: bool, report: &mut Report) {
    let Marked { ours, dead, foreign } = marked;
    // A pod that lives in a hull looks like one to containerd until containerd is started again.
    let says = format!("{ours} sandboxes are hulls or pods in hulls, {dead} of them not running");
    match (daemon, ours) {
        (true, _) | (false, 0) => report.ok("hulls", says),
        (false, _) => report.warn(
            "hulls",
            format!("{says}; nobody takes care of them"),
            "start hullspeed-prewarm; before leaving it for good, drain it and restart containerd",
        ),
    }
    if *foreign > 0 {
        report.warn(
            "hulls",
            format!("{foreign} sandboxes have the label {HULL_LABEL} with another mark"),
            "they are shown as pods; remove those of the namespace \"hullspeed\": crictl pods --namespace hullspeed",
        );
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    #[test]
    fn hulls_that_nobody_takes_care_of_are_told() {
        let levels = |ours, foreign, daemon| {
            let mut report = Report::default();
            let dead = 0;
            judge(&Marked { ours, dead, foreign }, daemon, &mut report);
            report.findings.iter().map(|finding| finding.level).collect::<Vec<_>>()
        };
        assert_eq!(levels(3, 0, true), [Level::Ok]);
        assert_eq!(levels(0, 0, false), [Level::Ok]);
        assert_eq!(levels(3, 0, false), [Level::Warn]);
        assert_eq!(levels(0, 2, true), [Level::Ok, Level::Warn]);
    }
}
