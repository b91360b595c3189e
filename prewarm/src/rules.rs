//! What happens to the CRI calls in which a hull could be seen, or an adopted sandbox under its old name.

use std::sync::Arc;

use async_trait::async_trait;
use hullspeed_proto::cri::v1::AuthConfig;

use crate::adopt::HullSource;
use crate::containerd::Containerd;
use crate::ledger::Ledger;
use crate::relay::{Api, Call, Method, Reply, Rules};

pub mod events;

pub use events::Events;

/// Makes pods' sandboxes; implemented by the adopter.
#[async_trait]
pub trait Sandboxes: Send + Sync + 'static {
    /// Answers `RunPodSandbox`: from a hull, or from containerd.
    async fn run_pod_sandbox(&self, call: Call) -> Reply;

    /// A sandbox (adopted or not, full id) was removed and nothing more will be heard of it: its identity and name go.
    fn removed(&self, sandbox_id: &str);
}

/// What the pool wants to hear; implemented by the pool.
pub trait PoolHooks: Send + Sync + 'static {
    /// Hulls made until now are of no use any more.
    fn flush(&self, reason: &'static str);
}

/// Takes the credentials of pulls; they are never written down.
pub trait CredentialSink: Send + Sync + 'static {
    /// The kubelet pulls `image` with these. Must not wait.
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
}

impl CriRules {
    /// Rules over these parts.
    #[must_use]
    pub fn new(options: RuleOptions) -> Self {
        Self { options }
    }
}

#[async_trait]
impl Rules for CriRules {
    fn wants(&self, _method: Method, _api: Api) -> bool {
        true
    }

    async fn call(&self, call: Call) -> Reply {
        let _ = &self.options.ledger;
        call.upstream.unary(call.message).await.into()
    }
}
