//! containerd, as far as both daemons depend on it: its version, and what its CRI plugin is configured to do with images.

use std::collections::HashMap;

use serde_json::Value;

use super::Report;
use crate::containerd::Release;

/// The name of our snapshotter in the configurations that we hand out.
pub const SNAPSHOTTER: &str = "hullspeed";

/// What is wrong with the answer of something, if anything: its version.
pub fn examine_version(version: &str, report: &mut Report) {
    match Release::of(version) {
        Some(
            Release {
                major: 1, minor: 6 | 7, ..
            }
            | Release { major: 2, .. },
        ) => report.ok("containerd", format!("version {version}")),
        _ => report.warn(
            "containerd",
            format!("version {version} is not one that is tested"),
            "1.6, 1.7 and 2.x are; with others, watch the metrics",
        ),
    }
}

/// What CRI does with images.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImagePolicy {
    /// The snapshotter of pods' images.
    pub snapshotter: Option<String>,
    /// Whether the snapshotter is told nothing of the image that is pulled.
    pub hides_images: Option<bool>,
}

impl ImagePolicy {
    /// What the verbose answer to CRI's `Status` tells. containerd 2 keeps this where CRI does not show it.
    #[must_use]
    pub fn of_status(information: &HashMap<String, String>) -> Self {
        let config = information
            .get("config")
            .and_then(|text| serde_json::from_str::<Value>(text).ok());
        let section = config.as_ref().and_then(|config| config.get("containerd"));
        let value = |key: &str| section.and_then(|section| section.get(key));
        Self {
            snapshotter: value("snapshotter").and_then(Value::as_str).map(str::to_owned),
            hides_images: value("disableSnapshotAnnotations").and_then(Value::as_bool),
        }
    }

    /// Without annotations our snapshotter, which is called `ours`, cannot be lazy.
    pub fn examine_annotations(&self, ours: &str, report: &mut Report) {
        if self.snapshotter.as_deref() != Some(ours) {
            return;
        }
        match self.hides_images {
            Some(true) => report.warn(
                "annotations",
                "the snapshotter is told nothing of images, so no layer is lazy",
                "set disable_snapshot_annotations = false in containerd's configuration",
            ),
            Some(false) => report.ok("annotations", "the snapshotter is told of images"),
            None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    #[test]
    fn versions_that_are_tested_are_known() {
        for (version, level) in [
            ("1.6.20~ds1", Level::Ok),
            ("v1.7.34", Level::Ok),
            ("2.1.9", Level::Ok),
            ("1.5.9", Level::Warn),
            ("3.0.0", Level::Warn),
            ("", Level::Warn),
            ("main", Level::Warn),
        ] {
            let mut report = Report::default();
            examine_version(version, &mut report);
            assert_eq!(report.findings[0].level, level, "{version}");
        }
    }

    #[test]
    fn missing_annotations_matter_for_our_snapshotter_only() {
        let levels = |config: &str| {
            let mut report = Report::default();
            let policy = ImagePolicy::of_status(&HashMap::from([("config".to_owned(), config.to_owned())]));
            policy.examine_annotations(SNAPSHOTTER, &mut report);
            report.findings.iter().map(|finding| finding.level).collect::<Vec<_>>()
        };
        let with = |snapshotter: &str, disabled: &str| {
            levels(&format!(
                r#"{{"containerd":{{"snapshotter":"{snapshotter}","disableSnapshotAnnotations":{disabled}}}}}"#
            ))
        };
        assert_eq!(with("hullspeed", "true"), [Level::Warn]);
        assert_eq!(with("hullspeed", "false"), [Level::Ok]);
        assert!(with("overlayfs", "true").is_empty());
        for text in ["", "[", "{}", "{\"containerd\":1}"] {
            assert!(levels(text).is_empty(), "{text}");
        }
    }
}
