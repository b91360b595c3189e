//! containerd that is not there, comes, goes; and a relay that stops.

use std::time::{Duration, Instant};

use http::Request;
use hullspeed_prewarm::relay::{Limits, Method};
use tokio::net::UnixStream;
use tonic::Code;

use crate::support::{Events, Over, Peer, Rule, Stand, answer, framed, grpc, ok_head, read_all, soon, whole};

const LIST: &str = "/runtime.v1.RuntimeService/ListPodSandbox";

#[tokio::test(flavor = "multi_thread")]
async fn an_absent_containerd_is_unavailable_and_may_come() {
    let stand = Stand::start(Rule::forward(&[Method::ListPodSandbox]));
    let client = stand.client().await;
    let socket = stand.upstream();
    for round in 0..2 {
        for path in ["/x/Unary", LIST] {
            let answer = client.call(grpc(path), framed(b"")).await.unwrap();
            let (code, message) = answer.status();
            assert_eq!((code, answer.is_bare()), (Code::Unavailable as i32, true), "{round}");
            assert!(message.contains(&socket.display().to_string()), "{message}");
            assert!(message.contains("No such file or directory"), "{message}");
        }
        let plain = Request::get("http://localhost/metrics").body(()).unwrap();
        let answer = client.call(plain, "").await.unwrap();
        assert_eq!(answer.head.status, 503);
        assert!(
            String::from_utf8(answer.body)
                .unwrap()
                .contains(&socket.display().to_string())
        );
        // A socket that nobody listens on refuses.
        if round == 0 {
            drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
            let answer = client.call(grpc("/x/Unary"), framed(b"")).await.unwrap();
            assert!(answer.status().1.contains("refused"), "{answer:?}");
            std::fs::remove_file(&socket).unwrap();
        }
    }
    let _peer = Peer::start(&socket, |_, respond| answer(respond, b"here"));
    for path in ["/x/Unary", LIST] {
        assert_eq!(
            client.call(grpc(path), framed(b"")).await.unwrap().body,
            framed(b"here")
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_calls_of_an_absent_containerd_end_soon() {
    let stand = Stand::start(Rule::none());
    let client = std::sync::Arc::new(stand.client().await);
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..500 {
        let client = std::sync::Arc::clone(&client);
        calls.spawn(async move { client.call(grpc("/x/Unary"), framed(b"")).await.unwrap().status().0 });
    }
    assert!(
        soon(calls.join_all())
            .await
            .into_iter()
            .all(|code| code == Code::Unavailable as i32)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_of_a_containerd_that_dies_end_and_the_next_ones_reach_its_successor() {
    let stand = Stand::start(Rule::forward(&[Method::ListPodSandbox]));
    let (events, mut seen) = Events::new();
    let peer = Peer::start(&stand.upstream(), move |request, mut respond| {
        let events = events.clone();
        async move {
            let _ = read_all(&mut request.into_body()).await;
            let kept = (request_begun(&mut respond, &events), respond);
            std::future::pending::<()>().await;
            drop(kept);
        }
    });
    let client = stand.client().await;
    let mut calls = Vec::new();
    for path in ["/x/Silent", "/x/Begun", LIST] {
        let (response, mut upload) = client.begin(grpc(path), false).await;
        upload.send_data(framed(b"").into(), true).unwrap();
        calls.push((path, response));
        soon(seen.recv()).await.unwrap();
    }
    drop(peer);
    for (path, response) in calls {
        let answer = soon(async { whole(response.await.unwrap()).await.unwrap() }).await;
        let (code, message) = answer.status();
        assert_eq!(code, Code::Unavailable as i32, "{path}");
        assert!(
            message.contains("containerd at /") && message.contains("went away"),
            "{path}: {message}"
        );
    }
    // The client's connection is the same, and nothing fails that begins after its successor is there.
    for name in [&b"second"[..], b"third", b"fourth"] {
        let peer = Peer::start(&stand.upstream(), move |_, respond| answer(respond, name));
        for path in ["/x/Unary", LIST] {
            assert_eq!(client.call(grpc(path), framed(b"")).await.unwrap().body, framed(name));
        }
        assert_eq!(peer.accepted(), 1);
        drop(peer);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn request_begun(respond: &mut h2::server::SendResponse<bytes::Bytes>, events: &Events<()>) -> impl Sized + use<> {
    let stream = respond.send_response(ok_head(), false).unwrap();
    events.tell(());
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_containerd_that_goes_away_gracefully_loses_no_call() {
    let stand = Stand::start(Rule::none());
    let slow = |request: http::Request<h2::RecvStream>, respond| async move {
        if request.uri().path() == "/x/Slow" {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        answer(respond, b"done").await;
    };
    let peer = Peer::start(&stand.upstream(), slow);
    let client = std::sync::Arc::new(stand.client().await);
    let other = std::sync::Arc::clone(&client);
    let slow_call = tokio::spawn(async move { other.call(grpc("/x/Slow"), framed(b"")).await.unwrap().body });
    tokio::time::sleep(Duration::from_millis(100)).await;
    peer.leaving.cancel();
    tokio::time::sleep(Duration::from_millis(50)).await;
    std::fs::remove_file(stand.upstream()).unwrap();
    let successor = Peer::start(&stand.upstream(), slow);
    assert_eq!(
        client.call(grpc("/x/Unary"), framed(b"")).await.unwrap().body,
        framed(b"done")
    );
    assert_eq!(successor.accepted(), 1);
    assert_eq!(soon(slow_call).await.unwrap(), framed(b"done"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_does_not_accept_does_not_hang_for_ever() {
    let limits = Limits {
        connect: Duration::from_millis(300),
        ..Limits::default()
    };
    let stand = Stand::with(Rule::none(), limits, Duration::ZERO);
    let socket = rustix_listener(&stand);
    // Fills its backlog.
    let mut waiting = Vec::new();
    while let Ok(Ok(stream)) =
        tokio::time::timeout(Duration::from_millis(50), UnixStream::connect(stand.upstream())).await
    {
        waiting.push(stream);
        assert!(waiting.len() < 1000);
    }
    let client = stand.client().await;
    let answer = client.call(grpc("/x/Unary"), framed(b"")).await.unwrap();
    assert_eq!(answer.status().0, Code::Unavailable as i32);
    assert!(answer.status().1.contains("timed out"), "{answer:?}");
    drop(socket);
}

fn rustix_listener(stand: &Stand) -> rustix::fd::OwnedFd {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen, socket};
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    bind(&listener, &SocketAddrUnix::new(stand.upstream()).unwrap()).unwrap();
    listen(&listener, 1).unwrap();
    listener
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_lets_calls_finish_and_ends_streams() {
    let stand = Stand::with(Rule::none(), Limits::default(), Duration::from_secs(10));
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        if request.uri().path() == "/x/Slow" {
            tokio::time::sleep(Duration::from_millis(500)).await;
            return answer(respond, b"done").await;
        }
        let mut stream = respond.send_response(ok_head(), false).unwrap();
        stream.send_data(framed(b"event").into(), false).unwrap();
        let _ = crate::support::reset_of(&mut stream).await;
    });
    let client = stand.client().await;
    let (endless, mut upload) = client
        .begin(grpc("/runtime.v1.RuntimeService/GetContainerEvents"), false)
        .await;
    upload.send_data(framed(b"").into(), true).unwrap();
    let endless = soon(endless).await.unwrap();
    let (slow, mut upload) = client.begin(grpc("/x/Slow"), false).await;
    upload.send_data(framed(b"").into(), true).unwrap();
    let idle = stand.client().await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    stand.stopping.cancel();
    let ended = soon(whole(endless)).await.unwrap();
    assert_eq!(
        (ended.status().0, ended.body.clone()),
        (Code::Unavailable as i32, framed(b"event"))
    );
    assert!(ended.status().1.contains("stopping"));
    assert!(
        start.elapsed() < Duration::from_millis(300),
        "the stream waited for the call"
    );
    let done = soon(async { whole(slow.await.unwrap()).await.unwrap() }).await;
    assert_eq!(done.body, framed(b"done"));
    let Stand { served, .. } = stand;
    soon(served).await.unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "an idle connection holds the relay up"
    );
    let refused = idle.requests.clone().ready().await;
    assert!(refused.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_finish_is_ended() {
    let rule = Rule::new(&[Method::ListPodSandbox], |_| std::future::pending());
    let stand = Stand::with(rule, Limits::default(), Duration::from_millis(200));
    let (events, mut seen) = Events::new();
    let _peer = Peer::start(&stand.upstream(), move |_request, mut respond| {
        let events = events.clone();
        async move {
            let _over = Over(events, ());
            let _ = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
        }
    });
    let client = stand.client().await;
    // Says that it speaks HTTP/2 and then nothing, not even that it has heard of the end.
    let deaf = UnixStream::connect(stand.socket()).await.unwrap();
    deaf.try_write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    let mut calls = Vec::new();
    for path in ["/x/Silent", LIST] {
        let (response, mut upload) = client.begin(grpc(path), false).await;
        upload.send_data(framed(b"").into(), true).unwrap();
        calls.push(response);
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    let start = Instant::now();
    stand.stopping.cancel();
    for response in calls {
        let answer = soon(async { whole(response.await.unwrap()).await.unwrap() }).await;
        assert_eq!(
            answer.status(),
            (Code::Unavailable as i32, "hullspeed-prewarm is stopping".into())
        );
    }
    soon(seen.recv()).await.unwrap();
    soon(stand.served).await.unwrap();
    assert!(start.elapsed() < Duration::from_secs(4));
    drop(deaf);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_go_away_is_left_behind() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let stand = Stand::with(Rule::none(), Limits::default(), Duration::from_secs(60));
    let _peer = Peer::start(&stand.upstream(), |request, respond| async move {
        read_all(&mut request.into_body()).await.unwrap();
        answer(respond, b"late").await;
    });
    // Speaks HTTP/2 as far as its preface, and answers nothing.
    let mut raw = tokio::net::UnixStream::connect(stand.socket()).await.unwrap();
    raw.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
        .await
        .unwrap();
    // Another one has a call under way, longer than idle connections are borne.
    let client = stand.client().await;
    let (response, mut upload) = client.begin(grpc("/x/Long"), false).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    stand.stopping.cancel();
    let begun = Instant::now();
    tokio::time::timeout(Duration::from_secs(10), async {
        let mut read = [0; 1024];
        while raw.read(&mut read).await.is_ok_and(|read| read > 0) {}
    })
    .await
    .expect("an idle connection stays open");
    assert!(begun.elapsed() > Duration::from_secs(1));
    upload.send_data(framed(b"at last").into(), true).unwrap();
    let late = soon(async { whole(response.await.unwrap()).await.unwrap() }).await;
    assert_eq!((late.status().0, late.body), (0, framed(b"late")));
    soon(stand.served).await.unwrap();
}
