//! The client against Debian's docker-registry.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "common/servers.rs"]
mod common;

use std::net::{Ipv4Addr, TcpListener};

use bytes::Bytes;
use common::{PASSWORD, Registry, client, content, text};
use hullspeed_registry::{
    Client, ClientOptions, Digest, ErrorClass, Fault, MANIFEST_ACCEPT, RangeSpec, Reference, Upload, Uploaded, Version,
};

const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";

fn image(host: &str, name: &str) -> Reference {
    Reference::parse(&format!("{host}/{name}")).unwrap()
}

async fn push(client: &Client, image: &Reference, bytes: &Bytes) -> Digest {
    let digest = Digest::of(bytes);
    let upload = Upload::Bytes(bytes.clone());
    client
        .push_blob(image, &digest, bytes.len() as u64, upload, None)
        .await
        .unwrap();
    digest
}

#[tokio::test]
async fn blobs_go_up_once_and_come_back_whole_and_in_parts() {
    let registry = Registry::start(false);
    let client = client(&registry.host, None);
    let image = image(&registry.host, "team/app:1");
    let bytes = content(3 << 20);
    let digest = Digest::of(&bytes);
    assert!(!client.blob_exists(&image, &digest).await.unwrap());

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &bytes).unwrap();
    let upload = || Upload::File(file.path().to_owned());
    let told = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counter = std::sync::Arc::clone(&told);
    let progress: hullspeed_registry::Progress = std::sync::Arc::new(move |n| {
        counter.fetch_add(n, std::sync::atomic::Ordering::Relaxed);
    });
    let size = bytes.len() as u64;
    assert_eq!(
        client
            .push_blob(&image, &digest, size, upload(), Some(progress))
            .await
            .unwrap(),
        Uploaded::Sent
    );
    assert_eq!(told.load(std::sync::atomic::Ordering::Relaxed), size);
    assert_eq!(
        client.push_blob(&image, &digest, size, upload(), None).await.unwrap(),
        Uploaded::Existed
    );

    assert_eq!(client.pull_blob_bytes(&image, &digest, size).await.unwrap(), bytes);
    let error = client.pull_blob_bytes(&image, &digest, size - 1).await.unwrap_err();
    assert!(matches!(error.fault(), Fault::TooLarge { .. }), "{error}");

    for (range, start, end) in [
        (RangeSpec::From(0..1), 0, 1),
        (RangeSpec::From(1_000_000..2_000_000), 1_000_000, 2_000_000),
        (RangeSpec::From(size - 10..size + 10), size - 10, size),
        (RangeSpec::Suffix(51), size - 51, size),
        (RangeSpec::Suffix(size), 0, size),
    ] {
        let part = client.blob_range(&image, &digest, range).await.unwrap();
        assert_eq!(
            (part.start, part.end, part.total, part.ranges_ignored),
            (start, end, Some(size), false)
        );
        let wanted = bytes.slice(usize::try_from(start).unwrap()..usize::try_from(end).unwrap());
        assert_eq!(part.bytes().await.unwrap(), wanted);
    }
    assert!(
        client
            .blob_range(&image, &digest, RangeSpec::From(size..size + 1))
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_file_that_changed_under_an_upload_is_a_local_error() {
    let registry = Registry::start(false);
    let client = client(&registry.host, None);
    let image = image(&registry.host, "app");
    let file = tempfile::NamedTempFile::new().unwrap();
    for (size, announced) in [(1000, 2000), (2000, 1000)] {
        std::fs::write(file.path(), content(size)).unwrap();
        let digest = Digest::of(content(announced));
        let upload = Upload::File(file.path().to_owned());
        let error = client
            .push_blob(&image, &digest, announced as u64, upload, None)
            .await
            .unwrap_err();
        assert_eq!(error.class(), ErrorClass::Local, "{}", text(&error));
        assert!(!client.blob_exists(&image, &digest).await.unwrap());
    }
}

#[tokio::test]
async fn manifests_round_trip_and_mounts_save_uploads() {
    let registry = Registry::start(false);
    let client = client(&registry.host, None);
    let (first, second) = (image(&registry.host, "a:x"), image(&registry.host, "b/c"));
    let config = Bytes::from_static(b"{}");
    let digest = push(&client, &first, &config).await;
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{OCI_MANIFEST}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{digest}","size":2}},"layers":[]}}"#
    );
    let manifest = Bytes::from(manifest);
    let put = client
        .put_manifest(&first, &first.version(), manifest.clone(), OCI_MANIFEST)
        .await
        .unwrap();
    assert_eq!(put, Digest::of(&manifest));
    for version in [first.version(), Version::Digest(put.clone())] {
        let got = client.manifest(&first, &version, MANIFEST_ACCEPT).await.unwrap();
        assert_eq!(
            (got.bytes, got.media_type.as_str(), got.digest),
            (manifest.clone(), OCI_MANIFEST, put.clone())
        );
    }
    let missing = client
        .manifest(&first, &Version::Tag("nope".into()), MANIFEST_ACCEPT)
        .await
        .unwrap_err();
    assert_eq!(missing.class(), ErrorClass::NotFound);
    assert!(
        text(&missing).contains("nope") && text(&missing).contains(&registry.host),
        "{}",
        text(&missing)
    );

    assert!(client.mount_blob(&second, &digest, &first).await.unwrap());
    assert!(client.blob_exists(&second, &digest).await.unwrap());
    let absent = Digest::of("absent");
    assert!(!client.mount_blob(&second, &absent, &first).await.unwrap());
}

