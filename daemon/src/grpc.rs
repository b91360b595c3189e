//! gRPC over Unix sockets, and its codes by name.

use std::io;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::Code;
use tonic::transport::{Channel, Endpoint, Error, Uri};
use tower::Service;

/// How a peer on a Unix socket is reached: the socket takes the place of whatever a request line names.
fn connector(
    socket: &Path,
) -> impl Service<Uri, Response = TokioIo<UnixStream>, Error = io::Error, Future: Send> + Send + Sync + 'static {
    let socket = socket.to_owned();
    tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { Ok(TokioIo::new(UnixStream::connect(socket).await?)) }
    })
}

/// The authority is not used on a Unix socket, but the request line needs one.
fn endpoint(connect_limit: Duration) -> Endpoint {
    Endpoint::from_static("http://localhost").connect_timeout(connect_limit)
}

/// A connection to the server at `socket`.
pub async fn connect(socket: &Path, limit: Duration) -> Result<Channel, Error> {
    endpoint(limit).connect_with_connector(connector(socket)).await
}

/// The same, connected at the first call, and again whenever that is needed. Made on a runtime.
#[must_use]
pub fn connect_lazily(socket: &Path, limit: Duration) -> Channel {
    endpoint(limit).connect_with_connector_lazy(connector(socket))
}

/// A code as gRPC's documents name it, in small letters: as metrics and logs have it.
#[must_use]
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_channel_reaches_its_socket() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s.sock");
        assert!(connect(&path, LIMIT).await.is_err());
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let (channel, accepted) = tokio::join!(connect(&path, LIMIT), listener.accept());
        assert!(channel.is_ok() && accepted.is_ok());
    }
}
