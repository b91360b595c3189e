//! Finding out, after a start or a restart of containerd, which sandboxes are hulls and which have become pods.
//!
//! The journal knows, unless it is lost; then the records do, which carry a note of their adoption once they are
//! rewritten. A sandbox that bears the mark and is known to neither is a hull, if nobody has put a container into it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use hullspeed_daemon::error::chain;
use hullspeed_proto::containerd::services::containers::v1::{Container, ListContainersRequest as ListRecordsRequest};
use hullspeed_proto::cri::v1::{
    ListContainersRequest, ListPodSandboxRequest, PodSandbox, PodSandboxConfig, PodSandboxState,
    PodSandboxStatusRequest,
};
use prost::Message as _;
use serde_json::Value;

use super::journal::{Contents, Entry};
use super::rebrand::record::{self, KIND_LABEL, KIND_SANDBOX};
use super::rebrand::{ADOPTION_EXTENSION, METADATA_EXTENSION};
use crate::containerd::{CallError, Containerd, limited};
use crate::ledger::{Adoption, Mark, sandbox_name};

/// A hull that nobody has used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdleHull {
    /// The sandbox.
    pub id: String,
    /// The runtime handler that it was made for.
    pub runtime_handler: String,
    /// Whether containerd calls it ready.
    pub ready: bool,
}

/// What there is.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Hulls that the pool may open, check and hand out, or destroy.
    pub idle: Vec<IdleHull>,
    /// Sandboxes of pods that were hulls; the ledger has them already.
    pub adopted: Vec<Arc<Adoption>>,
    /// Hulls never to be handed out, because somebody has had them: the pool destroys them.
    pub dropped: Vec<IdleHull>,
}

/// Why containerd could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// What containerd has.
#[derive(Debug, Default)]
pub(super) struct Found {
    sandboxes: Vec<PodSandbox>,
    records: HashMap<String, Container>,
    /// Sandboxes with a container in them.
    occupied: HashSet<String>,
}

impl Found {
    /// Whether containerd has this sandbox.
    pub(super) fn has(&self, id: &str) -> bool {
        self.sandboxes.iter().any(|sandbox| sandbox.id == id)
    }

    /// Asks containerd.
    pub(super) async fn ask(containerd: &Containerd) -> Result<Self, RecoveryError> {
        let mut runtime = containerd.runtime();
        let list = runtime.list_pod_sandbox(ListPodSandboxRequest::default());
        let sandboxes = limited("ListPodSandbox", list).await?.items;
        let list = runtime.list_containers(ListContainersRequest::default());
        let containers = limited("ListContainers", list).await?.containers;
        let filters = vec![format!("labels.\"{KIND_LABEL}\"==\"{KIND_SANDBOX}\"")];
        let mut client = containerd.containers();
        let list = client.list(ListRecordsRequest { filters });
        let records = limited("Containers.List", list).await?.containers;
        Ok(Self {
            sandboxes,
            records: records.into_iter().map(|record| (record.id.clone(), record)).collect(),
            occupied: containers
                .into_iter()
                .map(|container| container.pod_sandbox_id)
                .collect(),
        })
    }
}

/// A sandbox that a pod has.
#[derive(Debug, PartialEq)]
pub(super) struct Kept {
    pub(super) adoption: Adoption,
    /// Whether containerd's record is the pod's.
    pub(super) branded: bool,
    /// Whether the journal has it.
    pub(super) journalled: bool,
    /// Whether it runs.
    pub(super) ready: bool,
}

/// What is to be done about what there is.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Plan {
    pub(super) kept: Vec<Kept>,
    pub(super) idle: Vec<IdleHull>,
    pub(super) dropped: Vec<IdleHull>,
    /// Names of other sandboxes, and their ids.
    pub(super) natives: Vec<(String, String)>,
    /// What the journal has and containerd has not.
    pub(super) gone: Vec<String>,
}

impl Plan {
    /// From what the journal had before containerd was asked, and what containerd has.
    pub(super) fn new(found: &Found, journal: &Contents, mark: &Mark) -> Self {
        let mut plan = Self::default();
        for sandbox in &found.sandboxes {
            plan.classify(sandbox, found, journal, mark);
        }
        let present: HashSet<&str> = found.sandboxes.iter().map(|sandbox| sandbox.id.as_str()).collect();
        let known = journal.adopted.keys().chain(&journal.aborted);
        plan.gone = known.filter(|id| !present.contains(id.as_str())).cloned().collect();
        plan.drop_namesakes();
        plan
    }

