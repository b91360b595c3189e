//! Builds the daemon's parts, serves, and takes them down in order.
//!
//! Start: root and its lock, metadata, layers, socket, then the mounts of before in the background; a start never
//! waits for a network. Stop: no new requests, those under way are drained within a bound, layers are unmounted, the
//! socket is removed, and at last the lock is given up.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use hullspeed_daemon::activation::{ActivationError, Announced, Inherited};
use hullspeed_daemon::fdstore::Store;
use hullspeed_daemon::http::{BindError, Endpoint};
use hullspeed_daemon::notify;
use hullspeed_daemon::root::{Root, RootError};
use hullspeed_daemon::socket::{Socket, SocketError};
use hullspeed_proto::containerd::services::snapshots::v1::snapshots_server::SnapshotsServer;
use hullspeed_proto::hullspeed::control::v1::snapshotter_control_server::SnapshotterControlServer;
use prometheus_client::registry::Registry;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::control::Control;
use crate::explain::Explainer;
use crate::grpc::Snapshots;
use crate::layer::layers::Layers;
use crate::layer::mounts::kept::Descriptors;
use crate::layer::{Cause, LayerMounts};
use crate::metrics::Metrics;
use crate::snapshot::no_layers::NoLayers;
use crate::snapshot::store::StoreError;
use crate::snapshot::{self, Service, ServiceOptions};

