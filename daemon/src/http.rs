//! `/metrics` and `/healthz` over HTTP, for Prometheus and probes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::MetricsConfig;

/// Media type of the text format of OpenMetrics.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

#[derive(Clone)]
struct Shared {
    registry: Arc<Registry>,
    stopping: CancellationToken,
}

/// The address that the configuration asks for cannot be bound.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on metrics.address = \"{address}\"; choose another address, or \"\" for none")]
pub struct BindError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

/// A bound address that is not served yet.
#[derive(Debug)]
pub struct Endpoint {
    listener: TcpListener,
}

impl Endpoint {
    /// Binds the address, if there is one. A default one that is taken is done without.
    pub async fn bind(config: &MetricsConfig) -> Result<Option<Self>, BindError> {
        let Some(address) = config.address else {
            return Ok(None);
        };
        match TcpListener::bind(address).await {
            Ok(listener) => {
                let bound = listener.local_addr().unwrap_or(address);
                tracing::info!(address = %bound, "metrics are at /metrics");
                Ok(Some(Self { listener }))
            }
            Err(source) if config.explicit => Err(BindError { address, source }),
            Err(error) => {
                tracing::warn!(%address, %error, "no metrics: the default address cannot be bound; set metrics.address");
                Ok(None)
            }
        }
    }

    /// The address with the port that it got.
    pub fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Answers until `stopped`; `/healthz` is 503 from `stopping` on.
    pub async fn serve(self, registry: Arc<Registry>, stopping: CancellationToken, stopped: CancellationToken) {
        let app = Router::new()
            .route("/metrics", get(metrics))
            .route("/healthz", get(healthz))
            .with_state(Shared { registry, stopping });
        let served = axum::serve(self.listener, app)
            .with_graceful_shutdown(stopped.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "the metrics endpoint failed");
        }
    }
}

async fn metrics(State(shared): State<Shared>) -> Response {
    let mut text = String::new();
    match encode(&mut text, &shared.registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPENMETRICS)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

async fn healthz(State(shared): State<Shared>) -> (StatusCode, &'static str) {
    if shared.stopping.is_cancelled() {
        (StatusCode::SERVICE_UNAVAILABLE, "stopping\n")
    } else {
        (StatusCode::OK, "ok\n")
    }
}
