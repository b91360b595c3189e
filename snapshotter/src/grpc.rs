//! containerd's gRPC API in front of [`crate::snapshot::Service`]: translation, timing, and the table of statuses.
//! Nothing is decided here.

use hullspeed_daemon::error::chain;
use std::pin::Pin;
use std::time::Instant;

use futures_util::{Stream, stream};
use hullspeed_daemon::grpc::code_name;
use hullspeed_proto::containerd::services::snapshots::v1 as api;
use hullspeed_proto::containerd::types;
use prost_types::Timestamp;
use tonic::{Code, Request, Response, Status};

use crate::metrics::Metrics;
use crate::metrics::defs::{OpErrorLabels, OpLabels};
use crate::snapshot::mounts::Mount;
use crate::snapshot::service::List;
use crate::snapshot::{Error, Info, Kind, Labels, Service};

/// The server for tonic.
pub struct Snapshots {
    service: Service,
    metrics: Metrics,
}

impl Snapshots {
    /// Serves `service`.
    pub fn new(service: Service, metrics: Metrics) -> Self {
        Self { service, metrics }
    }

    /// Times an operation, and turns its error into a status.
    async fn answer<T, R>(
        &self,
        op: &'static str,
        operation: impl Future<Output = Result<T, Error>>,
        translate: impl FnOnce(T) -> R,
    ) -> Result<Response<R>, Status> {
        let start = Instant::now();
        let result = operation.await;
        self.metrics
            .snapshot_operation
            .get_or_create(&OpLabels { op })
            .observe(start.elapsed().as_secs_f64());
        match result {
            Ok(value) => Ok(Response::new(translate(value))),
            Err(error) => Err(self.status(op, &error)),
        }
    }

    fn status(&self, op: &'static str, error: &Error) -> Status {
        let code = code(error);
        let message = chain(error);
        // The end of the remote protocol is success.
        if !matches!(error, Error::TargetExists { .. }) {
            self.metrics
                .snapshot_operation_errors
                .get_or_create(&OpErrorLabels {
                    op,
                    error: code_name(code),
                })
                .inc();
        }
        match code {
            Code::Internal | Code::Unavailable | Code::ResourceExhausted | Code::DataLoss => {
                tracing::error!(op, code = code_name(code), error = message, "operation failed");
            }
            _ => tracing::debug!(op, code = code_name(code), error = message, "operation is refused"),
        }
        Status::new(code, message)
    }
}

/// The status of each error; containerd's clients turn these codes into its error types.
fn code(error: &Error) -> Code {
    match error {
        Error::NotFound { .. } | Error::ParentNotFound { .. } => Code::NotFound,
        Error::AlreadyExists { .. } | Error::TargetExists { .. } => Code::AlreadyExists,
        Error::NewParentNotCommitted { .. }
        | Error::NotActive { .. }
        | Error::NoMounts { .. }
        | Error::HasChildren { .. } => Code::FailedPrecondition,
        Error::ParentNotCommitted { .. }
        | Error::ParentChanged { .. }
        | Error::BadName { .. }
        | Error::LabelTooLong { .. }
        | Error::ImmutableField { .. }
        | Error::Filter { .. } => Code::InvalidArgument,
        Error::LayerUnavailable { .. } | Error::Stopping => Code::Unavailable,
        Error::Directory { source, .. } if source.kind() == std::io::ErrorKind::StorageFull => Code::ResourceExhausted,
        Error::Directory { .. } | Error::Interrupted(_) => Code::Internal,
        Error::Store(error) if error.is_storage_full() => Code::ResourceExhausted,
        Error::Store(error) if error.is_damage() => Code::DataLoss,
        Error::Store(_) => Code::Internal,
    }
}

