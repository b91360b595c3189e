//! The sysctls that containerd adds to those of a sandbox.

use std::borrow::Cow;

use hullspeed_proto::cri::v1::{NamespaceMode, PodSandboxConfig};

use super::facts::Facts;

/// What containerd stores, and shows, of a pod's configuration. It adds its own sysctls in place to those that the pod
/// has; where the pod has none, they reach the sandbox's specification only.
#[must_use]
pub fn stored<'a>(config: &'a PodSandboxConfig, facts: &Facts) -> Cow<'a, PodSandboxConfig> {
    let Some(linux) = config.linux.as_ref().filter(|linux| !linux.sysctls.is_empty()) else {
        return Cow::Borrowed(config);
    };
    let context = linux.security_context.as_ref();
    let options = context.and_then(|context| context.namespace_options.as_ref());
    if options.is_some_and(|options| options.network() == NamespaceMode::Node) {
        return Cow::Borrowed(config);
    }
    let defaults = [
        (
            facts.enable_unprivileged_ports,
            "net.ipv4.ip_unprivileged_port_start",
            "0",
        ),
        (
            facts.enable_unprivileged_icmp,
            "net.ipv4.ping_group_range",
            "0 2147483647",
        ),
    ];
    let mut sysctls = linux.sysctls.clone();
    for (enabled, name, value) in defaults {
        if enabled {
            sysctls.entry(name.to_owned()).or_insert_with(|| value.to_owned());
        }
    }
    let mut stored = config.clone();
    if let Some(linux) = &mut stored.linux {
        linux.sysctls = sysctls;
    }
    Cow::Owned(stored)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use hullspeed_proto::cri::v1::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    use super::*;

    fn config(sysctls: &[(&str, &str)], network: NamespaceMode) -> PodSandboxConfig {
        let options = NamespaceOption {
            network: network.into(),
            ..Default::default()
        };
        let linux = LinuxPodSandboxConfig {
            sysctls: pairs(sysctls),
            security_context: Some(LinuxSandboxSecurityContext {
                namespace_options: Some(options),
                ..Default::default()
            }),
            ..Default::default()
        };
        PodSandboxConfig {
            linux: Some(linux),
            ..Default::default()
        }
    }

    fn pairs(of: &[(&str, &str)]) -> HashMap<String, String> {
        of.iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect()
    }

    #[test]
    fn defaults_join_the_pods_own_and_do_not_replace_them() {
        let (ports, ping) = ("net.ipv4.ip_unprivileged_port_start", "net.ipv4.ping_group_range");
        let sysctls = |config: &PodSandboxConfig, facts: &Facts| stored(config, facts).linux.clone().unwrap().sysctls;
        let facts = Facts {
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
            ..Facts::default()
        };
        let pod = config(&[("net.core.somaxconn", "7"), (ping, "1 2")], NamespaceMode::Pod);
        let expected = pairs(&[("net.core.somaxconn", "7"), (ping, "1 2"), (ports, "0")]);
        assert_eq!(sysctls(&pod, &facts), expected);
        let only = config(&[("net.core.somaxconn", "7")], NamespaceMode::Pod);
        assert_eq!(sysctls(&only, &facts).get(ping).unwrap(), "0 2147483647");
        for (config, facts) in [
            (config(&[], NamespaceMode::Pod), &facts),
            (config(&[("net.core.somaxconn", "7")], NamespaceMode::Node), &facts),
            (only, &Facts::default()),
        ] {
            assert_eq!(*stored(&config, facts), config);
        }
        assert_eq!(
            *stored(&PodSandboxConfig::default(), &facts),
            PodSandboxConfig::default()
        );
    }
}
