//! The pool as the API shows it.

use std::time::Duration;

use hullspeed_proto::hullspeed::prewarm::v1 as api;

use crate::adopt::Unbranded;
use crate::ledger::Adoption;
use crate::pool::{CreationFailure, HandlerSnapshot, Off, PoolSnapshot};
use crate::warm::{ImageStatus, WarmStatus};

/// Hulls that exist or are about to.
pub(super) fn left(pool: &PoolSnapshot) -> u64 {
    let hulls = |handler: &HandlerSnapshot| handler.idle + handler.creating;
    (pool.handlers.iter().map(hulls).sum::<usize>() + pool.removing) as u64
}

pub(super) fn unbranded(unbranded: Unbranded) -> api::UnbrandedPods {
    let pod = |adoption: &Adoption| {
        let metadata = adoption.config.metadata.clone().unwrap_or_default();
        api::UnbrandedPod {
            sandbox_id: adoption.sandbox_id.clone(),
            pod_namespace: metadata.namespace,
            pod_name: metadata.name,
        }
    };
    api::UnbrandedPods {
        pending: unbranded.pending.len() as u64,
        refused: unbranded.refused.iter().map(|one| pod(one)).collect(),
    }
}

pub(super) fn warm(status: WarmStatus) -> api::WarmStatus {
    api::WarmStatus {
        policy_problem: status.policy_problem.unwrap_or_default(),
        images: status.images.into_iter().map(image).collect(),
    }
}

fn image(status: ImageStatus) -> api::WarmedImage {
    let ImageStatus {
        target,
        state,
        manifest: _,
        layers,
        layers_resident,
        layers_not_lazy,
        bytes_wanted,
        bytes_resident,
        problem,
        due_in: _,
    } = status;
    api::WarmedImage {
        image: target.key.image,
        platform: target.key.platform,
        share: target.share.name().to_owned(),
        state: state.name().to_owned(),
        layers: layers as u64,
        layers_resident: layers_resident as u64,
        layers_not_lazy: layers_not_lazy as u64,
        bytes_wanted,
        bytes_resident,
        problem: problem.unwrap_or_default(),
    }
}

pub(super) fn pool(pool: PoolSnapshot) -> api::PoolStatus {
    let PoolSnapshot {
        off,
        paused,
        drained,
        handlers,
        removing,
        networks,
        free_addresses,
        bytes_per_hull,
        failure,
        audit,
    } = pool;
    let state = match (&off, paused) {
        _ if drained => "drained",
        (Some(_), _) => "off",
        (None, true) => "paused",
        (None, false) => "on",
    };
    let (reason, detail) = why(off);
    api::PoolStatus {
        state: state.to_owned(),
        reason,
        detail,
        handlers: handlers.into_iter().map(handler).collect(),
        removing: removing as u64,
        networks,
        free_addresses,
        bytes_per_hull,
        failure: failure.map(
            |CreationFailure {
                 reason,
                 in_a_row,
                 retry_in,
             }| api::CreationFailure {
                reason,
                in_a_row: in_a_row.into(),
                retry_in_ms: millis(retry_in),
            },
        ),
        audit: Some(api::Audit {
            sweeps: audit.sweeps,
            lost: audit.lost,
            spared: audit.spared,
        }),
    }
}

fn handler(handler: HandlerSnapshot) -> api::HandlerPool {
    let HandlerSnapshot {
        runtime_handler,
        min,
        max,
        target,
        idle,
        creating,
        oldest,
        off,
    } = handler;
    let (off_reason, off_detail) = why(off);
    api::HandlerPool {
        handler: runtime_handler,
        min: min as u64,
        max: max as u64,
        target: target as u64,
        ready: idle as u64,
        creating: creating as u64,
        oldest_ms: oldest.map(millis),
        off_reason,
        off_detail,
    }
}

fn why(off: Option<Off>) -> (String, String) {
    off.map(|Off { reason, detail }| (reason.to_owned(), detail))
        .unwrap_or_default()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}
