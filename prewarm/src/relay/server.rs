//! Connections of clients, and their calls.

use std::io;
use std::pin::pin;
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

use super::budget::Allowance;
use super::client::Client;
use super::gather::gathered;
use super::link::Link;
use super::pass::pass;
use super::path::{called, is_endless};
use super::{Shared, status};

/// Between attempts to accept, when that fails: usually for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a connection without calls may stay open at the end. A client that speaks HTTP/2 closes it at once, when it is
/// told to go away; one that does not should not make everybody wait.
const IDLE: Duration = Duration::from_secs(2);

/// For calls that are ended to be said so, and for connections to close.
const FAREWELL: Duration = Duration::from_secs(1);

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

/// What belongs to one connection of a client.
#[derive(Clone)]
pub(super) struct Own {
    /// Its connection to containerd.
    pub(super) link: Arc<Link>,
    /// Its memory for requests.
    pub(super) requests: Allowance,
    /// Its memory for answers.
    pub(super) answers: Allowance,
}

impl Own {
    fn new(shared: &Shared) -> Self {
        let limits = &shared.options.limits;
        Self {
            link: Arc::new(Link::new(&shared.options.containerd_socket, *limits)),
            requests: Allowance::new(limits, &shared.requests),
            answers: Allowance::new(limits, &shared.answers),
        }
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
    let own = Own::new(&shared);
    let calls = TaskTracker::new();
    let mut idle = pin!(idle(&calls));
    let mut going = false;
    loop {
        let accepted = tokio::select! {
            biased;
            () = stages.stopping.cancelled(), if !going => {
                going = true;
                calls.close();
                connection.graceful_shutdown();
                continue;
            }
            () = stages.closed.cancelled() => return,
            () = &mut idle, if going => return,
            accepted = connection.accept() => accepted,
        };
        match accepted {
            Some(Ok((request, respond))) => {
                let call = call(Arc::clone(&shared), own.clone(), request, respond, stages.clone());
                tasks.spawn(calls.track_future(call));
            }
            Some(Err(error)) => {
                debug!(%error, "a client's connection broke");
                return;
            }
            None => return,
        }
    }
}

/// Ends when there have been no calls for a while: what they have said last has been read by then, if it is read at all.
async fn idle(calls: &TaskTracker) {
    loop {
        calls.wait().await;
        tokio::time::sleep(IDLE).await;
        if calls.is_empty() {
            return;
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
    own: Own,
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
    let mut client = Client::new(respond, grpc, &shared.options.limits);
    let rule = called
        .rule
        .filter(|(method, api)| shared.options.rules.wants(*method, *api));
    let code = match rule {
        Some(rule) => gathered(&shared, &own, rule, request, &mut client, &ended).await,
        None => pass(&own.link, request, &mut client, &ended).await,
    };
    shared.options.watch.call_ended(called.label, code);
}
