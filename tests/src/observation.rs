//! All that a client can read of a pod, from its start to its end, as one tree. Two of them, one made at containerd's
//! socket and one through our relay, should not differ.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use hullspeed_proto::cri::v1::{
    ContainerStatsRequest, ContainerStatusRequest, CreateContainerRequest, LinuxContainerConfig,
    LinuxContainerSecurityContext, ListContainerStatsRequest, ListContainersRequest, PodSandboxStatus,
    PodSandboxStatusRequest, PortForwardRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest, UpdatePodSandboxResourcesRequest,
};
use prost::Message as _;
use serde_json::{Map, Value, json};

use crate::cri::{Cri, Pod, container_config};
use crate::pod_node::PodNode;
use crate::raw::{self, RawClient};

mod events;
mod inside;
mod lists;
mod normal;
mod statistics;

pub use events::Events;
pub use normal::normalised;

/// How long the second container may take to answer.
const SERVE_LIMIT: Duration = Duration::from_secs(10);

/// How long the program of a sandbox may take from its start to its own code.
const START_LIMIT: Duration = Duration::from_secs(5);

/// Prints a line on each stream, then sleeps.
const MAIN: &str = "echo to-stdout; echo to-stderr >&2; exec sleep 1000000";

/// Serves a page on a port, and prints a line again and again for those that attach.
const SIDE: &str = "httpd -p PORT -h /www; while sleep 0.1; do echo tick; done";

/// One look at one pod.
pub struct Observer<'a> {
    node: &'a PodNode,
    raw: RawClient,
    cri: Cri,
    /// Whether hulls are visible here, and have to be taken out of lists.
    native: bool,
    /// What is told here.
    events: &'a Events,
    /// Ids by what they are of, and whether it was started.
    ids: BTreeMap<&'static str, (String, bool)>,
    /// What the second container serves on, in some pods on the host's network.
    port: u16,
    seen: Map<String, Value>,
    /// What to write instead of what differs from pod to pod.
    names: Vec<(String, &'static str)>,
}

impl<'a> Observer<'a> {
    /// An observer at containerd's own socket.
    pub async fn native(node: &'a PodNode, events: &'a Events) -> Result<Self> {
        Self::at(node, &node.containerd.socket(), events, true).await
    }

    /// An observer at the relay's socket.
    pub async fn relayed(node: &'a PodNode, events: &'a Events) -> Result<Self> {
        let prewarm = node.prewarm.as_ref().context("this node has no relay")?;
        Self::at(node, &prewarm.socket(), events, false).await
    }

    async fn at(node: &'a PodNode, socket: &std::path::Path, events: &'a Events, native: bool) -> Result<Self> {
        let port = crate::registry::free_port()?;
        Ok(Self {
            node,
            port,
            raw: RawClient::connect(socket).await?,
            cri: Cri::connect(socket).await?,
            native,
            events,
            ids: BTreeMap::new(),
            seen: Map::new(),
            names: vec![(format!("-p {port} "), "-p <port> ")],
        })
    }

    async fn see(&mut self, what: &str, method: &str, request: &impl prost::Message) {
        let answer = self.raw.observe(method, request).await;
        self.seen.insert(what.into(), answer);
    }

    /// Runs the pod, looks at everything, removes it; returns what was seen.
    pub async fn observe(mut self, pod: &Pod) -> Result<Value> {
        let before = nanoseconds_now();
        let request: RunPodSandboxRequest = pod.request();
        let run = format!("{}/RunPodSandbox", raw::RUNTIME);
        let answer = match self.raw.call(&run, request.encode_to_vec()).await {
            Ok(answer) => answer,
            Err(status) => {
                self.seen.insert("run".into(), raw::error(&status));
                self.lists_of_nothing(pod).await;
                return Ok(self.finish());
            }
        };
        let answer = hullspeed_proto::cri::v1::RunPodSandboxResponse::decode(answer)?;
        let sandbox = answer.pod_sandbox_id;
        self.names.push((sandbox.clone(), "<sandbox>"));
        self.ids.insert("sandbox", (sandbox.clone(), true));
        let looked = self.look(&sandbox, pod, before).await;
        let removed = self.remove(&sandbox).await;
        looked.and(removed)?;
        let events = self.events.of(pod, &self.ids).await;
        self.seen.insert("events".into(), events);
        Ok(self.finish())
    }

