//! The daemon's own connection to containerd, typed. It reconnects by itself; nothing here waits for containerd to come.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use hullspeed_daemon::grpc::connect_lazily;
use hullspeed_proto::containerd::services::containers::v1::containers_client::ContainersClient;
use hullspeed_proto::containerd::services::events::v1::events_client::EventsClient;
use hullspeed_proto::containerd::services::sandbox::v1::store_client::StoreClient;
use hullspeed_proto::cri::v1::image_service_client::ImageServiceClient;
use hullspeed_proto::cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::sync::Semaphore;
use tonic::metadata::AsciiMetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

pub mod facts;
pub mod sysctls;

pub use hullspeed_daemon::containerd::Release;

/// Whether this version makes a privileged pod's sandbox with a writable sysfs: since 2.1. Before, pause mounted it for
/// reading only, and a network namespace has one sysfs: the pod's containers cannot write to it either.
#[must_use]
pub fn has_writable_sysfs(version: &str) -> bool {
    Release::of(version).is_none_or(|release| (release.major, release.minor) >= (2, 1))
}

/// Limit on connecting to a Unix socket whose server does not accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Largest message that we accept, as containerd's own clients do.
pub const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Whole lists, each up to [`MAX_MESSAGE_BYTES`], that are in memory at once for questions that calls of clients cause.
const MAX_LISTS: usize = 4;

/// containerd's namespace of everything that CRI makes.
const NAMESPACE: &str = "k8s.io";

/// Limit on a call whose answer containerd has at hand.
const CALL_LIMIT: Duration = Duration::from_secs(10);

/// A call failed, or took too long.
#[derive(Debug, thiserror::Error)]
#[error("containerd does not answer {call}")]
pub struct CallError {
    /// Which.
    pub call: &'static str,
    /// What came instead.
    #[source]
    pub source: Box<Status>,
}

/// The answer to a call, within [`CALL_LIMIT`].
pub(crate) async fn limited<T>(
    call: &'static str,
    answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, CallError> {
    let late = |_| Status::deadline_exceeded(format!("no answer within {CALL_LIMIT:?}"));
    let answer = tokio::time::timeout(CALL_LIMIT, answer).await.map_err(late);
    let failed = |source| CallError {
        call,
        source: Box::new(source),
    };
    Ok(answer.flatten().map_err(failed)?.into_inner())
}

/// Puts a request into CRI's namespace.
#[derive(Debug, Clone, Copy)]
pub struct InNamespace;

impl tonic::service::Interceptor for InNamespace {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let namespace = AsciiMetadataValue::from_static(NAMESPACE);
        request.metadata_mut().insert("containerd-namespace", namespace);
        Ok(request)
    }
}

/// containerd, over one connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Containerd {
    socket: PathBuf,
    channel: Channel,
    lists: Arc<Semaphore>,
}

impl Containerd {
    /// A client of the containerd at `socket`; connected at the first call, and again whenever that is needed.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            channel: connect_lazily(socket, CONNECT_LIMIT),
            lists: Arc::new(Semaphore::new(MAX_LISTS)),
        }
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The connection itself, for calls whose messages are to stay bytes.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Turns to hold an answer that lists all that there is.
    #[must_use]
    pub fn lists(&self) -> &Arc<Semaphore> {
        &self.lists
    }

    /// CRI's runtime service.
    #[must_use]
    pub fn runtime(&self) -> RuntimeServiceClient<Channel> {
        RuntimeServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// CRI's image service.
    #[must_use]
    pub fn images(&self) -> ImageServiceClient<Channel> {
        ImageServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// containerd's records of containers, in CRI's namespace.
    #[must_use]
    pub fn containers(&self) -> ContainersClient<InterceptedService<Channel, InNamespace>> {
        ContainersClient::with_interceptor(self.channel.clone(), InNamespace)
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// containerd's records of sandboxes, in CRI's namespace: a second copy, which 1.6 has not.
    #[must_use]
    pub fn sandboxes(&self) -> StoreClient<InterceptedService<Channel, InNamespace>> {
        StoreClient::with_interceptor(self.channel.clone(), InNamespace).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }

    /// containerd's events.
    #[must_use]
    pub fn events(&self) -> EventsClient<InterceptedService<Channel, InNamespace>> {
        EventsClient::with_interceptor(self.channel.clone(), InNamespace).max_decoding_message_size(MAX_MESSAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_error_names_its_call() {
        let refused = async { Err::<tonic::Response<()>, _>(Status::not_found("no")) };
        let error = limited("Version", refused).await.unwrap_err();
        assert_eq!(error.to_string(), "containerd does not answer Version");
        assert_eq!(error.source.code(), tonic::Code::NotFound);
        let answered = async { Ok(tonic::Response::new(7)) };
        assert_eq!(limited("Version", answered).await.unwrap(), 7);
    }
}
