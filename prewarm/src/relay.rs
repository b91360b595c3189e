//! The CRI relay: gRPC calls go to containerd as raw HTTP/2 bytes, apart from those that [`Rules`] asks for.
//!
//! A call that no rule wants is never decoded or gathered: headers, data and trailers flow both ways as they come, so
//! unknown methods, other services, streams in both directions, metadata, deadlines, cancellation, status details and
//! messages of any size behave as without the relay. A call that a rule wants is gathered within a bound, handed over as
//! one message, and answered with bytes.
//!
//! Every connection of a client has its own connection to containerd, made at the first call and again whenever it is
//! gone: a client that does not read holds up nobody else, and the kubelet keeps its connection while containerd restarts.
//!
//! Known limit: HTTP/2 requires an authority that is one. Clients of gRPC before 1.34 that send the socket's path as
//! `:authority` are refused with PROTOCOL_ERROR; the kubelet, crictl and containerd's own clients send `localhost`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::stream::BoxStream;
use http::HeaderMap;
use tokio::net::UnixListener;
use tokio_util::sync::CancellationToken;

mod budget;
mod client;
mod deadline;
mod frames;
mod gather;
mod limits;
mod link;
mod pass;
mod path;
mod pump;
mod server;
mod status;
mod upstream;

pub use limits::Limits;

/// Makes [`Method`] and finds its values by their names, so that each method is written down once.
macro_rules! methods {
    ($($method:ident),* $(,)?) => {
        /// Methods that a rule may want.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(missing_docs, reason = "the names are CRI's")]
        pub enum Method {
            $($method),*
        }

        impl Method {
            /// The method of this name, and the name as a label.
            fn named(name: &str) -> Option<(Self, &'static str)> {
                match name {
                    $(stringify!($method) => Some((Self::$method, stringify!($method))),)*
                    _ => None,
                }
            }
        }
    };
}

methods!(
    RunPodSandbox,
    StopPodSandbox,
    RemovePodSandbox,
    PodSandboxStatus,
    ListPodSandbox,
    StreamPodSandboxes,
    CreateContainer,
    StartContainer,
    ListContainers,
    StreamContainers,
    ListContainerStats,
    StreamContainerStats,
    PortForward,
    PodSandboxStats,
    ListPodSandboxStats,
    StreamPodSandboxStats,
    ListPodSandboxMetrics,
    StreamPodSandboxMetrics,
    UpdatePodSandboxResources,
    UpdateRuntimeConfig,
    GetContainerEvents,
    PullImage,
);

/// Version of CRI that a client speaks. The messages of both are the same on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Api {
    /// `runtime.v1`
    V1,
    /// `runtime.v1alpha2`, which containerd 1.6 still serves.
    V1Alpha2,
}

/// A call, gathered: one request message.
pub struct Call {
    /// What is called.
    pub method: Method,
    /// In which version.
    pub api: Api,
    /// The request message, not compressed.
    pub message: Bytes,
    /// containerd, as this call reaches it: same path, metadata and deadline; dropped work is cancelled there.
    pub upstream: Box<dyn Upstream>,
}

/// containerd behind one call. It may be asked several times. What is dropped is cancelled there.
#[async_trait]
pub trait Upstream: Send + Sync {
    /// Sends `message`, gathers one answer.
    async fn unary(&self, message: Bytes) -> Result<Answer, Failure>;

    /// Sends `message`, gives the answer's messages as they come.
    ///
    /// Returns as soon as the request is on its way: containerd sends headers only with its first message, which for
    /// `GetContainerEvents` may be hours away. So only an unreachable containerd fails here; whatever containerd itself
    /// says, "unimplemented" included, is an item. After an `Err` item the stream ends.
    async fn stream(&self, message: Bytes) -> Result<Messages, Failure>;
}

/// containerd's answer to a unary call.
#[derive(Debug, Clone, Default)]
pub struct Answer {
    /// Initial metadata.
    pub metadata: HeaderMap,
    /// The message, not compressed.
    pub message: Bytes,
    /// Trailers, status included.
    pub trailers: HeaderMap,
}

