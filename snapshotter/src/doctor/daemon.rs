//! The running daemon: who serves its socket and the address of its metrics, how it is, and how it mounts layers.

use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use hullspeed_daemon::doctor::Report;
use hullspeed_daemon::doctor::processes;
use hullspeed_daemon::error::chain;
use hullspeed_proto::hullspeed::control::v1 as api;
use tokio::time::timeout;
use tonic::Code;

use super::{ANSWER_LIMIT, Places, mounts};
use crate::client::Client;
use crate::config::Config;

/// The daemon's name among processes, which the kernel cuts to 15 bytes.
const PROCESS: &str = "hullspeed-snaps";
/// Limit on a connection to an address of this machine.
const CONNECT_LIMIT: Duration = Duration::from_secs(1);

/// Looks at the daemon; its process if it runs.
pub(super) async fn examine(config: &Config, places: &Places, report: &mut Report) -> Option<u32> {
    let owners = processes::listeners(&config.socket, &places.proc);
    judge_socket(&config.socket.display().to_string(), &owners, report);
    let process = owners
        .iter()
        .find(|(_, name)| name == PROCESS)
        .map(|(process, _)| *process);
    // A question would start a daemon with socket activation; a doctor changes nothing.
    if process.is_some() {
        ask(config, places, report).await;
    }
    if let Some(address) = config.metrics.address {
        let answers = connects(address).await;
        judge_metrics(&address.to_string(), process.is_some(), answers, report);
    } else {
        report.ok("metrics", "switched off in the configuration");
    }
    process
}

fn judge_socket(socket: &str, owners: &[(u32, String)], report: &mut Report) {
    let ours = owners.iter().find(|(_, name)| name == PROCESS);
    let activated = owners.iter().any(|(process, _)| *process == 1);
    match (ours, owners.first()) {
        (Some((process, _)), _) => {
            report.ok(
                "socket",
                format!("{socket} is served by hullspeed-snapshotter (process {process})"),
            );
        }
        (None, Some(_)) if activated => report.ok(
            "socket",
            format!("{socket} is the service manager's, which starts the daemon when it is needed"),
        ),
        (None, Some((process, name))) => report.fail(
            "socket",
            format!("{socket} is served by {name} (process {process})"),
            "another program serves the snapshotter's socket; stop it, or set socket",
        ),
        (None, None) => report.warn(
            "socket",
            format!("nobody listens on {socket}, so what follows is not known of the running daemon"),
            "systemctl start hullspeed-snapshotter; see its log if it does not stay",
        ),
    }
}

async fn ask(config: &Config, places: &Places, report: &mut Report) {
    let client = Client::at(&config.socket);
    match timeout(ANSWER_LIMIT, client.status()).await {
        Ok(Ok(status)) => judge_status(&status, report),
        Ok(Err(error)) => {
            return report.fail(
                "daemon",
                chain(&error),
                "see its log; restarting it disturbs no container",
            );
        }
        Err(_) => {
            let says = format!("no answer on {} within {ANSWER_LIMIT:?}", config.socket.display());
            return report.fail("daemon", says, "see its log; restarting it disturbs no container");
        }
    }
    match timeout(ANSWER_LIMIT, client.diagnose()).await {
        Ok(Ok(diagnosis)) => mounts::examine(&diagnosis, places, report),
        Ok(Err(error)) if error.code() == Some(Code::Unimplemented) => report.warn(
            "mounts",
            "the running daemon is older than this command, and does not tell",
            "restart it",
        ),
        Ok(Err(error)) => report.fail("mounts", chain(&error), "see the daemon's log"),
        Err(_) => report.fail(
            "mounts",
            format!("no answer within {ANSWER_LIMIT:?}"),
            "see the daemon's log",
        ),
    }
}

