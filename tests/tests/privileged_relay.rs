//! The relay in front of a real containerd: answers are the same bytes as without it, gRPC clients written in Go work,
//! and the relay's clients outlive containerd.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use hullspeed_prewarm::relay::{Api, Call, Limits, Method, Relay, RelayOptions, Reply, Rules};
use hullspeed_proto::cri::v1::{PodSandboxStatusRequest, StopPodSandboxRequest};
use hullspeed_tests::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use hullspeed_tests::cri::Cri;
use hullspeed_tests::network::Network;
use hullspeed_tests::release::Release;
use hullspeed_tests::requirements;
use hullspeed_tests::run::RunDir;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::sync::{CancellationToken, DropGuard};

const PATIENCE: Duration = Duration::from_secs(30);

/// Hands these to containerd as they are, through the rules' way.
struct Forward(&'static [Method]);

#[async_trait]
impl Rules for Forward {
    fn wants(&self, method: Method, _api: Api) -> bool {
        self.0.contains(&method)
    }

    async fn call(&self, call: Call) -> Reply {
        if call.method == Method::GetContainerEvents {
            return match call.upstream.stream(call.message).await {
                Ok(messages) => Reply::Stream(messages),
                Err(failure) => Reply::Failed(failure),
            };
        }
        call.upstream.unary(call.message).await.into()
    }
}

/// A containerd with a relay before it.
struct Stand {
    containerd: Containerd,
    relay: PathBuf,
    _stop: DropGuard,
    _network: Network,
    run: RunDir,
}

impl Stand {
    async fn start(release: Release, wanted: &'static [Method]) -> Self {
        requirements::check().unwrap();
        let run = RunDir::temporary().unwrap();
        let network = Network::create(&run).unwrap();
        let options = ContainerdOptions {
            name: "containerd".into(),
            snapshotter: SnapshotterChoice::Overlayfs,
            pause_image: "localhost/pause:latest".into(),
            release,
        };
        let containerd = Containerd::start(&run, &network, &options).await.unwrap();
        let relay = run.path().join("relay.sock");
        let listener = UnixListener::bind(&relay).unwrap();
        let served = Relay::new(RelayOptions {
            containerd_socket: containerd.socket(),
            rules: Arc::new(Forward(wanted)),
            watch: Arc::new(()),
            limits: Limits::default(),
        });
        let stopping = CancellationToken::new();
        let token = stopping.clone();
        tokio::spawn(async move { served.serve(listener, token, Duration::ZERO).await });
        Self {
            containerd,
            relay,
            _stop: stopping.drop_guard(),
            _network: network,
            run,
        }
    }

    /// containerd's own client, which is gRPC's in Go.
    fn ctr(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(&self.relay).args(arguments);
        command
    }
}

/// Runs a program with `input`.
fn output(command: &mut Command, input: &[u8]) -> Output {
    use std::io::Write as _;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
    let output = child.wait_with_output().unwrap();
    writer.join().unwrap();
    output
}

type Raw = (StatusCode, HeaderMap, Vec<u8>, Option<HeaderMap>);

/// An answer, byte by byte.
async fn raw(socket: &Path, path: &str, message: &[u8]) -> Result<Raw, h2::Error> {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (requests, connection) = h2::client::handshake(stream).await?;
    let connection = tokio::spawn(async move { drop(connection.await) });
    let request = Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "20S")
        .header("containerd-namespace", "k8s.io")
        .body(())
        .unwrap();
    let (response, mut upload) = requests.ready().await?.send_request(request, false)?;
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    // Who knows no such method may have answered and closed the stream already; what counts is the answer.
    let _ = upload.send_data(Bytes::from([&[0][..], &length, message].concat()), true);
    let (head, mut stream) = response.await?.into_parts();
    let mut body = Vec::new();
    while let Some(data) = stream.data().await {
        let data = data?;
        stream.flow_control().release_capacity(data.len())?;
        body.extend_from_slice(&data);
    }
    let trailers = stream.trailers().await?;
    connection.abort();
    Ok((head.status, head.headers, body, trailers))
}

