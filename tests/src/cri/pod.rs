//! What a kubelet asks a pod to be.

use std::path::{Path, PathBuf};

/// A sandbox's security context.
pub use hullspeed_proto::cri::v1::LinuxSandboxSecurityContext as Security;
use hullspeed_proto::cri::v1::{
    DnsConfig, LinuxPodSandboxConfig, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PortMapping, RunPodSandboxRequest,
};

/// A pod to run.
#[derive(Debug, Clone)]
pub struct Pod {
    config: PodSandboxConfig,
    handler: String,
}

impl Pod {
    /// A pod named `name`, logging below `logs`, in the run's cgroup. CRI wants names unique among live pods.
    #[must_use]
    pub fn new(name: &str, logs: &Path, cgroup: &str) -> Self {
        let metadata = PodSandboxMetadata {
            name: name.into(),
            uid: name.into(),
            namespace: "hullspeed".into(),
            attempt: 0,
        };
        let linux = LinuxPodSandboxConfig {
            cgroup_parent: format!("/{cgroup}"),
            ..Default::default()
        };
        let config = PodSandboxConfig {
            metadata: Some(metadata),
            hostname: name.into(),
            log_directory: logs.to_string_lossy().into_owned(),
            linux: Some(linux),
            ..Default::default()
        };
        Self {
            config,
            handler: String::new(),
        }
    }

    /// With a change to the whole specification.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut PodSandboxConfig)) -> Self {
        change(&mut self.config);
        self
    }

    /// With a runtime handler other than the default.
    #[must_use]
    pub fn handler(mut self, handler: &str) -> Self {
        self.handler = handler.into();
        self
    }

    /// With a label.
    #[must_use]
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.config.labels.insert(key.into(), value.into());
        self
    }

    /// With an annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config.annotations.insert(key.into(), value.into());
        self
    }

    /// With name servers, search domains and resolver options.
    #[must_use]
    pub fn dns(mut self, servers: &[&str], searches: &[&str], options: &[&str]) -> Self {
        let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
        self.config.dns_config = Some(DnsConfig {
            servers: owned(servers),
            searches: owned(searches),
            options: owned(options),
        });
        self
    }

    /// With a port; a host port of 0 is none.
    #[must_use]
    pub fn port(mut self, container_port: i32, host_port: i32) -> Self {
        self.config.port_mappings.push(PortMapping {
            container_port,
            host_port,
            ..Default::default()
        });
        self
    }

    /// With a sysctl.
    #[must_use]
    pub fn sysctl(mut self, name: &str, value: &str) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        linux.sysctls.insert(name.into(), value.into());
        self
    }

    /// With a change to the security context.
    #[must_use]
    pub fn security(mut self, change: impl FnOnce(&mut Security)) -> Self {
        let linux = self.config.linux.get_or_insert_default();
        change(linux.security_context.get_or_insert_default());
        self
    }

    /// With the network, pid and ipc namespaces of these modes.
    #[must_use]
    pub fn namespaces(self, network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) -> Self {
        self.security(|security| {
            security.namespace_options = Some(NamespaceOption {
                network: network.into(),
                pid: pid.into(),
                ipc: ipc.into(),
                ..Default::default()
            });
        })
    }

    /// The specification.
    #[must_use]
    pub fn config(&self) -> &PodSandboxConfig {
        &self.config
    }

    /// The request that runs it.
    #[must_use]
    pub fn request(&self) -> RunPodSandboxRequest {
        RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.handler.clone(),
        }
    }

    /// Where the container's output goes.
    #[must_use]
    pub fn log(&self, container: &str) -> PathBuf {
        Path::new(&self.config.log_directory).join(format!("{container}.log"))
    }
}
