//! The sockets: who serves the kubelet, whether the daemon and the snapshotter answer.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;

use hullspeed_daemon::error::chain;
use hullspeed_proto::cri::v1::VersionRequest;
use tokio::time::timeout;

use super::containerd::limited;
use super::{ANSWER_LIMIT, Places, Report, kubelet};
use crate::client::Client;
use crate::config::Config;
use crate::containerd::Containerd;

/// The daemon's name among processes, which the kernel cuts to 15 bytes.
const PROCESS: &str = "hullspeed-prewa";

/// Flag of a listening socket in the kernel's table.
const ACCEPTS: u32 = 1 << 16;

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
    let owners = owners(&config.socket, &places.proc);
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

/// Processes (with their names) that hold the listener of this path. Found without connecting, since a connection would
/// start a daemon with socket activation.
fn owners(socket: &Path, proc: &Path) -> Vec<(u32, String)> {
    let table = kubelet::read(&proc.join("net/unix")).unwrap_or_default();
    let path = socket.to_string_lossy();
    // Num RefCount Protocol Flags Type St Inode Path
    let listener = table.lines().find_map(|line| {
        let mut fields = line.split_ascii_whitespace();
        let flags = u32::from_str_radix(fields.nth(3)?, 16).ok()?;
        let inode = fields.nth(2)?;
        (flags & ACCEPTS != 0 && fields.next() == Some(&*path)).then(|| format!("socket:[{inode}]"))
    });
    let Some(listener) = listener else { return Vec::new() };
    let holds = |process: &Path| {
        let descriptors = fs::read_dir(process.join("fd"))
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        descriptors
            .filter_map(|descriptor| fs::read_link(descriptor.path()).ok())
            .any(|target| target.as_os_str() == listener.as_str())
    };
    let entries = fs::read_dir(proc).into_iter().flatten().filter_map(Result::ok);
    entries
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse::<u32>().ok()?, entry.path())))
        .filter(|(_, process)| holds(process))
        .map(|(number, process)| {
            let name = fs::read_to_string(process.join("comm")).unwrap_or_default();
            (number, name.trim_end().to_owned())
        })
        .collect()
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

/// What can be done about a pool that is off.
fn advice(reason: &str) -> &'static str {
    match reason {
        reason if reason.starts_with("cni") => {
            "hulls need a network that does not depend on the pod; if yours does not, cni.allow or cni.override say so"
        }
        "nri" => "if the NRI plugins may see a hull's name instead of its pod's, set pool.allow_nri",
        _ => "see the keys pool, cni and adoption of the configuration, and the daemon's log",
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
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn who_listens_is_found_without_a_connection() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s");
        let proc = Path::new("/proc");
        assert_eq!(owners(&path, proc), []);
        let listener = UnixListener::bind(&path).unwrap();
        let found = owners(&path, proc);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].0, std::process::id());
        assert!(!found[0].1.is_empty() && !found[0].1.ends_with('\n'));
        listener.set_nonblocking(true).unwrap();
        assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        drop(listener);
        assert_eq!(owners(&path, proc), []);
    }
}