    fn classify(&mut self, sandbox: &PodSandbox, found: &Found, journal: &Contents, mark: &Mark) {
        let ready = sandbox.state == PodSandboxState::SandboxReady as i32;
        let hull = IdleHull {
            id: sandbox.id.clone(),
            runtime_handler: sandbox.runtime_handler.clone(),
            ready,
        };
        let record = found.records.get(&sandbox.id);
        let noted = record.and_then(noted);
        let journalled = journal.adopted.get(&sandbox.id).and_then(written);
        if let Some((adoption, branded)) = journalled {
            let branded = branded || noted.is_some();
            self.kept.push(Kept {
                adoption,
                branded,
                journalled: true,
                ready,
            });
        } else if let Some(adoption) = noted {
            self.kept.push(Kept {
                adoption,
                branded: true,
                journalled: false,
                ready,
            });
        } else if mark.is_on(&sandbox.labels) {
            let used = journal.aborted.contains(&sandbox.id)
                || journal.adopted.contains_key(&sandbox.id)
                || found.occupied.contains(&sandbox.id);
            if used {
                self.dropped.push(hull)
            } else {
                self.idle.push(hull)
            }
        } else if let Some(metadata) = &sandbox.metadata {
            self.natives.push((sandbox_name(metadata), sandbox.id.clone()));
        }
    }

    /// Made while we were not asked, a sandbox of containerd's may have the name of one whose record is not rewritten
    /// yet. Two records of one name would keep containerd from starting, so ours goes.
    fn drop_namesakes(&mut self) {
        let names: HashSet<&String> = self.natives.iter().map(|(name, _)| name).collect();
        let mut kept = Vec::new();
        for one in std::mem::take(&mut self.kept) {
            let name = one.adoption.config.metadata.as_ref().map(sandbox_name);
            if !one.branded && name.is_some_and(|name| names.contains(&name)) {
                tracing::error!(
                    sandbox_id = one.adoption.sandbox_id,
                    "another sandbox has the name of an adopted one"
                );
                self.dropped.push(IdleHull {
                    id: one.adoption.sandbox_id,
                    runtime_handler: one.adoption.runtime_handler,
                    ready: one.ready,
                });
            } else {
                kept.push(one);
            }
        }
        self.kept = kept;
    }
}

/// The adoption that the journal tells of.
fn written(entry: &Entry) -> Option<(Adoption, bool)> {
    let config = PodSandboxConfig::decode(entry.adopt.config.as_slice());
    let config = config.inspect_err(|error| {
        tracing::error!(sandbox_id = entry.adopt.id, %error, "the journal's configuration of a sandbox cannot be read");
    });
    let adoption = Adoption {
        sandbox_id: entry.adopt.id.clone(),
        config: config.ok()?,
        runtime_handler: entry.adopt.runtime_handler.clone(),
        adopted_at: entry.adopt.adopted_at,
    };
    Some((adoption, entry.branded))
}

/// The adoption that a record tells of.
fn noted(container: &Container) -> Option<Adoption> {
    let note = container.extensions.get(ADOPTION_EXTENSION)?;
    let metadata = container.extensions.get(METADATA_EXTENSION)?;
    match record::adoption(&metadata.value, &note.value) {
        Ok(adoption) if adoption.sandbox_id == container.id => Some(adoption),
        Ok(_) => None,
        Err(error) => {
            tracing::error!(sandbox_id = container.id, error = %chain(&error), "a sandbox's record cannot be read");
            None
        }
    }
}

