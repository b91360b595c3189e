//! Reports as the API shows them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use estargz::digest::Digest;
use hullspeed_proto::hullspeed::control::v1 as api;

use crate::explain::{Explanation, LayerExplanation, Listing, Overview, References, Serving, SubjectKind, Sums, Usage};
use crate::layer::cache::CacheLimits;
use crate::layer::layers::inspector::{Space, Survey, VerifyReport, WrongChunk};
use crate::layer::readers::{Reader, ReaderReport, Waits};
use crate::layer::report::{
    Cost, Failure, Fetched, HostReport, LayerReport, MountReport, ProbeStep, Residence, StoreReport,
};

/// Layers in one answer, over all that it explains.
const MAX_LAYERS: usize = 1000;
/// Readers told of one layer.
const MAX_READERS: usize = 8;

fn text(digest: Option<Digest>) -> String {
    digest.map(|digest| digest.to_string()).unwrap_or_default()
}

pub(super) fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn unix_millis(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, millis)
}

/// Adds to a status what an overview tells.
pub(super) fn status(status: api::StatusResponse, overview: Overview) -> api::StatusResponse {
    let Overview {
        uptime,
        mounted,
        complete,
        erofs,
        kernel_alone,
        mount,
        opening,
        in_flight,
        hosts,
        decisions,
        failures,
    } = overview;
    let in_flight = in_flight.into_iter().filter(|(_, requests)| *requests > 0);
    let overlay = decisions.refused.into_iter();
    api::StatusResponse {
        layers_mounted: count(mounted),
        uptime_seconds: uptime.as_secs(),
        layers_opening: count(opening),
        layers_complete: count(complete),
        in_flight: in_flight
            .map(|(kind, requests)| api::KindCount {
                kind: kind.to_owned(),
                requests,
                bytes: 0,
            })
            .collect(),
        hosts: hosts.into_iter().map(host).collect(),
        snapshots_lazy: decisions.lazy,
        snapshots_overlay: overlay
            .map(|(reason, count)| api::ReasonCount { reason, count })
            .collect(),
        failures: failures.into_iter().map(failure).collect(),
        mount: mount.to_owned(),
        layers_erofs: count(erofs),
        layers_kernel_alone: count(kernel_alone),
        ..status
    }
}

fn host(report: HostReport) -> api::HostHealth {
    let HostReport {
        host,
        failures_in_a_row,
        retry_in,
    } = report;
    let state = if retry_in.is_some() { "backing off" } else { "ok" };
    api::HostHealth {
        host,
        state: state.to_owned(),
        failures_in_a_row,
        retry_in_ms: retry_in.map_or(0, millis),
    }
}

fn failure(failure: Failure) -> api::Failure {
    let Failure {
        at,
        reason,
        what,
        host,
        image,
        layer,
    } = failure;
    api::Failure {
        at_unix_ms: unix_millis(at),
        reason,
        what,
        host,
        image,
        layer: text(layer),
    }
}

pub(super) fn explained(found: Vec<Explanation>, more: usize) -> api::ExplainResponse {
    let mut room = MAX_LAYERS;
    let explained = found.into_iter().map(|one| {
        let told = explanation(one, room);
        room = room.saturating_sub(told.layers.len());
        told
    });
    api::ExplainResponse {
        found: explained.collect(),
        more: count(more),
    }
}

fn explanation(explanation: Explanation, room: usize) -> api::Explanation {
    let sums = explanation.sums();
    let Explanation {
        kind,
        name,
        manifest,
        layers,
    } = explanation;
    let more = layers.len().saturating_sub(room);
    api::Explanation {
        kind: match kind {
            SubjectKind::Image => "image",
            SubjectKind::Snapshot => "snapshot",
            SubjectKind::Layer => "layer",
        }
        .to_owned(),
        name,
        manifest_digest: text(manifest),
        sums: Some(to_sums(sums)),
        layers: layers.into_iter().take(room).map(layer).collect(),
        more: count(more),
    }
}

fn to_sums(sums: Sums) -> api::LayerSums {
    let Sums {
        layers,
        lazy,
        bytes,
        resident,
        saved,
        fetched,
        reused,
        stalls,
        stall_time,
    } = sums;
    api::LayerSums {
        layers: count(layers),
        lazy: count(lazy),
        bytes,
        bytes_resident: resident,
        bytes_fetched: fetched,
        bytes_saved: saved,
        bytes_reused: reused,
        stalls,
        stall_ms: millis(stall_time),
    }
}

