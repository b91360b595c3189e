//! What is passed on arrives as it was sent, both ways, and at its receiver's pace.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use hullspeed_prewarm::relay::Method;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tonic::Code;

use crate::support::{
    Client, Events, Over, Peer, Rule, Stand, answer, framed, grpc, ok_head, read_all, reset_of, send, soon, trailers,
    whole,
};

/// Headers whose names and values are any that HTTP allows.
fn metadata() -> impl Strategy<Value = Vec<(HeaderName, HeaderValue)>> {
    let name = "[a-z][a-z0-9_.-]{0,20}(-bin)?"
        .prop_map(|name| HeaderName::from_bytes(format!("x-{name}").as_bytes()).unwrap());
    let value = prop_oneof![
        "[A-Za-z0-9+/]{0,200}=?".prop_map(|value| HeaderValue::from_str(&value).unwrap()),
        proptest::collection::vec(0x20_u8..=0xff, 0..40)
            .prop_filter("no delete", |bytes| !bytes.contains(&0x7f))
            .prop_map(|bytes| HeaderValue::from_bytes(&bytes).unwrap()),
    ];
    proptest::collection::vec((name, value), 0..8)
}

fn pairs(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    let mut pairs: Vec<_> = headers
        .iter()
        .map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()))
        .collect();
    // Values of one name keep their order.
    pairs.sort_by(|a, b| a.0.cmp(&b.0));
    pairs
}

#[test]
fn any_metadata_and_any_body_arrive_unchanged() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let (stand, peer, client, seen) = runtime.block_on(async {
        let stand = Stand::start(Rule::none());
        let (events, seen) = Events::new();
        let peer = Peer::start(&stand.upstream(), move |request, mut respond| {
            let events = events.clone();
            async move {
                let (head, mut body) = request.into_parts();
                let bytes = read_all(&mut body).await.unwrap();
                let tail = body.trailers().await.unwrap();
                let mut response = Response::new(());
                *response.headers_mut() = head.headers.clone();
                response.headers_mut().remove("te");
                response.headers_mut().remove("content-length");
                let mut stream = respond.send_response(response, false).unwrap();
                send(&mut stream, bytes.clone().into(), false).await;
                stream.send_trailers(tail.clone().unwrap_or_default()).unwrap();
                events.tell((head, bytes, tail));
            }
        });
        let client = stand.client().await;
        (stand, peer, client, std::sync::Mutex::new(seen))
    });
    let case = (
        metadata(),
        metadata(),
        proptest::collection::vec(any::<u8>(), 0..3000),
        "[a-z]{1,9}(:[0-9]{1,4})?",
    );
    let mut runner = TestRunner::new(ProptestConfig {
        cases: 200,
        failure_persistence: None,
        ..Default::default()
    });
    let run = runner.run(&case, |(headers, tail, body, authority)| {
        let mut request = Request::post(format!("http://{authority}/a.b/C?d=%20"))
            .body(())
            .unwrap();
        *request.headers_mut() = grpc("/").headers().clone();
        for (name, value) in [
            ("grpc-timeout", "10S"),
            ("user-agent", "grpc-go/1.59"),
            ("grpc-encoding", "zstd"),
            ("traceparent", "00-1-2-01"),
        ] {
            request.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        for (name, value) in headers {
            request.headers_mut().append(name, value);
        }
        let tail = HeaderMap::from_iter(
            tail.into_iter()
                .map(|(name, value)| (Some(name), value))
                .map(|(name, value)| (name.unwrap(), value)),
        );
        let sent = (request.uri().clone(), pairs(request.headers()));
        let (answer, (head, bytes, arrived)) = runtime.block_on(async {
            let (response, mut upload) = client.begin(request, false).await;
            send(&mut upload, body.clone().into(), false).await;
            upload.send_trailers(tail.clone()).unwrap();
            let answer = soon(async { whole(response.await.unwrap()).await.unwrap() }).await;
            (answer, soon(poll_seen(&seen)).await)
        });
        prop_assert_eq!(&head.uri, &sent.0);
        prop_assert_eq!(head.method, http::Method::POST);
        prop_assert_eq!(pairs(&head.headers), sent.1.clone());
        prop_assert_eq!(&bytes, &body);
        prop_assert_eq!(pairs(&arrived.unwrap_or_default()), pairs(&tail));
        let mut back = pairs(&answer.head.headers);
        back.push(("te".into(), b"trailers".to_vec()));
        back.sort_by(|a, b| a.0.cmp(&b.0));
        prop_assert_eq!(back, sent.1);
        prop_assert_eq!(&answer.body, &body);
        prop_assert_eq!(pairs(&answer.trailers.unwrap_or_default()), pairs(&tail));
        Ok(())
    });
    run.unwrap();
    assert_eq!(peer.accepted(), 1, "one connection serves all calls of one client");
    let _guard = runtime.enter();
    drop((stand, peer, client));
}