async fn same_answers(release: Release) {
    use prost::Message as _;
    const WANTED: &[Method] = &[
        Method::ListPodSandbox,
        Method::PodSandboxStatus,
        Method::StopPodSandbox,
        Method::RemovePodSandbox,
        Method::CreateContainer,
        Method::ListPodSandboxStats,
        Method::PullImage,
        Method::StreamPodSandboxes,
    ];
    let stand = Stand::start(release, WANTED).await;
    let unknown = PodSandboxStatusRequest {
        pod_sandbox_id: "unknown".into(),
        ..Default::default()
    }
    .encode_to_vec();
    let stop = StopPodSandboxRequest {
        pod_sandbox_id: "unknown".into(),
    }
    .encode_to_vec();
    let cases: &[(&str, &[u8])] = &[
        ("/runtime.v1.RuntimeService/Version", b""),
        ("/runtime.v1alpha2.RuntimeService/Version", b""),
        ("/runtime.v1.RuntimeService/ListPodSandbox", b""),
        ("/runtime.v1alpha2.RuntimeService/ListPodSandbox", b""),
        ("/runtime.v1.RuntimeService/PodSandboxStatus", &unknown),
        ("/runtime.v1.RuntimeService/StopPodSandbox", &stop),
        ("/runtime.v1.RuntimeService/RemovePodSandbox", &stop),
        ("/runtime.v1.RuntimeService/CreateContainer", &stop),
        ("/runtime.v1.RuntimeService/ListPodSandboxStats", b""),
        ("/runtime.v1.RuntimeService/StreamPodSandboxes", b""),
        ("/runtime.v1.ImageService/PullImage", b""),
        ("/runtime.v1.RuntimeService/ContainerStatus", &unknown),
        ("/runtime.v1.ImageService/ListImages", b""),
        ("/containerd.services.version.v1.Version/Version", b""),
        ("/containerd.services.introspection.v1.Introspection/Plugins", b""),
        ("/containerd.services.content.v1.Content/Info", b"\x0a\x01x"),
        ("/containerd.services.containers.v1.Containers/Get", b"\x0a\x04none"),
        ("/grpc.health.v1.Health/Check", b""),
        ("/runtime.v1.RuntimeService/NoSuchMethod", b"abc"),
        ("/no.such.Service/Method", b"abc"),
        // What is no protobuf message.
        ("/runtime.v1.RuntimeService/Version", b"\xff\xff\xff"),
        ("/runtime.v1.RuntimeService/ListPodSandbox", b"\xff\xff\xff"),
    ];
    for (path, message) in cases {
        let direct = tokio::time::timeout(PATIENCE, raw(&stand.containerd.socket(), path, message))
            .await
            .unwrap()
            .unwrap();
        let relayed = tokio::time::timeout(PATIENCE, raw(&stand.relay, path, message))
            .await
            .unwrap()
            .unwrap();
        let (mut relayed, mut direct) = (relayed, direct);
        if path.ends_with("/Plugins") {
            // Its maps come in any order.
            relayed.2.sort_unstable();
            direct.2.sort_unstable();
        }
        assert!(relayed == direct, "{path}: {relayed:?} instead of {direct:?}");
        assert!(
            direct.1.contains_key("grpc-status") || direct.3.unwrap().contains_key("grpc-status"),
            "{path}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_containerd_1() {
    same_answers(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_are_those_of_containerd_2() {
    same_answers(Release::Two).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_written_in_go_works() {
    let stand = Stand::start(Release::One, &[]).await;
    let version = output(&mut stand.ctr(&["version"]), b"");
    assert!(
        String::from_utf8_lossy(&version.stdout).contains("Server:"),
        "{version:?}"
    );
    // A stream of events, and then something that makes one.
    let log = stand.run.path().join("events");
    let mut events = stand
        .ctr(&["events"])
        .stdout(std::fs::File::create(&log).unwrap())
        .spawn()
        .unwrap();
    // The content store writes over a stream in both directions.
    let mut content = vec![0_u8; 32 << 20];
    for (at, byte) in content.iter_mut().enumerate() {
        *byte = u8::try_from(at * at % 251).unwrap();
    }
    let written = output(
        &mut stand.ctr(&["--namespace", "relay", "content", "ingest", "relay-test"]),
        &content,
    );
    assert!(written.status.success(), "{written:?}");
    let listed = output(&mut stand.ctr(&["--namespace", "relay", "content", "ls", "-q"]), b"");
    let digest = String::from_utf8(listed.stdout).unwrap().trim().to_owned();
    assert!(digest.starts_with("sha256:"), "{digest}");
    let read = output(
        &mut stand.ctr(&["--namespace", "relay", "content", "get", &digest]),
        b"",
    );
    assert!(
        read.status.success() && read.stdout == content,
        "{}",
        String::from_utf8_lossy(&read.stderr)
    );
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        let made = output(
            &mut stand.ctr(&[
                "namespaces",
                "create",
                &format!("n{}", Instant::now().elapsed().as_nanos()),
            ]),
            b"",
        );
        drop(made);
        if std::fs::read_to_string(&log).unwrap().contains("/namespaces/create") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    events.kill().unwrap();
    events.wait().unwrap();
    let told = std::fs::read_to_string(&log).unwrap();
    assert!(told.contains("/namespaces/create"), "{told}");
    let missing = output(
        &mut stand.ctr(&["--namespace", "relay", "containers", "info", "none"]),
        b"",
    );
    assert!(
        String::from_utf8_lossy(&missing.stderr).contains("not found"),
        "{missing:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_outlive_containerd() {
    let mut stand = Stand::start(Release::One, &[Method::ListPodSandbox]).await;
    let mut cri = Cri::connect(&stand.relay).await.unwrap();
    assert!(cri.version().await.unwrap().starts_with("containerd"));
    let relay = stand.relay.clone();
    let subscribed = tokio::spawn(async move {
        raw(&relay, "/containerd.services.events.v1.Events/Subscribe", b"")
            .await
            .unwrap()
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    stand.containerd.process().kill().unwrap();
    let (_, head, _, trailers) = tokio::time::timeout(PATIENCE, subscribed).await.unwrap().unwrap();
    let status = tonic::Status::from_header_map(trailers.as_ref().unwrap_or(&head)).unwrap();
    assert_eq!(status.code(), tonic::Code::Unavailable, "{status}");
    assert!(status.message().contains("went away"), "{status}");
    // Down: said at once, to a client in Go, too.
    for _ in 0..3 {
        let down = cri.version().await.unwrap_err();
        assert!(
            format!("{down:?}").contains("containerd cannot be reached at"),
            "{down:?}"
        );
    }
    let down = output(&mut stand.ctr(&["--connect-timeout", "3s", "namespaces", "ls"]), b"");
    let told = String::from_utf8_lossy(&down.stderr).to_lowercase();
    assert!(told.contains("containerd cannot be reached at"), "{told}");
    // Up again: the same connection goes on.
    let Stand { containerd, run, .. } = &mut stand;
    containerd.start_again(run).await.unwrap();
    assert!(cri.version().await.unwrap().starts_with("containerd"));
    assert!(cri.sandboxes(Default::default()).await.unwrap().is_empty());
}
