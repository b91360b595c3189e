//! Mirrors, certificates and headers of `hosts.toml`, with real servers.

#![allow(clippy::unwrap_used, reason = "a failed step is a failed test")]

#[path = "common/servers.rs"]
mod common;

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::{Registry, Scripted, Seen, answer, content, serve_range, text};
use hullspeed_registry::{
    Client, ClientOptions, Credentials, Digest, ErrorClass, Login, MANIFEST_ACCEPT, RangeSpec, Reference, RetryPolicy,
    Version,
};

/// `certs.d`, and clients that use it.
struct Certs(tempfile::TempDir);

impl Certs {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, registry: &str, file: &str, text: &str) -> PathBuf {
        let directory = self.0.path().join(registry);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join(file), text).unwrap();
        directory.join(file)
    }

    fn client(&self, credentials: Credentials) -> Client {
        let retry = RetryPolicy {
            attempts: 2,
            first: Duration::from_millis(5),
            longest: Duration::from_millis(20),
        };
        Client::new(ClientOptions {
            hosts_directory: Some(self.0.path().to_owned()),
            idle_timeout: Duration::from_secs(5),
            credentials,
            retry,
            ..ClientOptions::default()
        })
        .unwrap()
    }
}

fn image(name: &str) -> Reference {
    Reference::parse(name).unwrap()
}

fn login(username: &str) -> Login {
    Login::Basic {
        username: username.to_owned(),
        password: "pw".to_owned(),
    }
}

const MANIFEST: &str = r#"{"schemaVersion":2,"layers":[]}"#;

/// Serves one manifest under any name, and `blob` under its digest.
fn serve(seen: &Seen, blob: &Bytes) -> axum::response::Response {
    if seen.path.contains("/manifests/") {
        return answer(
            200,
            &[("content-type", "application/vnd.oci.image.manifest.v1+json")],
            MANIFEST,
        );
    }
    if seen.path.ends_with(Digest::of(blob).as_str()) {
        return serve_range(blob, seen.range.as_deref());
    }
    answer(404, &[], "")
}

async fn serving(blob: &Bytes) -> Scripted {
    let blob = blob.clone();
    Scripted::start(move |seen| serve(seen, &blob)).await
}

/// A server that answers everything with one status.
async fn failing(status: u16) -> Scripted {
    Scripted::start(move |_| answer(status, &[], "")).await
}

async fn read(client: &Client, image: &Reference, blob: &Bytes) -> Result<Bytes, hullspeed_registry::Error> {
    let range = RangeSpec::From(0..blob.len() as u64);
    client.blob_range(image, &Digest::of(blob), range).await?.bytes().await
}

#[tokio::test]
async fn manifests_and_ranges_go_from_host_to_host_with_the_namespace() {
    let blob = content(1000);
    let (broken, missing, good) = (failing(500).await, failing(404).await, serving(&blob).await);
    let certs = Certs::new();
    let toml = format!(
        "server = 'https://nowhere.invalid'\n[host.'http://{}']\n[host.'http://{}/sub']\n[host.'http://{}/v2/proxy']\noverride_path = true\n",
        broken.host, missing.host, good.host
    );
    certs.write("r.example_5000_", "hosts.toml", &toml);
    let client = certs.client(Credentials::anonymous());
    let image = image("r.example:5000/team/app:1");
    let tag = client
        .manifest(&image, &Version::Tag("1".to_owned()), MANIFEST_ACCEPT)
        .await;
    assert_eq!(tag.unwrap().bytes, MANIFEST);
    assert_eq!(broken.seen().len(), 1, "only the last host is worth a second attempt");
    assert_eq!(
        missing.seen()[0].uri,
        "/sub/v2/team/app/manifests/1?ns=r.example%3A5000"
    );
    assert_eq!(good.seen()[0].uri, "/v2/proxy/team/app/manifests/1?ns=r.example%3A5000");
    assert_eq!(read(&client, &image, &blob).await.unwrap(), blob);
    // The broken one is asked after the others for a while; one that lacks something is not.
    assert_eq!(
        (broken.seen().len(), missing.seen().len(), good.seen().len()),
        (1, 2, 2)
    );
}