fn layer(layer: LayerExplanation) -> api::LayerExplanation {
    let LayerExplanation {
        digest,
        toc,
        serving,
        fallback,
        snapshots,
        images,
        report,
    } = layer;
    let state = match serving {
        Serving::Lazy => "lazy",
        Serving::Overlay => "overlay",
        Serving::Refused => "refused",
        Serving::Cached => "cached",
    };
    let is_lazy = matches!(serving, Serving::Lazy | Serving::Cached);
    let (reason, error, host, decided) = match fallback {
        Some(fallback) => (fallback.reason, fallback.error, fallback.host, unix_millis(fallback.at)),
        None if is_lazy => Default::default(),
        None => ("unknown".to_owned(), String::new(), String::new(), 0),
    };
    let told = report.as_ref();
    let mounted = told.is_some_and(|report| report.mounted);
    let mount = told.and_then(|report| report.mount).unwrap_or_default();
    let former_mount = told.and_then(|report| report.former_mount).unwrap_or_default();
    let kernel_alone = told.is_some_and(|report| report.kernel_alone);
    let known = told.map(|report| report.readers.as_slice()).unwrap_or_default();
    let readers: Vec<_> = known.iter().take(MAX_READERS).map(reader).collect();
    let more_readers = count(known.len() - readers.len());
    let (residence, cost) = report.map(residence_and_cost).unwrap_or_default();
    api::LayerExplanation {
        digest: text(digest),
        toc_digest: text(toc),
        state: state.to_owned(),
        reason,
        error,
        host,
        decided_unix_ms: decided,
        snapshots,
        images,
        mounted,
        residence,
        cost,
        mount: mount.to_owned(),
        former_mount: former_mount.to_owned(),
        kernel_alone,
        readers,
        more_readers,
    }
}

fn reader(report: &ReaderReport) -> api::Reader {
    let ReaderReport {
        reader: Reader {
            pod,
            container,
            command,
        },
        waits:
            Waits {
                reads,
                bytes,
                waited,
                first,
                last,
            },
    } = report;
    api::Reader {
        pod: pod.as_ref().map(ToString::to_string).unwrap_or_default(),
        container: container.as_ref().map(ToString::to_string).unwrap_or_default(),
        command: command.clone(),
        reads: *reads,
        bytes: *bytes,
        waited_ms: millis(*waited),
        first_unix_ms: unix_millis(*first),
        last_unix_ms: unix_millis(*last),
    }
}

fn residence_and_cost(report: LayerReport) -> (Option<api::Residence>, Option<api::Cost>) {
    (Some(residence(report.residence)), report.cost.map(cost))
}

fn residence(residence: Residence) -> api::Residence {
    let Residence {
        chunks,
        resident,
        content,
        blob_bytes,
        disk_bytes,
    } = residence;
    let content = content.unwrap_or_default();
    api::Residence {
        chunks,
        chunks_resident: resident,
        bytes: content.bytes,
        bytes_resident: content.resident,
        bytes_saved: content.saved,
        blob_bytes,
        disk_bytes,
    }
}

fn cost(cost: Cost) -> api::Cost {
    let Cost {
        stalls,
        stall_time,
        longest_stall,
        fetched,
        reused,
        verify_failures,
        last_failure,
        background,
        hosts,
    } = cost;
    let fetched = fetched
        .into_iter()
        .filter(|fetched| fetched.requests > 0 || fetched.bytes > 0);
    api::Cost {
        stalls,
        stall_ms: millis(stall_time),
        longest_stall_ms: millis(longest_stall),
        fetched: fetched
            .map(|Fetched { kind, requests, bytes }| api::KindCount {
                kind: kind.to_owned(),
                requests,
                bytes,
            })
            .collect(),
        bytes_reused: reused,
        verify_failures,
        last_failure: last_failure.map(failure),
        background: background.to_owned(),
        hosts: hosts.into_iter().map(host).collect(),
    }
}

pub(super) fn listing(listing: Listing) -> api::ListLayersResponse {
    let row = |(survey, report, references): (Survey, LayerReport, References)| api::CachedLayer {
        toc_digest: survey.toc.to_string(),
        digest: survey.layer.to_string(),
        image: survey.image,
        residence: Some(residence(report.residence)),
        mounted: report.mounted,
        last_used_unix_ms: survey.last_used.map_or(0, unix_millis),
        references: count(references.count),
        snapshots: references.snapshots,
        mount: report.mount.unwrap_or_default().to_owned(),
    };
    api::ListLayersResponse {
        layers: listing.layers.into_iter().map(row).collect(),
        more: count(listing.more),
    }
}

