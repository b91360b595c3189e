//! The client: its options, connection pools and shared state.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use reqwest::Certificate;
use url::Url;

use crate::auth::Tokens;
use crate::credentials::Credentials;
use crate::error::{Error, Fault};
use crate::exchange::Endpoint;
use crate::limits::{CONNECT_TIMEOUT, IDLE_TIMEOUT, MAX_CA_FILE_BYTES};
use crate::reference::Reference;
use crate::retry::RetryPolicy;
use crate::urls::Urls;

/// How to talk to registries.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Registries that speak http, as `host` (any port) or `host:port`. Loopback addresses always do, as in containerd.
    pub plain_http: Vec<String>,
    /// Where logins come from.
    pub credentials: Credentials,
    /// PEM file of certificate authorities that are trusted besides the platform's.
    pub ca_file: Option<PathBuf>,
    /// Time to open a connection, TLS included.
    pub connect_timeout: Duration,
    /// Time without a byte after which a transfer counts as stalled.
    pub idle_timeout: Duration,
    /// Retries of transient failures.
    pub retry: RetryPolicy,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            plain_http: Vec::new(),
            credentials: Credentials::anonymous(),
            ca_file: None,
            connect_timeout: CONNECT_TIMEOUT,
            idle_timeout: IDLE_TIMEOUT,
            retry: RetryPolicy::default(),
        }
    }
}

/// A client of OCI registries. Clones share connections, tokens and final addresses.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    /// For loopback: no proxy, and no need for certificates, which a minimal machine lacks.
    direct: reqwest::Client,
    /// For the rest of the world; a failure to set it up matters only when it is needed.
    world: Result<reqwest::Client, String>,
    options: ClientOptions,
    tokens: Tokens,
    urls: Urls,
}

