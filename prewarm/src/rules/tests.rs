//! The rules as a whole: pure functions over generated messages, handlers over a scripted containerd.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use hullspeed_proto::cri::v1::{
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata,
};

use crate::ledger::{Adoption, HULL_LABEL, Ledger, Mark};

mod events;
mod handlers;
mod lists;
mod messages;
mod scripted;

/// The mark of the tests' hulls.
const MARK: &str = "secret";

fn ledger() -> Ledger {
    Ledger::new(Mark::new(MARK.into()))
}

fn full_id(n: u8) -> String {
    format!("{n:02x}").repeat(32)
}

fn pairs(of: &[(&str, &str)]) -> HashMap<String, String> {
    of.iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn marked() -> HashMap<String, String> {
    pairs(&[(HULL_LABEL, MARK)])
}

fn metadata(name: &str) -> PodSandboxMetadata {
    PodSandboxMetadata {
        name: name.into(),
        uid: format!("uid-{name}"),
        namespace: "shop".into(),
        attempt: 3,
    }
}

fn adoption(id: &str, name: &str, labels: HashMap<String, String>) -> Adoption {
    let options = NamespaceOption {
        pid: NamespaceMode::Container.into(),
        ..Default::default()
    };
    let linux = LinuxPodSandboxConfig {
        cgroup_parent: "/no/such/cgroup".into(),
        security_context: Some(LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        }),
        ..Default::default()
    };
    Adoption {
        sandbox_id: id.into(),
        config: PodSandboxConfig {
            metadata: Some(metadata(name)),
            hostname: format!("{name}-host"),
            labels,
            annotations: pairs(&[("note", "adopted")]),
            linux: Some(linux),
            ..Default::default()
        },
        runtime_handler: "runc".into(),
        adopted_at: 1_700_000_000_000_000_000,
    }
}

type Shared<T> = Arc<Mutex<T>>;
