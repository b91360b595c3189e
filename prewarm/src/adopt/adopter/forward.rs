//! A pod's sandbox made by containerd.

use std::sync::Arc;
use std::time::Duration;

use hullspeed_proto::cri::v1::{PodSandboxStatusRequest, RunPodSandboxResponse};
use prost::Message as _;
use tonic::Code;

use super::{Adopter, Passed};
use crate::adopt::HullSource;
use crate::ledger::Reservation;
use crate::relay::{Call, Failure, Reply};

/// Limit on asking whether a sandbox is still there.
const ASK_LIMIT: Duration = Duration::from_secs(2);

/// What CNI plugins say, in lower case, when they have no address left. From host-local and whereabouts, Calico, Cilium,
/// and the clouds' own.
const EXHAUSTED: [&str; 10] = [
    "no ip addresses available",
    "no available ip",
    "no ips available",
    "no more ips",
    "no more free addresses",
    "could not allocate ip",
    "range is full",
    "address pool exhausted",
    "failed to assign an ip address",
    "insufficientfreeaddresses",
];

/// Whether an error says that there is no address left.
fn is_exhaustion(message: &str) -> bool {
    let message = message.to_lowercase();
    EXHAUSTED.iter().any(|phrase| message.contains(phrase))
}

/// A pod's start while containerd makes its sandbox, known by the sandbox's name. Given up or failed, it has ended.
struct Start {
    hulls: Arc<dyn HullSource>,
    name: String,
}

impl Start {
    fn begin(hulls: Arc<dyn HullSource>, name: &str) -> Self {
        hulls.start_begins(name);
        Self {
            hulls,
            name: name.to_owned(),
        }
    }

    /// The sandbox is there: the start goes on under its id until the pod's container runs.
    fn becomes(self, id: &str) {
        self.hulls.start_begins(id);
    }
}

impl Drop for Start {
    fn drop(&mut self) {
        self.hulls.start_ended(&self.name);
    }
}

impl Adopter {
    /// Sends the request on as it came, and keeps track of its name.
    pub(super) async fn pass(&self, call: Call, name: Option<Reservation>, why: Passed) -> Reply {
        self.count(why);
        let mut name = name;
        let start = name
            .as_ref()
            .map(|name| Start::begin(Arc::clone(&self.shared.options.hulls), name.name()));
        if let Some(name) = &mut name {
            name.forwarded();
        }
        let answer = call.upstream.unary(call.message).await;
        match &answer {
            Ok(answer) => {
                let response = RunPodSandboxResponse::decode(answer.message.clone());
                if let (Some(name), Ok(response)) = (name, response) {
                    if let Some(start) = start {
                        start.becomes(&response.pod_sandbox_id);
                    }
                    name.settle_native(&response.pod_sandbox_id);
                }
            }
            Err(Failure::Answered { status, .. }) if is_exhaustion(status.message()) => {
                self.shared.options.hulls.release_all("no_addresses");
            }
            Err(_) => {}
        }
        answer.into()
    }

    /// Whether containerd says that there is no such sandbox.
    pub(super) async fn is_gone(&self, id: &str) -> bool {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: id.to_owned(),
            verbose: false,
        };
        let mut client = self.shared.options.containerd.runtime();
        let answer = tokio::time::timeout(ASK_LIMIT, client.pod_sandbox_status(request)).await;
        matches!(answer, Ok(Err(status)) if status.code() == Code::NotFound)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::{Start, is_exhaustion};
    use crate::adopt::hull::Hull;
    use crate::adopt::{HullSource, Miss};

    #[derive(Default)]
    struct Told(Mutex<Vec<String>>);

    impl HullSource for Told {
        fn take(&self, _runtime_handler: &str) -> Result<Hull, Miss> {
            Err(Miss::Empty)
        }

        fn discard(&self, _hull: Hull, _why: &'static str) {}

        fn give_back(&self, _hull: Hull) {}

        fn start_begins(&self, sandbox_id: &str) {
            self.0.lock().unwrap().push(format!("begins {sandbox_id}"));
        }

        fn start_ended(&self, sandbox_id: &str) {
            self.0.lock().unwrap().push(format!("ended {sandbox_id}"));
        }
    }

    #[test]
    fn a_start_is_never_lost_between_its_name_and_its_id() {
        let told = Arc::new(Told::default());
        Start::begin(Arc::clone(&told) as Arc<dyn HullSource>, "pod").becomes("id");
        drop(Start::begin(Arc::clone(&told) as Arc<dyn HullSource>, "failed"));
        let told = told.0.lock().unwrap();
        assert_eq!(
            *told,
            ["begins pod", "begins id", "ended pod", "begins failed", "ended failed"]
        );
    }

    #[test]
    fn errors_of_plugins_without_addresses() {
        let host_local = "failed to setup network for sandbox \"1\": plugin type=\"bridge\" failed (add): failed to \
                          allocate for range 0: no IP addresses available in range set: 10.0.0.1-10.0.0.2";
        assert!(is_exhaustion(host_local));
        assert!(is_exhaustion("add cmd: failed to assign an IP address to container"));
        assert!(!is_exhaustion("failed to reserve sandbox name"));
    }
}
