//! The client against servers that redirect, expire, break, lie and stall.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "common/servers.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{PASSWORD, Scripted, Seen, answer, broken, client, content, serve_range, text};
use hullspeed_registry::{
    Client, ClientOptions, Credentials, Digest, ErrorClass, Fault, Login, MANIFEST_ACCEPT, RangeSpec, Upload, Version,
};

/// `base64(hull:pw)`.
const BASIC: &str = "Basic aHVsbDpwdw==";

fn counter() -> Arc<AtomicUsize> {
    Arc::new(AtomicUsize::new(0))
}

/// A registry with a token server at `/token`; `valid` decides which bearer tokens it takes. Tokens are numbered.
async fn token_registry(
    lifetime: u64,
    valid: impl Fn(&str) -> bool + Clone + Send + Sync + 'static,
    inside: impl Fn(&Seen) -> axum::response::Response + Clone + Send + Sync + 'static,
) -> Scripted {
    let issued = counter();
    let address = Arc::new(std::sync::OnceLock::<String>::new());
    let own = Arc::clone(&address);
    let server = Scripted::start(move |seen| {
        if seen.path == "/token" {
            let n = issued.fetch_add(1, Ordering::SeqCst);
            return answer(200, &[], format!(r#"{{"token":"t{n}","expires_in":{lifetime}}}"#));
        }
        match seen
            .authorization
            .as_deref()
            .and_then(|value| value.strip_prefix("Bearer "))
        {
            Some(token) if valid(token) => inside(seen),
            _ => {
                let realm = format!(r#"Bearer realm="http://{}/token",service="svc""#, own.get().unwrap());
                answer(401, &[("www-authenticate", &realm)], "")
            }
        }
    })
    .await;
    address.set(server.host.clone()).unwrap();
    server
}

#[tokio::test]
async fn tokens_are_asked_for_once_per_scope_and_again_when_they_end() {
    let server = token_registry(300, |_| true, |_| answer(200, &[], "")).await;
    let registry = client(&server.host, Some(PASSWORD));
    let digest = Digest::of("");
    for _ in 0..3 {
        assert!(registry.blob_exists(&server.image("a/b"), &digest).await.unwrap());
    }
    let seen = server.seen();
    assert_eq!(seen.len(), 5, "challenge, token, three answers: {seen:#?}");
    assert_eq!(seen[1].uri, "/token?service=svc&scope=repository%3Aa%2Fb%3Apull");
    assert_eq!(seen[1].authorization.as_deref(), Some(BASIC));
    assert!(
        seen.iter()
            .filter(|seen| seen.path != "/token")
            .all(|seen| seen.authorization.as_deref() != Some(BASIC))
    );
    // Another repository needs another token, but no second challenge.
    registry.blob_exists(&server.image("c"), &digest).await.unwrap();
    assert_eq!(server.seen().len(), 7);

    // Concurrent requests share one token request.
    let server = token_registry(300, |_| true, |_| answer(200, &[], "")).await;
    let registry = client(&server.host, None);
    let image = server.image("a");
    let all = (0..8).map(|_| registry.blob_exists(&image, &digest));
    assert!(
        futures_util::future::join_all(all)
            .await
            .into_iter()
            .all(|found| found.unwrap())
    );
    assert_eq!(server.count("/token"), 1);

    // A token that is over is not even tried.
    let server = token_registry(0, |_| true, |_| answer(200, &[], "")).await;
    let registry = client(&server.host, None);
    for _ in 0..3 {
        registry.blob_exists(&server.image("a"), &digest).await.unwrap();
    }
    assert_eq!((server.count("/token"), server.count("/v2/")), (3, 4));
}

#[tokio::test]
async fn a_source_of_logins_that_cannot_be_read_is_none() {
    let server = token_registry(300, |_| true, |_| answer(200, &[], "")).await;
    let client = Client::new(ClientOptions {
        credentials: Credentials::anonymous().with_file("/nonexistent/auth.json"),
        ..ClientOptions::default()
    })
    .unwrap();
    for _ in 0..2 {
        let found = client.blob_exists(&server.image("a"), &Digest::of("")).await;
        assert!(found.unwrap());
    }
    assert_eq!(server.count("/token"), 1);
}

#[tokio::test]
async fn a_revoked_token_is_renewed_once_from_scratch() {
    // Token 0 works for one request, token 1 for ever.
    let uses = counter();
    let valid = move |token: &str| token != "t0" || uses.fetch_add(1, Ordering::SeqCst) == 0;
    let server = token_registry(300, valid, |_| answer(200, &[], "")).await;
    let registry = client(&server.host, Some(PASSWORD));
    for _ in 0..3 {
        assert!(registry.blob_exists(&server.image("a"), &Digest::of("")).await.unwrap());
    }
    assert_eq!(server.count("/token"), 2);

    // A registry that takes no token at all is not asked for ever.
    let server = token_registry(300, |_| false, |_| answer(200, &[], "")).await;
    let error = client(&server.host, Some(PASSWORD))
        .blob_exists(&server.image("a"), &Digest::of(""))
        .await
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Auth);
    assert_eq!((server.count("/token"), server.count("/v2/")), (1, 2));
}

#[tokio::test]
async fn identity_tokens_are_exchanged_by_post() {
    let server = token_registry(300, |_| true, |_| answer(200, &[], "")).await;
    let login = Login::IdentityToken("refresh-me".to_owned());
    let credentials = Credentials::anonymous().with_login(&server.host, login);
    let registry = Client::new(ClientOptions {
        credentials,
        ..ClientOptions::default()
    })
    .unwrap();
    registry.blob_exists(&server.image("a"), &Digest::of("")).await.unwrap();
    let token = server.seen().into_iter().find(|seen| seen.path == "/token").unwrap();
    let form = String::from_utf8(token.body.to_vec()).unwrap();
    assert_eq!(token.method, "POST");
    assert!(
        form.contains("grant_type=refresh_token") && form.contains("refresh_token=refresh-me"),
        "{form}"
    );
}

#[tokio::test]
async fn token_servers_that_lie_are_refused() {
    for body in [
        "{}".to_owned(),
        r#"{"token":""}"#.to_owned(),
        "x".to_owned(),
        format!("{{\"token\":\"{}\"}}", "x".repeat(2 << 20)),
    ] {
        let server = Scripted::start(move |_| answer(200, &[], body.clone())).await;
        let host = server.host.clone();
        let front = Scripted::start(move |_| {
            answer(
                401,
                &[("www-authenticate", &format!(r#"Bearer realm="http://{host}/token""#))],
                "",
            )
        })
        .await;
        let error = client(&front.host, None)
            .blob_exists(&front.image("a"), &Digest::of(""))
            .await
            .unwrap_err();
        assert_ne!(error.class(), ErrorClass::Transient, "{}", text(&error));
    }
}

#[tokio::test]
async fn redirects_carry_no_authorization_and_are_remembered_until_they_fail() {
    let bytes = content(1000);
    let digest = Digest::of(&bytes);
    let expired = counter();
    let (served, gate) = (bytes.clone(), Arc::clone(&expired));
    let store = Scripted::start(move |seen| {
        if seen.uri.contains(&format!("sig={}", gate.load(Ordering::SeqCst))) {
            serve_range(&served, seen.range.as_deref())
        } else {
            answer(403, &[], "<Error>expired</Error>")
        }
    })
    .await;
    let (target, signature) = (store.host.clone(), Arc::clone(&expired));
    let server = token_registry(
        300,
        |_| true,
        move |_| {
            let location = format!("http://{target}/data?sig={}", signature.load(Ordering::SeqCst));
            answer(307, &[("location", &location)], "")
        },
    )
    .await;
    let registry = client(&server.host, Some(PASSWORD));
    let image = server.image("a");
    let read = async |start: u64| {
        let part = registry
            .blob_range(&image, &digest, RangeSpec::From(start..start + 10))
            .await?;
        part.bytes().await
    };
    for start in [0, 10, 20] {
        assert_eq!(
            read(start).await.unwrap(),
            bytes.slice(usize::try_from(start).unwrap()..).slice(..10)
        );
    }
    assert_eq!(
        (server.count("/v2/"), store.seen().len()),
        (2, 3),
        "challenge and one redirect for three reads"
    );
    expired.store(1, Ordering::SeqCst);
    assert_eq!(read(30).await.unwrap(), bytes.slice(30..40));
    assert_eq!(
        (server.count("/v2/"), store.seen().len()),
        (3, 5),
        "one refusal, one new redirect"
    );
    assert!(
        store.seen().iter().all(|seen| seen.authorization.is_none()),
        "credentials reached the store"
    );
    // A store that refuses fresh signatures too is asked a bounded number of times, and its signature stays private.
    expired.store(2, Ordering::SeqCst);
    read(0).await.unwrap();
    let refusing = Scripted::start(|_| answer(403, &[], "no")).await;
    let target = refusing.host.clone();
    let server =
        Scripted::start(move |_| answer(307, &[("location", &format!("http://{target}/d?sig=topsecret"))], "")).await;
    let registry = client(&server.host, None);
    for _ in 0..2 {
        let error = registry
            .blob_range(&server.image("a"), &digest, RangeSpec::Suffix(5))
            .await
            .unwrap_err();
        assert_eq!(error.class(), ErrorClass::Auth);
        assert!(!format!("{} {error:?}", text(&error)).contains("topsecret"));
    }
    assert!(refusing.seen().len() <= 3, "{}", refusing.seen().len());
}

#[tokio::test]
async fn redirects_that_lead_nowhere_are_refused() {
    for (location, wanted) in [
        ("/v2/a/blobs/again", "in a row"),
        ("file:///etc/passwd", "location"),
        ("http://", "location"),
    ] {
        let server = Scripted::start(move |_| answer(302, &[("location", location)], "")).await;
        let error = client(&server.host, None)
            .blob_exists(&server.image("a"), &Digest::of(""))
            .await
            .unwrap_err();
        assert_eq!(error.class(), ErrorClass::Protocol);
        assert!(text(&error).contains(wanted), "{}", text(&error));
        assert!(server.seen().len() <= 6);
    }
}

#[tokio::test]
async fn a_server_without_ranges_still_gives_the_right_bytes() {
    let bytes = content(300_000);
    let served = bytes.clone();
    let server = Scripted::start(move |_| answer(200, &[], served.clone())).await;
    let registry = client(&server.host, None);
    let digest = Digest::of(&bytes);
    for (range, start, end) in [
        (RangeSpec::From(0..10), 0, 10),
        (RangeSpec::From(150_000..250_000), 150_000, 250_000),
        (RangeSpec::From(299_990..400_000), 299_990, 300_000),
        (RangeSpec::Suffix(100), 299_900, 300_000),
        (RangeSpec::Suffix(1 << 40), 0, 300_000),
    ] {
        let part = registry.blob_range(&server.image("a"), &digest, range).await.unwrap();
        assert!(part.ranges_ignored);
        assert_eq!(
            (part.start, part.end, part.total),
            (start as u64, end as u64, Some(300_000))
        );
        assert_eq!(part.bytes().await.unwrap(), bytes.slice(start..end));
    }
}

#[tokio::test]
async fn progress_in_bytes_that_are_dropped_is_progress() {
    // Nine tenths of the body are not asked for and take a second to come.
    let bytes = content(10_000);
    let served = bytes.clone();
    let server = Scripted::start(move |_| {
        let pieces: Vec<_> = (0..10).map(|n| served.slice(n * 1000..(n + 1) * 1000)).collect();
        let slow = futures_util::StreamExt::then(futures_util::stream::iter(pieces), |piece| async {
            tokio::time::sleep(Duration::from_millis(120)).await;
            Ok::<_, std::io::Error>(piece)
        });
        answer(200, &[("content-length", "10000")], axum::body::Body::from_stream(slow))
    })
    .await;
    let ask = async || {
        let range = RangeSpec::From(9_000..9_900);
        let digest = Digest::of(&bytes);
        client(&server.host, None)
            .blob_range(&server.image("a"), &digest, range)
            .await
            .unwrap()
    };
    let mut part = ask().await;
    let mut got = Vec::new();
    let each = Duration::from_millis(600);
    while let Some(piece) = tokio::time::timeout(each, part.chunk()).await.unwrap().unwrap() {
        got.extend_from_slice(&piece);
    }
    assert_eq!(got, bytes[9_000..9_900]);
    assert_eq!(ask().await.bytes().await.unwrap(), bytes.slice(9_000..9_900));
}

#[tokio::test]
async fn lies_about_ranges_are_protocol_errors() {
    let digest = Digest::of("");
    let range = RangeSpec::From(10..20);
    let lies: [(&str, usize); 6] = [
        ("bytes 0-9/100", 10),
        ("bytes 10-19/100", 9),
        ("bytes 10-29/100", 20),
        ("bytes 10-14/100", 5),
        ("bytes 10-/100", 10),
        ("", 10),
    ];
    for (content_range, length) in lies {
        let server = Scripted::start(move |_| answer(206, &[("content-range", content_range)], vec![0; length])).await;
        let error = client(&server.host, None)
            .blob_range(&server.image("a"), &digest, range.clone())
            .await
            .unwrap_err();
        assert_eq!(error.class(), ErrorClass::Protocol, "{content_range}");
        assert_eq!(server.seen().len(), 1, "lies are not asked for twice");
    }
    // More bytes than announced, without a length to check beforehand.
    let server = Scripted::start(|_| {
        let stream = futures_util::stream::iter([Ok::<_, std::io::Error>(Bytes::from(vec![0; 11]))]);
        answer(
            206,
            &[("content-range", "bytes 10-19/100")],
            axum::body::Body::from_stream(stream),
        )
    })
    .await;
    let part = client(&server.host, None)
        .blob_range(&server.image("a"), &digest, range.clone())
        .await
        .unwrap();
    assert_eq!(part.bytes().await.unwrap_err().class(), ErrorClass::Protocol);
    let server = Scripted::start(|_| answer(200, &[("content-encoding", "gzip")], "x")).await;
    let error = client(&server.host, None)
        .blob_range(&server.image("a"), &digest, range)
        .await
        .unwrap_err();
    assert!(text(&error).contains("content-encoding"));
}

#[tokio::test]
async fn bodies_that_break_or_stall_are_transient_errors() {
    let digest = Digest::of("");
    let server = Scripted::start(|_| broken(206, &[("content-range", "bytes 0-99/100")], content(40), 100)).await;
    let registry = client(&server.host, None);
    let mut part = registry
        .blob_range(&server.image("a"), &digest, RangeSpec::From(0..100))
        .await
        .unwrap();
    assert_eq!(
        part.chunk().await.unwrap().unwrap(),
        content(40),
        "what came before the break is given"
    );
    let error = part.chunk().await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Transient, "{}", text(&error));

    let server = Scripted::start(|_| {
        let stream = futures_util::stream::pending::<Result<Bytes, std::io::Error>>();
        answer(
            206,
            &[("content-range", "bytes 0-99/100")],
            axum::body::Body::from_stream(stream),
        )
    })
    .await;
    let part = client(&server.host, None)
        .blob_range(&server.image("a"), &digest, RangeSpec::From(0..100))
        .await
        .unwrap();
    let started = Instant::now();
    let error = part.bytes().await.unwrap_err();
    assert!(matches!(error.fault(), Fault::Stalled(_)) && started.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn a_final_address_whose_body_fails_is_found_anew() {
    let bytes = content(100);
    let digest = Digest::of(&bytes);
    let whole = bytes.clone();
    // The first edge breaks each body, the second one gives wrong bytes as far as the caller can tell.
    let store = Scripted::start(move |seen| match seen.uri.as_str() {
        "/edge?0" => broken(206, &[("content-range", "bytes 0-99/100")], content(40), 100),
        _ => serve_range(&whole, seen.range.as_deref()),
    })
    .await;
    let (target, issued) = (store.host.clone(), counter());
    let server = Scripted::start(move |_| {
        let location = format!("http://{target}/edge?{}", issued.fetch_add(1, Ordering::SeqCst));
        answer(307, &[("location", &location)], "")
    })
    .await;
    let image = server.image("a");
    let host = client(&server.host, None).hosts(&image).unwrap().remove(0);
    let read = async || host.blob_range(&digest, RangeSpec::From(0..100)).await?.bytes().await;
    assert_eq!(read().await.unwrap_err().class(), ErrorClass::Transient);
    for _ in 0..2 {
        assert_eq!(read().await.unwrap(), bytes);
    }
    host.forget_address(&digest);
    let response = host.blob_range(&digest, RangeSpec::From(0..100)).await.unwrap();
    let said = format!("{response:?}");
    assert!(!said.contains("edge?"), "{said}");
    let asked: Vec<_> = store.seen().into_iter().map(|seen| seen.uri).collect();
    assert_eq!(asked, ["/edge?0", "/edge?1", "/edge?1", "/edge?2"]);
    // One that is given up before its end says nothing of the edge.
    drop(response);
    assert_eq!(read().await.unwrap(), bytes);
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn pulls_resume_where_they_broke_and_check_the_digest() {
    let bytes = content(500_000);
    let (served, breaks) = (bytes.clone(), counter());
    let server = Scripted::start(move |seen| {
        let n = breaks.fetch_add(1, Ordering::SeqCst);
        match seen.range.as_deref() {
            None => broken(200, &[], served.slice(..100_000), served.len()),
            Some(range) if n < 3 => {
                let start: usize = range["bytes=".len()..].split('-').next().unwrap().parse().unwrap();
                let content_range = format!("bytes {start}-499999/500000");
                let part = served.slice(start..start + 100_000);
                broken(206, &[("content-range", &content_range)], part, served.len() - start)
            }
            range => serve_range(&served, range),
        }
    })
    .await;
    let registry = client(&server.host, None);
    let digest = Digest::of(&bytes);
    assert_eq!(
        registry
            .pull_blob_bytes(&server.image("a"), &digest, 1 << 20)
            .await
            .unwrap(),
        bytes
    );
    let ranges: Vec<_> = server.seen().into_iter().filter_map(|seen| seen.range).collect();
    assert_eq!(
        ranges,
        ["bytes=100000-499999", "bytes=200000-499999", "bytes=300000-499999"]
    );

    // Wrong bytes of the right size.
    let server = Scripted::start(|_| answer(200, &[], vec![7; 1000])).await;
    let error = client(&server.host, None)
        .pull_blob_bytes(&server.image("a"), &digest, 1 << 20)
        .await
        .unwrap_err();
    assert!(matches!(error.fault(), Fault::Digest { .. }), "{}", text(&error));
    let error = client(&server.host, None)
        .pull_blob(&server.image("a"), &digest, Some(999))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error.fault(),
            Fault::Size {
                expected: 999,
                actual: 1000
            }
        ),
        "{}",
        text(&error)
    );

    // A server that always breaks at once ends the pull.
    let server = Scripted::start(|seen| match seen.range {
        None => broken(200, &[], Bytes::new(), 1000),
        Some(_) => broken(206, &[("content-range", "bytes 0-999/1000")], Bytes::new(), 1000),
    })
    .await;
    let error = client(&server.host, None)
        .pull_blob_bytes(&server.image("a"), &digest, 1 << 20)
        .await
        .unwrap_err();
    assert_eq!(error.class(), ErrorClass::Transient);
    assert!(server.seen().len() <= 8, "{}", server.seen().len());
}

#[tokio::test]
async fn transient_answers_are_retried_within_bounds() {
    let count = counter();
    let server = Scripted::start(move |_| match count.fetch_add(1, Ordering::SeqCst) {
        0 => answer(503, &[], ""),
        1 => answer(429, &[("retry-after", "1")], ""),
        _ => answer(200, &[], ""),
    })
    .await;
    let started = Instant::now();
    assert!(
        client(&server.host, None)
            .blob_exists(&server.image("a"), &Digest::of(""))
            .await
            .unwrap()
    );
    assert!(
        started.elapsed() >= Duration::from_secs(1),
        "Retry-After was not waited for"
    );
    for (status, requests, class) in [
        (500, 4, ErrorClass::Transient),
        (429, 4, ErrorClass::Transient),
        (501, 1, ErrorClass::Protocol),
        (400, 1, ErrorClass::Protocol),
        (404, 1, ErrorClass::NotFound),
        (403, 1, ErrorClass::Auth),
    ] {
        let server = Scripted::start(move |_| answer(status, &[], r#"{"errors":[{"message":"why\nnot"}]}"#)).await;
        let version = Version::Tag("t".to_owned());
        let error = client(&server.host, None)
            .manifest(&server.image("a"), &version, &[])
            .await
            .unwrap_err();
        assert_eq!((server.seen().len(), error.class()), (requests, class), "{status}");
        assert!(text(&error).contains("why not"), "{}", text(&error));
    }
}

#[tokio::test]
async fn manifests_are_bounded_and_checked() {
    let version = Version::Digest(Digest::of("good"));
    let server = Scripted::start(|_| answer(200, &[], "evil")).await;
    let error = client(&server.host, None)
        .manifest(&server.image("a"), &version, MANIFEST_ACCEPT)
        .await
        .unwrap_err();
    assert!(matches!(error.fault(), Fault::Digest { .. }));
    let announced = Scripted::start(|_| answer(200, &[], vec![b' '; (4 << 20) + 1])).await;
    let endless = Scripted::start(|_| {
        let piece = || Ok::<_, std::io::Error>(Bytes::from(vec![b' '; 1 << 16]));
        answer(
            200,
            &[],
            axum::body::Body::from_stream(futures_util::stream::repeat_with(piece)),
        )
    })
    .await;
    for server in [announced, endless] {
        let error = client(&server.host, None)
            .manifest(&server.image("a"), &version, &[])
            .await
            .unwrap_err();
        assert!(matches!(error.fault(), Fault::TooLarge { .. }), "{}", text(&error));
    }
}

#[tokio::test]
async fn uploads_elsewhere_carry_no_authorization_and_restart_when_refused() {
    let store = Scripted::start(|_| answer(201, &[], "")).await;
    let target = store.host.clone();
    let inside = move |seen: &Seen| match seen.method.as_str() {
        "HEAD" => answer(404, &[], ""),
        _ => answer(202, &[("location", &format!("http://{target}/up?state=x"))], ""),
    };
    let server = token_registry(300, |_| true, inside).await;
    let bytes = content(1000);
    let digest = Digest::of(&bytes);
    let registry = client(&server.host, Some(PASSWORD));
    registry
        .push_blob(&server.image("a"), &digest, 1000, Upload::Bytes(bytes.clone()), None)
        .await
        .unwrap();
    let put = store.seen().pop().unwrap();
    assert_eq!(
        (put.method.as_str(), put.authorization, put.body),
        ("PUT", None, bytes.clone())
    );
    assert!(put.uri.contains("state=x&digest=sha256%3A"), "{}", put.uri);
    assert!(server.count("pull%2Cpush") > 0, "the token must be good for pushing");

    // A failed PUT gets a new upload address.
    let puts = counter();
    let server = Scripted::start(move |seen| match seen.method.as_str() {
        "HEAD" => answer(404, &[], ""),
        "POST" => answer(202, &[("location", "/v2/a/blobs/uploads/1")], ""),
        _ if puts.fetch_add(1, Ordering::SeqCst) == 0 => answer(500, &[], ""),
        _ => answer(201, &[], ""),
    })
    .await;
    let registry = client(&server.host, None);
    registry
        .push_blob(&server.image("a"), &digest, 1000, Upload::Bytes(bytes), None)
        .await
        .unwrap();
    let methods: Vec<_> = server.seen().into_iter().map(|seen| seen.method).collect();
    assert_eq!(methods, ["HEAD", "POST", "PUT", "POST", "PUT"]);
}
