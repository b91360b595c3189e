//! The sockets: who serves the kubelet, whether the daemon and the snapshotter answer.

use std::os::unix::net::UnixStream;

use hullspeed_daemon::doctor::processes;
use hullspeed_daemon::error::chain;
use hullspeed_proto::cri::v1::VersionRequest;
use hullspeed_proto::hullspeed::prewarm::v1 as api;
use tokio::time::timeout;

use super::containerd::{advice, limited};
use super::{ANSWER_LIMIT, Places, Report};
use crate::cli::table::names;
use crate::client::Client;
use crate::config::Config;
use crate::containerd::Containerd;

/// The daemon's name among processes, which the kernel cuts to 15 bytes.
const PROCESS: &str = "hullspeed-prewa";

/// Looks at the sockets; whether the daemon runs.
pub(super) async fn examine(config: &Config, places: &Places, report: &mut Report) -> bool {
    let served = examine_relay(config, places, report);
    let daemon = examine_control(config, report).await;
    // Where only the service manager listens, a question would start the daemon; a doctor changes nothing.
    if served && daemon {
        examine_way_through(config, report).await;
    }
    let snapshotter = &config.warm.snapshotter;
    match UnixStream::connect(snapshotter) {
        Ok(_) => report.ok("snapshotter", format!("listens on {}", snapshotter.display())),
        Err(error) => report.warn(
            "snapshotter",
            format!("{}: {error}", snapshotter.display()),
            "without hullspeed-snapshotter no image is warmed and no credentials are handed over",
        ),
    }
    daemon
}

fn examine_relay(config: &Config, places: &Places, report: &mut Report) -> bool {
    let socket = config.socket.display();
    let owners = processes::listeners(&config.socket, &places.proc);
    let ours = owners.iter().find(|(_, name)| name == PROCESS);
    let activated = owners.iter().any(|(process, _)| *process == 1);
    match (ours, owners.first()) {
        (Some((process, _)), _) => {
            let whose = if activated { "the service manager's, and " } else { "" };
            report.ok(
                "socket",
                format!("{socket} is {whose}served by hullspeed-prewarm (process {process})"),
            );
            true
        }
        (None, Some(_)) if activated => {
            report.ok(
                "socket",
                format!("{socket} is the service manager's, which starts the daemon when it is needed"),
            );
            false
        }
        (None, Some((process, name))) => {
            let says = format!("{socket} is served by {name} (process {process})");
            let advice = "another program serves the relay's socket; stop it, or set socket";
            report.fail("socket", says, advice);
            false
        }
        (None, None) => {
            let advice = "systemctl start hullspeed-prewarm.socket hullspeed-prewarm.service";
            report.warn("socket", format!("nobody listens on {socket}"), advice);
            false
        }
    }
}

async fn examine_control(config: &Config, report: &mut Report) -> bool {
    let client = Client::at(&config.control_socket);
    let status = match timeout(ANSWER_LIMIT, client.status()).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => {
            report.warn(
                "daemon",
                chain(&error),
                "systemctl start hullspeed-prewarm; see its log if it does not stay",
            );
            return false;
        }
        Err(_) => {
            let says = format!(
                "no answer on {} within {ANSWER_LIMIT:?}",
                config.control_socket.display()
            );
            report.fail("daemon", says, "see its log; restarting it disturbs no pod");
            return false;
        }
    };
    report.ok(
        "daemon",
        format!("version {} runs; {} pods are in hulls", status.version, status.adopted),
    );
    judge_records(&status.unbranded.unwrap_or_default(), report);
    let pool = status.pool.unwrap_or_default();
    let ready: u64 = pool.handlers.iter().map(|handler| handler.ready).sum();
    match pool.state.as_str() {
        "on" => {
            let networks = pool.networks.join(", ");
            report.ok("pool", format!("on, {ready} hulls are ready; networks: {networks}"));
        }
        "paused" => report.warn(
            "pool",
            format!("paused, {ready} hulls are ready"),
            "hullspeed-prewarm pool resume",
        ),
        "drained" => report.warn(
            "pool",
            "drained: every pod takes the ordinary way",
            "hullspeed-prewarm pool resume",
        ),
        _ => report.warn(
            "pool",
            format!("off ({}): {}", pool.reason, pool.detail),
            advice(&pool.reason),
        ),
    }
    if let Some(failure) = pool.failure {
        let says = format!(
            "the last hull could not be made ({} in a row): {}",
            failure.in_a_row, failure.reason
        );
        report.warn("pool", says, "see containerd's log; ordinary pods meet the same");
    }
    true
}

/// Whether containerd, started anew, would know all pods.
fn judge_records(unbranded: &api::UnbrandedPods, report: &mut Report) {
    let api::UnbrandedPods { pending, refused } = unbranded;
    if !refused.is_empty() {
        report.fail(
            "records",
            format!(
                "containerd's records of {} pods stay their hulls': {}",
                refused.len(),
                names(refused)
            ),
            "do not leave the relay while they run: delete these pods first; the daemon's log says why",
        );
    } else if *pending > 0 {
        report.warn(
            "records",
            format!("containerd's records of {pending} pods are not rewritten yet"),
            "before leaving the relay wait for them: hullspeed-prewarm drain --wait",
        );
    } else {
        report.ok("records", "containerd's records of pods in hulls are the pods'");
    }
}

async fn examine_way_through(config: &Config, report: &mut Report) {
    let relay = Containerd::at(&config.socket);
    match limited(relay.runtime().version(VersionRequest::default())).await {
        Ok(version) => report.ok(
            "relay",
            format!("containerd {} answers through it", version.runtime_version),
        ),
        Err(status) => report.fail(
            "relay",
            format!("containerd does not answer through it: {}", status.message()),
            "if containerd answers by itself, see the daemon's log",
        ),
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    #[test]
    fn pods_that_leaving_would_lose_are_told() {
        let pod = api::UnbrandedPod {
            sandbox_id: "0a1b".into(),
            pod_namespace: "shop".into(),
            pod_name: "web".into(),
        };
        for (pending, refused, level) in [
            (0, vec![], Level::Ok),
            (2, vec![], Level::Warn),
            (2, vec![pod], Level::Fail),
        ] {
            let mut report = Report::default();
            let named = !refused.is_empty();
            judge_records(&api::UnbrandedPods { pending, refused }, &mut report);
            let [finding] = report.findings.as_slice() else {
                panic!("{report:?}")
            };
            assert_eq!(finding.level, level);
            assert_eq!(finding.says.contains("shop/web (0a1b)"), named, "{finding:?}");
        }
    }
}
