//! A reverse proxy in user space in front of the registry: the wide-area link of the experiments.
//!
//! It delays each request, caps the bandwidth of all connections together, counts requests and bytes, keeps a log of the
//! requests and, when told, answers wrongly. The kernels of the development machines lack netem, hence a proxy.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse as _, Response};
use http::{HeaderValue, StatusCode, Uri, header};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub mod fault;
pub mod link;
pub mod record;

use fault::{Fault, FaultRule};
use link::{Link, LinkListener};
use record::{Log, RequestRecord, Totals};

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
}

struct Shared {
    upstream: SocketAddr,
    delay: Duration,
    client: Client<HttpConnector, Body>,
    log: Log,
    link: Arc<Link>,
    rules: Mutex<Vec<FaultRule>>,
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
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .context("no port for the proxy")?;
        let address = listener.local_addr()?;
        let link = Arc::new(Link::new(options.bytes_per_second));
        let client = Client::builder(TokioExecutor::new()).build_http();
        let (log, rules) = (Log::default(), Mutex::default());
        let shared = Arc::new(Shared {
            upstream,
            delay: options.delay,
            client,
            log,
            link: Arc::clone(&link),
            rules,
        });
        let router = Router::new().fallback(forward).with_state(Arc::clone(&shared));
        let server = tokio::spawn(async move {
            // Ends only when it is aborted.
            let _ = axum::serve(LinkListener::new(listener, link), router).await;
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

    /// Adds a rule; the first one that matches a request applies.
    pub fn inject(&self, rule: FaultRule) {
        self.rules().push(rule);
    }

    /// Forgets all rules.
    pub fn heal(&self) {
        self.rules().clear();
        self.set_dead(false);
    }

    /// A dead link resets every connection, those that exist included.
    pub fn set_dead(&self, dead: bool) {
        self.shared.link.set_dead(dead);
    }

    fn rules(&self) -> std::sync::MutexGuard<'_, Vec<FaultRule>> {
        self.shared.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.link.set_dead(true);
        self.server.abort();
    }
}

async fn forward(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let entry = shared.log.begin(&request);
    let fault = {
        let mut rules = shared.rules.lock().unwrap_or_else(PoisonError::into_inner);
        fault::pick(
            &mut rules,
            request.method(),
            request.uri().path(),
            request.headers().contains_key(header::RANGE),
        )
    };
    tokio::time::sleep(shared.delay).await;
    let response = match &fault {
        Some(Fault::Status(code)) => status_only(*code),
        Some(Fault::Slow(delay)) => {
            tokio::time::sleep(*delay).await;
            upstream(&shared, request, &fault).await
        }
        _ => upstream(&shared, request, &fault).await,
    };
    entry.answered(response.status());
    let start = fault::range_start(response.headers());
    response.map(|body| fault::apply(entry.count(body), fault, start))
}

async fn upstream(shared: &Shared, mut request: Request, fault: &Option<Fault>) -> Response {
    let path = request.uri().path_and_query().map_or("/", |path| path.as_str());
    match format!("http://{}{path}", shared.upstream).parse::<Uri>() {
        Ok(uri) => *request.uri_mut() = uri,
        Err(error) => return (StatusCode::BAD_REQUEST, error.to_string()).into_response(),
    }
    if matches!(fault, Some(Fault::IgnoreRange)) {
        request.headers_mut().remove(header::RANGE);
    }
    match shared.client.request(request).await {
        Ok(response) => response.map(Body::new),
        Err(error) => (StatusCode::BAD_GATEWAY, error.to_string()).into_response(),
    }
}

fn status_only(code: u16) -> Response {
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, format!("injected fault: {status}\n")).into_response();
    if status == StatusCode::UNAUTHORIZED {
        // A 401 without a challenge is no HTTP.
        response.headers_mut().insert(
            header::WWW_AUTHENTICATE,
            HeaderValue::from_static("Basic realm=\"injected\""),
        );
    }
    response
}
