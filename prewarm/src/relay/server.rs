//! Connections of clients, and their calls.

use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use h2::RecvStream;
use h2::server::{Connection, SendResponse};
use http::Request;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::{debug, warn};

use super::client::Client;
use super::gather::gathered;
use super::link::Link;
use super::pass::pass;
use super::path::{called, is_endless};
use super::{Shared, status};

/// Between attempts to accept, when that fails: usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// For calls that are ended to be said so, and for connections to close.
const FAREWELL: Duration = Duration::from_secs(1);

/// Between looks, while the relay ends, at whether a connection has calls. One without any at two looks is closed: its
/// client does not heed that it was told to go.
const IDLE_GRACE: Duration = Duration::from_millis(500);

/// How a relay ends: step by step.
#[derive(Clone, Default)]
struct Stages {
    /// Nobody new; endless streams are ended.
    stopping: CancellationToken,
    /// Calls are ended.
    ended: CancellationToken,
    /// Connections are closed whatever they do.
    closed: CancellationToken,
}

pub(super) async fn serve(shared: Arc<Shared>, listener: UnixListener, stopping: CancellationToken, drain: Duration) {
    let stages = Stages {
        stopping,
        ..Stages::default()
    };
    let tasks = TaskTracker::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stages.stopping.cancelled() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => match Place::take(&shared) {
                Some(place) => {
                    let served = connection(Arc::clone(&shared), stream, stages.clone(), tasks.clone());
                    tasks.spawn(async move {
                        served.await;
                        drop(place);
                    });
                }
                None => warn!(
                    limit = shared.options.limits.connections,
                    "too many connections: one is closed"
                ),
            },
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    tasks.close();
    if tokio::time::timeout(drain, tasks.wait()).await.is_err() {
        stages.ended.cancel();
        let _ = tokio::time::timeout(FAREWELL, tasks.wait()).await;
        stages.closed.cancel();
        let _ = tokio::time::timeout(FAREWELL, tasks.wait()).await;
    }
}

/// A connection's place among those that are let in.
struct Place(Arc<Shared>);

impl Place {
    fn take(shared: &Arc<Shared>) -> Option<Self> {
        let mut open = shared.open.lock().unwrap_or_else(PoisonError::into_inner);
        if *open >= shared.options.limits.connections {
            return None;
        }
        *open += 1;
        // Told under the lock, so that the last number told is the right one.
        shared.options.watch.connections(*open);
        Some(Self(Arc::clone(shared)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.0.open.lock().unwrap_or_else(PoisonError::into_inner);
        *open -= 1;
        self.0.options.watch.connections(*open);
    }
}

/// Serves one connection to its end.
async fn connection(shared: Arc<Shared>, stream: UnixStream, stages: Stages, tasks: TaskTracker) {
    let shaken = tokio::select! {
        biased;
        () = stages.stopping.cancelled() => return,
        shaken = handshake(&shared, stream) => shaken,
    };
    let mut connection = match shaken {
        Ok(connection) => connection,
        Err(error) => {
            debug!(%error, "a client does not speak HTTP/2: its connection is closed");
            return;
        }
    };
    let link = Arc::new(Link::new(&shared.options.containerd_socket, shared.options.limits));
    let (mut going, mut was_idle) = (false, false);
    loop {
        let accepted = tokio::select! {
            biased;
            () = stages.stopping.cancelled(), if !going => {
                going = true;
                connection.graceful_shutdown();
                continue;
            }
            () = stages.closed.cancelled() => return,
            accepted = connection.accept() => accepted,
            () = tokio::time::sleep(IDLE_GRACE), if going => {
                // Each call holds the link. What ended just now may still have an answer to be written.
                let is_idle = Arc::strong_count(&link) == 1;
                if is_idle && was_idle {
                    return;
                }
                was_idle = is_idle;
                continue;
            }
        };
        match accepted {
            Some(Ok((request, respond))) => {
                tasks.spawn(call(
                    Arc::clone(&shared),
                    Arc::clone(&link),
                    request,
                    respond,
                    stages.clone(),
                ));
            }
            Some(Err(error)) => {
                debug!(%error, "a client's connection broke");
                return;
            }
            None => return,
        }
    }
}

async fn handshake(shared: &Shared, stream: UnixStream) -> io::Result<Connection<UnixStream, Bytes>> {
    let limits = &shared.options.limits;
    let mut builder = h2::server::Builder::new();
    builder
        .initial_window_size(limits.stream_window)
        .initial_connection_window_size(limits.connection_window)
        .max_concurrent_streams(limits.streams)
        .max_header_list_size(limits.request_headers)
        .max_send_buffer_size(limits.send_buffer)
        // Calls that their client gave up before we saw them. A client may give up all it has at once.
        .max_pending_accept_reset_streams(limits.streams as usize)
        .max_concurrent_reset_streams(limits.streams as usize);
    let shaken = tokio::time::timeout(limits.handshake, builder.handshake::<_, Bytes>(stream)).await;
    shaken.map_err(|_| io::ErrorKind::TimedOut)?.map_err(io::Error::other)
}

/// Serves one call to its end.
async fn call(
    shared: Arc<Shared>,
    link: Arc<Link>,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    stages: Stages,
) {
    let path = request
        .uri()
        .path_and_query()
        .map_or("", http::uri::PathAndQuery::as_str);
    let called = called(path);
    let ended = if is_endless(path) {
        stages.stopping
    } else {
        stages.ended
    };
    let grpc = status::is_grpc(request.headers());
    let mut client = Client::new(respond, grpc, shared.options.limits.stalled);
    let rule = called
        .rule
        .filter(|(method, api)| shared.options.rules.wants(*method, *api));
    let code = match rule {
        Some(rule) => gathered(&shared, &link, rule, request, &mut client, &ended).await,
        None => pass(&link, request, &mut client, &ended).await,
    };
    shared.options.watch.call_ended(called.label, code);
}
