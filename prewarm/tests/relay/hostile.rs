//! What is not HTTP/2, or too much of it.

use std::time::Duration;

use http::HeaderValue;
use hullspeed_prewarm::relay::Limits;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::support::{Peer, Rule, Stand, answer, framed, grpc, soon};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// Sends bytes, gives whether the relay closes the connection.
async fn closes(stand: &Stand, bytes: &[u8]) -> bool {
    let mut stream = UnixStream::connect(stand.socket()).await.unwrap();
    let _ = stream.write_all(bytes).await;
    let mut read = Vec::new();
    tokio::time::timeout(Duration::from_secs(3), stream.read_to_end(&mut read))
        .await
        .is_ok()
}

async fn works(stand: &Stand) {
    let client = stand.client().await;
    let answer = client.call(grpc("/x/Unary"), framed(b"")).await.unwrap();
    assert_eq!(answer.body, framed(b"fine"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_http2_is_closed_and_nothing_is_wedged() {
    let limits = Limits {
        handshake: Duration::from_millis(300),
        ..Limits::default()
    };
    let stand = Stand::with(Rule::none(), limits, Duration::ZERO);
    let _peer = Peer::start(&stand.upstream(), |_, respond| answer(respond, b"fine"));
    let kept = stand.client().await;
    let frame = |kind: u8, stream: u8, length: u8| {
        [
            PREFACE,
            SETTINGS,
            &[0, 0, length, kind, 4, 0, 0, 0, stream],
            &vec![0xff; length.into()],
        ]
        .concat()
    };
    for (what, bytes) in [
        ("HTTP/1", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec()),
        ("nothing", vec![]),
        ("half a preface", PREFACE[..10].to_vec()),
        ("TLS", vec![0x16, 3, 1, 2, 0, 1, 0]),
        ("an oversized frame", [PREFACE, SETTINGS, &[0xff; 300]].concat()),
        ("headers that are not HPACK", frame(1, 1, 40)),
        ("data of no stream", frame(0, 1, 8)),
        ("a window update of nothing", frame(8, 0, 3)),
        ("headers of stream 0", frame(1, 0, 4)),
        ("an even stream", frame(1, 2, 4)),
    ] {
        assert!(closes(&stand, &bytes).await, "{what} stays open");
        works(&stand).await;
    }
    // A frame that does not end is a client that is slow: it holds its own connection only.
    let mut slow = UnixStream::connect(stand.socket()).await.unwrap();
    slow.write_all(&[PREFACE, SETTINGS, &[0, 0, 40, 1]].concat())
        .await
        .unwrap();
    works(&stand).await;
    assert_eq!(
        kept.call(grpc("/x/Unary"), framed(b"")).await.unwrap().body,
        framed(b"fine")
    );
}

#[test]
fn any_bytes_wedge_nothing() {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let (stand, peer) = runtime.block_on(async {
        let stand = Stand::start(Rule::none());
        let peer = Peer::start(&stand.upstream(), |_, respond| answer(respond, b"fine"));
        (stand, peer)
    });
    let config = ProptestConfig {
        cases: 300,
        failure_persistence: None,
        ..Default::default()
    };
    TestRunner::new(config)
        .run(
            &(any::<bool>(), proptest::collection::vec(any::<u8>(), 0..400)),
            |(preface, bytes)| {
                runtime.block_on(async {
                    let mut stream = UnixStream::connect(stand.socket()).await.unwrap();
                    if preface {
                        let _ = stream.write_all(&[PREFACE, SETTINGS].concat()).await;
                    }
                    let _ = stream.write_all(&bytes).await;
                    drop(stream);
                });
                Ok(())
            },
        )
        .unwrap();
    runtime.block_on(async {
        works(&stand).await;
        soon(async {
            while *stand.told.connections.lock().unwrap().last().unwrap() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    });
    assert!(!stand.served.is_finished());
    let _guard = runtime.enter();
    drop((stand, peer));
}

#[tokio::test(flavor = "multi_thread")]
async fn header_bombs_are_refused_and_long_answers_pass() {
    let stand = Stand::start(Rule::none());
    let _peer = Peer::start(&stand.upstream(), |request, mut respond| async move {
        let Some(size) = request.uri().query() else {
            return answer(respond, b"fine").await;
        };
        let mut head = crate::support::ok_head();
        let value = HeaderValue::from_maybe_shared(bytes::Bytes::from(vec![b'a'; size.parse().unwrap()])).unwrap();
        head.headers_mut().insert("grpc-status", HeaderValue::from_static("2"));
        head.headers_mut().insert("grpc-message", value);
        respond.send_response(head, true).unwrap();
    });
    let client = stand.client().await;
    let mut bomb = grpc("/x/Unary");
    for number in 0..400 {
        let name = http::HeaderName::from_bytes(format!("x-{number}").as_bytes()).unwrap();
        bomb.headers_mut().insert(
            name,
            HeaderValue::from_maybe_shared(bytes::Bytes::from(vec![b'a'; 1000])).unwrap(),
        );
    }
    let refused = client.call(bomb, framed(b"")).await;
    assert!(
        refused
            .as_ref()
            .map_or_else(h2::Error::is_reset, |answer| answer.head.status == 431),
        "{refused:?}"
    );
    works(&stand).await;
    // containerd quotes what runc says, which can be long.
    let answer = client.call(grpc("/x/Unary?500000"), framed(b"")).await.unwrap();
    assert_eq!(answer.status().1.len(), 500_000);
    let answer = client.call(grpc("/x/Unary?1100000"), framed(b"")).await.unwrap();
    assert_eq!(answer.status().0, tonic::Code::Internal as i32, "{answer:?}");
    works(&stand).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_closed_at_once() {
    let limits = Limits {
        connections: 3,
        ..Limits::default()
    };
    let stand = Stand::with(Rule::none(), limits, Duration::ZERO);
    let _peer = Peer::start(&stand.upstream(), |_, respond| answer(respond, b"fine"));
    let mut clients = Vec::new();
    for _ in 0..3 {
        let client = stand.client().await;
        assert_eq!(
            client.call(grpc("/x/Unary"), framed(b"")).await.unwrap().body,
            framed(b"fine")
        );
        clients.push(client);
    }
    assert!(closes(&stand, &[PREFACE, SETTINGS].concat()).await);
    assert_eq!(
        clients[0].call(grpc("/x/Unary"), framed(b"")).await.unwrap().body,
        framed(b"fine")
    );
    clients.pop();
    soon(async {
        while *stand.told.connections.lock().unwrap() != [1, 2, 3, 2] {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    works(&stand).await;
}
