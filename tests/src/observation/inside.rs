//! What a pod's own processes see, and what comes through its streams.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context as _, Result};
use hullspeed_proto::cri::v1::{NamespaceMode, NamespaceOption};
use serde_json::{Map, Value, json};

use super::{Observer, SERVE_LIMIT};
use crate::cri::Pod;
use crate::websocket::WebSocket;

/// Prints sections, each after a line `== name`.
const SCRIPT: &str = r#"
say() { echo "== $1"; shift; "$@" 2>&1; }
say hostname hostname
say uname uname -s -n
say "file hostname" cat /etc/hostname
say "file hosts" cat /etc/hosts
say "file resolv.conf" cat /etc/resolv.conf
say environment env
say id id
say process grep -E '^(Uid|Gid|Groups|NoNewPrivs|Seccomp|Cap...):' /proc/self/status
say limits cat /proc/self/limits
say oom cat /proc/self/oom_score_adj
say cgroup cat /proc/self/cgroup
say mounts cat /proc/self/mountinfo
say addresses ip -o address
say routes ip route
say interfaces ls /sys/class/net
say devices ls /dev
say shm df -k /dev/shm
say writable touch /etc/hostname /etc/hosts /etc/resolv.conf /sys/kernel
for name in net/ipv4/ip_local_port_range net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range \
  net/ipv4/tcp_syncookies net/ipv4/ip_forward net/ipv4/conf/eth0/forwarding net/core/somaxconn \
  kernel/shm_rmid_forced kernel/shmmax kernel/msgmax kernel/sem fs/mqueue/msg_max kernel/hostname kernel/domainname; do
  say "sysctl $name" cat /proc/sys/$name
done
say processes ps -o user,args
"#;

/// Sections about the network.
const NETWORK: [&str; 3] = ["addresses", "routes", "interfaces"];

/// Namespaces of a process.
const KINDS: [&str; 7] = ["cgroup", "ipc", "mnt", "net", "pid", "user", "uts"];

/// Which namespaces a process is in, by what tells them apart.
fn links(process: &str) -> Value {
    let link = |kind: &str| {
        let target = std::fs::read_link(format!("/proc/{process}/ns/{kind}"));
        target.map_or_else(
            |error| format!("({error})"),
            |target| target.to_string_lossy().into_owned(),
        )
    };
    KINDS
        .iter()
        .map(|kind| ((*kind).to_owned(), Value::from(link(kind))))
        .collect::<Map<_, _>>()
        .into()
}

