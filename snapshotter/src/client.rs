//! The command line's end of the control API.

use std::path::Path;

use hullspeed_daemon::ask::{ClientError, Daemon, limited};
use hullspeed_proto::hullspeed::control::v1 as api;
use hullspeed_proto::hullspeed::control::v1::snapshotter_control_client::SnapshotterControlClient;
use tonic::transport::Channel;
use tonic::{Request, Streaming};

/// Largest answer taken. The daemon bounds the number of entries, and their names may be long.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// A daemon's socket. Every call connects anew.
#[derive(Debug, Clone)]
pub struct Client {
    daemon: Daemon,
}

impl Client {
    /// The daemon at this socket.
    pub fn at(socket: &Path) -> Self {
        Self {
            daemon: Daemon {
                program: env!("CARGO_PKG_NAME"),
                key: "socket",
                socket: socket.to_owned(),
            },
        }
    }

    async fn connect(&self) -> Result<SnapshotterControlClient<Channel>, ClientError> {
        let client = SnapshotterControlClient::new(self.daemon.connect().await?);
        Ok(client.max_decoding_message_size(MAX_ANSWER_BYTES))
    }

    /// How it is.
    pub async fn status(&self) -> Result<api::StatusResponse, ClientError> {
        let answer = self.connect().await?.status(limited(api::StatusRequest {})).await;
        Ok(answer?.into_inner())
    }

    /// What only it knows of its ways to mount layers.
    pub async fn diagnose(&self) -> Result<api::DiagnoseResponse, ClientError> {
        let answer = self.connect().await?.diagnose(limited(api::DiagnoseRequest {})).await;
        Ok(answer?.into_inner())
    }

    /// Why something is served as it is.
    pub async fn explain(&self, subject: &str) -> Result<api::ExplainResponse, ClientError> {
        let request = limited(api::ExplainRequest {
            subject: subject.to_owned(),
        });
        Ok(self.connect().await?.explain(request).await?.into_inner())
    }

    /// A page of the layers of the cache.
    pub async fn list_layers(&self, after: String) -> Result<api::ListLayersResponse, ClientError> {
        let request = limited(api::ListLayersRequest { after, limit: 0 });
        Ok(self.connect().await?.list_layers(request).await?.into_inner())
    }

    /// What the cache takes.
    pub async fn cache_usage(&self) -> Result<api::CacheUsageResponse, ClientError> {
        let request = limited(api::CacheUsageRequest {});
        Ok(self.connect().await?.cache_usage(request).await?.into_inner())
    }

    /// Removes what is not used; takes as long as it takes.
    pub async fn prune_cache(&self, all_unused: bool) -> Result<api::PruneCacheResponse, ClientError> {
        let request = Request::new(api::PruneCacheRequest { all_unused });
        Ok(self.connect().await?.prune_cache(request).await?.into_inner())
    }

    /// Verifies what is cached; progress as it comes.
    pub async fn verify_cache(&self, layer: String) -> Result<Streaming<api::VerifyCacheProgress>, ClientError> {
        let request = Request::new(api::VerifyCacheRequest { layer });
        Ok(self.connect().await?.verify_cache(request).await?.into_inner())
    }
}
