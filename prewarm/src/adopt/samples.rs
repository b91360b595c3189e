//! Random requests for tests.

use std::collections::HashMap;

use hullspeed_proto::cri::v1::{
    DnsConfig, HugepageLimit, IdMapping, Int64Value, LinuxContainerResources, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PortMapping,
    RunPodSandboxRequest, SeLinuxOption, SecurityProfile, UserNamespace, WindowsPodSandboxConfig,
};
use proptest::collection::{hash_map, vec};
use proptest::option::of;
use proptest::prelude::*;

fn text() -> BoxedStrategy<String> {
    prop_oneof![Just(String::new()), "[a-z0-9.]{1,12}", "\\PC{0,6}"].boxed()
}

fn map() -> BoxedStrategy<HashMap<String, String>> {
    hash_map(text(), text(), 0..3).boxed()
}

fn metadata() -> BoxedStrategy<PodSandboxMetadata> {
    (text(), text(), text(), any::<u32>())
        .prop_map(|(name, uid, namespace, attempt)| PodSandboxMetadata {
            name,
            uid,
            namespace,
            attempt,
        })
        .boxed()
}

fn dns() -> BoxedStrategy<DnsConfig> {
    (vec(text(), 0..3), vec(text(), 0..3), vec(text(), 0..3))
        .prop_map(|(servers, searches, options)| DnsConfig {
            servers,
            searches,
            options,
        })
        .boxed()
}

fn port() -> BoxedStrategy<PortMapping> {
    (0..3, any::<i32>(), any::<i32>(), text())
        .prop_map(|(protocol, container_port, host_port, host_ip)| PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip,
        })
        .boxed()
}

fn mapping() -> BoxedStrategy<IdMapping> {
    any::<[u32; 3]>()
        .prop_map(|[host_id, container_id, length]| IdMapping {
            host_id,
            container_id,
            length,
        })
        .boxed()
}

fn namespaces() -> BoxedStrategy<NamespaceOption> {
    let users = (0..4, vec(mapping(), 0..2), vec(mapping(), 0..2));
    let users = users.prop_map(|(mode, uids, gids)| UserNamespace { mode, uids, gids });
    (0..4, 0..4, 0..4, text(), of(users))
        .prop_map(|(network, pid, ipc, target_id, userns_options)| NamespaceOption {
            network,
            pid,
            ipc,
            target_id,
            userns_options,
        })
        .boxed()
}

fn integer() -> BoxedStrategy<Int64Value> {
    any::<i64>().prop_map(|value| Int64Value { value }).boxed()
}

fn profile() -> BoxedStrategy<SecurityProfile> {
    (0..3, text())
        .prop_map(|(profile_type, localhost_ref)| SecurityProfile {
            profile_type,
            localhost_ref,
        })
        .boxed()
}

fn security() -> BoxedStrategy<LinuxSandboxSecurityContext> {
    let selinux = any::<[bool; 2]>().prop_map(|[user, level]| SeLinuxOption {
        user: if user { "u".into() } else { String::new() },
        level: if level { "s0".into() } else { String::new() },
        ..Default::default()
    });
    let who = (of(integer()), of(integer()), vec(any::<i64>(), 0..4), 0..2);
    let profiles = (of(profile()), of(profile()), text());
    (of(namespaces()), of(selinux), who, any::<[bool; 2]>(), profiles)
        .prop_map(
            |(namespace_options, selinux_options, who, [readonly_rootfs, privileged], profiles)| {
                LinuxSandboxSecurityContext {
                    namespace_options,
                    selinux_options,
                    run_as_user: who.0,
                    run_as_group: who.1,
                    supplemental_groups: who.2,
                    supplemental_groups_policy: who.3,
                    readonly_rootfs,
                    privileged,
                    seccomp: profiles.0,
                    apparmor: profiles.1,
                    seccomp_profile_path: profiles.2,
                }
            },
        )
        .boxed()
}

fn resources() -> BoxedStrategy<LinuxContainerResources> {
    let pages = (text(), any::<u64>()).prop_map(|(page_size, limit)| HugepageLimit { page_size, limit });
    (any::<[i64; 6]>(), text(), text(), vec(pages, 0..2), map())
        .prop_map(
            |(numbers, cpuset_cpus, cpuset_mems, hugepage_limits, unified)| LinuxContainerResources {
                cpu_period: numbers[0],
                cpu_quota: numbers[1],
                cpu_shares: numbers[2],
                memory_limit_in_bytes: numbers[3],
                oom_score_adj: numbers[4],
                memory_swap_limit_in_bytes: numbers[5],
                cpuset_cpus,
                cpuset_mems,
                hugepage_limits,
                unified,
            },
        )
        .boxed()
}

fn linux() -> BoxedStrategy<LinuxPodSandboxConfig> {
    let limits = (of(resources()), of(resources()));
    (text(), of(security()), map(), limits)
        .prop_map(
            |(cgroup_parent, security_context, sysctls, limits)| LinuxPodSandboxConfig {
                cgroup_parent,
                security_context,
                sysctls,
                overhead: limits.0,
                resources: limits.1,
            },
        )
        .boxed()
}

/// Any configuration.
pub(super) fn any_config() -> BoxedStrategy<PodSandboxConfig> {
    let names = (of(metadata()), text(), text());
    let net = (of(dns()), vec(port(), 0..3));
    (names, net, map(), map(), of(linux()), any::<bool>())
        .prop_map(|(names, net, labels, annotations, linux, windows)| PodSandboxConfig {
            metadata: names.0,
            hostname: names.1,
            log_directory: names.2,
            dns_config: net.0,
            port_mappings: net.1,
            labels,
            annotations,
            linux,
            windows: windows.then(WindowsPodSandboxConfig::default),
        })
        .boxed()
}

/// Any request.
pub(super) fn any_request() -> BoxedStrategy<RunPodSandboxRequest> {
    (of(any_config()), text())
        .prop_map(|(config, runtime_handler)| RunPodSandboxRequest {
            config,
            runtime_handler,
        })
        .boxed()
}
