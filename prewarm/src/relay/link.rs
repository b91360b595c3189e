//! The connection to containerd that belongs to one client's connection.

use std::fmt::Display;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use h2::SendStream;
use h2::client::{ResponseFuture, SendRequest};
use http::{Request, Version};
use tokio::net::UnixStream;
use tokio::time::Instant;
use tonic::Status;
use tracing::debug;

use super::Limits;

/// Between two attempts to connect to a socket whose backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(5);

/// Connections that a request is tried on. A second one only when the first certainly did not take it.
const ATTEMPTS: usize = 2;

/// Why containerd was not asked.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    /// The socket does not connect.
    #[error("containerd cannot be reached at {}", socket.display())]
    Connect {
        /// Which.
        socket: PathBuf,
        /// Why. Shared by all calls that waited for this attempt.
        #[source]
        source: Arc<io::Error>,
    },
    /// The connection takes no request.
    #[error("containerd at {} takes no request", socket.display())]
    Request {
        /// Which.
        socket: PathBuf,
        /// Why.
        #[source]
        source: h2::Error,
    },
}

impl LinkError {
    /// What the client is told.
    pub(super) fn status(&self) -> Status {
        match self {
            Self::Connect { source, .. } => Status::unavailable(format!("{self}: {source}")),
            Self::Request { source, .. } => Status::unavailable(format!("{self}: {source}")),
        }
    }
}

/// The connection to containerd of one client's connection: none before the first call, a new one when it is gone.
pub(super) struct Link {
    socket: PathBuf,
    limits: Limits,
    sender: Mutex<Option<Sender>>,
    connecting: tokio::sync::Mutex<Attempts>,
}

#[derive(Clone)]
struct Sender {
    requests: SendRequest<Bytes>,
    number: u64,
}

/// Attempts to connect: how many succeeded, and when the last one that failed began.
#[derive(Default)]
struct Attempts {
    connected: u64,
    failed: Option<(Instant, Arc<io::Error>)>,
}

impl Link {
    pub(super) fn new(socket: &Path, limits: Limits) -> Self {
        Self {
            socket: socket.to_owned(),
            limits,
            sender: Mutex::new(None),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    /// What the client is told when the connection breaks under a call.
    pub(super) fn broken(&self, error: &impl Display) -> Status {
        Status::unavailable(format!("containerd at {} went away: {error}", self.socket.display()))
    }

    /// Begins a request. `end` if it has no body.
    pub(super) async fn send(
        &self,
        request: Request<()>,
        end: bool,
    ) -> Result<(ResponseFuture, SendStream<Bytes>), LinkError> {
        let mut request = request;
        if request.uri().authority().is_none() {
            // The client sent none, and this is how h2 is told to send none either.
            *request.version_mut() = Version::HTTP_11;
        }
        let mut last = None;
        for _ in 0..ATTEMPTS {
            let Sender { requests, number } = self.sender().await?;
            let sent = match requests.ready().await {
                Ok(mut requests) => requests.send_request(request.clone(), end),
                Err(error) => Err(error),
            };
            match sent {
                Ok(sent) => return Ok(sent),
                Err(error) => {
                    self.forget(number);
                    last = Some(error);
                }
            }
        }
        let source = last.unwrap_or_else(|| h2::Reason::INTERNAL_ERROR.into());
        Err(LinkError::Request {
            socket: self.socket.clone(),
            source,
        })
    }

    fn current(&self) -> Option<Sender> {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn forget(&self, number: u64) {
        let mut sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        sender.take_if(|sender| sender.number == number);
    }

    async fn sender(&self) -> Result<Sender, LinkError> {
        if let Some(sender) = self.current() {
            return Ok(sender);
        }
        let asked = Instant::now();
        let mut attempts = self.connecting.lock().await;
        if let Some(sender) = self.current() {
            return Ok(sender);
        }
        // A thousand calls that wait here do not try a thousand times, one after the other.
        if let Some((_, why)) = attempts.failed.as_ref().filter(|(began, _)| *began >= asked) {
            return Err(self.unreachable(Arc::clone(why)));
        }
        let began = Instant::now();
        match self.connect().await {
            Ok(requests) => {
                attempts.connected += 1;
                let number = attempts.connected;
                let sender = Sender { requests, number };
                *self.sender.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
                Ok(sender)
            }
            Err(why) => {
                let why = Arc::new(why);
                attempts.failed = Some((began, Arc::clone(&why)));
                Err(self.unreachable(why))
            }
        }
    }

    fn unreachable(&self, source: Arc<io::Error>) -> LinkError {
        LinkError::Connect {
            socket: self.socket.clone(),
            source,
        }
    }

    async fn connect(&self) -> io::Result<SendRequest<Bytes>> {
        let connected = tokio::time::timeout(self.limits.connect, async {
            let stream = self.reach().await?;
            let mut builder = h2::client::Builder::new();
            builder
                .initial_window_size(self.limits.stream_window)
                .initial_connection_window_size(self.limits.connection_window)
                .max_header_list_size(self.limits.answer_headers)
                .max_send_buffer_size(self.limits.send_buffer)
                // Answers to calls that were given up still come: many at once, and over the years any number.
                .max_concurrent_reset_streams(self.limits.streams as usize)
                .max_local_error_reset_streams(None)
                .enable_push(false);
            builder.handshake::<_, Bytes>(stream).await.map_err(io::Error::other)
        });
        let (requests, connection) = connected.await.map_err(|_| io::ErrorKind::TimedOut)??;
        // It ends when containerd closes it, or with the last handle: the client's connection and calls.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(%error, "a connection to containerd broke");
            }
        });
        Ok(requests)
    }

    async fn reach(&self) -> io::Result<UnixStream> {
        loop {
            match UnixStream::connect(&self.socket).await {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => tokio::time::sleep(BACKLOG_PAUSE).await,
                reached => return reached,
            }
        }
    }
}
