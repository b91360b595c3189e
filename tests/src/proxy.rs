//! A reverse proxy in user space in front of the registry: the wide-area link of the experiments, and everything that a
//! registry can do to its clients.
//!
//! It delays each request, paces the bytes of all connections together, counts requests and bytes and keeps a log of the
//! requests. When told, it answers wrongly ([`fault`]), wants tokens that expire ([`tokens`]), sends clients on to signed
//! addresses at another host ([`signed`]), or dies ([`Carrier`]). Several in front of one registry are its mirrors. The
//! kernels of the development machines lack netem, hence a proxy.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request, State};
use axum::response::{IntoResponse as _, Response};
use http::{StatusCode, Uri, header};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub mod fault;
mod link;
pub mod record;
pub mod signed;
pub mod tokens;

use fault::{Fault, FaultRule};
pub use link::Carrier;
use link::{Abort, Link, LinkListener};
use record::{Entry, Log, RequestRecord, Totals};
use signed::{Redirects, Signer};
use tokens::{TOKEN_PATH, TokenServer};

/// Another program may take a free port between our look and our bind.
const PORT_TRIES: u32 = 5;

/// Answers under way from the registry that a connection to it is kept for afterwards.
const IDLE_UPSTREAM: usize = 64;

/// What the link is like.
#[derive(Debug, Clone, Copy, Default)]
pub struct LinkOptions {
    /// Added to each request before it is forwarded.
    pub delay: Duration,
    /// Bytes per second towards the client, all connections together; `None` for no cap.
    pub bytes_per_second: Option<u64>,
}

impl LinkOptions {
    /// The demo's link: 20 ms per request, 200 Mbit/s.
    pub const WIDE_AREA: Self = Self {
        delay: Duration::from_millis(20),
        bytes_per_second: Some(200_000_000 / 8),
    };

    /// The link that figures of the fetch engine are measured on: 20 ms per request, 1 Gbit/s.
    pub const GIGABIT: Self = Self {
        delay: Duration::from_millis(20),
        bytes_per_second: Some(1_000_000_000 / 8),
    };
}

/// How the proxy treats requests; changed while it runs.
#[derive(Default)]
struct Manners {
    rules: Vec<FaultRule>,
    tokens: Option<Arc<TokenServer>>,
    redirects: Option<Redirects>,
    signer: Option<Arc<Signer>>,
}

struct Shared {
    address: SocketAddr,
    upstream: SocketAddr,
    delay: Duration,
    client: Client<HttpConnector, Body>,
    log: Log,
    link: Arc<Link>,
    manners: Mutex<Manners>,
}

/// A running proxy. Dropping it closes the listener.
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

impl Proxy {
    /// Starts a proxy on a free loopback port in front of `upstream`.
    pub async fn start(upstream: SocketAddr, options: LinkOptions) -> Result<Self> {
        let listener = listen().await?;
        let address = listener.local_addr()?;
        let link = Arc::new(Link::new(options.bytes_per_second));
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(IDLE_UPSTREAM)
            .build(connector);
        let shared = Arc::new(Shared {
            address,
            upstream,
            delay: options.delay,
            client,
            log: Log::default(),
            link: Arc::clone(&link),
            manners: Mutex::default(),
        });
        let router = Router::new().fallback(forward).with_state(Arc::clone(&shared));
        let listener = LinkListener::new(listener, link)?;
        let server = tokio::spawn(async move {
            let service = router.into_make_service_with_connect_info::<Abort>();
            // Ends only when it is aborted.
            let _ = axum::serve(listener, service).await;
        });
        Ok(Self {
            address,
            shared,
            server,
        })
    }

    /// Where clients connect; the host part of image references.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Requests and bytes since the last [`Self::reset`].
    #[must_use]
    pub fn totals(&self) -> Totals {
        let link = self.shared.link.bytes();
        Totals {
            requests: self.shared.log.count(),
            bytes_down: link.0,
            bytes_up: link.1,
        }
    }

    /// The requests since the last [`Self::reset`], oldest first.
    #[must_use]
    pub fn requests(&self) -> Vec<RequestRecord> {
        self.shared.log.records()
    }

    /// Starts counting anew.
    pub fn reset(&self) {
        self.shared.log.reset();
        self.shared.link.reset();
    }

    /// Adds a rule; the first one that matches a request and does not let it pass applies.
    pub fn inject(&self, rule: FaultRule) {
        self.manners().rules.push(rule);
    }

    /// From now on every request needs a bearer token of the token server that the challenge names; tokens are good for
    /// `lifetime`.
    pub fn require_tokens(&self, lifetime: Duration) {
        self.manners().tokens = Some(Arc::new(TokenServer::new(lifetime)));
    }