#[tokio::test]
async fn each_host_has_a_handle_of_its_own_and_only_those_that_may_pull() {
    let blob = content(1000);
    let (good, other) = (serving(&blob).await, failing(503).await);
    let certs = Certs::new();
    let toml = |header: &str| {
        format!(
            "[host.'http://{}']\ncapabilities = ['push']\n[host.'http://{}']\ncapabilities = ['pull']\n[host.'http://{}'.header]\nx-extra = '{header}'\n",
            other.host, good.host, good.host
        )
    };
    certs.write("_default", "hosts.toml", &toml("one"));
    let client = certs.client(Credentials::anonymous());
    let image = image("localhost:1/app:1");
    let hosts = client.hosts(&image).unwrap();
    let names: Vec<_> = hosts.iter().map(|host| host.host().to_owned()).collect();
    assert_eq!(names, [good.host.clone(), "localhost:1".to_owned()]);
    let ask = async || {
        let range = hosts[0].blob_range(&Digest::of(&blob), RangeSpec::Suffix(10)).await?;
        range.bytes().await
    };
    assert_eq!(ask().await.unwrap(), blob.slice(990..));
    assert_eq!(good.seen()[0].extra.as_deref(), Some("one"));
    let error = hosts[1]
        .blob_range(&Digest::of(&blob), RangeSpec::Suffix(1))
        .await
        .unwrap_err();
    assert!(
        error.class() == ErrorClass::Transient && error.host() == "localhost:1",
        "{error}"
    );
    // A host that may pull and not resolve is never asked what a tag means.
    let tag = client
        .manifest(&image, &Version::Tag("1".to_owned()), MANIFEST_ACCEPT)
        .await;
    assert_eq!(tag.unwrap_err().host(), "localhost:1");
    assert_eq!(good.count("/manifests/"), 0);
    let digest = Version::Digest(Digest::of(MANIFEST));
    assert!(client.manifest(&image, &digest, MANIFEST_ACCEPT).await.is_ok());

    // What the file says of the host now counts for a handle that was there before.
    certs.write("_default", "hosts.toml", &toml("two"));
    tokio::time::sleep(Duration::from_millis(1200)).await;
    ask().await.unwrap();
    assert_eq!(good.seen().last().unwrap().extra.as_deref(), Some("two"));
    // One that is listed no longer is asked no longer, and those that are in its place.
    let asked = good.seen().len();
    certs.write("_default", "hosts.toml", "");
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let error = ask().await.unwrap_err();
    assert_eq!((error.host(), good.seen().len()), ("localhost:1", asked));
}

#[tokio::test]
async fn a_registry_that_is_listed_is_not_asked_twice() {
    for (server, capabilities, asked) in [
        ("", "", 1),
        ("server = 'http://localhost:1/'", "", 1),
        // One that may do less there is still needed for the rest.
        ("", "capabilities = ['pull']", 2),
        ("server = 'http://localhost:1'", "capabilities = ['pull']", 2),
    ] {
        let certs = Certs::new();
        let toml = format!("{server}\n[host.'http://localhost:1']\n{capabilities}\n");
        certs.write("localhost_1_", "hosts.toml", &toml);
        let client = certs.client(Credentials::anonymous());
        let hosts = client.hosts(&image("localhost:1/app:1")).unwrap();
        assert_eq!(hosts.len(), asked, "{toml}");
    }
}

