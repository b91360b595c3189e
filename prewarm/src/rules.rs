//! What happens to the CRI calls in which a hull could be seen, or an adopted sandbox under its old name.
//!
//! Requests and answers are edited as bytes ([`crate::wire`]): what is not named here passes as it came, also what only
//! newer peers know. A request that is not a protobuf message is refused as containerd's own decoder would. An answer
//! that is not one is not relayed, since a hull could be in it: the call fails with INTERNAL and the place.
//!
//! What containerd says of an unknown id differs between versions and methods. A call that names a hull is therefore
//! sent on under an id that nobody has, and containerd itself says what it says of strangers.

use std::sync::Arc;

use async_trait::async_trait;
use hullspeed_proto::cri::v1::AuthConfig;
use tonic::Status;

use crate::adopt::HullSource;
use crate::containerd::Containerd;
use crate::ledger::Ledger;
use crate::relay::{Api, Call, Failure, Method, Reply, Rules};
use crate::wire::WireError;

mod calls;
pub mod events;
mod identity;
mod info;
mod listing;
mod lookup;
mod overlay;
mod parts;
mod question;
mod samples;
mod starts;
mod stats;
#[cfg(test)]
mod tests;
mod usage;

pub use events::Events;

/// Makes pods' sandboxes; implemented by the adopter.
#[async_trait]
pub trait Sandboxes: Send + Sync + 'static {
    /// Answers `RunPodSandbox`: from a hull, or from containerd.
    async fn run_pod_sandbox(&self, call: Call) -> Reply;

    /// A sandbox (adopted or not, full id) was removed: its identity goes and its name is free. Must not wait.
    fn removed(&self, sandbox_id: &str);
}

/// What the pool wants to hear; implemented by the pool.
pub trait PoolHooks: Send + Sync + 'static {
    /// Hulls made until now are of no use any more.
    fn flush(&self, reason: &'static str);
}

/// Takes the credentials of pulls; they are never written down.
pub trait CredentialSink: Send + Sync + 'static {
    /// The kubelet pulls `image` with these, which are empty where it has none. Must not wait.
    fn seen(&self, image: &str, auth: &AuthConfig);
}

/// What [`CriRules`] works with.
pub struct RuleOptions {
    /// Who is what.
    pub ledger: Ledger,
    /// The daemon's own connection.
    pub containerd: Containerd,
    /// The adopter.
    pub sandboxes: Arc<dyn Sandboxes>,
    /// The pool, as the adopter sees it: told of the end of a pod's start.
    pub hulls: Arc<dyn HullSource>,
    /// The pool, as an administrator of the network sees it.
    pub hooks: Arc<dyn PoolHooks>,
    /// Where credentials go.
    pub credentials: Arc<dyn CredentialSink>,
    /// Events; the adopter has a clone, to say what it adopted.
    pub events: Events,
}

/// The rules of every intercepted method.
pub struct CriRules {
    options: RuleOptions,
    rates: Arc<stats::Rates>,
    starts: starts::Starts,
}

impl CriRules {
    /// Rules over these parts.
    #[must_use]
    pub fn new(options: RuleOptions) -> Self {
        Self {
            options,
            rates: Arc::default(),
            starts: starts::Starts::default(),
        }
    }
}

#[async_trait]
impl Rules for CriRules {
    fn wants(&self, method: Method, api: Api) -> bool {
        // The older version has no events, and nobody supplied them to its clients.
        !(method == Method::GetContainerEvents && api == Api::V1Alpha2)
    }

    async fn call(&self, call: Call) -> Reply {
        let answered = match call.method {
            Method::RunPodSandbox => return self.options.sandboxes.run_pod_sandbox(call).await,
            Method::GetContainerEvents => return Reply::Stream(self.options.events.stream(call)),
            Method::PodSandboxStatus => self.sandbox_status(&call).await,
            Method::StopPodSandbox | Method::PortForward | Method::UpdatePodSandboxResources => {
                self.by_id(&call).await.map(|(_, answer)| answer)
            }
            Method::RemovePodSandbox => self.remove(&call).await,
            Method::CreateContainer => self.create(&call).await,
            Method::StartContainer => self.start(&call).await,
            Method::PodSandboxStats => self.sandbox_stats(&call).await,
            Method::ListPodSandbox => self.list_sandboxes(&call).await,
            Method::ListPodSandboxStats => self.list_stats(&call).await,
            Method::ListPodSandboxMetrics => self.list_metrics(&call).await,
            Method::ListContainers | Method::ListContainerStats => self.list_containers(&call).await,
            Method::UpdateRuntimeConfig => self.configure(&call).await,
            Method::PullImage => self.pull(&call).await,
            Method::StreamPodSandboxes
            | Method::StreamPodSandboxStats
            | Method::StreamPodSandboxMetrics
            | Method::StreamContainers
            | Method::StreamContainerStats => {
                return match self.streamed(call).await {
                    Ok(messages) => Reply::Stream(messages),
                    Err(failure) => Reply::Failed(failure),
                };
            }
        };
        answered.into()
    }
}

/// A request that is not what its method takes, in the words of containerd's own server.
fn malformed_request(error: &WireError) -> Failure {
    Failure::Ours(Status::internal(format!("grpc: error unmarshalling request: {error}")))
}

/// An answer of containerd's that cannot be read, and so cannot be shown.
fn malformed_answer(method: &str, error: &WireError) -> Failure {
    Failure::Ours(Status::internal(format!(
        "hullspeed: containerd's answer to {method} cannot be read: {error}"
    )))
}
