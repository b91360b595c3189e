//! Builds the daemon's parts, serves, and takes them down in order.
//!
//! Start: root and state with their locks, the mark, the sockets (so that the kubelet waits and is not refused), then the
//! relay. containerd may come later: until it has been asked which sandboxes are hulls and which are pods, calls that
//! show sandboxes or work on one wait, and then fail. Stop: the relay drains within a bound, then pool and adopter end; hulls stay for the next run.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use hullspeed_daemon::activation::{ActivationError, Announced, Inherited};
use hullspeed_daemon::http::{BindError, Endpoint};
use hullspeed_daemon::notify;
use hullspeed_daemon::root::{Root, RootError};
use hullspeed_daemon::socket::{Socket, SocketError};
use prometheus_client::registry::Registry;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::adopt::{Adopter, AdopterError};
use crate::config::Config;
use crate::mark::{self, MarkError};
use crate::metrics::Metrics;
use parts::Parts;

pub(crate) use parts::pool_options;

mod parts;
mod recovery;
#[cfg(test)]
mod tests;

/// Names of the sockets in a socket unit.
const CRI_SOCKET: &str = "cri";
const CONTROL_SOCKET: &str = "control";

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The root or the state directory cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// There is no mark.
    #[error(transparent)]
    Mark(#[from] MarkError),
    /// What the service manager left cannot be used.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// A socket cannot be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The address of the metrics cannot be bound.
    #[error(transparent)]
    Metrics(#[from] BindError),
    /// Adoptions cannot be written down.
    #[error("cannot adopt")]
    Adopter(#[from] AdopterError),
    /// A signal handler or the like cannot be installed.
    #[error("cannot set up the process")]
    Process(#[source] io::Error),
}

impl RunError {
    /// The exit code, from sysexits.h where it has one.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Root(error) if error.is_running() => 75,
            Self::Socket(error) if error.is_running() => 75,
            Self::Root(_) | Self::Socket(_) | Self::Activation(_) => 73,
            Self::Mark(MarkError::Damaged { .. }) => 65,
            Self::Mark(MarkError::File { .. }) | Self::Adopter(_) => 73,
            Self::Metrics(_) => 69,
            Self::Process(_) => 70,
        }
    }
}

/// Runs the daemon until `stop`, with the sockets that were `announced` to this process or its own.
pub async fn run(config: Config, announced: &Announced, stop: impl Future<Output = ()>) -> Result<(), RunError> {
    let config = Arc::new(config);
    let mut inherited = Inherited::take(announced)?.only_listeners()?;
    let mut root = Root::lock(&config.root, "root", "lock")?;
    let mut state = Root::lock(&config.state, "state", "prewarm.lock")?;
    // Others have sockets in it; it is not this daemon's to remove.
    state.keep();
    let mark = mark::load(&config.root)?;
    let mut socket = Socket::open(&mut inherited, CRI_SOCKET, &config.socket).await?;
    let control_socket = Socket::open(&mut inherited, CONTROL_SOCKET, &config.control_socket).await?;
    for name in inherited.left() {
        tracing::warn!(
            name,
            "a socket of the service manager is not used; its name must be cri or control"
        );
    }
    let endpoint = Endpoint::bind(&config.metrics).await?;
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let mut parts = Parts::new(&config, mark, metrics)?;
    root.keep();

    let stopping = CancellationToken::new();
    let stopped = CancellationToken::new();
    let _stop_http = stopped.clone().drop_guard();
    if let Some(endpoint) = endpoint {
        tokio::spawn(endpoint.serve(Arc::new(registry), stopping.clone(), stopped.clone()));
    }
    let control = tokio::spawn(parts.control.clone().serve(control_socket, stopping.clone()));
    let pool = tokio::spawn(recovery::run(
        parts.containerd.clone(),
        parts.adopter.clone(),
        parts.control.pool.clone(),
        stopping.clone(),
    ));
    warm(&mut parts, &stopping);
    let relay = tokio::spawn({
        let (relay, listener, stopping) = (parts.relay.clone(), socket.take_listener(), stopping.clone());
        let drain = config.stop_timeout;
        async move { relay.serve(listener, stopping, drain).await }
    });
    tracing::info!(version = env!("CARGO_PKG_VERSION"), socket = %config.socket.display(),
        containerd = %config.containerd.address.display(), pool = config.pool.enabled, "serving");
    notify::send("READY=1");

    stop.await;
    tracing::info!("stopping");
    notify::send("STOPPING=1");
    stopping.cancel();
    finish(
        &parts.adopter,
        [("relay", relay), ("pool", pool), ("control", control)],
        config.stop_timeout,
    )
    .await;
    tracing::info!("stopped");
    Ok(())
}

/// Starts what warms images. Nothing of it must be finished; it ends with the runtime at the latest.
fn warm(parts: &mut Parts, stopping: &CancellationToken) {
    if let Some(logins) = parts.logins.take() {
        tokio::spawn(logins.run(stopping.clone()));
    }
    if let Some(warm) = parts.warm.take() {
        let stopping = stopping.clone();
        tokio::spawn(async move { warm.run(stopping).await });
    }
}

/// Waits for the parts to end, each within a bound, the relay first: its calls need the others.
async fn finish<const N: usize>(adopter: &Adopter, tasks: [(&'static str, JoinHandle<()>); N], limit: Duration) {
    // The relay itself ends calls after `limit`; it has a little longer to say so.
    let limit = limit + Duration::from_secs(1);
    for (part, task) in tasks {
        let abort = task.abort_handle();
        match tokio::time::timeout(limit, task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(part, %error, "a part of the daemon ended early"),
            Err(_) => {
                tracing::warn!(part, waited = ?limit, "a part of the daemon did not end in time and is abandoned");
                abort.abort();
            }
        }
    }
    if tokio::time::timeout(limit, adopter.shutdown()).await.is_err() {
        tracing::warn!(waited = ?limit, "work after adoptions is left to the next start");
    }
}