#[tokio::test]
async fn whoever_keeps_hosts_can_find_out_that_they_are_others_now() {
    let certs = Certs::new();
    let client = certs.client(Credentials::anonymous());
    let image = image("localhost:1/app:1");
    let names = || {
        let hosts = client.hosts(&image).unwrap();
        hosts.iter().map(|host| host.host().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(client.hosts_version(), 0);
    assert_eq!(names(), ["localhost:1"]);
    let first = client.hosts_version();
    for (text, hosts) in [
        ("[host.'http://a.test']", vec!["a.test", "localhost:1"]),
        (
            "[host.'http://b.test']\n[host.'http://a.test']",
            vec!["b.test", "a.test", "localhost:1"],
        ),
    ] {
        certs.write("localhost:1", "hosts.toml", text);
        tokio::time::sleep(Duration::from_millis(1200)).await;
        // Nobody else has asked for them meanwhile.
        assert_ne!(client.hosts_version(), first, "{text}");
        assert_eq!(names(), hosts);
    }
    let last = client.hosts_version();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(client.hosts_version(), last, "nothing has changed");
}

#[tokio::test]
async fn a_broken_file_changes_nothing_and_at_first_means_the_registry_itself() {
    let blob = content(100);
    let (mirror, registry) = (serving(&blob).await, serving(&blob).await);
    let certs = Certs::new();
    certs.write(&registry.host, "hosts.toml", "[host.'http://x']\nca = 1");
    let client = certs.client(Credentials::anonymous());
    let image = registry.image("app");
    assert_eq!(read(&client, &image, &blob).await.unwrap(), blob);
    assert_eq!(registry.seen().len(), 1);
    let good = format!("[host.'http://{}']", mirror.host);
    certs.write(&registry.host, "hosts.toml", &good);
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(read(&client, &image, &blob).await.unwrap(), blob);
    assert_eq!((mirror.seen().len(), registry.seen().len()), (1, 1));
    for bad in [
        "[host",
        "server = 1",
        &format!("[host.'http://{}']\nca = 'absent.pem'", mirror.host),
    ] {
        certs.write(&registry.host, "hosts.toml", bad);
        tokio::time::sleep(Duration::from_millis(1200)).await;
        let before = mirror.seen().len();
        assert_eq!(read(&client, &image, &blob).await.unwrap(), blob);
        assert_eq!((mirror.seen().len(), registry.seen().len()), (before + 1, 1), "{bad}");
    }
    // Without anything good before it, a host whose files cannot be read fails, and tells which.
    let client = certs.client(Credentials::anonymous());
    let hosts = client.hosts(&image).unwrap();
    let error = hosts[0]
        .blob_range(&Digest::of(&blob), RangeSpec::Suffix(1))
        .await
        .unwrap_err();
    assert!(
        error.class() == ErrorClass::Local && text(&error).contains("absent.pem"),
        "{}",
        text(&error)
    );
    assert_eq!(read(&client, &image, &blob).await.unwrap(), blob);
    assert_eq!(registry.seen().len(), 2);
}

/// Logins and headers of one host, and the addresses that it names.
#[tokio::test]
async fn nothing_that_identifies_us_follows_to_another_host() {
    let blob = content(1000);
    let store = serving(&blob).await;
    let steps = store.host.clone();
    let digest = Digest::of(&blob);
    let last = format!("http://{steps}/{digest}?signed");
    // Several levels, on several hosts: each names the next.
    let middle = Scripted::start(move |_| answer(302, &[("location", &last)], "")).await;
    let next = format!("http://{}/next", middle.host);
    let mirror = Scripted::start(move |seen| match seen.authorization.as_deref() {
        None => answer(401, &[("www-authenticate", "Basic realm=\"x\"")], ""),
        Some(_) if seen.path == "/v2/again" => answer(307, &[("location", &next)], ""),
        Some(_) => answer(307, &[("location", "/v2/again")], ""),
    })
    .await;
    let certs = Certs::new();
    let toml = format!(
        "[host.'http://{0}']\n[host.'http://{0}'.header]\nx-extra = 'token'\n",
        mirror.host
    );
    certs.write("r.example", "hosts.toml", &toml);
    let credentials = Credentials::anonymous()
        .with_login("r.example", login("registry"))
        .with_login(mirror.host.as_str(), login("mirror"));
    let client = certs.client(credentials);
    let image = image("r.example/app:1");
    for _ in 0..3 {
        assert_eq!(read(&client, &image, &blob).await.unwrap(), blob);
    }
    // mirror:pw; the login for the registry is not for its mirror.
    let given: Vec<_> = mirror
        .seen()
        .into_iter()
        .filter_map(|seen| seen.authorization)
        .collect();
    assert_eq!(given, ["Basic bWlycm9yOnB3"; 2]);
    assert!(mirror.seen().iter().all(|seen| seen.extra.as_deref() == Some("token")));
    for server in [&middle, &store] {
        assert!(!server.seen().is_empty());
        assert!(
            server
                .seen()
                .iter()
                .all(|seen| seen.authorization.is_none() && seen.extra.is_none())
        );
    }
    assert_eq!(
        (middle.seen().len(), store.seen().len()),
        (1, 3),
        "the last address is used again"
    );
}

#[tokio::test]
async fn a_final_address_that_is_refused_is_found_anew() {
    for status in [401, 403, 404, 410, 400] {
        let blob = content(500);
        let content = blob.clone();
        let uses = Arc::new(AtomicUsize::new(0));
        // Each signature is good for one use.
        let store = Scripted::start(move |seen| {
            let n = uses.fetch_add(1, Ordering::SeqCst);
            if n == 1 {
                return answer(status, &[("www-authenticate", "Basic realm=\"x\"")], "expired");
            }
            serve_range(&content, seen.range.as_deref())
        })
        .await;
        let target = format!("http://{}/blob", store.host);
        let issued = Arc::new(AtomicUsize::new(0));
        let registry = Scripted::start(move |_| {
            let location = format!("{target}?{}", issued.fetch_add(1, Ordering::SeqCst));
            answer(307, &[("location", &location)], "")
        })
        .await;
        let client = common::client("x", None);
        for _ in 0..3 {
            assert_eq!(read(&client, &registry.image("app"), &blob).await.unwrap(), blob);
        }
        let asked: Vec<_> = store.seen().into_iter().map(|seen| seen.uri).collect();
        assert_eq!(asked, ["/blob?0", "/blob?0", "/blob?1", "/blob?1"], "{status}");
        assert_eq!(registry.seen().len(), 2);
    }
}

/// A proxy in front of both may want its headers with each request, whatever login that has.
#[tokio::test]
async fn headers_of_a_host_go_to_its_own_token_server() {
    let basic = "Basic bWlycm9yOnB3";
    for (login, given) in [
        (None, Some("Basic configured")),
        (Some(login("mirror")), Some(basic)),
        (Some(Login::IdentityToken("refresh".to_owned())), None),
    ] {
        let address = Arc::new(std::sync::OnceLock::<String>::new());
        let own = Arc::clone(&address);
        let host = Scripted::start(move |seen| {
            if seen.path == "/token" {
                return answer(200, &[], r#"{"token":"t","expires_in":300}"#);
            }
            if seen.authorization.as_deref() == Some("Bearer t") {
                return answer(200, &[], "");
            }
            let realm = format!(r#"Bearer realm="http://{}/token",service="s""#, own.get().unwrap());
            answer(401, &[("www-authenticate", &realm)], "")
        })
        .await;
        address.set(host.host.clone()).unwrap();
        let certs = Certs::new();
        let toml = format!(
            "server = 'http://{}'\n[header]\nx-extra = 'token'\nauthorization = 'Basic configured'\n",
            host.host
        );
        certs.write("_default", "hosts.toml", &toml);
        let credentials = Credentials::anonymous();
        let credentials = match login {
            Some(login) => credentials.with_login(host.host.as_str(), login),
            None => credentials,
        };
        let client = certs.client(credentials);
        assert!(client.blob_exists(&host.image("app"), &Digest::of("")).await.unwrap());
        let asked: Vec<_> = host.seen().into_iter().filter(|seen| seen.path == "/token").collect();
        assert_eq!(asked.len(), 1);
        assert_eq!(asked[0].extra.as_deref(), Some("token"));
        assert_eq!(asked[0].authorization.as_deref(), given);
    }
}

/// A bearer registry below a path, as a proxy project is: its challenge names the repository as it knows it.
#[tokio::test]
async fn a_token_is_for_the_repository_as_the_mirror_names_it() {
    let blob = content(100);
    let inside = blob.clone();
    let address = Arc::new(std::sync::OnceLock::<String>::new());
    let own = Arc::clone(&address);
    let mirror = Scripted::start(move |seen| {
        if seen.path == "/token" {
            return answer(200, &[], r#"{"token":"t","expires_in":300}"#);
        }
        if seen.authorization.as_deref() == Some("Bearer t") {
            return serve(seen, &inside);
        }
        let realm = format!(
            r#"Bearer realm="http://{}/token",service="s",scope="repository:remote/hub/team/app:pull""#,
            own.get().unwrap()
        );
        answer(401, &[("www-authenticate", &realm)], "")
    })
    .await;
    address.set(mirror.host.clone()).unwrap();
    let certs = Certs::new();
    let toml = format!("server = 'http://{}/api/hub'\noverride_path = true\n", mirror.host);
    certs.write("docker.io", "hosts.toml", &toml);
    let client = certs.client(Credentials::anonymous());
    assert_eq!(read(&client, &image("team/app"), &blob).await.unwrap(), blob);
    let asked: Vec<_> = mirror.seen().into_iter().map(|seen| seen.uri).collect();
    let path = format!("/api/hub/team/app/blobs/{}?ns=docker.io", Digest::of(&blob));
    assert_eq!(
        asked,
        [
            path.as_str(),
            "/token?service=s&scope=repository%3Aremote%2Fhub%2Fteam%2Fapp%3Apull",
            &path
        ]
    );
}

/// An authority and what it has issued, by `openssl`.
struct Authority(tempfile::TempDir);

impl Authority {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.openssl(&[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=authority",
            "-keyout",
            "ca.key",
            "-out",
            "ca.crt",
        ]);
        this
    }

    fn openssl(&self, arguments: &[&str]) {
        let made = Command::new("openssl")
            .args(arguments)
            .current_dir(self.0.path())
            .output()
            .unwrap();
        assert!(made.status.success(), "{made:?}");
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A certificate and its key: `name.crt`, `name.key`.
    fn issue(&self, name: &str, extensions: &str) {
        std::fs::write(self.path("extensions"), extensions).unwrap();
        let (key, request, crt) = (format!("{name}.key"), format!("{name}.csr"), format!("{name}.crt"));
        self.openssl(&[
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            &format!("/CN={name}"),
            "-keyout",
            &key,
            "-out",
            &request,
        ]);
        self.openssl(&[
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            "ca.crt",
            "-CAkey",
            "ca.key",
            "-days",
            "2",
            "-extfile",
            "extensions",
            "-out",
            &crt,
        ]);
    }
}

/// A docker-registry that speaks TLS, and wants a client certificate of the authority if `mutual`. Linux connects 0.0.0.0 to itself,
/// and that is no loopback address to the client.
fn tls_registry(authority: &Authority, mutual: bool) -> (Registry, String) {
    tls_registry_at(authority, Ipv4Addr::UNSPECIFIED, mutual)
}

/// One that is asked for at the address `name`.
fn tls_registry_at(authority: &Authority, name: Ipv4Addr, mutual: bool) -> (Registry, String) {
    authority.issue(
        "server",
        &format!("subjectAltName=IP:{name}\nbasicConstraints=critical,CA:FALSE\n"),
    );
    let shown = |name: &str| authority.path(name).display().to_string();
    let clients = if mutual {
        format!(", clientcas: [{}]", shown("ca.crt"))
    } else {
        String::new()
    };
    let http = format!(
        "  tls: {{certificate: {}, key: {}{clients}}}\n",
        shown("server.crt"),
        shown("server.key")
    );
    let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let listen = free.local_addr().unwrap();
    drop(free);
    let registry = Registry::start_at(tempfile::tempdir().unwrap(), listen, false, &http);
    (registry, format!("{name}:{}", listen.port()))
}

/// Whether the registry can be asked; it has nothing.
async fn reach(certs: &Certs, host: &str) -> Result<(), String> {
    let client = certs.client(Credentials::anonymous());
    let image = image(&format!("{host}/app"));
    match read(&client, &image, &content(1)).await {
        Err(error) if error.class() == ErrorClass::NotFound => Ok(()),
        Err(error) => Err(text(&error).to_lowercase()),
        Ok(_) => panic!("it has nothing"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_of_a_host_count_for_it() {
    let authority = Authority::new();
    authority.issue("client", "extendedKeyUsage=clientAuth\n");
    let (_registry, host) = tls_registry(&authority, true);
    let certs = Certs::new();
    let directory = host.replace(':', "_") + "_";
    let copy = |from: &str, to: &str| {
        certs.write(&directory, to, &std::fs::read_to_string(authority.path(from)).unwrap());
    };
    let refused = |said: Result<(), String>, word: &str| {
        let said = said.unwrap_err();
        assert!(said.contains(word), "{said}");
    };
    refused(reach(&certs, &host).await, "certificate");
    // As hosts.toml has it: text and list, relative to the file.
    copy("ca.crt", "own.pem");
    certs.write(&directory, "hosts.toml", "ca = 'own.pem'\n");
    refused(reach(&certs, &host).await, "connection");
    copy("client.crt", "client.cert");
    copy("client.key", "client.key");
    certs.write(
        &directory,
        "hosts.toml",
        "ca = ['own.pem']\nclient = [['client.cert', 'client.key']]\n",
    );
    reach(&certs, &host).await.unwrap();
    // Both in one file.
    let both = ["client.crt", "client.key"].map(|name| std::fs::read_to_string(authority.path(name)).unwrap());
    certs.write(&directory, "both.pem", &both.concat());
    let toml = format!("server = 'https://{host}'\nca = 'own.pem'\nclient = 'both.pem'\n");
    certs.write(&directory, "hosts.toml", &toml);
    reach(&certs, &host).await.unwrap();
    // As docker has it.
    std::fs::remove_file(certs.0.path().join(&directory).join("hosts.toml")).unwrap();
    refused(reach(&certs, &host).await, "connection");
    copy("ca.crt", "own.crt");
    reach(&certs, &host).await.unwrap();
}

/// Where the system's authorities are is a variable of the process, so the client is another one: this test again.
#[tokio::test(flavor = "multi_thread")]
async fn the_systems_authorities_count_on_loopback_too() {
    const HOST: &str = "HULLSPEED_TEST_TLS_HOST";
    if let Ok(host) = std::env::var(HOST) {
        let certs = Certs::new();
        certs.write(&host, "hosts.toml", &format!("server = 'https://{host}'\n"));
        return reach(&certs, &host).await.unwrap();
    }
    let authority = Authority::new();
    let (_registry, host) = tls_registry_at(&authority, Ipv4Addr::LOCALHOST, false);
    let again = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_systems_authorities_count_on_loopback_too"])
        .env(HOST, host)
        .env("SSL_CERT_FILE", authority.path("ca.crt"))
        .output()
        .unwrap();
    assert!(again.status.success(), "{again:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn skipping_the_check_is_for_one_host() {
    let authority = Authority::new();
    let (_registry, host) = tls_registry(&authority, false);
    let certs = Certs::new();
    assert!(reach(&certs, &host).await.unwrap_err().contains("certificate"));
    certs.write(
        &host,
        "hosts.toml",
        "skip_verify = true\n[host.'https://mirror.invalid']\ndial_timeout = '200ms'\n",
    );
    reach(&certs, &host).await.unwrap();
    certs.write(
        &host,
        "hosts.toml",
        "[host.'https://mirror.invalid']\nskip_verify = true\n",
    );
    assert!(reach(&certs, &host).await.unwrap_err().contains("certificate"));
}

#[tokio::test]
async fn without_a_directory_everything_is_as_it_was() {
    let blob = content(100);
    let registry = serving(&blob).await;
    let client = Client::new(ClientOptions {
        hosts_directory: Some(Path::new("/nonexistent/certs.d").to_owned()),
        ..ClientOptions::default()
    })
    .unwrap();
    assert_eq!(read(&client, &registry.image("a"), &blob).await.unwrap(), blob);
    assert_eq!(registry.seen()[0].uri, format!("/v2/a/blobs/{}", Digest::of(&blob)));
    assert_eq!(client.hosts(&registry.image("a")).unwrap().len(), 1);
}
