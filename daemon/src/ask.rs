//! The end of a daemon's own API that its command line has: reaching it, and what it says when it refuses.

use std::path::PathBuf;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::grpc::connect;

/// Limit on an answer; daemons answer from memory, or from their own disk.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The daemon does not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers.
    #[error("no {program} answers on {} (key {key}); is it running, and are you root?", socket.display())]
    Unreachable {
        /// The daemon's name.
        program: &'static str,
        /// The key of its configuration that names the socket.
        key: &'static str,
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

impl ClientError {
    /// The exit code, from sysexits.h where it has one.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable { .. } => 69,
            Self::Answer(_) => 1,
        }
    }

    /// What the daemon answered, where it did.
    #[must_use]
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Unreachable { .. } => None,
            Self::Answer(status) => Some(status.code()),
        }
    }
}

impl From<Status> for ClientError {
    fn from(status: Status) -> Self {
        Self::Answer(Box::new(status))
    }
}

/// Where a daemon answers. Every call connects anew.
#[derive(Debug, Clone)]
pub struct Daemon {
    /// Its name.
    pub program: &'static str,
    /// The key of its configuration that names the socket.
    pub key: &'static str,
    /// The socket.
    pub socket: PathBuf,
}

impl Daemon {
    /// A connection to it.
    pub async fn connect(&self) -> Result<Channel, ClientError> {
        let unreachable = |source| ClientError::Unreachable {
            program: self.program,
            key: self.key,
            socket: self.socket.clone(),
            source,
        };
        connect(&self.socket, ANSWER_LIMIT).await.map_err(unreachable)
    }
}

/// A request whose answer is not waited for longer than [`ANSWER_LIMIT`].
pub fn limited<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER_LIMIT);
    request
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::chain;

    #[tokio::test]
    async fn who_does_not_answer_is_named_with_the_key() {
        let daemon = Daemon {
            program: "hullspeed-test",
            key: "some_socket",
            socket: "/nonesuch/s.sock".into(),
        };
        let error = daemon.connect().await.unwrap_err();
        let said = chain(&error);
        assert!(
            said.contains("hullspeed-test") && said.contains("some_socket") && said.contains("/nonesuch/s.sock"),
            "{said}"
        );
        assert_eq!((error.exit_code(), error.code()), (69, None));
        let refused = ClientError::from(Status::not_found("no such thing"));
        assert_eq!((refused.exit_code(), refused.code()), (1, Some(Code::NotFound)));
        assert!(chain(&refused).contains("no such thing"));
    }
}