fn judge_status(status: &api::StatusResponse, report: &mut Report) {
    let own = env!("CARGO_PKG_VERSION");
    let says = format!(
        "version {} runs; {} layers are mounted",
        status.version, status.layers_mounted
    );
    if status.version == own {
        report.ok("daemon", says);
    } else {
        report.warn(
            "daemon",
            says,
            format!("this command is version {own}: restart the daemon"),
        );
    }
    let no_room = status
        .cache
        .as_ref()
        .map(|cache| cache.no_room.as_str())
        .unwrap_or_default();
    if !no_room.is_empty() {
        report.warn(
            "cache",
            format!("no room to spare: {no_room}"),
            "raise cache.quota or make room; what containers read is fetched, and nothing ahead of them",
        );
    }
    let troubled: Vec<&str> = status
        .hosts
        .iter()
        .filter(|host| host.state != "ok")
        .map(|host| host.host.as_str())
        .collect();
    if !troubled.is_empty() {
        report.warn(
            "registries",
            format!("these do not answer as they should: {}", troubled.join(", ")),
            "hullspeed-snapshotter status shows what they said last",
        );
    }
}

async fn connects(address: SocketAddr) -> bool {
    let connect = move || TcpStream::connect_timeout(&address, CONNECT_LIMIT).is_ok();
    tokio::task::spawn_blocking(connect).await.unwrap_or(false)
}

fn judge_metrics(address: &str, daemon: bool, answers: bool, report: &mut Report) {
    match (daemon, answers) {
        (true, true) => report.ok("metrics", format!("somebody listens on {address}")),
        (false, false) => report.ok("metrics", format!("{address} is free for the daemon")),
        (true, false) => report.warn(
            "metrics",
            format!("nobody listens on {address}"),
            "the daemon could not bind it when it started; see its log, or set metrics.address",
        ),
        (false, true) => report.warn(
            "metrics",
            format!("another program listens on {address}"),
            "set metrics.address to another one, or \"\" for none",
        ),
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_daemon::doctor::Level;

    use super::*;

    fn levels(look: impl FnOnce(&mut Report)) -> Vec<(&'static str, Level)> {
        let mut report = Report::default();
        look(&mut report);
        report
            .findings
            .iter()
            .map(|finding| (finding.check, finding.level))
            .collect()
    }

    #[test]
    fn who_serves_the_socket_matters() {
        let owner = |process, name: &str| (process, name.to_owned());
        for (owners, expected) in [
            (vec![owner(7, PROCESS)], Level::Ok),
            (vec![owner(1, "systemd"), owner(7, PROCESS)], Level::Ok),
            (vec![owner(1, "systemd")], Level::Ok),
            (vec![owner(7, "other")], Level::Fail),
            (vec![], Level::Warn),
        ] {
            let found = levels(|report| judge_socket("/s", &owners, report));
            assert_eq!(found, [("socket", expected)], "{owners:?}");
        }
        assert!(env!("CARGO_PKG_NAME").starts_with(PROCESS) && PROCESS.len() == 15);
    }

    #[test]
    fn what_the_daemon_complains_of_is_passed_on() {
        let mut status = api::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        };
        assert_eq!(levels(|report| judge_status(&status, report)), [("daemon", Level::Ok)]);
        status.version = "0".to_owned();
        status.cache = Some(api::CacheUsageResponse {
            no_room: "1 B are free".to_owned(),
            ..Default::default()
        });
        for state in ["ok", "backing off"] {
            status.hosts.push(api::HostHealth {
                host: state.to_owned(),
                state: state.to_owned(),
                ..Default::default()
            });
        }
        let expected = [
            ("daemon", Level::Warn),
            ("cache", Level::Warn),
            ("registries", Level::Warn),
        ];
        assert_eq!(levels(|report| judge_status(&status, report)), expected);
    }

    #[tokio::test]
    async fn metrics_are_looked_for_where_they_should_be() {
        for (daemon, answers, expected) in [
            (true, true, Level::Ok),
            (false, false, Level::Ok),
            (true, false, Level::Warn),
            (false, true, Level::Warn),
        ] {
            let found = levels(|report| judge_metrics("a", daemon, answers, report));
            assert_eq!(found, [("metrics", expected)]);
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(connects(address).await);
        drop(listener);
        assert!(!connects(address).await);
    }
}