/// The pause process of a sandbox.
pub(super) async fn pause_process(containerd: &Containerd, id: &str) -> Result<Option<i32>, RecoveryError> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: id.to_owned(),
        verbose: true,
    };
    let status = limited("PodSandboxStatus", containerd.runtime().pod_sandbox_status(request)).await?;
    let info = status
        .info
        .get("info")
        .and_then(|info| serde_json::from_str::<Value>(info).ok());
    let pid = info.and_then(|info| info.get("pid")?.as_i64());
    Ok(pid.and_then(|pid| i32::try_from(pid).ok()).filter(|pid| *pid > 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adopt::journal::AdoptRecord;
    use crate::adopt::{gojson, testing};
    use crate::ledger::HULL_LABEL;
    use prost_types::Any;

    fn sandbox(id: &str, name: &str, marked: bool) -> PodSandbox {
        let mut sandbox = PodSandbox {
            id: id.into(),
            metadata: testing::pod(name).metadata,
            ..Default::default()
        };
        if marked {
            sandbox.labels.insert(HULL_LABEL.into(), "secret".into());
        }
        sandbox
    }

    fn adoption(id: &str, name: &str) -> Adoption {
        Adoption {
            sandbox_id: id.into(),
            config: testing::pod(name),
            runtime_handler: String::new(),
            adopted_at: 7,
        }
    }

    fn journal(adopted: &[(&str, &str)], aborted: &[&str]) -> Contents {
        let entry = |(id, name): &(&str, &str)| {
            let adopt = AdoptRecord {
                id: (*id).into(),
                runtime_handler: String::new(),
                config: testing::pod(name).encode_to_vec(),
                adopted_at: 7,
            };
            ((*id).to_owned(), Entry { adopt, branded: false })
        };
        Contents {
            adopted: adopted.iter().map(entry).collect(),
            aborted: aborted.iter().map(ToString::to_string).collect(),
        }
    }

    fn record(id: &str, name: &str) -> Container {
        let config = gojson::encode(&testing::pod(name)).unwrap();
        let metadata = format!(r#"{{"Version":"v1","Metadata":{{"ID":"{id}","Config":{config}}}}}"#);
        let any = |text: &str| Any {
            type_url: String::new(),
            value: text.as_bytes().to_vec(),
        };
        let note = any(r#"{"adopted_at":7,"runtime_handler":""}"#);
        Container {
            id: id.into(),
            extensions: [
                (METADATA_EXTENSION.to_owned(), any(&metadata)),
                (ADOPTION_EXTENSION.to_owned(), note),
            ]
            .into(),
            ..Default::default()
        }
    }

    fn plan(found: &Found, journal: &Contents) -> Plan {
        Plan::new(found, journal, &Mark::new("secret".into()))
    }

    fn ids(hulls: &[IdleHull]) -> Vec<&str> {
        hulls.iter().map(|hull| hull.id.as_str()).collect()
    }

    #[test]
    fn each_sandbox_is_what_it_was() {
        let found = Found {
            sandboxes: vec![
                sandbox("idle", "hull-1", true),
                sandbox("adopted", "hull-2", true),
                sandbox("aborted", "hull-3", true),
                sandbox("occupied", "hull-4", true),
                sandbox("noted", "hull-5", true),
                sandbox("restarted", "pod-6", false),
                sandbox("native", "pod-7", false),
            ],
            records: ["noted", "restarted"].map(|id| (id.to_owned(), record(id, id))).into(),
            occupied: ["occupied", "adopted", "native"].map(str::to_owned).into(),
        };
        let plan = plan(
            &found,
            &journal(&[("adopted", "web"), ("lost", "old")], &["aborted", "away"]),
        );
        assert_eq!(ids(&plan.idle), ["idle"]);
        assert_eq!(ids(&plan.dropped), ["aborted", "occupied"]);
        assert_eq!(plan.gone, ["lost", "away"]);
        assert_eq!(
            plan.natives,
            [("pod-7_default_pod-7-uid_0".to_owned(), "native".to_owned())]
        );
        let kept: Vec<_> = plan
            .kept
            .iter()
            .map(|one| (&one.adoption, one.branded, one.journalled))
            .collect();
        let expected = [
            (&adoption("adopted", "web"), false, true),
            (&adoption("noted", "noted"), true, false),
            (&adoption("restarted", "restarted"), true, false),
        ];
        assert_eq!(kept, expected);
    }

    #[test]
    fn of_two_sandboxes_of_one_name_containerds_stays() {
        let found = Found {
            sandboxes: vec![sandbox("ours", "hull-1", true), sandbox("theirs", "web", false)],
            ..Default::default()
        };
        let plan = plan(&found, &journal(&[("ours", "web")], &[]));
        assert_eq!(ids(&plan.dropped), ["ours"]);
        assert!(plan.kept.is_empty());
    }

    #[test]
    fn what_cannot_be_read_is_never_handed_out() {
        let mut journal = journal(&[("ours", "web")], &[]);
        journal.adopted.get_mut("ours").unwrap().adopt.config = vec![0xff];
        let found = Found {
            sandboxes: vec![sandbox("ours", "hull-1", true)],
            ..Default::default()
        };
        let plan = plan(&found, &journal);
        assert_eq!(ids(&plan.dropped), ["ours"]);
        assert!(plan.idle.is_empty());
    }
}