pub(super) fn usage(usage: Usage, space: Space) -> api::CacheUsageResponse {
    let Usage {
        layers,
        bytes,
        unreferenced,
        unreferenced_bytes,
    } = usage;
    let Space {
        limits: CacheLimits { quota, min_free },
        filesystem,
        size,
        free,
        no_room,
    } = space;
    api::CacheUsageResponse {
        layers: count(layers),
        bytes,
        unreferenced_layers: count(unreferenced),
        unreferenced_bytes,
        quota_bytes: quota,
        filesystem: filesystem.to_owned(),
        filesystem_bytes: size,
        filesystem_free_bytes: free,
        min_free_bytes: min_free,
        no_room: no_room.map(|no_room| no_room.to_string()).unwrap_or_default(),
    }
}

pub(super) fn verified(report: VerifyReport) -> api::VerifyCacheProgress {
    let VerifyReport {
        layers,
        layers_done,
        chunks,
        bytes,
        wrong,
        told,
        failed,
        error,
        done,
    } = report;
    let wrong_chunk = |wrong: WrongChunk| api::WrongChunk {
        toc_digest: wrong.toc_digest.to_string(),
        chunk: wrong.chunk,
        file: wrong.file,
        offset: wrong.offset,
    };
    api::VerifyCacheProgress {
        layers: count(layers),
        layers_done: count(layers_done),
        chunks,
        bytes,
        wrong_chunks: wrong,
        wrong: told.into_iter().map(wrong_chunk).collect(),
        layers_failed: count(failed),
        error,
        done,
    }
}

/// What this process knows of its ways to mount, where there are any.
pub(super) fn diagnosis(configured: &str, mounts: Option<MountReport>) -> api::DiagnoseResponse {
    let MountReport {
        chosen,
        reason,
        steps,
        store,
    } = mounts.unwrap_or_default();
    let step = |ProbeStep { name, ok, detail }| api::ProbeStep {
        name: String::from(name),
        ok,
        detail,
    };
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    api::DiagnoseResponse {
        process: std::process::id(),
        mount_configured: configured.to_owned(),
        mount_chosen: chosen.to_owned(),
        mount_reason: reason,
        steps: steps.into_iter().map(step).collect(),
        store: store.map(|StoreReport { capacity, kept }| api::DescriptorStore {
            capacity: capacity as u64,
            kept: kept as u64,
        }),
        // None is no limit.
        open_files_limit: files.unwrap_or(u64::MAX),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_are_few_and_those_left_out_are_counted() {
        let at = UNIX_EPOCH + Duration::from_secs(7);
        let waits = Waits {
            reads: 3,
            bytes: 4096,
            waited: Duration::from_millis(20),
            first: at,
            last: at,
        };
        let named = |number: usize| ReaderReport {
            reader: Reader {
                command: number.to_string(),
                ..Reader::default()
            },
            waits,
        };
        let explained = layer(LayerExplanation {
            digest: None,
            toc: None,
            serving: Serving::Lazy,
            fallback: None,
            snapshots: Vec::new(),
            images: Vec::new(),
            report: Some(LayerReport {
                toc_digest: Digest::of("toc"),
                mounted: true,
                mount: Some("erofs"),
                former_mount: Some("fuse"),
                kernel_alone: true,
                residence: Residence::default(),
                cost: None,
                readers: (0..MAX_READERS + 3).map(named).collect(),
            }),
        });
        assert_eq!((explained.readers.len(), explained.more_readers), (MAX_READERS, 3));
        let first = &explained.readers[0];
        assert_eq!((first.command.as_str(), first.reads, first.waited_ms), ("0", 3, 20));
        assert_eq!((first.pod.as_str(), first.last_unix_ms), ("", 7000));
        assert_eq!(
            (explained.mount.as_str(), explained.former_mount.as_str()),
            ("erofs", "fuse")
        );
        assert!(explained.kernel_alone);
    }

    #[test]
    fn where_nothing_is_lazy_the_diagnosis_says_no_way() {
        let told = diagnosis("auto", None);
        assert_eq!(
            (told.mount_configured.as_str(), told.mount_chosen.as_str()),
            ("auto", "")
        );
        assert!(told.process == std::process::id() && told.store.is_none() && told.open_files_limit > 0);
        let step = ProbeStep {
            name: "erofs",
            ok: false,
            detail: "EINVAL".to_owned(),
        };
        let told = diagnosis(
            "auto",
            Some(MountReport {
                chosen: "fuse",
                reason: "no".to_owned(),
                steps: vec![step],
                store: Some(StoreReport { capacity: 4, kept: 3 }),
            }),
        );
        assert_eq!((told.steps[0].name.as_str(), told.steps[0].ok), ("erofs", false));
        assert_eq!(told.store.map(|store| (store.capacity, store.kept)), Some((4, 3)));
    }
}