impl Answer {
    /// The same answer with another message.
    #[must_use]
    pub fn with(mut self, message: impl Into<Bytes>) -> Self {
        self.message = message.into();
        self
    }

    /// An answer of our own.
    #[must_use]
    pub fn ours(message: impl Into<Bytes>) -> Self {
        Self::default().with(message)
    }
}

/// A call that failed.
#[derive(Debug, Clone)]
pub enum Failure {
    /// containerd said so: its status as it came, with message and details, and any other trailers. The client is given
    /// `metadata`; a rule that wants to say something else makes a [`Self::Ours`].
    Answered {
        /// The status, for rules to look at.
        status: tonic::Status,
        /// Initial metadata and trailers as they came, to be relayed.
        metadata: HeaderMap,
    },
    /// We say so.
    Ours(tonic::Status),
}

impl Failure {
    /// The status.
    #[must_use]
    pub fn status(&self) -> &tonic::Status {
        match self {
            Self::Answered { status, .. } | Self::Ours(status) => status,
        }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        Self::Ours(status)
    }
}

/// Messages of a stream.
pub type Messages = BoxStream<'static, Result<Bytes, Failure>>;

/// What a rule answers.
pub enum Reply {
    /// One message.
    One(Answer),
    /// A stream of messages.
    Stream(Messages),
    /// A failure.
    Failed(Failure),
}

impl From<Result<Answer, Failure>> for Reply {
    fn from(result: Result<Answer, Failure>) -> Self {
        match result {
            Ok(answer) => Self::One(answer),
            Err(failure) => Self::Failed(failure),
        }
    }
}

/// What happens to the calls that are not simply passed on.
#[async_trait]
pub trait Rules: Send + Sync + 'static {
    /// Whether calls of this method are gathered and handed to [`Self::call`].
    fn wants(&self, method: Method, api: Api) -> bool;

    /// Answers a call. Dropped when the client gives up.
    async fn call(&self, call: Call) -> Reply;
}

/// What is told about calls and connections, for metrics. Called on the relay's tasks: must not block.
pub trait Watch: Send + Sync + 'static {
    /// A call has ended. `method` is the bare name of a CRI method, or `other`.
    fn call_ended(&self, method: &'static str, code: tonic::Code);

    /// So many connections of clients are open now.
    fn connections(&self, open: usize);
}

/// Nobody watches.
impl Watch for () {
    fn call_ended(&self, _method: &'static str, _code: tonic::Code) {}

    fn connections(&self, _open: usize) {}
}

/// What a relay is made of.
pub struct RelayOptions {
    /// containerd's socket.
    pub containerd_socket: PathBuf,
    /// What happens to the calls that are not simply passed on.
    pub rules: Arc<dyn Rules>,
    /// Who is told; `Arc::new(())` for nobody.
    pub watch: Arc<dyn Watch>,
    /// Bounds; the default is meant for production.
    pub limits: Limits,
}

/// The relay.
#[derive(Clone)]
pub struct Relay {
    shared: Arc<Shared>,
}

/// What all connections share.
struct Shared {
    options: RelayOptions,
    /// Memory for large gathered requests.
    requests: budget::Budget,
    /// Memory for large gathered answers.
    answers: budget::Budget,
    /// Connections that are open.
    open: Mutex<usize>,
}

impl Relay {
    /// A relay. Nothing is opened before [`Self::serve`].
    #[must_use]
    pub fn new(options: RelayOptions) -> Self {
        let shared = Shared {
            requests: budget::Budget::new(options.limits.requests),
            answers: budget::Budget::new(options.limits.answers),
            open: Mutex::new(0),
            options,
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Serves clients of `listener` until `stopping`, then ends: nobody new is let in, clients are told to go away, calls
    /// under way have `drain` to finish. Streams without an end are ended at once, and whatever is left after `drain`,
    /// with UNAVAILABLE, upon which clients connect again.
    pub async fn serve(&self, listener: UnixListener, stopping: CancellationToken, drain: Duration) {
        server::serve(Arc::clone(&self.shared), listener, stopping, drain).await;
    }
}

/// What calls are told that the relay does not wait for.
fn stopped() -> Failure {
    tonic::Status::unavailable("hullspeed-prewarm is stopping").into()
}
