//! What a path calls: CRI's methods, and what metrics call them.

use super::{Api, Method};

/// Label of everything that is not CRI.
pub(super) const OTHER: &str = "other";

/// CRI's methods that no rule may want, for metrics.
const PLAIN: [&str; 19] = [
    "Attach",
    "CheckpointContainer",
    "ContainerStats",
    "ContainerStatus",
    "Exec",
    "ExecSync",
    "ImageFsInfo",
    "ImageStatus",
    "ListImages",
    "ListMetricDescriptors",
    "RemoveContainer",
    "RemoveImage",
    "ReopenContainerLog",
    "RuntimeConfig",
    "Status",
    "StopContainer",
    "StreamImages",
    "UpdateContainerResources",
    "Version",
];

/// What a path calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Called {
    /// The method and version, if a rule may want it.
    pub(super) rule: Option<(Method, Api)>,
    /// The name for metrics.
    pub(super) label: &'static str,
}

/// Reads a request's path. Compared byte for byte, query included, as gRPC servers do: what is different in any way is
/// not that method for containerd either.
pub(super) fn called(path: &str) -> Called {
    let other = Called {
        rule: None,
        label: OTHER,
    };
    let Some((service, name)) = path.strip_prefix('/').and_then(|path| path.rsplit_once('/')) else {
        return other;
    };
    let (api, image) = match service {
        "runtime.v1.RuntimeService" => (Api::V1, false),
        "runtime.v1.ImageService" => (Api::V1, true),
        "runtime.v1alpha2.RuntimeService" => (Api::V1Alpha2, false),
        "runtime.v1alpha2.ImageService" => (Api::V1Alpha2, true),
        _ => return other,
    };
    match Method::named(name) {
        Some((method, label)) if (method == Method::PullImage) == image => Called {
            rule: Some((method, api)),
            label,
        },
        Some(_) => other,
        None => PLAIN
            .iter()
            .find(|plain| **plain == name)
            .map_or(other, |label| Called { rule: None, label }),
    }
}

/// Whether a call of this path is a stream that has no end of its own, so that waiting for it is in vain.
pub(super) fn is_endless(path: &str) -> bool {
    [
        "/runtime.v1.RuntimeService/GetContainerEvents",
        "/containerd.services.events.v1.Events/Subscribe",
    ]
    .contains(&path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cri_methods_are_known_in_both_versions() {
        let called_of = |path: &str| (called(path).rule, called(path).label);
        assert_eq!(
            called_of("/runtime.v1.RuntimeService/RunPodSandbox"),
            (Some((Method::RunPodSandbox, Api::V1)), "RunPodSandbox")
        );
        assert_eq!(
            called_of("/runtime.v1alpha2.RuntimeService/ListPodSandbox"),
            (Some((Method::ListPodSandbox, Api::V1Alpha2)), "ListPodSandbox")
        );
        assert_eq!(
            called_of("/runtime.v1.ImageService/PullImage"),
            (Some((Method::PullImage, Api::V1)), "PullImage")
        );
        assert_eq!(called_of("/runtime.v1.RuntimeService/Version"), (None, "Version"));
    }

    #[test]
    fn what_containerd_would_not_take_for_the_method_is_not_it() {
        for path in [
            "/runtime.v1.RuntimeService/PullImage",
            "/runtime.v1.ImageService/RunPodSandbox",
            "/runtime.v1.RuntimeService/RunPodSandbox?",
            "/runtime.v1.RuntimeService/RunPodSandbox/",
            "/runtime.v1.RuntimeService//RunPodSandbox",
            "//runtime.v1.RuntimeService/RunPodSandbox",
            "/runtime.v2.RuntimeService/RunPodSandbox",
            "/runtime.v1.RuntimeService/runpodsandbox",
            "runtime.v1.RuntimeService/RunPodSandbox",
            "/",
            "",
            "*",
        ] {
            assert_eq!(
                called(path),
                Called {
                    rule: None,
                    label: OTHER
                },
                "{path}"
            );
        }
    }
}
