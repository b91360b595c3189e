//! Calls that rules answer.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use h2::Reason;
use http::{HeaderValue, Request};
use hullspeed_prewarm::relay::{Answer, Api, Failure, Limits, Method, Reply};
use tonic::{Code, Status};

use crate::passed::memory;
use crate::support::{Events, Peer, Rule, Stand, answer, framed, grpc, ok_head, read_all, send, soon, trailers, whole};

const LIST: &str = "/runtime.v1.RuntimeService/ListPodSandbox";
const EVENTS: &str = "/runtime.v1.RuntimeService/GetContainerEvents";

fn with(path: &str, headers: &[(&'static str, &'static str)]) -> Request<()> {
    let mut request = grpc(path);
    for (name, value) in headers {
        request.headers_mut().insert(*name, HeaderValue::from_static(value));
    }
    request
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn packed(bytes: &[u8]) -> Vec<u8> {
    let mut packed = framed(&gzip(bytes));
    packed[0] = 1;
    packed
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rule_sees_the_message_and_edits_the_answer() {
    let rule = Rule::new(&[Method::ListPodSandbox], |call| async move {
        assert_eq!((call.method, call.api), (Method::ListPodSandbox, Api::V1));
        let mut message = call.message.to_vec();
        message.reverse();
        let answer = call.upstream.unary(message.into()).await;
        Reply::from(answer.map(|answer| {
            let edited = [&answer.message[..], b" edited"].concat();
            answer.with(edited)
        }))
    });
    let stand = Stand::start(rule);
    let (events, mut seen) = Events::new();
    let _peer = Peer::start(&stand.upstream(), move |request, mut respond| {
        let events = events.clone();
        async move {
            let (head, mut body) = request.into_parts();
            let body = read_all(&mut body).await.unwrap();
            events.tell(head);
            let mut response = ok_head();
            response.headers_mut().insert("x-head", HeaderValue::from_static("h"));
            let mut stream = respond.send_response(response, false).unwrap();
            send(&mut stream, body.into(), false).await;
            stream
                .send_trailers(trailers(&[("grpc-status", "0"), ("x-tail-bin", "AAE")]))
                .unwrap();
        }
    });
    let client = stand.client().await;
    let headers = [
        ("grpc-timeout", "9S"),
        ("x-custom-bin", "AQI"),
        ("traceparent", "00-1-2-01"),
        ("user-agent", "kubelet"),
        ("grpc-encoding", "gzip"),
        ("grpc-accept-encoding", "gzip,zstd"),
    ];
    for body in [framed(b"abc"), packed(b"abc")] {
        let answer = client.call(with(LIST, &headers), body).await.unwrap();
        assert_eq!(answer.body, framed(b"cba edited"));
        assert_eq!(answer.head.headers["x-head"], "h");
        assert_eq!(answer.head.headers["content-type"], "application/grpc");
        let tail = answer.trailers.unwrap();
        assert_eq!(
            (&tail["grpc-status"], &tail["x-tail-bin"]),
            (&"0".parse().unwrap(), &"AAE".parse().unwrap())
        );
        let head = soon(seen.recv()).await.unwrap();
        for (name, value) in &headers[1..4] {
            assert_eq!(head.headers[*name], *value);
        }
        assert!(!head.headers.contains_key("grpc-encoding") && !head.headers.contains_key("grpc-accept-encoding"));
        let remaining = head.headers["grpc-timeout"].to_str().unwrap();
        assert!(remaining.ends_with('u') && remaining.len() == 8, "{remaining} of 9 s");
    }
    // The other version is a call of its own.
    let answer = client
        .call(grpc("/runtime.v1.RuntimeService/Version"), framed(b"abc"))
        .await
        .unwrap();
    assert_eq!(answer.body, framed(b"abc"));
    assert_eq!(
        stand.calls(3).await[1..],
        [("ListPodSandbox", Code::Ok), ("Version", Code::Ok)]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_grpc_server_refuses_is_refused_as_it_does() {
    let limits = Limits {
        message: 1000,
        requests: 2000,
        answers: 2000,
        ..Limits::default()
    };
    let stand = Stand::with(Rule::forward(&[Method::ListPodSandbox]), limits, Duration::ZERO);
    let _peer = Peer::start(&stand.upstream(), |_, respond| answer(respond, b"asked"));
    let client = stand.client().await;
    let mut large = framed(&[0; 1001]);
    let plain = with(LIST, &[]);
    let zipped = with(LIST, &[("grpc-encoding", "gzip")]);
    let cases: Vec<(Request<()>, Vec<u8>, Code, &str)> = vec![
        (
            plain.clone(),
            large.clone(),
            Code::ResourceExhausted,
            "grpc: received message larger than max (1001 vs. 1000)",
        ),
        (
            plain.clone(),
            {
                large.truncate(5);
                large
            },
            Code::ResourceExhausted,
            "grpc: received message larger than max (1001 vs. 1000)",
        ),
        (
            plain.clone(),
            vec![0, 255, 255, 255, 255],
            Code::ResourceExhausted,
            "(4294967295 vs. 1000)",
        ),
        (
            plain.clone(),
            framed(b"abc")[..7].to_vec(),
            Code::Internal,
            "unexpected EOF",
        ),
        (plain.clone(), vec![0, 0], Code::Internal, "unexpected EOF"),
        (plain.clone(), vec![], Code::Internal, "cardinality violation"),
        (
            plain.clone(),
            [framed(b"a"), framed(b"b")].concat(),
            Code::Internal,
            "cardinality violation",
        ),
        (
            plain.clone(),
            vec![7, 0, 0, 0, 0],
            Code::Internal,
            "unexpected payload format 7",
        ),
        (
            plain.clone(),
            packed(b"abc"),
            Code::Internal,
            "compressed flag set with identity or empty encoding",
        ),
        (
            zipped.clone(),
            packed(&[0; 1001]),
            Code::ResourceExhausted,
            "after decompression larger than max",
        ),
        (
            zipped.clone(),
            {
                let mut bad = framed(b"no gzip");
                bad[0] = 1;
                bad
            },
            Code::Internal,
            "failed to decompress",
        ),
        (
            with(LIST, &[("grpc-encoding", "br")]),
            framed(b"a"),
            Code::Unimplemented,
            "Decompressor is not installed for grpc-encoding \"br\"",
        ),
        (
            with(LIST, &[("grpc-timeout", "1x")]),
            framed(b"a"),
            Code::Internal,
            "malformed grpc-timeout",
        ),
    ];
    for (request, body, code, text) in cases {
        let answer = client.call(request, body).await.unwrap();
        let (status, message) = answer.status();
        assert_eq!(status, code as i32, "{text}: {message}");
        assert!(message.contains(text), "{message} without {text}");
        assert!(answer.is_bare());
        assert_eq!(
            answer.head.headers.get("grpc-accept-encoding").is_some(),
            code == Code::Unimplemented
        );
    }
    let mut get = plain.clone();
    *get.method_mut() = http::Method::GET;
    assert_eq!(client.call(get, "").await.unwrap().head.status, 405);
    let mut json = plain.clone();
    json.headers_mut()
        .insert("content-type", HeaderValue::from_static("application/json"));
    assert_eq!(client.call(json, "{}").await.unwrap().head.status, 415);
    // Nothing of that has used memory up.
    for _ in 0..5 {
        let answer = client.call(zipped.clone(), packed(&[9; 1000])).await.unwrap();
        assert_eq!((answer.status().0, answer.body), (0, framed(b"asked")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_of_containerd_arrive_whole() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let failures = Arc::clone(&seen);
    let rule = Rule::new(&[Method::ListPodSandbox], move |call| {
        let failures = Arc::clone(&failures);
        async move {
            let result = call.upstream.unary(call.message).await;
            if let Err(failure) = &result {
                let status = failure.status();
                let answered = matches!(failure, Failure::Answered { .. });
                failures
                    .lock()
                    .unwrap()
                    .push((status.code(), status.message().to_owned(), answered));
            }
            result.into()
        }
    });
    let stand = Stand::start(rule);
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        let how = request.headers()["x-how"].to_str().unwrap().to_owned();
        let details = trailers(&[
            ("grpc-status", "5"),
            ("grpc-message", "no%20%C3%BC"),
            ("grpc-status-details-bin", "%%% not base64"),
            ("x-tail", "t"),
        ]);
        match how.as_str() {
            "bare" => {
                let mut head = ok_head();
                head.headers_mut().extend(details);
                respond.send_response(head, true).unwrap();
            }
            "late" => {
                let mut stream = respond.send_response(ok_head(), false).unwrap();
                stream.send_trailers(details).unwrap();
            }
            "both" => {
                let mut stream = respond.send_response(ok_head(), false).unwrap();
                stream.send_data(framed(b"abc").into(), false).unwrap();
                stream.send_trailers(details).unwrap();
            }
            "none" => drop(respond.send_response(ok_head(), true).unwrap()),
            "empty" => {
                let mut stream = respond.send_response(ok_head(), false).unwrap();
                stream.send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
            }
            "two" => {
                let mut stream = respond.send_response(ok_head(), false).unwrap();
                stream
                    .send_data([framed(b"a"), framed(b"b")].concat().into(), false)
                    .unwrap();
                stream.send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
            }
            "http" => {
                let head = http::Response::builder().status(503).body(()).unwrap();
                respond.send_response(head, true).unwrap();
            }
            "reset" => respond.send_reset(Reason::ENHANCE_YOUR_CALM),
            "packed" => {
                let mut head = ok_head();
                head.headers_mut()
                    .insert("grpc-encoding", HeaderValue::from_static("gzip"));
                let mut stream = respond.send_response(head, false).unwrap();
                stream.send_data(packed(b"unasked").into(), false).unwrap();
                stream.send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
            }
            other => unreachable!("{other}"),
        }
        // Streams are finished, not reset.
        let _ = read_all(&mut request.into_body()).await;
    });
    let client = stand.client().await;
    for (how, code, text) in [
        ("bare", Code::NotFound, "no ü"),
        ("late", Code::NotFound, "no ü"),
        ("both", Code::NotFound, "no ü"),
        ("none", Code::Internal, "without sending trailers"),
        ("empty", Code::Internal, "cardinality violation"),
        ("two", Code::Internal, "cardinality violation"),
        ("http", Code::Unavailable, "503"),
        ("reset", Code::ResourceExhausted, "RST_STREAM"),
        ("packed", Code::Ok, ""),
    ] {
        let mut request = grpc(LIST);
        request.headers_mut().insert("x-how", HeaderValue::from_static(how));
        let answer = client.call(request, framed(b"")).await.unwrap();
        if how == "packed" {
            assert_eq!(answer.body, framed(b"unasked"));
            assert!(!answer.head.headers.contains_key("grpc-encoding"));
            continue;
        }
        let headers = &answer.head.headers;
        let seen = seen.lock().unwrap().pop().unwrap();
        assert_eq!(seen.0, code, "{how}");
        assert!(seen.1.contains(text), "{how}: {seen:?}");
        assert_eq!(headers["grpc-status"], (code as i32).to_string().as_str(), "{how}");
        assert_eq!(seen.2, code == Code::NotFound, "{how}");
        if seen.2 {
            assert_eq!(headers["grpc-message"], "no%20%C3%BC", "{how}");
            assert_eq!(headers["grpc-status-details-bin"], "%%% not base64", "{how}");
            assert_eq!(headers["x-tail"], "t", "{how}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deadlines_are_kept_whatever_waits() {
    let limits = Limits {
        gather: Duration::from_millis(300),
        ..Limits::default()
    };
    let stand = Stand::with(Rule::forward(&[Method::ListPodSandbox]), limits, Duration::ZERO);
    let (events, mut seen) = Events::new();
    let _peer = Peer::start(&stand.upstream(), move |_request, mut respond| {
        let events = events.clone();
        async move {
            let reason = std::future::poll_fn(|cx| respond.poll_reset(cx)).await;
            events.tell(reason.ok());
        }
    });
    let client = stand.client().await;
    let start = Instant::now();
    // containerd does not answer.
    let timed = with(LIST, &[("grpc-timeout", "200m")]);
    let answer = client.call(timed.clone(), framed(b"")).await.unwrap();
    assert_eq!(answer.status(), (4, "context deadline exceeded".into()));
    assert!(start.elapsed() >= Duration::from_millis(200));
    assert_eq!(soon(seen.recv()).await.unwrap(), Some(Reason::CANCEL));
    // The request does not come: the client's limit, then ours.
    for (request, code) in [(timed, Code::DeadlineExceeded), (grpc(LIST), Code::ResourceExhausted)] {
        let start = Instant::now();
        let (response, mut upload) = client.begin(request, false).await;
        upload
            .send_data(Bytes::from_static(&[0, 0, 0, 1, 0, 9]), false)
            .unwrap();
        let answer = soon(async { whole(response.await.unwrap()).await.unwrap() }).await;
        assert_eq!(answer.status().0, code as i32);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    // The client goes: the rule is dropped, and so is its call.
    let (response, mut upload) = client.begin(grpc(LIST), false).await;
    upload.send_data(framed(b"").into(), true).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    drop((response, upload));
    assert_eq!(soon(seen.recv()).await.unwrap(), Some(Reason::CANCEL));
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_come_message_by_message_and_are_merged_with_ours() {
    let rule = Rule::new(&[Method::GetContainerEvents], |call| async move {
        // Although containerd has sent nothing, not even headers.
        let messages = call.upstream.stream(call.message).await.unwrap();
        Reply::Stream(stream::iter([Ok(Bytes::from_static(b"ours"))]).chain(messages).boxed())
    });
    let stand = Stand::start(rule);
    let (events, mut seen) = Events::new();
    let (next, nexts) = tokio::sync::mpsc::unbounded_channel::<usize>();
    let nexts = Arc::new(tokio::sync::Mutex::new(nexts));
    let _peer = Peer::start(&stand.upstream(), move |request, mut respond| {
        let (events, nexts) = (events.clone(), Arc::clone(&nexts));
        async move {
            events.tell(read_all(&mut request.into_body()).await.unwrap());
            let mut nexts = nexts.lock().await;
            let mut size = nexts.recv().await.unwrap();
            let mut stream = respond.send_response(ok_head(), false).unwrap();
            while size > 0 {
                send(&mut stream, framed(&vec![5; size]).into(), false).await;
                size = nexts.recv().await.unwrap();
            }
            stream
                .send_trailers(trailers(&[("grpc-status", "14"), ("grpc-message", "over")]))
                .unwrap();
        }
    });
    let client = stand.client().await;
    let (response, mut upload) = client.begin(grpc(EVENTS), false).await;
    upload.send_data(framed(b"subscribe").into(), true).unwrap();
    let mut body = soon(response).await.unwrap().into_body();
    assert_eq!(soon(body.data()).await.unwrap().unwrap(), framed(b"ours"));
    assert_eq!(soon(seen.recv()).await.unwrap(), framed(b"subscribe"));
    for size in [1, 100_000, 20, 3_000_000] {
        next.send(size).unwrap();
        let mut read = Vec::new();
        while read.len() < size + 5 {
            let data = soon(body.data()).await.unwrap().unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
            read.extend_from_slice(&data);
        }
        assert_eq!(read, framed(&vec![5; size]));
    }
    next.send(0).unwrap();
    assert!(soon(body.data()).await.is_none());
    let tail = soon(body.trailers()).await.unwrap().unwrap();
    assert_eq!(
        (&tail["grpc-status"], &tail["grpc-message"]),
        (&"14".parse().unwrap(), &"over".parse().unwrap())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_containerd_does_not_have_is_an_item_that_fails() {
    let rule = Rule::new(&[Method::GetContainerEvents], |call| async move {
        let mut messages = call.upstream.stream(call.message).await.unwrap();
        let failure = messages.next().await.unwrap().unwrap_err();
        assert!(messages.next().await.is_none());
        Reply::Stream(stream::iter([Err(failure)]).boxed())
    });
    let stand = Stand::start(rule);
    let _peer = Peer::start(&stand.upstream(), |_, mut respond| async move {
        let mut head = ok_head();
        head.headers_mut()
            .extend(trailers(&[("grpc-status", "12"), ("grpc-message", "unknown method")]));
        respond.send_response(head, true).unwrap();
    });
    let client = stand.client().await;
    let answer = client.call(grpc(EVENTS), framed(b"")).await.unwrap();
    assert_eq!(
        (answer.status(), answer.is_bare()),
        ((12, "unknown method".into()), true)
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_our_own_need_no_containerd() {
    let rule = Rule::new(
        &[
            Method::StopPodSandbox,
            Method::RemovePodSandbox,
            Method::StreamPodSandboxes,
        ],
        |call| async move {
            match call.method {
                Method::StopPodSandbox => Reply::One(Answer::ours("mine")),
                Method::RemovePodSandbox => {
                    Reply::Failed(Status::with_details(Code::NotFound, "no\nü", Bytes::from_static(b"\x08\x05")).into())
                }
                _ => Reply::Stream(stream::iter((0..3_u8).map(|number| Ok(Bytes::from(vec![number])))).boxed()),
            }
        },
    );
    let stand = Stand::start(rule);
    let client = stand.client().await;
    let call = async |name: &str| {
        client
            .call(grpc(&format!("/runtime.v1.RuntimeService/{name}")), framed(b""))
            .await
            .unwrap()
    };
    let one = call("StopPodSandbox").await;
    assert_eq!((one.status().0, one.body), (0, framed(b"mine")));
    let failed = call("RemovePodSandbox").await;
    assert_eq!(failed.status(), (5, "no\nü".into()));
    assert_eq!(failed.head.headers["grpc-status-details-bin"], "CAU");
    let many = call("StreamPodSandboxes").await;
    assert_eq!(
        (many.status().0, many.body),
        (0, [framed(&[0]), framed(&[1]), framed(&[2])].concat())
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn gathered_bytes_stay_within_their_budgets() {
    const MESSAGE: usize = 8 << 20;
    let limits = Limits {
        requests: 32 << 20,
        answers: 32 << 20,
        ..Limits::default()
    };
    let stand = Stand::with(Rule::forward(&[Method::ListPodSandbox]), limits, Duration::ZERO);
    // Sends and receives without holding anything.
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        let mut body = request.into_body();
        let mut length = 0;
        while let Some(data) = body.data().await {
            let Ok(data) = data else { return };
            length += data.len();
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        assert_eq!(length, MESSAGE + 5);
        let mut stream = respond.send_response(ok_head(), false).unwrap();
        let piece = Bytes::from_static(&[0; 32 << 10]);
        let prefix = [&[0][..], &u32::try_from(MESSAGE).unwrap().to_be_bytes()].concat();
        send(&mut stream, prefix.into(), false).await;
        for _ in 0..MESSAGE / piece.len() {
            if !send(&mut stream, piece.clone(), false).await {
                return;
            }
        }
        stream.send_trailers(trailers(&[("grpc-status", "0")])).unwrap();
    });
    let before = memory("VmRSS");
    let mut calls = tokio::task::JoinSet::new();
    let client = Arc::new(stand.client().await);
    for _ in 0..40 {
        let client = Arc::clone(&client);
        calls.spawn(async move {
            let (response, mut upload) = client.begin(grpc(LIST), false).await;
            let prefix = [&[0][..], &u32::try_from(MESSAGE).unwrap().to_be_bytes()].concat();
            send(&mut upload, prefix.into(), false).await;
            let piece = Bytes::from_static(&[0; 32 << 10]);
            for _ in 0..MESSAGE / piece.len() {
                send(&mut upload, piece.clone(), false).await;
            }
            send(&mut upload, Bytes::new(), true).await;
            let mut body = response.await.unwrap().into_body();
            let mut read = 0;
            while let Some(data) = body.data().await {
                let data = data.unwrap();
                body.flow_control().release_capacity(data.len()).unwrap();
                read += data.len();
            }
            assert_eq!(read, MESSAGE + 5);
            assert_eq!(body.trailers().await.unwrap().unwrap()["grpc-status"], "0");
        });
    }
    assert_eq!(
        tokio::time::timeout(Duration::from_secs(60), calls.join_all())
            .await
            .unwrap()
            .len(),
        40
    );
    let grown = memory("VmHWM").saturating_sub(before) >> 10;
    // 640 MiB went through. Two budgets, and what 40 streams have in windows and queues on all four ends.
    assert!(grown < 64 + 80, "grew by {grown} MiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_give_memory_back() {
    let limits = Limits {
        message: 4 << 20,
        answers: 8 << 20,
        stalled: Duration::from_secs(2),
        ..Limits::default()
    };
    let stand = Stand::with(Rule::forward(&[Method::ListPodSandbox]), limits, Duration::ZERO);
    let _peer = Peer::start(&stand.upstream(), |request, respond| async move {
        read_all(&mut request.into_body()).await.unwrap();
        answer(respond, &vec![1; 4 << 20]).await;
    });
    let mut idle = Vec::new();
    for _ in 0..4 {
        let client = stand.client().await;
        let (response, mut upload) = client.begin(grpc(LIST), false).await;
        upload.send_data(framed(b"").into(), true).unwrap();
        idle.push((client, response, upload));
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    let client = stand.client().await;
    let answer = client.call(grpc(LIST), framed(b"")).await.unwrap();
    assert_eq!((answer.status().0, answer.body.len()), (0, (4 << 20) + 5));
    // Whoever was in before it was cut; the last ones may have come after it.
    let mut cut = 0;
    for (_, response, _) in idle {
        match soon(async { whole(response.await?).await }).await {
            Ok(answer) => assert_eq!(answer.body.len(), (4 << 20) + 5),
            Err(error) => {
                assert_eq!(error.reason(), Some(Reason::CANCEL));
                cut += 1;
            }
        }
    }
    assert!(cut > 0);
}
