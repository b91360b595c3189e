//! The rules' own questions to containerd. Answers stay bytes, so that what we do not know in them is not lost.

use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use http::uri::PathAndQuery;
use hullspeed_proto::cri::v1::{
    ContainerFilter, ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest, PodSandboxFilter,
    PodSandboxStatusRequest, VersionRequest,
};
use prost::Message;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Status};

use super::overlay::Era;
use super::parts::text;
use crate::containerd::{Containerd, MAX_MESSAGE_BYTES, Release};

/// Limit on one question; containerd answers all of these from memory.
const LIMIT: Duration = Duration::from_secs(10);

/// Messages as bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, dst: &mut EncodeBuf<'_>) -> Result<(), Status> {
        dst.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, src: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(src.copy_to_bytes(src.remaining())))
    }
}

async fn ask(containerd: &Containerd, path: &'static str, request: &impl Message) -> Result<Bytes, Status> {
    let mut client = tonic::client::Grpc::new(containerd.channel()).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let message = Bytes::from(request.encode_to_vec());
    let answer = async {
        client
            .ready()
            .await
            .map_err(|error| Status::unavailable(format!("containerd: {error}")))?;
        let path = PathAndQuery::from_static(path);
        Ok(client.unary(Request::new(message), path, Raw).await?.into_inner())
    };
    match tokio::time::timeout(LIMIT, answer).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!(
            "containerd did not answer {path} in {LIMIT:?}"
        ))),
    }
}

/// `ListPodSandboxResponse` with all sandboxes, or the one with this id.
pub(crate) async fn sandboxes(containerd: &Containerd, id: &str) -> Result<Bytes, Status> {
    let filter = (!id.is_empty()).then(|| PodSandboxFilter {
        id: id.to_owned(),
        ..Default::default()
    });
    let request = ListPodSandboxRequest { filter };
    ask(containerd, "/runtime.v1.RuntimeService/ListPodSandbox", &request).await
}

/// `PodSandboxStatusResponse`.
pub(crate) async fn sandbox_status(containerd: &Containerd, id: &str) -> Result<Bytes, Status> {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: id.to_owned(),
        verbose: false,
    };
    ask(containerd, "/runtime.v1.RuntimeService/PodSandboxStatus", &request).await
}

/// `ListContainersResponse`; both filters may be empty.
pub(crate) async fn containers(containerd: &Containerd, id: &str, sandbox_id: &str) -> Result<Bytes, Status> {
    let filter = ContainerFilter {
        id: id.to_owned(),
        pod_sandbox_id: sandbox_id.to_owned(),
        ..Default::default()
    };
    let request = ListContainersRequest { filter: Some(filter) };
    ask(containerd, "/runtime.v1.RuntimeService/ListContainers", &request).await
}

/// `ContainerStatusResponse`.
pub(crate) async fn container_status(containerd: &Containerd, id: &str) -> Result<Bytes, Status> {
    let request = ContainerStatusRequest {
        container_id: id.to_owned(),
        verbose: false,
    };
    ask(containerd, "/runtime.v1.RuntimeService/ContainerStatus", &request).await
}

/// How this containerd shows namespace options. Asked only for the rare pod for which that matters, so never kept.
pub(crate) async fn era(containerd: &Containerd) -> Result<Era, Status> {
    let request = VersionRequest::default();
    let answer = ask(containerd, "/runtime.v1.RuntimeService/Version", &request).await?;
    let version = text(&answer, 3).map_err(|error| Status::internal(format!("answer to Version: {error}")))?;
    Ok(era_of(&version))
}

fn era_of(version: &str) -> Era {
    match Release::of(version) {
        Some(Release { major: 1, minor, .. }) if minor < 7 => Era::Modes,
        _ => Era::AsGiven,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn eras_by_version() {
        assert_eq!(era_of("1.6.20~ds1"), Era::Modes);
        assert_eq!(era_of("v1.6.20"), Era::Modes);
        assert_eq!(era_of("1.7.24"), Era::AsGiven);
        assert_eq!(era_of("2.1.9"), Era::AsGiven);
        assert_eq!(era_of("unknown"), Era::AsGiven);
    }
}