async fn poll_seen<T>(seen: &std::sync::Mutex<tokio::sync::mpsc::UnboundedReceiver<T>>) -> T {
    std::future::poll_fn(|cx| seen.lock().unwrap().poll_recv(cx))
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_directions_stream_at_once_and_halves_close_alone() {
    let stand = Stand::start(Rule::none());
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        let mut body = request.into_body();
        let mut stream = respond.send_response(ok_head(), false).unwrap();
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            send(&mut stream, data, false).await;
        }
        // The client has closed its half; ours goes on.
        send(&mut stream, Bytes::from_static(b"after"), false).await;
        let details = [
            ("grpc-status", "5"),
            ("grpc-message", "no%20such"),
            ("grpc-status-details-bin", "CAUSBG5vbmU"),
        ];
        stream.send_trailers(trailers(&details)).unwrap();
    });
    let client = stand.client().await;
    let (response, mut upload) = client.begin(grpc("/x/Bidi"), false).await;
    let mut answer = soon(response).await.unwrap().into_body();
    for round in 0..50_u8 {
        upload.send_data(Bytes::from(vec![round; 100]), false).unwrap();
        let mut echoed = Vec::new();
        while echoed.len() < 100 {
            echoed.extend_from_slice(&soon(answer.data()).await.unwrap().unwrap());
        }
        assert_eq!(echoed, vec![round; 100]);
    }
    upload.send_data(Bytes::new(), true).unwrap();
    assert_eq!(soon(answer.data()).await.unwrap().unwrap(), "after");
    assert!(soon(answer.data()).await.is_none());
    let end = soon(answer.trailers()).await.unwrap().unwrap();
    assert_eq!(end["grpc-message"], "no%20such");
    assert_eq!(end["grpc-status-details-bin"], "CAUSBG5vbmU");
    assert_eq!(stand.calls(1).await, [("other", Code::NotFound)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_may_come_before_the_request_has_ended() {
    let stand = Stand::start(Rule::none());
    let (events, mut seen) = Events::new();
    let _peer = Peer::start(&stand.upstream(), move |request, mut respond| {
        let events = events.clone();
        async move {
            let mut body = request.into_body();
            let bare = Response::builder()
                .header("grpc-status", "16")
                .header("grpc-message", "who are you")
                .body(());
            respond.send_response(bare.unwrap(), true).unwrap();
            events.tell(read_all(&mut body).await.map_err(|error| error.reason()));
        }
    });
    let client = stand.client().await;
    let (response, mut upload) = client.begin(grpc("/runtime.v1.RuntimeService/Attach"), false).await;
    // Too late, perhaps.
    let _ = upload.send_data(Bytes::from_static(b"\0\0"), false);
    let answer = soon(async { whole(response.await.unwrap()).await.unwrap() }).await;
    assert_eq!(answer.status(), (16, "who are you".into()));
    assert!(answer.is_bare());
    // Neither side is left with half a stream.
    assert_eq!(soon(reset_of(&mut upload)).await.unwrap(), Reason::NO_ERROR);
    assert_eq!(soon(seen.recv()).await.unwrap(), Err(Some(Reason::CANCEL)));
    assert_eq!(stand.calls(1).await, [("Attach", Code::Unauthenticated)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_gives_up_or_goes_cancels_the_call() {
    let stand = Stand::start(Rule::none());
    let (events, mut seen) = Events::new();
    let _peer = Peer::start(&stand.upstream(), move |request, mut respond| {
        let events = events.clone();
        async move {
            let path = request.uri().path().to_owned();
            events.tell(format!("{path} came"));
            let _over = Over(events.clone(), format!("{path} over"));
            let reason = if path == "/x/Headers" {
                let mut stream = respond.send_response(ok_head(), false).unwrap();
                reset_of(&mut stream).await
            } else {
                std::future::poll_fn(|cx| respond.poll_reset(cx)).await
            };
            events.tell(format!("{path} {:?}", reason.ok()));
        }
    });
    let mut next = async || soon(seen.recv()).await.unwrap();
    for (path, ended) in [("/x/Unary", true), ("/x/Open", false), ("/x/Headers", true)] {
        let client = stand.client().await;
        let (response, mut upload) = client.begin(grpc(path), ended).await;
        assert_eq!(next().await, format!("{path} came"));
        if path == "/x/Headers" {
            let answer = soon(response).await.unwrap();
            drop(answer);
        } else {
            drop(response);
        }
        upload.send_reset(Reason::CANCEL);
        assert_eq!(next().await, format!("{path} Some(CANCEL)"));
        assert_eq!(next().await, format!("{path} over"));
    }
    let client = stand.client().await;
    let kept = client.begin(grpc("/x/Gone"), true).await;
    assert_eq!(next().await, "/x/Gone came");
    drop(client);
    // With its client's, the relay's connection goes, too.
    while next().await != "/x/Gone over" {}
    drop(kept);
    let calls = stand.calls(4).await;
    assert!(
        calls.iter().all(|call| *call == ("other", Code::Cancelled)),
        "{calls:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reset_arrives_with_its_reason() {
    let stand = Stand::start(Rule::none());
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        let number: u32 = request.uri().query().unwrap().parse().unwrap();
        if request.uri().path() == "/x/Late" {
            let mut stream = respond.send_response(ok_head(), false).unwrap();
            stream.send_data(Bytes::from_static(b"12345"), false).unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
            stream.send_reset(number.into());
        } else {
            respond.send_reset(number.into());
        }
    });
    let client = stand.client().await;
    for reason in [
        Reason::INTERNAL_ERROR,
        Reason::REFUSED_STREAM,
        Reason::CANCEL,
        Reason::ENHANCE_YOUR_CALM,
    ] {
        for path in ["/x/Early", "/x/Late"] {
            let path = format!("{path}?{}", u32::from(reason));
            let error = client.call(grpc(&path), "").await.unwrap_err();
            assert_eq!((error.is_reset(), error.reason()), (true, Some(reason)), "{path}");
        }
    }
    let codes: Vec<_> = stand.calls(8).await.into_iter().map(|(_, code)| code).collect();
    assert_eq!(
        codes[..4],
        [Code::Internal, Code::Internal, Code::Unavailable, Code::Unavailable]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_slows_the_writer_and_nobody_else() {
    let stand = Stand::start(Rule::none());
    let written = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&written);
    let _peer = Peer::start(&stand.upstream(), move |request, mut respond| {
        let counter = Arc::clone(&counter);
        async move {
            if request.uri().path() != "/x/Endless" {
                return answer(respond, b"quick").await;
            }
            let mut stream = respond.send_response(ok_head(), false).unwrap();
            let piece = Bytes::from(vec![1; 16 << 10]);
            while send(&mut stream, piece.clone(), false).await {
                counter.fetch_add(piece.len(), Ordering::Relaxed);
            }
        }
    });
    let client = stand.client().await;
    let mut streams = Vec::new();
    for _ in 0..20 {
        let (response, upload) = client.begin(grpc("/x/Endless"), true).await;
        streams.push((soon(response).await.unwrap().into_body(), upload));
    }
    // Until nothing moves any more.
    let mut before = usize::MAX;
    while before != written.load(Ordering::Relaxed) {
        before = written.load(Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    // The window of the relay, what it has written ahead, the client's window, what the peer has queued.
    let most = streams.len() * ((256 + 256 + 64 + 512) << 10);
    assert!(
        before < most,
        "{before} bytes were taken from the peer, {most} at most should be"
    );
    assert_eq!(
        client.call(grpc("/x/Quick"), framed(b"")).await.unwrap().body,
        framed(b"quick")
    );
    let other = stand.client().await;
    assert_eq!(
        other.call(grpc("/x/Quick"), framed(b"")).await.unwrap().body,
        framed(b"quick")
    );
    // And it goes on when it is read.
    let (body, _) = &mut streams[0];
    let mut read = 0;
    while read < 4 << 20 {
        let data = soon(body.data()).await.unwrap().unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        read += data.len();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_writer_of_requests_is_slowed_by_containerd() {
    let stand = Stand::start(Rule::none());
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        // Reads nothing until it is told to.
        std::future::poll_fn(|cx| respond.poll_reset(cx)).await.ok();
        drop(request);
    });
    let client = stand.client().await;
    let (_response, mut upload) = client.begin(grpc("/x/Upload"), false).await;
    let mut taken = 0;
    while let Ok(true) = tokio::time::timeout(
        Duration::from_millis(500),
        send(&mut upload, Bytes::from(vec![0; 16 << 10]), false),
    )
    .await
    {
        taken += 16 << 10;
        assert!(taken < 2 << 20, "the relay takes what nobody reads");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_calls_of_one_client_at_once() {
    let stand = Stand::start(Rule::none());
    let peer = Peer::start(&stand.upstream(), |request, respond| async move {
        let body = read_all(&mut request.into_body()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(20)).await;
        answer(respond, &body[5..]).await;
    });
    let client = Arc::new(stand.client().await);
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..1000_u32 {
        let client = Arc::clone(&client);
        calls.spawn(async move {
            let message = number.to_be_bytes();
            let answer = client.call(grpc("/x/Unary"), framed(&message)).await.unwrap();
            assert_eq!((answer.status().0, answer.body), (0, framed(&message)));
        });
    }
    let results = soon(calls.join_all()).await;
    assert_eq!((results.len(), peer.accepted()), (1000, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_given_up_by_the_thousand_break_no_connection() {
    let stand = Stand::start(Rule::forward(&[Method::ListPodSandbox]));
    let peer = Peer::start(&stand.upstream(), |_, mut respond| async move {
        // Does not look whether anybody is there.
        if let Ok(mut stream) = respond.send_response(ok_head(), false) {
            for _ in 0..20 {
                let _ = stream.send_data(framed(&[1; 100]).into(), false);
                tokio::task::yield_now().await;
            }
        }
    });
    let client = stand.client().await;
    for round in 0..30 {
        let mut calls = Vec::new();
        for number in 0..100 {
            let path = ["/x/Unary", "/runtime.v1.RuntimeService/ListPodSandbox"][number % 2];
            let (response, mut upload) = client.begin(grpc(path), false).await;
            // The peer may have answered and reset the call before.
            let _ = upload.send_data(framed(b"").into(), true);
            calls.push((response, upload));
        }
        tokio::time::sleep(Duration::from_millis(round as u64 % 4)).await;
        drop(calls);
        stand.calls((round + 1) * 100).await;
    }
    // The same two connections are still in use.
    drop(client.begin(grpc("/x/Unary"), true).await);
    stand.calls(3001).await;
    assert_eq!(
        (peer.accepted(), stand.told.connections.lock().unwrap().clone()),
        (1, vec![1])
    );
}

/// A field of `/proc/self/status`, in KiB.
pub(crate) fn memory(field: &str) -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn sixty_four_mebibytes_pass_through_little_memory() {
    const SIZE: usize = 64 << 20;
    let stand = Stand::start(Rule::none());
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        // Echoes what it has, without gathering it.
        let mut body = request.into_body();
        let mut stream = respond.send_response(ok_head(), false).unwrap();
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            if !send(&mut stream, data, false).await {
                return;
            }
        }
        stream.send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
    });
    let client = Client::with_window(&stand.socket(), 1 << 20).await;
    let before = memory("VmRSS");
    let (response, mut upload) = client.begin(grpc("/x/Large"), false).await;
    let sending = tokio::spawn(async move {
        let length = u32::try_from(SIZE).unwrap().to_be_bytes();
        send(&mut upload, [&[0][..], &length].concat().into(), false).await;
        let piece = Bytes::from(vec![3; 64 << 10]);
        for _ in 0..SIZE / piece.len() {
            assert!(send(&mut upload, piece.clone(), false).await);
        }
        send(&mut upload, Bytes::new(), true).await
    });
    let mut body = soon(response).await.unwrap().into_body();
    let mut read = 0;
    while let Some(data) = soon(body.data()).await {
        let data = data.unwrap();
        body.flow_control().release_capacity(data.len()).unwrap();
        read += data.len();
    }
    assert!(sending.await.unwrap());
    assert_eq!(read, SIZE + 5);
    assert_eq!(soon(body.trailers()).await.unwrap().unwrap()["grpc-status"], "0");
    let grown = memory("VmHWM").saturating_sub(before);
    assert!(grown < 12 << 10, "client, relay and peer grew by {grown} KiB");
}
