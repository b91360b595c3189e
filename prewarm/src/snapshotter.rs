//! The connection to the snapshotter's control API. It reconnects by itself; nothing here waits for the snapshotter to come.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hullspeed_daemon::grpc::connect_lazily;
use hullspeed_proto::hullspeed::control::v1::snapshotter_control_client::SnapshotterControlClient;
use tonic::transport::Channel;

/// Limit on connecting to a socket whose server does not accept.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// The snapshotter, over one connection. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Snapshotter {
    socket: PathBuf,
    channel: Channel,
}

impl Snapshotter {
    /// The snapshotter at `socket`; connected at the first call, and again whenever that is needed. Made on a runtime.
    #[must_use]
    pub fn at(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            channel: connect_lazily(socket, CONNECT_LIMIT),
        }
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Its control API.
    #[must_use]
    pub fn control(&self) -> SnapshotterControlClient<Channel> {
        SnapshotterControlClient::new(self.channel.clone())
    }
}