    fn finish(self) -> Value {
        normalised(Value::Object(self.seen), &self.names)
    }

    async fn look(&mut self, sandbox: &str, pod: &Pod, before: i64) -> Result<()> {
        let status = self.status(sandbox).await?;
        let created = status.created_at;
        let in_time = before <= created && created <= nanoseconds_now();
        self.seen.insert("created while it was run".into(), in_time.into());
        if let Some(network) = status.network.filter(|network| !network.ip.is_empty()) {
            self.names.push((network.ip, "<address>"));
        }
        self.see("run again", "RunPodSandbox", &pod.request()).await;
        self.lists("ready", sandbox, pod).await;
        self.node_files(sandbox);
        let main = self.container(sandbox, pod, "main", MAIN).await?;
        let side = self
            .container(sandbox, pod, "side", &SIDE.replace("PORT", &self.port.to_string()))
            .await?;
        if let (Some(main), Some(side)) = (&main, &side) {
            // First, for it waits until the second container serves.
            self.streams(sandbox, main, side).await;
            self.inside(sandbox, pod, main, side).await?;
            self.statistics(sandbox, pod, main).await?;
            self.see("stop main", "StopContainer", &stop_container(main)).await;
        }
        self.see(
            "update",
            "UpdatePodSandboxResources",
            &UpdatePodSandboxResourcesRequest {
                pod_sandbox_id: sandbox.into(),
                ..Default::default()
            },
        )
        .await;
        self.log(pod)
    }

    async fn status(&mut self, sandbox: &str) -> Result<PodSandboxStatus> {
        for (what, verbose, id) in [
            ("status", false, sandbox),
            ("verbose status", true, sandbox),
            ("status by prefix", false, &sandbox[..16]),
        ] {
            self.see(what, "PodSandboxStatus", &status_request(id, verbose)).await;
        }
        let status = self.cri.sandbox(sandbox).await?;
        let info: Value = serde_json::from_str(status.info.get("info").map_or("{}", |text| text.as_str()))?;
        let pid = info["pid"].as_u64().unwrap_or_default();
        self.seen
            .insert("program of the sandbox".into(), program(pid).await.into());
        status.status.context("a status without a status")
    }

    /// containerd's files of the sandbox, which containers get mounted.
    fn node_files(&mut self, sandbox: &str) {
        let directory = self.node.sandbox_files(sandbox);
        for name in ["hostname", "hosts", "resolv.conf"] {
            let text = std::fs::read_to_string(directory.join(name));
            let text = text.unwrap_or_else(|error| format!("({error})"));
            self.seen.insert(format!("file {name}"), text.into());
        }
    }

