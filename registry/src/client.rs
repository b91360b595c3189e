//! The client: its options, the hosts that it asks, and shared state.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use url::Url;

use crate::auth::Tokens;
use crate::credentials::Credentials;
use crate::digest::Digest;
use crate::endpoint::{Endpoint, Parts, Pools, authority, host_name, is_loopback};
use crate::error::{Error, Fault};
use crate::hosts::{Endpoints, HostEntry, Hosts};
use crate::limits::{CONNECT_TIMEOUT, IDLE_TIMEOUT};
use crate::range::{RangeResponse, RangeSpec};
use crate::reference::Reference;
use crate::retry::RetryPolicy;
use crate::tls::Trust;
use crate::turns::Avoided;
use crate::urls::Urls;

/// How to talk to registries.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// Registries that speak http, as `host` (any port) or `host:port`. Loopback addresses always do, as in containerd.
    pub plain_http: Vec<String>,
    /// Where logins come from.
    pub credentials: Credentials,
    /// containerd's `certs.d`, which says how each registry is reached and which mirrors it has; it need not exist.
    pub hosts_directory: Option<PathBuf>,
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
            hosts_directory: None,
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
    /// What is trusted everywhere.
    trust: Trust,
    /// The connections to hosts that want nothing of their own.
    pools: Arc<Pools>,
    hosts: Hosts,
    avoided: Avoided,
    options: ClientOptions,
    tokens: Tokens,
    urls: Urls,
}

/// One host that may serve the blobs of an image, in the order of [`Client::hosts`].
///
/// It is looked up for each request, so that a change of its certificates or headers counts at once.
#[derive(Debug, Clone)]
pub struct HostHandle {
    client: Client,
    image: Arc<Reference>,
    name: String,
    key: String,
}

impl HostHandle {
    /// The host, as `hosts.toml` or the image names it.
    pub fn host(&self) -> &str {
        &self.name
    }

    /// Tells hosts apart that have one name: by scheme, by path, and by the registry that is meant.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// Asks this host for a part of a blob, once, and no other as long as the image may be asked for there: whoever has several hosts
    /// decides which one is asked next, and counts those that fail. If `hosts.toml` lists it no longer, those
    /// that it lists are asked in its place. See [`Client::blob_range`].
    pub async fn blob_range(&self, digest: &Digest, range: RangeSpec) -> Result<RangeResponse, Error> {
        let endpoints = self.client.endpoints(&self.image)?;
        let is_own = |endpoint: &&Arc<Endpoint>| endpoint.key() == self.key && endpoint.capabilities.pull;
        let Some(endpoint) = endpoints.iter().find(is_own) else {
            return self.client.blob_range(&self.image, digest, range).await;
        };
        self.client.range_at(endpoint, &self.image, digest, range, 1).await
    }

    /// Forgets to where this host sent for a blob: what came from there was wrong.
    pub fn forget_address(&self, digest: &Digest) {
        self.client.forget_address(&self.key, &self.image, digest);
    }
}

impl Client {
    /// A client with its own pools and caches.
    pub fn new(options: ClientOptions) -> Result<Self, Error> {
        let setup = |fault: Fault| fault.at("this machine", "set-up of the registry client");
        let mut trust = Trust::default();
        if let Some(path) = &options.ca_file {
            trust = trust.with_authorities(path).map_err(setup)?;
        }
        let shared = Shared {
            pools: Arc::new(Pools::new(trust.clone(), options.connect_timeout)),
            trust,
            hosts: Hosts::new(options.hosts_directory.clone()),
            avoided: Avoided::default(),
            options,
            tokens: Tokens::default(),
            urls: Urls::default(),
        };
        Ok(Self {
            shared: Arc::new(shared),
        })
    }

    /// The hosts that may serve blobs of `image`, in the order in which they are to be asked.
    pub fn hosts(&self, image: &Reference) -> Result<Vec<HostHandle>, Error> {
        let endpoints = self.endpoints(image)?;
        let image = Arc::new(image.clone());
        let able = endpoints.iter().filter(|endpoint| endpoint.capabilities.pull);
        let handle = |endpoint: &Arc<Endpoint>| HostHandle {
            client: self.clone(),
            image: Arc::clone(&image),
            name: endpoint.name.clone(),
            key: endpoint.key().to_owned(),
        };
        Ok(able.map(handle).collect())
    }

    /// A number that is another one whenever [`Self::hosts`] of some image that was asked for may have become others. Looks at the
    /// files of all these registries, each at most once a second; blocks.
    pub fn hosts_version(&self) -> u64 {
        for registry in self.shared.hosts.registries() {
            // An address that is none has no hosts.
            if let Ok(own) = self.own_api(&registry) {
                self.hosts_of(&registry, &own);
            }
        }
        self.shared.hosts.changes()
    }

    fn hosts_of(&self, registry: &str, own: &Url) -> Endpoints {
        self.shared
            .hosts
            .of(registry, |entry| self.make_endpoint(registry, own, entry))
    }

    /// All hosts for an image.
    pub(crate) fn endpoints(&self, image: &Reference) -> Result<Endpoints, Error> {
        let registry = image.host();
        let own = self.own_api(registry)?;
        Ok(self.hosts_of(registry, &own))
    }

    /// The host for what is stored.
    pub(crate) fn endpoint(&self, image: &Reference) -> Result<Arc<Endpoint>, Error> {
        let endpoints = self.endpoints(image)?;
        let able = endpoints.iter().find(|endpoint| endpoint.capabilities.push);
        let none = || Fault::NoHost("no host of hosts.toml may store").at(image.host(), "look-up");
        able.cloned().ok_or_else(none)
    }

    /// The API's root of a registry that no file says anything about.
    fn own_api(&self, registry: &str) -> Result<Url, Error> {
        let host = if registry == "docker.io" {
            "registry-1.docker.io"
        } else {
            registry
        };
        let scheme = if self.is_plain(registry) { "http" } else { "https" };
        let bad = || Fault::Setup(format!("{host:?} is no address")).at(registry, "look-up");
        Url::parse(&format!("{scheme}://{host}/v2/")).map_err(|_| bad())
    }

    fn make_endpoint(&self, registry: &str, own: &Url, entry: HostEntry) -> Endpoint {
        let HostEntry {
            api,
            capabilities,
            tls,
            headers,
            dial_timeout,
        } = entry;
        let api = api.unwrap_or_else(|| own.clone());
        let ports = || api.port_or_known_default() == own.port_or_known_default();
        let is_registry = authority(&api) == authority(own) || (api.host() == own.host() && ports());
        let name = match authority(&api) {
            _ if is_registry => registry.to_owned(),
            name if name == "registry-1.docker.io" => "docker.io".to_owned(),
            name => name,
        };
        let pools = if tls.is_empty() && dial_timeout.is_none() {
            Ok(Arc::clone(&self.shared.pools))
        } else {
            let timeout = dial_timeout.unwrap_or(self.shared.options.connect_timeout);
            let trust = self.shared.trust.clone().with_files(&tls);
            trust
                .map(|trust| Arc::new(Pools::new(trust, timeout)))
                .map_err(Fault::into_text)
        };
        Endpoint::new(Parts {
            name,
            api,
            namespace: (!is_registry).then(|| registry.to_owned()),
            capabilities,
            headers,
            pools,
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

    pub(crate) fn avoided(&self) -> &Avoided {
        &self.shared.avoided
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::limits::MAX_CA_FILE_BYTES;

    fn chain(error: &dyn std::error::Error) -> String {
        let causes = std::iter::successors(error.source(), |error| error.source());
        causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
    }

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
