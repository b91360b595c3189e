//! The command line's end of the daemon's own API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hullspeed_daemon::grpc::connect;
use hullspeed_proto::hullspeed::prewarm::v1 as api;
use hullspeed_proto::hullspeed::prewarm::v1::prewarm_control_client::PrewarmControlClient;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

/// Limit on an answer; the daemon answers from memory.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// The daemon does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error(
        "no hullspeed-prewarm answers on {} (key control_socket); is it running, and are you root?",
        socket.display()
    )]
    Unreachable {
        /// The socket.
        socket: PathBuf,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// It answers with an error.
    #[error("the daemon says")]
    Answer(#[source] Box<Status>),
}

/// A daemon's socket. Every call connects anew.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    /// The daemon at this socket.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
        }
    }

    async fn connect(&self) -> Result<PrewarmControlClient<Channel>, ClientError> {
        let connected = connect(&self.socket, ANSWER_LIMIT).await;
        connected
            .map(PrewarmControlClient::new)
            .map_err(|source| ClientError::Unreachable {
                socket: self.socket.clone(),
                source,
            })
    }

    /// How things stand.
    pub async fn status(&self) -> Result<api::StatusResponse, ClientError> {
        let mut client = self.connect().await?;
        let answer = client.status(limited(api::StatusRequest {})).await;
        Ok(answer.map_err(said)?.into_inner())
    }

    /// Changes what the pool does; how it stands then.
    pub async fn pool(&self, action: api::PoolAction) -> Result<api::PoolStatus, ClientError> {
        let mut client = self.connect().await?;
        let request = limited(api::PoolRequest { action: action.into() });
        let answer = client.pool(request).await.map_err(said)?.into_inner();
        Ok(answer.pool.unwrap_or_default())
    }

    /// Drains the pool; progress as it comes.
    pub async fn drain(&self) -> Result<Streaming<api::DrainProgress>, ClientError> {
        let mut client = self.connect().await?;
        let answer = client.drain(api::DrainRequest {}).await;
        Ok(answer.map_err(said)?.into_inner())
    }
}

/// An error of the daemon's.
pub fn said(status: Status) -> ClientError {
    ClientError::Answer(Box::new(status))
}

fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER_LIMIT);
    request
}