/// protobuf has no absent strings.
fn present(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn to_mounts(mounts: Vec<Mount>) -> Vec<types::Mount> {
    let translate = |Mount { kind, source, options }| types::Mount {
        r#type: str::to_owned(kind),
        source,
        target: String::new(),
        options,
    };
    mounts.into_iter().map(translate).collect()
}

fn to_info(info: Info) -> api::Info {
    let Info {
        name,
        parent,
        kind,
        labels,
        created,
        updated,
    } = info;
    api::Info {
        name,
        parent: parent.unwrap_or_default(),
        kind: match kind {
            Kind::View => api::Kind::View,
            Kind::Active => api::Kind::Active,
            Kind::Committed => api::Kind::Committed,
        }
        .into(),
        created_at: Some(Timestamp::from(created)),
        updated_at: Some(Timestamp::from(updated)),
        labels: labels.into_iter().collect(),
    }
}

fn to_labels(labels: std::collections::HashMap<String, String>) -> Labels {
    labels.into_iter().collect()
}

/// Sizes are signed in the API.
fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

#[tonic::async_trait]
impl api::snapshots_server::Snapshots for Snapshots {
    async fn prepare(
        &self,
        request: Request<api::PrepareSnapshotRequest>,
    ) -> Result<Response<api::PrepareSnapshotResponse>, Status> {
        let api::PrepareSnapshotRequest {
            snapshotter: _,
            key,
            parent,
            labels,
        } = request.into_inner();
        let operation = self.service.prepare(key, present(parent), to_labels(labels));
        self.answer("prepare", operation, |mounts| api::PrepareSnapshotResponse {
            mounts: to_mounts(mounts),
        })
        .await
    }

    async fn view(
        &self,
        request: Request<api::ViewSnapshotRequest>,
    ) -> Result<Response<api::ViewSnapshotResponse>, Status> {
        let api::ViewSnapshotRequest {
            snapshotter: _,
            key,
            parent,
            labels,
        } = request.into_inner();
        let operation = self.service.view(key, present(parent), to_labels(labels));
        self.answer("view", operation, |mounts| api::ViewSnapshotResponse {
            mounts: to_mounts(mounts),
        })
        .await
    }

    async fn mounts(&self, request: Request<api::MountsRequest>) -> Result<Response<api::MountsResponse>, Status> {
        let api::MountsRequest { snapshotter: _, key } = request.into_inner();
        let operation = self.service.mounts(key);
        self.answer("mounts", operation, |mounts| api::MountsResponse {
            mounts: to_mounts(mounts),
        })
        .await
    }

    async fn commit(&self, request: Request<api::CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let api::CommitSnapshotRequest {
            snapshotter: _,
            name,
            key,
            labels,
            parent,
        } = request.into_inner();
        let operation = self.service.commit(name, key, present(parent), to_labels(labels));
        self.answer("commit", operation, |()| ()).await
    }

    async fn remove(&self, request: Request<api::RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let api::RemoveSnapshotRequest { snapshotter: _, key } = request.into_inner();
        self.answer("remove", self.service.remove(key), |()| ()).await
    }

    async fn stat(
        &self,
        request: Request<api::StatSnapshotRequest>,
    ) -> Result<Response<api::StatSnapshotResponse>, Status> {
        let api::StatSnapshotRequest { snapshotter: _, key } = request.into_inner();
        let translate = |info| api::StatSnapshotResponse {
            info: Some(to_info(info)),
        };
        self.answer("stat", self.service.stat(key), translate).await
    }

    async fn update(
        &self,
        request: Request<api::UpdateSnapshotRequest>,
    ) -> Result<Response<api::UpdateSnapshotResponse>, Status> {
        let api::UpdateSnapshotRequest {
            snapshotter: _,
            info,
            update_mask,
        } = request.into_inner();
        // Without an info the name is empty, which the service refuses.
        let api::Info { name, labels, .. } = info.unwrap_or_default();
        let fields = update_mask.unwrap_or_default().paths;
        let operation = self.service.update(name, to_labels(labels), fields);
        self.answer("update", operation, |info| api::UpdateSnapshotResponse {
            info: Some(to_info(info)),
        })
        .await
    }

    type ListStream = Pin<Box<dyn Stream<Item = Result<api::ListSnapshotsResponse, Status>> + Send>>;

    async fn list(&self, request: Request<api::ListSnapshotsRequest>) -> Result<Response<Self::ListStream>, Status> {
        let api::ListSnapshotsRequest {
            snapshotter: _,
            filters,
        } = request.into_inner();
        self.answer("list", self.service.list(&filters), |list| {
            batches(list) as Self::ListStream
        })
        .await
    }

    async fn usage(&self, request: Request<api::UsageRequest>) -> Result<Response<api::UsageResponse>, Status> {
        let api::UsageRequest { snapshotter: _, key } = request.into_inner();
        let translate = |usage: crate::layer::Usage| api::UsageResponse {
            size: signed(usage.bytes),
            inodes: signed(usage.inodes),
        };
        self.answer("usage", self.service.usage(key), translate).await
    }

    async fn cleanup(&self, request: Request<api::CleanupRequest>) -> Result<Response<()>, Status> {
        let api::CleanupRequest { snapshotter: _ } = request.into_inner();
        self.answer("cleanup", self.service.cleanup(), |()| ()).await
    }
}

/// A listing as messages; one batch is read when the client has taken the one before.
fn batches(list: List) -> Pin<Box<dyn Stream<Item = Result<api::ListSnapshotsResponse, Status>> + Send>> {
    Box::pin(stream::try_unfold(list, |mut list| async move {
        let batch = list
            .batch()
            .await
            .map_err(|error| Status::new(code(&error), chain(&error)))?;
        Ok(batch.map(|infos| {
            let info = infos.into_iter().map(to_info).collect();
            (api::ListSnapshotsResponse { info }, list)
        }))
    }))
}
