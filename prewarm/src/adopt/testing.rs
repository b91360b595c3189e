//! A pod and a containerd as tests want them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use hullspeed_proto::cri::v1::{
    DnsConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, SecurityProfile,
};

use crate::containerd::facts::{Facts, Handler};

/// containerd 1.6 with runc, a runtime of virtual machines and one with a controller of its own.
pub(super) fn facts(root: impl AsRef<Path>) -> Facts {
    let handler = |runtime_type: &str, sandboxer: &str| Handler {
        runtime_type: runtime_type.into(),
        sandboxer: sandboxer.into(),
        pod_annotations: vec!["io.passed.*".into()],
        ..Default::default()
    };
    Facts {
        version: "1.6.20~ds1".into(),
        root: root.as_ref().to_owned(),
        default_handler: "runc".into(),
        handlers: BTreeMap::from([
            ("runc".to_owned(), handler("io.containerd.runc.v2", "")),
            ("kata".to_owned(), handler("io.containerd.kata.v2", "")),
            ("shim".to_owned(), handler("io.containerd.runc.v2", "shim")),
        ]),
        ..Default::default()
    }
}

/// A pod as a kubelet asks for it.
pub(super) fn pod(name: &str) -> PodSandboxConfig {
    PodSandboxConfig {
        metadata: Some(PodSandboxMetadata {
            name: name.into(),
            uid: format!("{name}-uid"),
            namespace: "default".into(),
            attempt: 0,
        }),
        hostname: name.into(),
        dns_config: Some(DnsConfig {
            servers: vec!["10.0.0.10".into()],
            searches: vec!["default.svc.cluster.local".into()],
            options: vec!["ndots:5".into()],
        }),
        labels: HashMap::from([("io.kubernetes.pod.name".to_owned(), name.to_owned())]),
        linux: Some(LinuxPodSandboxConfig {
            cgroup_parent: "/kubepods/besteffort/pod1".into(),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(NamespaceOption {
                    pid: 1,
                    ..Default::default()
                }),
                seccomp: Some(SecurityProfile::default()),
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    }
}
