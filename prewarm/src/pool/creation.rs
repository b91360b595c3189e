//! Making a hull: an ordinary sandbox, asked for as the kubelet asks for one, under a name and a mark of ours.

use std::collections::HashMap;
use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use hullspeed_proto::cri::v1::{
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListPodSandboxRequest, NamespaceMode, NamespaceOption,
    PodSandboxConfig, PodSandboxFilter, PodSandboxMetadata, PodSandboxState, PodSandboxStatus, PodSandboxStatusRequest,
    RunPodSandboxRequest, SecurityProfile, security_profile::ProfileType,
};
use serde::Deserialize;

use crate::adopt::hull::{Hull, HullError};
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::ledger::{HULL_LABEL, Mark};

use super::cgroup::{self, CgroupError};

/// Annotation of a hull that says what it was made with.
pub(super) const MADE_WITH: &str = "io.hullspeed.made-with";

/// Namespace of hulls, in the kubelet's sense.
const NAMESPACE: &str = "hullspeed";

/// Limit on asking for a sandbox's status.
const STATUS_LIMIT: Duration = Duration::from_secs(10);

/// Why there is no new hull.
#[derive(Debug, thiserror::Error)]
pub(super) enum CreationError {
    /// Its cgroup cannot be made.
    #[error("no cgroup for hulls")]
    Cgroup(#[source] CgroupError),
    /// No name could be made up.
    #[error("no random numbers")]
    Random(#[source] std::io::Error),
    /// containerd refused.
    #[error("containerd makes no sandbox")]
    Refused(#[source] Box<tonic::Status>),
    /// containerd takes too long.
    #[error("containerd makes no sandbox within {} s", limit.as_secs())]
    Late {
        /// The limit.
        limit: Duration,
    },
    /// It cannot be asked for.
    #[error("no status of sandbox {id}")]
    Status {
        /// Which.
        id: String,
        /// Why.
        #[source]
        source: Box<tonic::Status>,
    },
    /// Nobody finished it.
    #[error("the creation was broken off")]
    BrokenOff,
    /// Its status makes no sense.
    #[error("sandbox {id} {what}")]
    Unfit {
        /// Which.
        id: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Its processes or files are not as they should be.
    #[error("sandbox {id} cannot be opened")]
    Open {
        /// Which.
        id: String,
        /// Why.
        #[source]
        source: Box<HullError>,
    },
}

impl CreationError {
    /// A label of a metric.
    pub(super) fn label(&self) -> &'static str {
        match self {
            Self::Cgroup(_) => "cgroup",
            Self::Random(_) => "random",
            Self::Refused(_) => "refused",
            Self::Late { .. } => "late",
            Self::Status { .. } => "status",
            Self::Unfit { .. } => "unfit",
            Self::Open { .. } => "open",
            Self::BrokenOff => "broken_off",
        }
    }
}

/// What to make.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) name: String,
    pub(super) handler: String,
    pub(super) mark: Mark,
    pub(super) made_with: String,
    /// Name of the cgroup, without `.slice`.
    pub(super) cgroup: String,
    pub(super) systemd: bool,
    pub(super) limit: Duration,
}

/// A name for a hull: also its uid.
pub(super) fn name() -> Result<String, CreationError> {
    Ok(format!("hull-{:016x}", random().map_err(CreationError::Random)?))
}

/// A random number.
pub(super) fn random() -> std::io::Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_le_bytes(bytes))
}

/// A random byte. Without random numbers all nodes retry alike, which is harmless.
pub(super) fn jitter() -> u8 {
    random().map_or(0, |random| random.to_le_bytes()[0])
}

/// Its cgroup, and the sandbox; returns its id.
pub(super) async fn run(containerd: &Containerd, order: &Order) -> Result<String, CreationError> {
    cgroup::ensure(&order.cgroup, order.systemd).map_err(CreationError::Cgroup)?;
    let request = RunPodSandboxRequest {
        config: Some(config(order)),
        runtime_handler: order.handler.clone(),
    };
    let mut runtime = containerd.runtime();
    match tokio::time::timeout(order.limit, runtime.run_pod_sandbox(request)).await {
        Err(_) => Err(CreationError::Late { limit: order.limit }),
        Ok(Err(status)) => Err(CreationError::Refused(Box::new(status))),
        Ok(Ok(answer)) => Ok(answer.into_inner().pod_sandbox_id),
    }
}