#[tokio::test]
async fn logins_are_needed_and_never_shown() {
    let registry = Registry::start(true);
    let image = image(&registry.host, "app:1");
    let bytes = content(100);
    let good = client(&registry.host, Some(PASSWORD));
    let digest = push(&good, &image, &bytes).await;
    assert_eq!(good.pull_blob_bytes(&image, &digest, 100).await.unwrap(), bytes);

    for password in [None, Some("wrong-secret")] {
        let error = client(&registry.host, password)
            .blob_exists(&image, &digest)
            .await
            .unwrap_err();
        let shown = format!("{} {error:?}", text(&error));
        assert_eq!(error.class(), ErrorClass::Auth);
        assert!(
            shown.contains(&registry.host) && !shown.contains("wrong-secret"),
            "{shown}"
        );
    }
    // The login of another registry is not tried.
    let other = client("localhost:1", Some(PASSWORD))
        .blob_exists(&image, &digest)
        .await
        .unwrap_err();
    assert_eq!(other.class(), ErrorClass::Auth);
}

#[tokio::test]
async fn a_dead_registry_is_transient_and_named() {
    let client = client("x", None);
    let image = image("127.0.0.1:1", "app");
    let error = client.blob_exists(&image, &Digest::of("")).await.unwrap_err();
    assert_eq!(error.class(), ErrorClass::Transient);
    assert!(
        text(&error).contains("127.0.0.1:1") && text(&error).contains("refused"),
        "{}",
        text(&error)
    );
}

/// A registry that speaks TLS, under a certificate that is its own authority.
struct TlsRegistry {
    _registry: Registry,
    host: String,
    trusting: Client,
}

/// `http` are lines for the `http` part of its configuration.
fn tls_registry(http: &str) -> TlsRegistry {
    // Loopback speaks plain http by rule, and a machine may have no other address. Linux connects 0.0.0.0 to itself.
    let address = Ipv4Addr::UNSPECIFIED;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let made = std::process::Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args(["-subj", "/CN=test", "-addext", &format!("subjectAltName=IP:{address}")])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .args(["-keyout", &path("key"), "-out", &path("crt")])
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let http = format!("{http}  tls: {{certificate: {}, key: {}}}\n", path("crt"), path("key"));
    let ca_file = Some(dir.path().join("crt"));
    let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listen = free.local_addr().unwrap();
    drop(free);
    let registry = Registry::start_at(dir, listen, false, &http);
    let trusting = Client::new(ClientOptions {
        ca_file,
        ..ClientOptions::default()
    })
    .unwrap();
    TlsRegistry {
        _registry: registry,
        host: format!("{address}:{}", listen.port()),
        trusting,
    }
}

#[tokio::test]
async fn tls_trusts_the_given_authority_and_no_other() {
    let TlsRegistry {
        _registry,
        host,
        trusting,
    } = tls_registry("");
    let image = image(&host, "app");
    assert!(!trusting.blob_exists(&image, &Digest::of("")).await.unwrap());
    let error = client("x", None)
        .blob_exists(&image, &Digest::of(""))
        .await
        .unwrap_err();
    assert!(text(&error).to_lowercase().contains("certificate"), "{}", text(&error));
}

#[tokio::test]
async fn an_upload_is_never_sent_from_https_to_http() {
    let bytes = content(1000);
    let digest = Digest::of(&bytes);
    let send = async |http: &str| {
        let TlsRegistry {
            _registry,
            host,
            trusting,
        } = tls_registry(http);
        let image = image(&host, "app");
        let upload = Upload::Bytes(bytes.clone());
        let sent = trusting.push_blob(&image, &digest, 1000, upload, None).await;
        (sent, trusting.blob_exists(&image, &digest).await.unwrap())
    };
    // The registry is told that the world reaches it by http, and names this listener as the place to upload to.
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let (sent, exists) = send(&format!("  host: http://{}\n", listener.local_addr().unwrap())).await;
    let error = sent.unwrap_err();
    assert!(matches!(error.fault(), Fault::Redirect(_)), "{}", text(&error));
    assert!(text(&error).contains("from https to http"), "{}", text(&error));
    assert_eq!(listener.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert!(!exists);
    let (sent, exists) = send("").await;
    assert!(sent.unwrap() == Uploaded::Sent && exists);
}