impl Client {
    /// A client with its own pools and caches.
    pub fn new(options: ClientOptions) -> Result<Self, Error> {
        let setup = |fault: Fault| fault.at("this machine", "set-up of the registry client");
        // Fails only if one is installed already, which then serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let authorities = match &options.ca_file {
            Some(path) => authorities(path).map_err(setup)?,
            None => Vec::new(),
        };
        let builder = || {
            reqwest::Client::builder()
                .user_agent(concat!("hullspeed/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .connect_timeout(options.connect_timeout)
                .tcp_nodelay(true)
        };
        let direct = builder().no_proxy().tls_certs_only(authorities.clone()).build();
        let direct = direct.map_err(|error| setup(unusable(options.ca_file.as_deref(), &error)))?;
        let world = builder()
            .tls_certs_merge(authorities)
            .build()
            .map_err(|error| chain(&error));
        let shared = Shared {
            direct,
            world,
            options,
            tokens: Tokens::default(),
            urls: Urls::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    pub(crate) fn endpoint(&self, image: &Reference) -> Result<Endpoint, Error> {
        let name = image.host();
        let host = if name == "docker.io" {
            "registry-1.docker.io"
        } else {
            name
        };
        let scheme = if self.is_plain(name) { "http" } else { "https" };
        let bad = || Fault::Setup(format!("{host:?} is no address")).at(name, "look-up");
        let origin = Url::parse(&format!("{scheme}://{host}/")).map_err(|_| bad())?;
        Ok(Endpoint {
            name: name.to_owned(),
            origin,
        })
    }

    /// Whether `host[:port]` is spoken to without TLS.
    pub(crate) fn is_plain(&self, host: &str) -> bool {
        let name = host_name(host);
        is_loopback(name)
            || self
                .shared
                .options
                .plain_http
                .iter()
                .any(|plain| plain == host || plain == name)
    }

    /// The connection pool for `url`.
    pub(crate) fn http(&self, url: &Url) -> Result<&reqwest::Client, Fault> {
        if url.host_str().is_some_and(|host| is_loopback(host_name(host))) {
            return Ok(&self.shared.direct);
        }
        self.shared
            .world
            .as_ref()
            .map_err(|reason| Fault::Setup(format!("{reason}; is ca-certificates installed?")))
    }

    pub(crate) fn credentials(&self) -> &Credentials {
        &self.shared.options.credentials
    }

    pub(crate) fn retry(&self) -> &RetryPolicy {
        &self.shared.options.retry
    }

    pub(crate) fn idle(&self) -> Duration {
        self.shared.options.idle_timeout
    }

    /// Longest wait for the head of an answer, which may need a new connection first.
    pub(crate) fn head_wait(&self) -> Duration {
        self.shared.options.connect_timeout + self.shared.options.idle_timeout
    }

    pub(crate) fn tokens(&self) -> &Tokens {
        &self.shared.tokens
    }

    pub(crate) fn urls(&self) -> &Urls {
        &self.shared.urls
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

/// Checks that `path` can be [`ClientOptions::ca_file`], so that a wrong one is found before a registry is needed.
pub fn check_ca_file(path: &Path) -> Result<(), Error> {
    let options = ClientOptions {
        ca_file: Some(path.to_owned()),
        ..ClientOptions::default()
    };
    Client::new(options).map(drop)
}

/// A set-up that failed; certificates of the user's file are the one thing in it that can be wrong.
fn unusable(ca_file: Option<&Path>, error: &reqwest::Error) -> Fault {
    let reason = chain(error);
    Fault::Setup(match ca_file {
        Some(path) => format!("{} cannot be used: {reason}", path.display()),
        None => reason,
    })
}

fn authorities(path: &Path) -> Result<Vec<Certificate>, Fault> {
    let shown = path.display().to_string();
    let pem = read_bounded(path).map_err(|source| Fault::File {
        path: shown.clone(),
        source,
    })?;
    let found = Certificate::from_pem_bundle(&pem).map_err(|_| Fault::Setup(format!("{shown} is not a PEM file")))?;
    if found.is_empty() {
        Err(Fault::Setup(format!("{shown} holds no certificate")))
    } else {
        Ok(found)
    }
}

/// Reads a regular file of at most [`MAX_CA_FILE_BYTES`]; a pipe or a device could last for ever.
fn read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut bytes = Vec::new();
    let read = File::open(path)?.take(MAX_CA_FILE_BYTES + 1).read_to_end(&mut bytes)?;
    if read as u64 > MAX_CA_FILE_BYTES {
        let why = format!("more than {MAX_CA_FILE_BYTES} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, why));
    }
    Ok(bytes)
}

fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

fn host_name(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

fn is_loopback(name: &str) -> bool {
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name.eq_ignore_ascii_case("localhost") || address.is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_loopback_and_named_hosts_only() {
        let plain_http = vec!["reg.lan".to_owned(), "other.lan:5000".to_owned()];
        let client = Client::new(ClientOptions {
            plain_http,
            ..ClientOptions::default()
        })
        .unwrap();
        for (image, url) in [
            ("localhost:5000/x", "http://localhost:5000/"),
            ("127.8.9.1/x", "http://127.8.9.1/"),
            ("[::1]:5000/x", "http://[::1]:5000/"),
            ("reg.lan:77/x", "http://reg.lan:77/"),
            ("other.lan:5000/x", "http://other.lan:5000/"),
            ("other.lan:5001/x", "https://other.lan:5001/"),
            ("localhost.example.com/x", "https://localhost.example.com/"),
            ("[2001:db8::1]/x", "https://[2001:db8::1]/"),
            ("ubuntu", "https://registry-1.docker.io/"),
        ] {
            let endpoint = client.endpoint(&Reference::parse(image).unwrap()).unwrap();
            assert_eq!(endpoint.origin.as_str(), url, "{image}");
        }
    }

    #[test]
    fn a_bad_authority_file_is_named() {
        let place = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = place.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let long = file("long", "");
        let sparse = File::options().write(true).open(&long).unwrap();
        sparse.set_len(MAX_CA_FILE_BYTES + 1).unwrap();
        let pem = |body: &str| format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n");
        for (path, word) in [
            (PathBuf::from("/nonexistent/ca.pem"), "No such file"),
            (PathBuf::from("/dev/zero"), "not a regular file"),
            (place.path().to_owned(), "not a regular file"),
            (long, "more than"),
            (file("empty", ""), "no certificate"),
            (file("text", "not PEM\n"), "no certificate"),
            (file("base64", &pem("!!!!")), "not a PEM file"),
            (file("der", &pem("AAAA")), "cannot be used"),
        ] {
            let error = check_ca_file(&path).unwrap_err();
            let text = chain(&error);
            assert!(text.contains(path.to_str().unwrap()) && text.contains(word), "{text}");
            assert_eq!(error.class(), crate::ErrorClass::Local);
        }
    }
}