    /// No token is good any more that was issued until now.
    pub fn revoke_tokens(&self) {
        if let Some(tokens) = &self.manners().tokens {
            tokens.revoke();
        }
    }

    /// From now on blobs are elsewhere.
    pub fn redirect_blobs(&self, redirects: Redirects) {
        self.manners().redirects = Some(redirects);
    }

    /// From now on only addresses that `signer` has signed are answered, and they without credentials.
    pub fn require_signature(&self, signer: Arc<Signer>) {
        self.manners().signer = Some(signer);
    }

    /// Forgets all rules; tokens, redirects and signatures stay.
    pub fn heal(&self) {
        self.manners().rules.clear();
        self.set_carrier(Carrier::Up);
    }

    /// A dead link resets every connection, those that exist included.
    pub fn set_dead(&self, dead: bool) {
        self.set_carrier(if dead { Carrier::Resetting } else { Carrier::Up });
    }

    /// What becomes of connections from now on.
    pub fn set_carrier(&self, carrier: Carrier) {
        self.shared.link.set_carrier(carrier);
    }

    fn manners(&self) -> std::sync::MutexGuard<'_, Manners> {
        self.shared.manners()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.set_dead(true);
        self.server.abort();
    }
}

/// A listener on a port that outgoing connections do not get: one of those could take it while the link refuses
/// connections.
async fn listen() -> Result<TcpListener> {
    let mut tries = 0;
    loop {
        let port = crate::registry::free_port()?;
        match TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await {
            Err(_) if tries < PORT_TRIES => tries += 1,
            bound => return bound.context("no port for the proxy"),
        }
    }
}

/// What is to be done with a request.
struct Verdict {
    fault: Option<Fault>,
    answer: Option<Response>,
}

impl Shared {
    fn manners(&self) -> std::sync::MutexGuard<'_, Manners> {
        self.manners.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies the rules in force when the request arrived.
    fn judge(&self, request: &Request) -> Verdict {
        let (path, headers) = (request.uri().path(), request.headers());
        let mut manners = self.manners();
        let fault = fault::pick(&mut manners.rules, request.method(), path, headers);
        let by_rule = || fault.as_ref().and_then(Fault::answer);
        let by_tokens = || {
            let tokens = manners.tokens.as_ref()?;
            if path == TOKEN_PATH {
                return Some(tokens.issue());
            }
            tokens.refuse(headers, self.address)
        };
        let by_signer = || signed::refuse(manners.signer.as_ref()?, request.uri(), headers, self.address);
        let by_redirects = || manners.redirects.as_ref()?.answer(request.method(), path);
        let answer = by_rule().or_else(by_tokens).or_else(by_signer).or_else(by_redirects);
        Verdict { fault, answer }
    }
}

async fn forward(State(shared): State<Arc<Shared>>, abort: ConnectInfo<Abort>, request: Request) -> Response {
    let entry = shared.log.begin(&request);
    let Verdict { fault, answer } = shared.judge(&request);
    if fault.is_some() {
        entry.faulted();
    }
    tokio::time::sleep(shared.delay).await;
    match &fault {
        Some(Fault::Slow(delay)) => tokio::time::sleep(*delay).await,
        Some(Fault::Silent) => std::future::pending().await,
        Some(Fault::Reset) => abort.0.reset(),
        _ => {}
    }
    let response = match answer {
        Some(answer) => answer,
        None => upstream(&shared, request, fault.as_ref()).await,
    };
    deliver(entry, fault, response)
}

/// The answer as the client gets it, its bytes counted.
fn deliver(entry: Entry, fault: Option<Fault>, response: Response) -> Response {
    let start = record::range_start(response.headers());
    entry.answered(response.status(), start);
    let response = match fault {
        Some(fault) => fault.apply(response, start),
        None => response,
    };
    response.map(|body| entry.count(body))
}

async fn upstream(shared: &Shared, mut request: Request, fault: Option<&Fault>) -> Response {
    // What a signed address has besides is nothing to the registry.
    let path = match shared.manners().signer {
        Some(_) => request.uri().path().to_owned(),
        None => request
            .uri()
            .path_and_query()
            .map_or_else(|| "/".to_owned(), ToString::to_string),
    };
    match format!("http://{}{path}", shared.upstream).parse::<Uri>() {
        Ok(uri) => *request.uri_mut() = uri,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
    if fault.is_some_and(|fault| fault.drops_range(request.headers())) {
        request.headers_mut().remove(header::RANGE);
    }
    match shared.client.request(request).await {
        Ok(response) => response.map(Body::new),
        Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    }
}
