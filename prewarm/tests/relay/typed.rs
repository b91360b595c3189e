//! tonic on both sides.

use std::pin::Pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt, stream};
use hullspeed_prewarm::containerd::Containerd;
use hullspeed_prewarm::relay::{Method, Reply};
use hullspeed_proto::containerd::services::containers::v1::containers_server::{Containers, ContainersServer};
use hullspeed_proto::containerd::services::containers::v1::{
    Container, GetContainerRequest, GetContainerResponse, ListContainersRequest, ListContainersResponse,
    UpdateContainerRequest, UpdateContainerResponse,
};
use hullspeed_proto::containerd::services::events::v1::events_server::{Events, EventsServer};
use hullspeed_proto::containerd::services::events::v1::{Envelope, SubscribeRequest};
use hullspeed_proto::cri::v1::{
    ListPodSandboxRequest, ListPodSandboxResponse, PodSandbox, PodSandboxStatusRequest, StopPodSandboxRequest,
};
use prost::Message;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::{Code, Request, Response, Status};

use crate::support::{Rule, Stand, soon};

/// Some services of a containerd.
struct Services;

#[tonic::async_trait]
impl Containers for Services {
    async fn get(&self, request: Request<GetContainerRequest>) -> Result<Response<GetContainerResponse>, Status> {
        if request
            .metadata()
            .get("containerd-namespace")
            .is_none_or(|namespace| namespace != "k8s.io")
        {
            return Err(Status::failed_precondition("namespace is required"));
        }
        let id = request.into_inner().id;
        match id.as_str() {
            "late" => {
                tokio::time::sleep(Duration::from_secs(60)).await;
                Err(Status::internal("nobody should wait for this"))
            }
            "missing" => Err(Status::with_details(
                Code::NotFound,
                "no such container",
                vec![8, 5].into(),
            )),
            _ => Ok(Response::new(GetContainerResponse {
                container: Some(Container {
                    id,
                    ..Default::default()
                }),
            })),
        }
    }

    async fn list(&self, _: Request<ListContainersRequest>) -> Result<Response<ListContainersResponse>, Status> {
        let container = |number: usize| Container {
            id: number.to_string().repeat(100),
            ..Default::default()
        };
        Ok(Response::new(ListContainersResponse {
            containers: (0..10_000).map(container).collect(),
        }))
    }

    async fn update(&self, _: Request<UpdateContainerRequest>) -> Result<Response<UpdateContainerResponse>, Status> {
        Err(Status::unimplemented("update"))
    }
}

#[tonic::async_trait]
impl Events for Services {
    type SubscribeStream = Pin<Box<dyn Stream<Item = Result<Envelope, Status>> + Send>>;

    async fn subscribe(&self, _: Request<SubscribeRequest>) -> Result<Response<Self::SubscribeStream>, Status> {
        let envelope = |number: usize| {
            Ok(Envelope {
                topic: format!("/{number}"),
                ..Default::default()
            })
        };
        let end = Err(Status::data_loss("that was all"));
        Ok(Response::new(
            stream::iter((0..1000).map(envelope)).chain(stream::iter([end])).boxed(),
        ))
    }
}

fn serve(stand: &Stand) {
    let listener = UnixListener::bind(stand.upstream()).unwrap();
    let server = tonic::transport::Server::builder()
        .add_service(ContainersServer::new(Services))
        .add_service(EventsServer::new(Services));
    tokio::spawn(server.serve_with_incoming(UnixListenerStream::new(listener)));
}

#[tokio::test(flavor = "multi_thread")]
async fn services_work_as_without_a_relay() {
    let stand = Stand::start(Rule::none());
    let client = Containerd::at(&stand.socket());
    let unavailable = client
        .containers()
        .list(ListContainersRequest::default())
        .await
        .unwrap_err();
    assert_eq!(unavailable.code(), Code::Unavailable);
    assert!(
        unavailable.message().contains(&stand.upstream().display().to_string()),
        "{unavailable}"
    );
    serve(&stand);
    let get = async |id: &str| client.containers().get(GetContainerRequest { id: id.into() }).await;
    assert_eq!(
        soon(get("abc")).await.unwrap().into_inner().container.unwrap().id,
        "abc"
    );
    let missing = soon(get("missing")).await.unwrap_err();
    assert_eq!(
        (missing.code(), missing.message(), missing.details()),
        (Code::NotFound, "no such container", &[8, 5][..])
    );
    let mut late = Request::new(GetContainerRequest { id: "late".into() });
    late.set_timeout(Duration::from_millis(100));
    let late = soon(client.containers().get(late)).await.unwrap_err();
    assert!(
        [Code::DeadlineExceeded, Code::Cancelled].contains(&late.code()),
        "{late}"
    );
    let list = soon(client.containers().list(ListContainersRequest::default()))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(list.containers.len(), 10_000);
    let mut events = soon(client.events().subscribe(SubscribeRequest::default()))
        .await
        .unwrap()
        .into_inner();
    for number in 0..1000 {
        assert_eq!(
            soon(events.message()).await.unwrap().unwrap().topic,
            format!("/{number}")
        );
    }
    assert_eq!(soon(events.message()).await.unwrap_err().message(), "that was all");
    let unknown = soon(client.runtime().list_pod_sandbox(ListPodSandboxRequest::default()))
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented);
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_answer_a_typed_client() {
    let wanted = [Method::ListPodSandbox, Method::PodSandboxStatus, Method::StopPodSandbox];
    let stand = Stand::start(Rule::new(&wanted, |call| async move {
        match call.method {
            Method::ListPodSandbox => {
                let items = vec![PodSandbox {
                    id: "ours".into(),
                    ..Default::default()
                }];
                let list = ListPodSandboxResponse { items };
                Reply::One(hullspeed_prewarm::relay::Answer::ours(list.encode_to_vec()))
            }
            Method::PodSandboxStatus => {
                let request = PodSandboxStatusRequest::decode(call.message).unwrap();
                let text = format!(
                    "an error occurred when try to find sandbox {:?}: not found",
                    request.pod_sandbox_id
                );
                Reply::Failed(Status::with_details(Code::NotFound, text, vec![8, 5].into()).into())
            }
            _ => call.upstream.unary(call.message).await.into(),
        }
    }));
    serve(&stand);
    let client = Containerd::at(&stand.socket());
    let list = soon(client.runtime().list_pod_sandbox(ListPodSandboxRequest::default()))
        .await
        .unwrap();
    assert_eq!(list.into_inner().items[0].id, "ours");
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: "ü\n".into(),
        ..Default::default()
    };
    let status = soon(client.runtime().pod_sandbox_status(request)).await.unwrap_err();
    assert_eq!(
        status.message(),
        "an error occurred when try to find sandbox \"ü\\n\": not found"
    );
    assert_eq!(status.details(), [8, 5]);
    let stop = soon(client.runtime().stop_pod_sandbox(StopPodSandboxRequest::default()))
        .await
        .unwrap_err();
    assert_eq!(stop.code(), Code::Unimplemented);
}