/// Requests of one connection under way at once; containerd has one connection.
const MAX_REQUESTS: usize = 256;
/// Name of the listener where the service manager made it.
const SOCKET: &str = "snapshotter";

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The root cannot be used.
    #[error(transparent)]
    Root(#[from] RootError),
    /// The socket cannot be used.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// What the service manager left cannot be used.
    #[error(transparent)]
    Activation(#[from] ActivationError),
    /// The kernel offers no FUSE.
    #[error(
        "cannot open {}; load the fuse module and run as root, or set layers.lazy = false to unpack every layer",
        path.display()
    )]
    Fuse {
        /// The device.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Metadata or snapshot directories cannot be used.
    #[error("cannot open the snapshots")]
    Snapshots(#[source] Box<snapshot::Error>),
    /// The layers cannot be started.
    #[error("cannot start lazy layers")]
    Layers(#[source] Cause),
    /// The address of the metrics cannot be bound.
    #[error(transparent)]
    Metrics(#[from] BindError),
    /// The gRPC server failed.
    #[error("the server failed")]
    Server(#[source] tonic::transport::Error),
    /// A signal handler or the like cannot be installed.
    #[error("cannot set up the process")]
    Process(#[source] io::Error),
}

impl RunError {
    /// The exit code, from sysexits.h where it has one.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Root(error) if error.is_running() => 75,
            Self::Socket(error) if error.is_running() => 75,
            Self::Root(_) | Self::Socket(_) => 73,
            Self::Snapshots(error) => snapshots_exit_code(error),
            Self::Fuse { .. } | Self::Layers(_) | Self::Metrics(_) | Self::Activation(_) => 69,
            Self::Server(_) | Self::Process(_) => 70,
        }
    }
}

/// What it means that the snapshots cannot be opened. Only metadata and directories can be at fault; whatever else a
/// request can meet would be a defect here.
fn snapshots_exit_code(error: &snapshot::Error) -> u8 {
    match error {
        snapshot::Error::Store(error) if error.is_damage() => 65,
        snapshot::Error::Store(error) => match error {
            StoreError::Open { .. } => 73,
            StoreError::Transaction(_) if error.is_storage_full() => 73,
            StoreError::Transaction(_)
            | StoreError::Damaged { .. }
            | StoreError::Schema { .. }
            | StoreError::Record { .. }
            | StoreError::Inconsistent { .. } => 70,
        },
        snapshot::Error::Directory { .. } => 73,
        snapshot::Error::NotFound { .. }
        | snapshot::Error::ParentNotFound { .. }
        | snapshot::Error::AlreadyExists { .. }
        | snapshot::Error::TargetExists { .. }
        | snapshot::Error::ParentNotCommitted { .. }
        | snapshot::Error::NewParentNotCommitted { .. }
        | snapshot::Error::ParentChanged { .. }
        | snapshot::Error::NotActive { .. }
        | snapshot::Error::NoMounts { .. }
        | snapshot::Error::HasChildren { .. }
        | snapshot::Error::BadName { .. }
        | snapshot::Error::LabelTooLong { .. }
        | snapshot::Error::ImmutableField { .. }
        | snapshot::Error::Filter { .. }
        | snapshot::Error::LayerUnavailable { .. }
        | snapshot::Error::Interrupted(_)
        | snapshot::Error::Stopping => 70,
    }
}

/// Runs the daemon until `stop`. `layers` makes the lazy layers once the root is locked.
pub async fn run<F>(
    config: Config,
    layers: impl FnOnce(Arc<Config>, Metrics, Descriptors) -> F,
    stop: impl Future<Output = ()>,
) -> Result<(), RunError>
where
    F: Future<Output = Result<Arc<dyn LayerMounts>, Cause>>,
{
    let config = Arc::new(config);
    let mut inherited = Inherited::take(&Announced::to_this_process())?;
    let mut root = Root::lock(&config.root, "root", "lock")?;
    if config.layers.lazy {
        check_fuse()?;
    }
    // Before anything is mounted, so that an address or a socket in use leaves no trace.
    let socket = Socket::open(&mut inherited, SOCKET, &config.socket).await?;
    let descriptors = Descriptors::new(Store::from_environment(), &mut inherited);
    let endpoint = Endpoint::bind(&config.metrics).await?;
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    let layers = layers(Arc::clone(&config), metrics.clone(), descriptors)
        .await
        .map_err(RunError::Layers)?;
    let warmer = layers.warmer();
    let service = match open_service(&config, Arc::clone(&layers), metrics.clone()) {
        Ok(service) => service,
        Err(error) => {
            layers.shutdown().await;
            return Err(error);
        }
    };
    root.keep();
    let explainer = Explainer::new(service.clone(), layers.inspector(), Arc::clone(&config));

    let stopping = CancellationToken::new();
    let stopped = CancellationToken::new();
    let _stop_http = stopped.clone().drop_guard();
    if let Some(endpoint) = endpoint {
        tokio::spawn(endpoint.serve(Arc::new(registry), stopping.clone(), stopped.clone()));
    }
    let restoring = tokio::spawn({
        let service = service.clone();
        async move { service.restore().await }
    });
    announce(&config);
    let served = serve(
        socket,
        Snapshots::new(service.clone(), metrics),
        Control::new(warmer, explainer, stopping.clone()),
        stop,
        &stopping,
        config.stop_timeout,
    )
    .await;
    restoring.abort();
    // An aborted task ends with an error, which is what was wanted.
    let _ = restoring.await;
    service.shutdown(config.stop_timeout).await;
    // The metadata is closed before another daemon may open it.
    drop(service);
    drop(root);
    tracing::info!("stopped");
    served
}

fn announce(config: &Config) {
    tracing::info!(version = env!("CARGO_PKG_VERSION"), root = %config.root.display(),
        socket = %config.socket.display(), lazy = config.layers.lazy, "serving");
    notify::send("READY=1");
}

/// The lazy layers as the configuration wants them: real ones, or none where `layers.lazy` is off.
pub async fn layers(
    config: Arc<Config>,
    metrics: Metrics,
    descriptors: Descriptors,
) -> Result<Arc<dyn LayerMounts>, Cause> {
    // What an earlier process left mounted is served on, or its readers would wait for ever.
    if !config.layers.lazy && descriptors.layers() == 0 {
        return Ok(Arc::new(NoLayers));
    }
    let runtime = tokio::runtime::Handle::current();
    // It tries what the kernel can, and waits for it.
    let layers = move || Layers::new(&config, metrics, descriptors, runtime);
    Ok(Arc::new(tokio::task::spawn_blocking(layers).await??))
}

fn open_service(config: &Config, layers: Arc<dyn LayerMounts>, metrics: Metrics) -> Result<Service, RunError> {
    Service::open(ServiceOptions {
        root: config.root.clone(),
        layers,
        metrics,
        mount_timeout: config.layers.mount_timeout,
        restore_parallelism: config.layers.restore_parallelism,
    })
    .map_err(|error| RunError::Snapshots(Box::new(error)))
}

fn check_fuse() -> Result<(), RunError> {
    let path = PathBuf::from("/dev/fuse");
    let opened = std::fs::File::options().read(true).write(true).open(&path);
    opened.map(drop).map_err(|source| RunError::Fuse { path, source })
}

/// Answers requests until `stop`, then waits at most `drain` for those under way.
async fn serve(
    mut socket: Socket,
    snapshots: Snapshots,
    control: Control,
    stop: impl Future<Output = ()>,
    stopping: &CancellationToken,
    drain: Duration,
) -> Result<(), RunError> {
    let incoming = UnixListenerStream::new(socket.take_listener());
    let server = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(MAX_REQUESTS)
        .add_service(SnapshotsServer::new(snapshots))
        .add_service(SnapshotterControlServer::new(control))
        .serve_with_incoming_shutdown(incoming, stopping.clone().cancelled_owned());
    tokio::pin!(server);
    tokio::select! {
        served = &mut server => return served.map_err(RunError::Server),
        () = stop => {}
    }
    tracing::info!("stopping");
    notify::send("STOPPING=1");
    stopping.cancel();
    match tokio::time::timeout(drain, server).await {
        Ok(served) => served.map_err(RunError::Server),
        Err(_) => {
            tracing::warn!(waited = ?drain, "requests did not end in time and are abandoned");
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(place: &std::path::Path) -> Config {
        let mut config = Config {
            root: place.join("new/root"),
            socket: place.join("socket"),
            ..Config::default()
        };
        config.layers.lazy = false;
        config.metrics.address = None;
        config
    }

    #[tokio::test]
    async fn a_start_that_fails_leaves_no_new_root_and_one_that_succeeds_does() {
        let place = tempfile::tempdir().unwrap();
        let config = config(place.path());
        let other = tokio::net::UnixListener::bind(&config.socket).unwrap();
        let error = run(config.clone(), layers, std::future::ready(())).await.unwrap_err();
        assert_eq!(error.exit_code(), 75, "{error}");
        assert!(!place.path().join("new").exists(), "the refused daemon left its root");
        drop(other);

        let fails = |_, _, _| async { Err::<Arc<dyn LayerMounts>, Cause>("no".into()) };
        let error = run(config.clone(), fails, std::future::ready(())).await.unwrap_err();
        assert_eq!(error.exit_code(), 69, "{error}");
        assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), 0);

        run(config.clone(), layers, std::future::ready(())).await.unwrap();
        assert!(config.root.join("meta.redb").exists());
    }

    #[test]
    fn every_way_not_to_open_the_snapshots_has_its_exit_code() {
        let path = || PathBuf::from("/r/meta.redb");
        let full = redb::Error::Io(io::ErrorKind::StorageFull.into());
        let io = |kind: io::ErrorKind| redb::Error::Io(kind.into());
        for (error, code) in [
            (
                snapshot::Error::Directory {
                    action: "make",
                    path: path(),
                    source: io::ErrorKind::NotFound.into(),
                },
                73,
            ),
            (
                StoreError::Open {
                    path: path(),
                    source: io(io::ErrorKind::PermissionDenied),
                }
                .into(),
                73,
            ),
            (
                StoreError::Damaged {
                    path: path(),
                    detail: String::new(),
                }
                .into(),
                65,
            ),
            (StoreError::Schema { path: path(), found: 9 }.into(), 65),
            (StoreError::Inconsistent { name: "x".to_owned() }.into(), 65),
            (
                StoreError::Transaction(Box::new(redb::Error::Corrupted(String::new()))).into(),
                65,
            ),
            (StoreError::Transaction(Box::new(full)).into(), 73),
            (StoreError::Transaction(Box::new(io(io::ErrorKind::Other))).into(), 70),
            (snapshot::Error::Stopping, 70),
        ] {
            assert_eq!(snapshots_exit_code(&error), code, "{error:?}");
        }
    }
}