impl Observer<'_> {
    pub(super) async fn inside(&mut self, sandbox: &str, pod: &Pod, main: &str, side: &str) -> Result<()> {
        for (name, container) in [("main", main), ("side", side)] {
            let answer = self.cri.exec(container, &["sh", "-c", SCRIPT]).await?;
            let text = String::from_utf8_lossy(&answer.stdout).into_owned();
            let of_host = |of: fn(&NamespaceOption) -> i32| mode(pod, of) == NamespaceMode::Node;
            let (host_pid, host_network) = (of_host(|options| options.pid), of_host(|options| options.network));
            for (section, lines) in sections(&text) {
                // What others do on this machine is not the pod's.
                if (section == "processes" && host_pid) || (NETWORK.contains(&section.as_str()) && host_network) {
                    continue;
                }
                self.seen
                    .insert(format!("{name}: {section}"), self.lines(&section, lines));
            }
            self.seen.insert(format!("{name}: exit code"), answer.exit_code.into());
        }
        self.namespaces(sandbox, main, side).await
    }

    fn lines(&self, section: &str, mut lines: Vec<String>) -> Value {
        match section {
            "mounts" => lines = lines.iter().map(|line| mount(line)).collect(),
            "environment" => lines.sort(),
            "processes" => {
                let ours = ["ps -o", "say()", "sleep 0.1", "[sleep]"];
                lines.retain(|line| !ours.iter().any(|part| line.contains(part)));
                lines.sort();
            }
            "addresses" => lines.retain(|line| !line.contains("inet6 fe80")),
            _ => {}
        }
        json!(lines)
    }

    /// Which namespaces are shared by whom.
    async fn namespaces(&mut self, sandbox: &str, main: &str, side: &str) -> Result<()> {
        let host = links("self");
        let mut of = BTreeMap::new();
        for (name, container) in [("main", main), ("side", side)] {
            let status = self.cri.container(container).await?;
            of.insert(name, links(&pid(&status.info)?.to_string()));
        }
        let status = self.cri.sandbox(sandbox).await?;
        of.insert("pause", links(&pid(&status.info)?.to_string()));
        let mut found = Map::new();
        for kind in KINDS {
            for (one, other) in [("main", "pause"), ("main", "side")] {
                found.insert(
                    format!("{kind} of {one} is that of {other}"),
                    (of[one][kind] == of[other][kind]).into(),
                );
            }
            for (name, links) in &of {
                found.insert(
                    format!("{kind} of {name} is the host's"),
                    (links[kind] == host[kind]).into(),
                );
            }
        }
        self.seen.insert("namespaces".into(), found.into());
        Ok(())
    }

    /// Exec, attach and port-forward as a client uses them: by the URLs that the runtime answers.
    pub(super) async fn streams(&mut self, sandbox: &str, main: &str, side: &str) {
        let exec = self.exec(main).await;
        let attach = self.attach(side).await;
        let forward = self.forward(sandbox).await;
        for (name, result) in [("exec", exec), ("attach", attach), ("port-forward", forward)] {
            let shown = result.unwrap_or_else(|error| format!("{error:#}").into());
            self.seen.insert(format!("stream: {name}"), shown);
        }
    }

    async fn exec(&mut self, container: &str) -> Result<Value> {
        let url = self
            .cri
            .exec_url(container, &["sh", "-c", "echo on $(hostname)"])
            .await?;
        let mut socket = WebSocket::open(&url, "").await?;
        Ok(json!([kind(&url), socket.read("").await?]))
    }

    async fn attach(&mut self, container: &str) -> Result<Value> {
        let url = self.cri.attach_url(container).await?;
        let mut socket = WebSocket::open(&url, "").await?;
        let said = socket.read("tick").await?;
        Ok(json!([
            kind(&url),
            said.get(&1).is_some_and(|text| text.contains("tick"))
        ]))
    }

    async fn forward(&mut self, sandbox: &str) -> Result<Value> {
        let end = Instant::now() + SERVE_LIMIT;
        loop {
            let url = self.cri.port_forward(sandbox, &[self.port.into()]).await?;
            let mut socket = WebSocket::open(&url, &format!("port={}", self.port)).await?;
            socket.send(0, b"GET /index.html HTTP/1.0\r\n\r\n").await?;
            let said = socket.read("hello from the toolbox").await?;
            let hello = said.values().any(|text| text.contains("hello from the toolbox"));
            if hello || Instant::now() > end {
                return Ok(json!([kind(&url), hello]));
            }
            // The server may not have opened its port yet.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }
}

/// `http://address/exec/token` without what differs each time.
fn kind(url: &str) -> Option<&str> {
    url.strip_prefix("http://")?.split('/').nth(1)
}

fn pid(info: &std::collections::HashMap<String, String>) -> Result<u64> {
    let info: Value = serde_json::from_str(info.get("info").context("no verbose information")?)?;
    info["pid"].as_u64().context("no pid in the verbose information")
}

fn mode(pod: &Pod, of: fn(&NamespaceOption) -> i32) -> NamespaceMode {
    let context = pod
        .config()
        .linux
        .as_ref()
        .and_then(|linux| linux.security_context.as_ref());
    let options = context.and_then(|context| context.namespace_options.as_ref());
    options
        .and_then(|options| of(options).try_into().ok())
        .unwrap_or_default()
}

fn sections(text: &str) -> Vec<(String, Vec<String>)> {
    let mut found: Vec<(String, Vec<String>)> = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("== "), found.last_mut()) {
            (Some(name), _) => found.push((name.into(), Vec::new())),
            (None, Some((_, lines))) => lines.push(line.into()),
            (None, None) => {}
        }
    }
    found
}

/// A line of mountinfo without ids and without the numbers of snapshots.
fn mount(line: &str) -> String {
    let fields: Vec<_> = line.split(' ').collect();
    let rest = fields.get(3..).unwrap_or_default().join(" ");
    let (head, options) = rest.split_once("lowerdir=").unwrap_or((&rest, ""));
    if options.is_empty() {
        return rest;
    }
    let shown: String = options.chars().filter(|c| !c.is_ascii_digit()).collect();
    format!("{head}lowerdir={shown}")
}
