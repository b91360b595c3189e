//! The rules' own questions to containerd. Answers stay bytes, so that what we do not know in them is not lost.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes};
use http::uri::PathAndQuery;
use hullspeed_proto::cri::v1::{
    ContainerFilter, ContainerStatusRequest, ListContainersRequest, ListPodSandboxRequest, PodSandboxFilter,
    PodSandboxStatsRequest, PodSandboxStatusRequest, VersionRequest,
};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Request, Status};

use super::overlay::Era;
use super::parts::text;
use crate::containerd::{Containerd, MAX_MESSAGE_BYTES};

/// Limit on one question; containerd answers nearly all of these from memory.
const LIMIT: Duration = Duration::from_secs(10);

/// Limit on waiting for a turn to read a list.
const TURN_LIMIT: Duration = Duration::from_secs(10);

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
    ask_raw(containerd, path, request.encode_to_vec().into()).await
}

async fn ask_raw(containerd: &Containerd, path: &'static str, message: Bytes) -> Result<Bytes, Status> {
    let mut client = tonic::client::Grpc::new(containerd.channel()).max_decoding_message_size(MAX_MESSAGE_BYTES);
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

/// A list, and the turn to hold it: only few lists are in memory at once. Who holds one must not ask for another.
pub(crate) struct Listed {
    message: Bytes,
    _turn: OwnedSemaphorePermit,
}

impl Listed {
    pub(crate) fn new(message: Bytes, turn: OwnedSemaphorePermit) -> Self {
        Self { message, _turn: turn }
    }
}

impl Deref for Listed {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.message
    }
}

/// A turn to hold messages that are as large as a list.
pub(crate) async fn turn(turns: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Status> {
    let turn = tokio::time::timeout(TURN_LIMIT, Arc::clone(turns).acquire_owned()).await;
    match turn {
        Ok(Ok(turn)) => Ok(turn),
        // The semaphore is never closed.
        Ok(Err(_)) | Err(_) => Err(Status::resource_exhausted(format!(
            "hullspeed: too many lists are read at once, no turn within {TURN_LIMIT:?}"
        ))),
    }
}

/// `ListPodSandboxResponse` with all sandboxes, or the one with this id.
pub(crate) async fn sandboxes(containerd: &Containerd, id: &str) -> Result<Listed, Status> {
    let filter = (!id.is_empty()).then(|| PodSandboxFilter {
        id: id.to_owned(),
        ..Default::default()
    });
    let request = ListPodSandboxRequest { filter };
    let turn = turn(containerd.lists()).await?;
    let message = ask(containerd, "/runtime.v1.RuntimeService/ListPodSandbox", &request).await?;
    Ok(Listed::new(message, turn))
}

/// `PodSandboxStatsResponse`, which on the wire is a list of one.
pub(crate) async fn sandbox_stats(containerd: &Containerd, id: &str) -> Result<Bytes, Status> {
    let request = PodSandboxStatsRequest {
        pod_sandbox_id: id.to_owned(),
    };
    ask(containerd, "/runtime.v1.RuntimeService/PodSandboxStats", &request).await
}

/// `ListPodSandboxStatsResponse` to a request as bytes, which is to be about one sandbox.
pub(crate) async fn listed_stats(containerd: &Containerd, request: Bytes) -> Result<Bytes, Status> {
    ask_raw(containerd, "/runtime.v1.RuntimeService/ListPodSandboxStats", request).await
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

/// Which containerd this is; asked only until its facts are known.
pub(crate) async fn era(containerd: &Containerd) -> Result<Era, Status> {
    let request = VersionRequest::default();
    let answer = ask(containerd, "/runtime.v1.RuntimeService/Version", &request).await?;
    let version = text(&answer, 3).map_err(|error| Status::internal(format!("answer to Version: {error}")))?;
    Ok(Era::of(&version))
}
