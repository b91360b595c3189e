//! The command line's end of the daemon's own API.

use std::path::Path;

use hullspeed_daemon::ask::{ClientError, Daemon, limited};
use hullspeed_proto::hullspeed::prewarm::v1 as api;
use hullspeed_proto::hullspeed::prewarm::v1::prewarm_control_client::PrewarmControlClient;
use tonic::Streaming;
use tonic::transport::Channel;

/// A daemon's socket. Every call connects anew.
#[derive(Debug, Clone)]
pub struct Client {
    daemon: Daemon,
}

impl Client {
    /// The daemon at this socket.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self {
            daemon: Daemon {
                program: env!("CARGO_PKG_NAME"),
                key: "control_socket",
                socket: socket.to_owned(),
            },
        }
    }

    async fn connect(&self) -> Result<PrewarmControlClient<Channel>, ClientError> {
        self.daemon.connect().await.map(PrewarmControlClient::new)
    }

    /// How things stand.
    pub async fn status(&self) -> Result<api::StatusResponse, ClientError> {
        let mut client = self.connect().await?;
        let answer = client.status(limited(api::StatusRequest {})).await;
        Ok(answer?.into_inner())
    }

    /// Changes what the pool does; how it stands then.
    pub async fn pool(&self, action: api::PoolAction) -> Result<api::PoolStatus, ClientError> {
        let mut client = self.connect().await?;
        let request = limited(api::PoolRequest { action: action.into() });
        let answer = client.pool(request).await?.into_inner();
        Ok(answer.pool.unwrap_or_default())
    }

    /// Drains the pool; progress as it comes.
    pub async fn drain(&self) -> Result<Streaming<api::DrainProgress>, ClientError> {
        let mut client = self.connect().await?;
        let answer = client.drain(api::DrainRequest {}).await;
        Ok(answer?.into_inner())
    }
}