/// As the kubelet would ask for a pod with no wishes. An empty hostname leaves the node's, as adoption does for pods
/// without one.
fn config(order: &Order) -> PodSandboxConfig {
    let options = NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    };
    let security = LinuxSandboxSecurityContext {
        namespace_options: Some(options),
        seccomp: Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let linux = LinuxPodSandboxConfig {
        cgroup_parent: cgroup::parent(&order.cgroup, order.systemd),
        security_context: Some(security),
        ..Default::default()
    };
    let metadata = PodSandboxMetadata {
        name: order.name.clone(),
        uid: order.name.clone(),
        namespace: NAMESPACE.into(),
        attempt: 0,
    };
    PodSandboxConfig {
        metadata: Some(metadata),
        labels: HashMap::from([(HULL_LABEL.to_owned(), order.mark.value().to_owned())]),
        annotations: HashMap::from([(MADE_WITH.to_owned(), order.made_with.clone())]),
        linux: Some(linux),
        ..Default::default()
    }
}

/// A sandbox that is ready to be opened.
#[derive(Debug)]
pub(super) struct Ready {
    pub(super) status: PodSandboxStatus,
    pub(super) pid: i32,
}

#[derive(Deserialize)]
struct Information {
    pid: i32,
}

/// A ready sandbox's status and pause process.
pub(super) async fn inspect(containerd: &Containerd, id: &str) -> Result<Ready, CreationError> {
    let failed = |status| CreationError::Status {
        id: id.to_owned(),
        source: Box::new(status),
    };
    let unfit = |what| CreationError::Unfit {
        id: id.to_owned(),
        what,
    };
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: id.to_owned(),
        verbose: true,
    };
    let mut runtime = containerd.runtime();
    let answer = tokio::time::timeout(STATUS_LIMIT, runtime.pod_sandbox_status(request)).await;
    let answer = answer
        .map_err(|_| failed(tonic::Status::deadline_exceeded("no answer")))?
        .map_err(failed)?
        .into_inner();
    let status = answer
        .status
        .filter(|status| status.id == id)
        .ok_or_else(|| unfit("has another's status"))?;
    if status.state() != PodSandboxState::SandboxReady {
        return Err(unfit("is not ready"));
    }
    let information = answer
        .info
        .get("info")
        .ok_or_else(|| unfit("has no verbose information"))?;
    let information: Information =
        serde_json::from_str(information).map_err(|_| unfit("has unreadable verbose information"))?;
    if information.pid <= 1 {
        return Err(unfit("has no process"));
    }
    Ok(Ready {
        status,
        pid: information.pid,
    })
}

/// Opens a ready sandbox. That reads files, so not on a thread of the runtime.
pub(super) async fn open(id: &str, handler: &str, pid: i32, facts: &Arc<Facts>) -> Result<Hull, CreationError> {
    let (name, handler, facts) = (id.to_owned(), handler.to_owned(), Arc::clone(facts));
    let opened = tokio::task::spawn_blocking(move || Hull::open(&name, &handler, pid, &facts)).await;
    let opened = opened.map_err(|_| CreationError::BrokenOff)?;
    opened.map_err(|source| CreationError::Open {
        id: id.to_owned(),
        source: Box::new(source),
    })
}

/// Sandboxes with our mark: id, name, whether it is ready.
pub(super) async fn marked(containerd: &Containerd, mark: &Mark) -> Result<Vec<(String, String, bool)>, tonic::Status> {
    let filter = PodSandboxFilter {
        label_selector: HashMap::from([(HULL_LABEL.to_owned(), mark.value().to_owned())]),
        ..Default::default()
    };
    let request = ListPodSandboxRequest { filter: Some(filter) };
    let mut runtime = containerd.runtime();
    let list = tokio::time::timeout(STATUS_LIMIT, runtime.list_pod_sandbox(request)).await;
    let list = list
        .map_err(|_| tonic::Status::deadline_exceeded("no answer"))??
        .into_inner();
    let items = list.items.into_iter().map(|item| {
        let ready = item.state() == PodSandboxState::SandboxReady;
        let name = item.metadata.unwrap_or_default().name;
        (item.id, name, ready)
    });
    Ok(items.collect())
}
