//! The daemon's own API, on its own socket: a translation to the pool, the ledger and the counters.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::stream::BoxStream;
use hullspeed_daemon::socket::Socket;
use hullspeed_proto::hullspeed::prewarm::v1 as api;
use hullspeed_proto::hullspeed::prewarm::v1::prewarm_control_server::{PrewarmControl, PrewarmControlServer};
use tokio::time::MissedTickBehavior;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::adopt::Adopter;
use crate::config::Config;
use crate::ledger::Ledger;
use crate::pool::Pool;
use crate::requests::Requests;
use crate::warm::WarmAgent;

mod view;

/// Calls of one connection under way at once.
const MAX_CALLS: usize = 16;

/// Largest request; all are small.
const MAX_REQUEST_BYTES: usize = 64 << 10;

/// Time between two messages of progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(500);

/// How long a drain waits for records to be rewritten once no hull is left: containerd may be away.
const RECORDS_LIMIT: Duration = Duration::from_secs(120);

/// What the API shows and works on.
#[derive(Clone)]
pub struct Control {
    /// The configuration.
    pub config: Arc<Config>,
    /// The pool.
    pub pool: Pool,
    /// Whose records are still to be rewritten.
    pub adopter: Adopter,
    /// Who is what.
    pub ledger: Ledger,
    /// What became of requests.
    pub requests: Requests,
    /// Image warming, where it is on.
    pub warm: Option<WarmAgent>,
}

impl Control {
    /// Answers until `stopping`, and a little longer those who wait for an answer.
    pub async fn serve(self, mut socket: Socket, stopping: CancellationToken) {
        let incoming = UnixListenerStream::new(socket.take_listener());
        let service = PrewarmControlServer::new(self).max_decoding_message_size(MAX_REQUEST_BYTES);
        let served = tonic::transport::Server::builder()
            .concurrency_limit_per_connection(MAX_CALLS)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, stopping.cancelled_owned());
        if let Err(error) = served.await {
            tracing::error!(%error, "the control API failed");
        }
    }

    fn status(&self) -> api::StatusResponse {
        let facts = self.pool.facts().borrow().clone();
        let count = |(result, reason, count): (&str, &str, u64)| api::RequestCount {
            result: result.to_owned(),
            reason: reason.to_owned(),
            count,
        };
        api::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            containerd_version: facts.map(|facts| facts.version.clone()).unwrap_or_default(),
            socket: self.config.socket.display().to_string(),
            containerd_socket: self.config.containerd.address.display().to_string(),
            pool: Some(view::pool(self.pool.snapshot())),
            adopted: self.ledger.adoptions().len() as u64,
            requests: self.requests.counts().into_iter().map(count).collect(),
            warm: self.warm.as_ref().map(|agent| view::warm(agent.status())),
            unbranded: Some(view::unbranded(self.adopter.unbranded())),
        }
    }

    /// Until no hull is left, and records are rewritten or have taken too long.
    async fn drained(&self, records_limit: Duration) {
        self.pool.drain().await;
        self.branded(records_limit).await;
    }

    /// Until records are rewritten, or have taken too long.
    async fn branded(&self, records_limit: Duration) {
        let branded = async {
            while !self.adopter.unbranded().pending.is_empty() {
                tokio::time::sleep(PROGRESS_INTERVAL).await;
            }
        };
        if tokio::time::timeout(records_limit, branded).await.is_err() {
            tracing::warn!(waited = ?records_limit, "drained, but pods' records in containerd are not rewritten yet");
        }
    }

    fn progress(&self, done: bool) -> api::DrainProgress {
        let pool = self.pool.snapshot();
        let left = if done { 0 } else { view::left(&pool) };
        let waiting = pool.off.filter(|_| !done && left == 0).map(|off| off.detail);
        api::DrainProgress {
            left,
            done,
            unbranded: Some(view::unbranded(self.adopter.unbranded())),
            waiting: waiting.unwrap_or_default(),
        }
    }
}

#[async_trait]
impl PrewarmControl for Control {
    async fn status(&self, _request: Request<api::StatusRequest>) -> Result<Response<api::StatusResponse>, Status> {
        Ok(Response::new(self.status()))
    }

    async fn pool(&self, request: Request<api::PoolRequest>) -> Result<Response<api::PoolResponse>, Status> {
        let action = request.get_ref().action;
        let action = api::PoolAction::try_from(action)
            .map_err(|_| Status::invalid_argument(format!("there is no pool action {action}")))?;
        match action {
            api::PoolAction::Unspecified => {}
            api::PoolAction::Flush => self.pool.flush("operator"),
            api::PoolAction::Pause => self.pool.pause(),
            api::PoolAction::Resume => self.pool.resume(),
        }
        if action != api::PoolAction::Unspecified {
            tracing::info!(action = action.as_str_name(), "the operator changed the pool");
        }
        let pool = Some(view::pool(self.pool.snapshot()));
        Ok(Response::new(api::PoolResponse { pool }))
    }

    type DrainStream = BoxStream<'static, Result<api::DrainProgress, Status>>;

    async fn drain(&self, _request: Request<api::DrainRequest>) -> Result<Response<Self::DrainStream>, Status> {
        tracing::info!("the operator drains the pool");
        let control = self.clone();
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let mut drained = pin!(control.drained(RECORDS_LIMIT));
            let mut ticks = tokio::time::interval(PROGRESS_INTERVAL);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                // The drain first: it has begun before the first progress is told.
                let done = tokio::select! {
                    biased;
                    () = &mut drained => true,
                    _ = ticks.tick() => false,
                };
                // A client that is gone, or does not read, stops only the telling.
                let told = tokio::time::timeout(PROGRESS_INTERVAL, sender.send(Ok(control.progress(done)))).await;
                if done || matches!(told, Ok(Err(_))) {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }
}

#[cfg(test)]
mod tests;
