//! ListPodSandbox with every filter.

use std::collections::HashMap;

use hullspeed_proto::cri::v1::{
    ListPodSandboxRequest, PodSandboxFilter, PodSandboxState, PodSandboxStateValue, StreamPodSandboxesRequest,
};
use serde_json::Value;

use super::Observer;
use crate::cri::Pod;
use crate::pod_node::HULL_LABEL;

impl Observer<'_> {
    async fn list(&mut self, what: String, filter: Option<PodSandboxFilter>) {
        let request = ListPodSandboxRequest { filter };
        let mut answer = self.raw.observe("ListPodSandbox", &request).await;
        if self.native {
            without_hulls(&mut answer);
        }
        self.seen.insert(what, answer);
    }

    /// All filters, alone and together.
    pub(super) async fn lists(&mut self, when: &str, sandbox: &str, pod: &Pod) {
        self.lists_by_id(when, sandbox).await;
        let labels = pod.config().labels.clone();
        let (key, value) = labels
            .iter()
            .min()
            .map_or(("none", ""), |(key, value)| (key.as_str(), value.as_str()));
        let one = HashMap::from([(key.to_owned(), value.to_owned())]);
        let wrong = HashMap::from([(key.to_owned(), "another".to_owned())]);
        let both = labels
            .clone()
            .into_iter()
            .chain([("absent".to_owned(), String::new())])
            .collect();
        for (name, label_selector) in [
            ("all labels", labels.clone()),
            ("one label", one.clone()),
            ("wrong value", wrong.clone()),
            ("one label too many", both),
        ] {
            let filter = PodSandboxFilter {
                label_selector: label_selector.clone(),
                ..Default::default()
            };
            self.list(format!("{when}: list by {name}"), Some(filter)).await;
            let filter = PodSandboxFilter {
                id: sandbox.into(),
                state: state(PodSandboxState::SandboxReady),
                label_selector,
            };
            self.list(format!("{when}: list by id, state and {name}"), Some(filter))
                .await;
        }
    }

    /// Filters without labels.
    pub(super) async fn lists_by_id(&mut self, when: &str, sandbox: &str) {
        let by = |id: &str, state: Option<PodSandboxStateValue>| {
            Some(PodSandboxFilter {
                id: id.into(),
                state,
                ..Default::default()
            })
        };
        let (ready, not) = (
            state(PodSandboxState::SandboxReady),
            state(PodSandboxState::SandboxNotready),
        );
        let none = Some(PodSandboxStateValue { state: 9 });
        for (name, filter) in [
            ("nothing", None),
            ("an empty filter", by("", None)),
            ("id", by(sandbox, None)),
            ("prefix", by(&sandbox[..12], None)),
            ("long id", by(&format!("{sandbox}0"), None)),
            ("no id", by("zzzz", None)),
            ("ready", by("", ready)),
            ("not ready", by("", not)),
            ("no state", by("", none)),
            ("id and ready", by(sandbox, ready)),
            ("prefix and not ready", by(&sandbox[..12], not)),
        ] {
            self.list(format!("{when}: list by {name}"), filter).await;
        }
        let stream = StreamPodSandboxesRequest::default();
        self.see(&format!("{when}: stream"), "StreamPodSandboxes", &stream)
            .await;
    }

    /// After a pod that could not be run.
    pub(super) async fn lists_of_nothing(&mut self, pod: &Pod) {
        self.list("list after a refusal".into(), None).await;
        let filter = PodSandboxFilter {
            label_selector: pod.config().labels.clone(),
            ..Default::default()
        };
        self.list("list by labels after a refusal".into(), Some(filter)).await;
    }
}

fn state(state: PodSandboxState) -> Option<PodSandboxStateValue> {
    Some(PodSandboxStateValue { state: state.into() })
}

/// Takes hulls out of the items (field 1) of a list: those with our label (field 5) and a value that is no guess.
fn without_hulls(answer: &mut Value) {
    let is_hull = |item: &Value| {
        let labels = item["5"].as_array().into_iter().flatten();
        labels
            .filter(|label| label["1"][0] == HULL_LABEL)
            .any(|label| label["2"][0] != "guess")
    };
    let Some(items) = answer.get_mut("1").and_then(Value::as_array_mut) else {
        return;
    };
    items.retain(|item| !is_hull(item));
    if items.is_empty()
        && let Some(answer) = answer.as_object_mut()
    {
        answer.remove("1");
    }
}
