//! The families as they are written, against the table of `docs/metrics.md`.

use std::collections::BTreeSet;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::defs::{
    EvictedLabels, FetchLabels, KindLabels, MountLabels, NativeEventLabels, NativeOutcome, OpErrorLabels, OpLabels,
    PrepareLabels, PrepareResult,
};
use super::defs::{ResultLabels, SourceLabels};
use super::*;

#[test]
fn the_documented_metrics_are_the_real_ones() {
    let mut registry = Registry::default();
    let metrics = Metrics::register(&mut registry);
    // A family without series is not written at all.
    metrics
        .snapshot_prepare
        .get_or_create(&PrepareLabels {
            result: PrepareResult::lazy,
            reason: "",
        })
        .inc();
    metrics
        .snapshot_operation
        .get_or_create(&OpLabels { op: "stat" })
        .observe(0.1);
    metrics
        .snapshot_operation_errors
        .get_or_create(&OpErrorLabels {
            op: "stat",
            error: "not_found",
        })
        .inc();
    metrics
        .mounts_restored
        .get_or_create(&ResultLabels { result: "ok" })
        .inc();
    metrics
        .fuse_operation
        .get_or_create(&OpLabels { op: "read" })
        .observe(0.1);
    metrics
        .fuse_operation_errors
        .get_or_create(&OpErrorLabels {
            op: "read",
            error: "EIO",
        })
        .inc();
    metrics
        .read_bytes
        .get_or_create(&SourceLabels { source: "cache" })
        .inc();
    metrics
        .fetch_requests
        .get_or_create(&FetchLabels {
            kind: "toc",
            result: "ok",
        })
        .inc();
    metrics.fetch_bytes.get_or_create(&KindLabels { kind: "toc" }).inc();
    metrics
        .cache_evicted_bytes
        .get_or_create(&EvictedLabels { kind: "layer" })
        .inc();
    metrics
        .layers_mounted
        .get_or_create(&MountLabels { mount: "erofs" })
        .inc();
    metrics
        .native_events
        .get_or_create(&NativeEventLabels {
            outcome: NativeOutcome::Fetched,
        })
        .inc();
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    assert!(
        text.contains("hullspeed_snapshot_prepare_total{result=\"lazy\",reason=\"\"} 1"),
        "{text}"
    );
    let written: BTreeSet<_> = text
        .lines()
        .filter_map(|line| line.strip_prefix("# TYPE "))
        .map(|line| line.to_owned())
        .collect();
    let document = include_str!("../../../docs/metrics.md");
    let documented: BTreeSet<_> = document
        .lines()
        .filter_map(|line| line.strip_prefix("| `hullspeed_"))
        .map(|line| {
            let (name, rest) = line.split_once('`').unwrap();
            format!("hullspeed_{name} {}", rest.split('|').nth(1).unwrap().trim())
        })
        .collect();
    assert_eq!(documented, written);
}
