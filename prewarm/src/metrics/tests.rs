//! The families as they are written, against the table of `docs/prewarm-metrics.md`.

use std::collections::BTreeSet;

use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;

use super::defs::{CallLabels, HandlerLabels, HullLabels, HullState, ReasonLabels, StateLabels};
use super::defs::{RequestLabels, ResultLabels};
use super::*;
use crate::adopt::eligibility::Ineligible;
use crate::adopt::{Miss, Outcome, rebrand};
use crate::warm::ImageState;

/// A family without series is not written at all.
fn touch(metrics: &Metrics) {
    let labels = RequestLabels {
        result: "hit",
        reason: "",
    };
    metrics.sandbox_requests.get_or_create(&labels).inc();
    let ok = ResultLabels { result: "ok" };
    metrics.rebrands.get_or_create(&ok).inc();
    metrics.hull_creations.get_or_create(&ok).inc();
    metrics.hull_creation_duration.get_or_create(&ok).observe(1.0);
    let handler = "runc".to_owned();
    let state = HullState::ready;
    metrics.pool_hulls.get_or_create(&HullLabels { handler, state }).set(1);
    let handler = "runc".to_owned();
    let labels = HandlerLabels { handler };
    metrics.pool_target.get_or_create(&labels).set(1);
    metrics.pool_oldest.get_or_create(&labels).set(1);
    let reason = ReasonLabels { reason: "cni" };
    metrics.pool_off.get_or_create(&reason).set(1);
    metrics.hulls_destroyed.get_or_create(&reason).inc();
    metrics.warm_runs.get_or_create(&ok).inc();
    metrics.warm_credentials.get_or_create(&ok).inc();
    let state = StateLabels { state: "resident" };
    metrics.warm_images.get_or_create(&state).set(1);
    let (method, code) = ("Version", "ok");
    metrics.relay_calls.get_or_create(&CallLabels { method, code }).inc();
}

#[test]
fn the_documented_metrics_are_the_real_ones() {
    let mut registry = Registry::default();
    touch(&Metrics::register(&mut registry));
    let mut text = String::new();
    encode(&mut text, &registry).unwrap();
    assert!(
        text.contains("hullspeed_sandbox_requests_total{result=\"hit\",reason=\"\"} 1"),
        "{text}"
    );
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let written: BTreeSet<_> = types.map(str::to_owned).collect();
    let document = include_str!("../../../docs/prewarm-metrics.md");
    let rows = document.lines().filter_map(|line| line.strip_prefix("| `hullspeed_"));
    let documented: BTreeSet<_> = rows
        .map(|line| {
            let (name, rest) = line.split_once('`').unwrap();
            format!("hullspeed_{name} {}", rest.split('|').nth(1).unwrap().trim())
        })
        .collect();
    assert_eq!(documented, written);
}

/// The values that the table gives for a label of a family; more may follow, where it says so.
fn documented(family: &str, label: &str) -> Vec<String> {
    let document = include_str!("../../../docs/prewarm-metrics.md");
    let row = document
        .lines()
        .find(|line| line.starts_with(&format!("| `{family}`")))
        .unwrap();
    let labels = row.split('|').nth(3).unwrap();
    let of_label = labels.split(';').map(str::trim);
    let prefix = format!("`{label}`:");
    let values = of_label.filter_map(|one| one.strip_prefix(&prefix)).next().unwrap();
    values.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

#[test]
fn closed_sets_of_labels_are_documented_as_they_are() {
    let outcomes = [
        Outcome::Hit,
        Outcome::Miss,
        Outcome::Ineligible,
        Outcome::Failed,
        Outcome::NativeOnly,
    ];
    assert_eq!(
        documented("hullspeed_sandbox_requests", "result"),
        outcomes.map(Outcome::result)
    );
    assert_eq!(
        documented("hullspeed_warm_images", "state"),
        ImageState::ALL.map(ImageState::name)
    );
    assert_eq!(documented("hullspeed_rebrands", "result"), rebrand::RESULTS);
}

#[test]
fn every_reason_is_documented() {
    let hulls = include_str!("../../../docs/hulls.md");
    let metrics = include_str!("../../../docs/prewarm-metrics.md");
    for why in Ineligible::ALL {
        let reason = why.reason();
        assert!(hulls.contains(&format!("`{reason}`")), "{reason}");
    }
    assert!(hulls.contains("`unknown_field`"));
    for miss in [Miss::Empty, Miss::Off, Miss::Handler, Miss::Stale] {
        let row = format!("| `miss` | `{}` |", miss.reason());
        assert!(metrics.contains(&row), "{row}");
    }
}