    /// Creates and starts a container as a kubelet would; `None` if it cannot be.
    async fn container(
        &mut self,
        sandbox: &str,
        pod: &Pod,
        name: &'static str,
        script: &str,
    ) -> Result<Option<String>> {
        let mut config = container_config(name, &self.node.image, &["sh", "-c", script]);
        let context = pod
            .config()
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.clone());
        let context = context.unwrap_or_default();
        config.linux = Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: context.namespace_options,
                run_as_user: context.run_as_user,
                run_as_group: context.run_as_group,
                supplemental_groups: context.supplemental_groups,
                privileged: context.privileged,
                readonly_rootfs: context.readonly_rootfs,
                ..Default::default()
            }),
            ..Default::default()
        });
        let log_directory = &pod.config().log_directory;
        if !log_directory.is_empty() {
            std::fs::create_dir_all(log_directory).context("cannot create the pod's log directory")?;
        }
        let request = CreateContainerRequest {
            pod_sandbox_id: sandbox.into(),
            config: Some(config),
            sandbox_config: Some(pod.config().clone()),
        };
        let id = match self.cri.runtime().create_container(request).await {
            Ok(answer) => answer.into_inner().container_id,
            Err(status) => {
                self.seen.insert(format!("create {name}"), raw::error(&status));
                return Ok(None);
            }
        };
        self.names
            .push((id.clone(), if name == "main" { "<main>" } else { "<side>" }));
        let start = StartContainerRequest {
            container_id: id.clone(),
        };
        self.see(&format!("start {name}"), "StartContainer", &start).await;
        let status = ContainerStatusRequest {
            container_id: id.clone(),
            verbose: true,
        };
        self.see(&format!("status of {name}"), "ContainerStatus", &status).await;
        let started = self.seen[&format!("start {name}")] == json!({});
        self.ids.insert(name, (id.clone(), started));
        Ok(started.then_some(id))
    }

    fn log(&mut self, pod: &Pod) -> Result<()> {
        if pod.config().log_directory.is_empty() {
            return Ok(());
        }
        let log = std::fs::read_to_string(pod.log("main")).unwrap_or_else(|error| format!("({error})"));
        // `TIME stream tag text`; the two streams are written independently.
        let mut lines: Vec<_> = log
            .lines()
            .map(|line| line.split_once(' ').map_or(line, |(_, rest)| rest).to_owned())
            .collect();
        lines.sort();
        self.seen.insert("log of main".into(), json!(lines));
        for name in ["main", "side"] {
            let _ = std::fs::remove_file(pod.log(name));
        }
        Ok(())
    }

    async fn remove(&mut self, sandbox: &str) -> Result<()> {
        let id = || sandbox.to_owned();
        let stop = StopPodSandboxRequest { pod_sandbox_id: id() };
        let remove = RemovePodSandboxRequest { pod_sandbox_id: id() };
        let forward = PortForwardRequest {
            pod_sandbox_id: id(),
            port: vec![self.port.into()],
        };
        self.see("stop", "StopPodSandbox", &stop).await;
        self.see(
            "status when stopped",
            "PodSandboxStatus",
            &status_request(sandbox, true),
        )
        .await;
        self.see(
            "containers when stopped",
            "ListContainers",
            &ListContainersRequest::default(),
        )
        .await;
        self.lists_by_id("stopped", sandbox).await;
        self.see("forward when stopped", "PortForward", &forward).await;
        self.see("stop again", "StopPodSandbox", &stop).await;
        self.see("remove", "RemovePodSandbox", &remove).await;
        for (what, id) in [
            ("status when gone", sandbox),
            ("status by prefix when gone", &sandbox[..16]),
        ] {
            self.see(what, "PodSandboxStatus", &status_request(id, false)).await;
        }
        self.lists_by_id("gone", sandbox).await;
        self.see("stop when gone", "StopPodSandbox", &stop).await;
        self.see("remove when gone", "RemovePodSandbox", &remove).await;
        self.see("forward when gone", "PortForward", &forward).await;
        let create = CreateContainerRequest {
            pod_sandbox_id: id(),
            config: Some(container_config("late", &self.node.image, &[])),
            sandbox_config: Some(Pod::new("late", std::path::Path::new("/"), "none").config().clone()),
        };
        self.see("create when gone", "CreateContainer", &create).await;
        let stats = ContainerStatsRequest { container_id: id() };
        self.see("container stats of a sandbox", "ContainerStats", &stats).await;
        self.see(
            "all container stats when gone",
            "ListContainerStats",
            &ListContainerStatsRequest::default(),
        )
        .await;
        Ok(())
    }
}

/// The name of a program that runs, once it does: right after its start it is still runc's.
async fn program(pid: u64) -> String {
    let end = Instant::now() + START_LIMIT;
    loop {
        let comm = std::fs::read_to_string(format!("/proc/{pid}/comm"));
        let comm = comm.unwrap_or_else(|error| error.to_string());
        if !comm.starts_with("runc") || Instant::now() > end {
            return comm.trim().to_owned();
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn status_request(id: &str, verbose: bool) -> PodSandboxStatusRequest {
    PodSandboxStatusRequest {
        pod_sandbox_id: id.into(),
        verbose,
    }
}

fn stop_container(id: &str) -> StopContainerRequest {
    StopContainerRequest {
        container_id: id.into(),
        timeout: 0,
    }
}

fn nanoseconds_now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(now.as_nanos()).unwrap_or(i64::MAX)
}
