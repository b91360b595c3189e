//! Which pods may have a hull: those that containerd would have given a sandbox like it.
//!
//! A hull is made with a network of its own and nothing else: no port of the host's, no bandwidth, no label, no user, the
//! runtime's default seccomp profile. What a pod asks for beyond that is either put right at adoption (hostname, DNS,
//! sysctls), or nobody can see it, or the pod is containerd's. So is every pod that containerd would refuse: it does that
//! best itself.

use std::collections::HashMap;

use hullspeed_proto::cri::v1::{
    DnsConfig, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode, NamespaceOption, PodSandboxConfig,
    PodSandboxMetadata, SecurityProfile, SupplementalGroupsPolicy, security_profile::ProfileType,
};

use super::glob;
use crate::containerd::Release;
use crate::containerd::facts::{Facts, Handler};

/// containerd's limit on a label's key and value together.
const MAX_LABEL_BYTES: usize = 4096;

/// The kernel's limit on a hostname.
const MAX_HOSTNAME_BYTES: usize = 64;

/// The only shim whose sandboxes are Linux namespaces on this kernel.
const RUNC: &str = "io.containerd.runc.v2";

/// Annotations that make containerd shape a pod's traffic, or choose another runtime.
const BANDWIDTH: [&str; 2] = ["kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"];
const UNTRUSTED: &str = "io.kubernetes.cri.untrusted-workload";

/// Annotations of this beginning become labels of the sandbox's snapshot.
const SNAPSHOT_ANNOTATION: &str = "containerd.io/snapshot/";

/// Kubernetes' safe sysctls: of a pod's own network or IPC namespace, and without effect beyond it.
const SAFE_SYSCTLS: [&str; 12] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
];

/// What the operator allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Whether a pod must not differ from its hull even in what only the pause process has: user, groups, and an absent
    /// seccomp profile. Any profile but the runtime's default is refused in either case.
    pub strict: bool,
    /// Whether privileged pods may have a hull, where SELinux is off.
    pub privileged: bool,
    /// Whether pods with sysctls of Kubernetes' safe set may.
    pub sysctls: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            strict: false,
            privileged: true,
            sysctls: true,
        }
    }
}

/// Why a pod may not have a hull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ineligible {
    /// No metadata, or such as no CNI plugin takes.
    Metadata,
    /// The handler is none of containerd's, or not runc's, or has another sandbox controller.
    Handler,
    /// It is for Windows.
    Windows,
    /// A port of the host's.
    HostPort,
    /// The host's network, or another namespace mode that pods do not have.
    Network,
    /// The host's or another container's processes.
    Pid,
    /// The host's IPC.
    Ipc,
    /// Containers see the pause process, which has to run as the pod says.
    SharedPid,
    /// A user namespace.
    UserNamespace,
    /// SELinux options.
    Selinux,
    /// A seccomp profile other than the runtime's default.
    Seccomp,
    /// A privileged sandbox where it has another SELinux label, or where the policy refuses it.
    Privileged,
    /// A user or groups that containerd would refuse, or that the policy wants on the pause process.
    RunAs,
    /// A sysctl that is not safe, or that the policy refuses.
    Sysctls,
    /// Bandwidth.
    Bandwidth,
    /// The annotation that chooses the runtime for untrusted workloads.
    Untrusted,
    /// An annotation that reaches the OCI specification or the snapshot.
    Annotation,
    /// A label that containerd would refuse.
    Label,
    /// A hostname that the kernel would refuse.
    Hostname,
    /// A configuration of DNS that this version of containerd may read in either of two ways.
    Dns,
    /// A cgroup that containerd's cgroup driver would refuse.
    CgroupParent,
}

impl Ineligible {
    /// Every reason.
    pub const ALL: [Self; 21] = [
        Self::Metadata,
        Self::Handler,
        Self::Windows,
        Self::HostPort,
        Self::Network,
        Self::Pid,
        Self::Ipc,
        Self::SharedPid,
        Self::UserNamespace,
        Self::Selinux,
        Self::Seccomp,
        Self::Privileged,
        Self::RunAs,
        Self::Sysctls,
        Self::Bandwidth,
        Self::Untrusted,
        Self::Annotation,
        Self::Label,
        Self::Hostname,
        Self::Dns,
        Self::CgroupParent,
    ];

    /// A short, stable name.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Handler => "handler",
            Self::Windows => "windows",
            Self::HostPort => "host_port",
            Self::Network => "host_network",
            Self::Pid => "host_pid",
            Self::Ipc => "host_ipc",
            Self::SharedPid => "shared_pid_run_as",
            Self::UserNamespace => "user_namespace",
            Self::Selinux => "selinux",
            Self::Seccomp => "seccomp",
            Self::Privileged => "privileged",
            Self::RunAs => "run_as",
            Self::Sysctls => "sysctls",
            Self::Bandwidth => "bandwidth",
            Self::Untrusted => "untrusted",
            Self::Annotation => "annotation",
            Self::Label => "label",
            Self::Hostname => "hostname",
            Self::Dns => "dns",
            Self::CgroupParent => "cgroup_parent",
        }
    }
}

/// Whether this pod may have a hull of this handler.
pub fn check(config: &PodSandboxConfig, handler: &str, facts: &Facts, policy: &Policy) -> Result<(), Ineligible> {
    check_metadata(config.metadata.as_ref())?;
    let handler = plain_handler(handler, facts)?;
    if config.windows.is_some() {
        return Err(Ineligible::Windows);
    }
    check_hostname(&config.hostname)?;
    check_dns(config.dns_config.as_ref(), &facts.version)?;
    // containerd ignores a mapping without a port of the host's.
    if config.port_mappings.iter().any(|mapping| mapping.host_port > 0) {
        return Err(Ineligible::HostPort);
    }
    check_annotations(&config.annotations, &handler.pod_annotations)?;
    // Together with the labels of the pause image, which is not the pod's doing; containerd checks each on its own.
    if config
        .labels
        .iter()
        .any(|(key, value)| key.len() + value.len() > MAX_LABEL_BYTES)
    {
        return Err(Ineligible::Label);
    }
    config
        .linux
        .as_ref()
        .map_or(Ok(()), |linux| check_linux(linux, handler, facts, policy))
}

/// Names reach CNI plugins as `K=V;K=V`. Those that Kubernetes allows are safe there; others may make an ADD fail.
fn check_metadata(metadata: Option<&PodSandboxMetadata>) -> Result<(), Ineligible> {
    let metadata = metadata.ok_or(Ineligible::Metadata)?;
    let ordinary = |name: &str| {
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
        !name.is_empty() && name.bytes().all(allowed)
    };
    let names = [&metadata.name, &metadata.namespace, &metadata.uid];
    if names.into_iter().all(|name| ordinary(name)) {
        Ok(())
    } else {
        Err(Ineligible::Metadata)
    }
}

fn plain_handler<'a>(handler: &str, facts: &'a Facts) -> Result<&'a Handler, Ineligible> {
    let name = if handler.is_empty() {
        &facts.default_handler
    } else {
        handler
    };
    let handler = facts.handlers.get(name).ok_or(Ineligible::Handler)?;
    let plain = handler.runtime_type == RUNC && matches!(handler.sandboxer.as_str(), "" | "podsandbox");
    if plain { Ok(handler) } else { Err(Ineligible::Handler) }
}

fn check_hostname(hostname: &str) -> Result<(), Ineligible> {
    let odd = hostname.len() > MAX_HOSTNAME_BYTES || hostname.contains(char::is_control);
    if odd { Err(Ineligible::Hostname) } else { Ok(()) }
}

/// containerd writes any server, search domain and option as it is. Only a configuration without any of them depends on
/// the version.
fn check_dns(dns: Option<&DnsConfig>, version: &str) -> Result<(), Ineligible> {
    match dns {
        Some(dns) if is_empty(dns) && empty_dns(version).is_none() => Err(Ineligible::Dns),
        _ => Ok(()),
    }
}

fn is_empty(dns: &DnsConfig) -> bool {
    dns.servers.is_empty() && dns.searches.is_empty() && dns.options.is_empty()
}

/// What containerd makes of a DNS configuration that is there and empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EmptyDns {
    /// As if it were not there: a copy of the host's resolv.conf. Until 1.6.33 and 1.7.19.
    Host,
    /// An empty resolv.conf.
    Empty,
}

/// As this version of containerd does; none for a version that we cannot read.
#[must_use]
pub fn empty_dns(version: &str) -> Option<EmptyDns> {
    let Release { major, minor, patch } = Release::of(version)?;
    let since = match (major, minor) {
        (1, ..=5) => return Some(EmptyDns::Host),
        (1, 6) => 34,
        (1, 7) => 20,
        _ => return Some(EmptyDns::Empty),
    };
    Some(if patch? >= since {
        EmptyDns::Empty
    } else {
        EmptyDns::Host
    })
}

fn check_annotations(annotations: &HashMap<String, String>, patterns: &[String]) -> Result<(), Ineligible> {
    for name in annotations.keys() {
        if BANDWIDTH.contains(&name.as_str()) {
            return Err(Ineligible::Bandwidth);
        }
        if name == UNTRUSTED {
            return Err(Ineligible::Untrusted);
        }
        let reaches = name.starts_with(SNAPSHOT_ANNOTATION) || patterns.iter().any(|one| glob::matches(one, name));
        if reaches {
            return Err(Ineligible::Annotation);
        }
    }
    Ok(())
}

/// Whether this sysctl is one of Kubernetes' safe set.
pub(super) fn is_safe_sysctl(name: &str) -> bool {
    SAFE_SYSCTLS.contains(&name)
}

/// Overhead and resources are annotations of the pause container, for shims of virtual machines.
fn check_linux(
    linux: &LinuxPodSandboxConfig,
    handler: &Handler,
    facts: &Facts,
    policy: &Policy,
) -> Result<(), Ineligible> {
    let slice = linux.cgroup_parent.trim_end_matches('/').ends_with(".slice");
    if !linux.cgroup_parent.is_empty() && slice != handler.systemd_cgroup {
        return Err(Ineligible::CgroupParent);
    }
    if !linux.sysctls.keys().all(|name| policy.sysctls && is_safe_sysctl(name)) {
        return Err(Ineligible::Sysctls);
    }
    let none = LinuxSandboxSecurityContext::default();
    let context = linux.security_context.as_ref().unwrap_or(&none);
    let namespaces = context.namespace_options.clone().unwrap_or_default();
    check_namespaces(&namespaces)?;
    check_identity(context, namespaces.pid, policy)?;
    let selinux = context.selinux_options.as_ref();
    if selinux.is_some_and(|options| *options != Default::default()) {
        return Err(Ineligible::Selinux);
    }
    if context.privileged && (facts.selinux || !policy.privileged) {
        return Err(Ineligible::Privileged);
    }
    check_seccomp(context, policy)
}

fn check_namespaces(options: &NamespaceOption) -> Result<(), Ineligible> {
    let mode = |number| NamespaceMode::try_from(number);
    if mode(options.network) != Ok(NamespaceMode::Pod) {
        return Err(Ineligible::Network);
    }
    if mode(options.ipc) != Ok(NamespaceMode::Pod) {
        return Err(Ineligible::Ipc);
    }
    // Which of the two is the containers' business, not the sandbox's.
    if !matches!(mode(options.pid), Ok(NamespaceMode::Pod | NamespaceMode::Container)) {
        return Err(Ineligible::Pid);
    }
    match &options.userns_options {
        None => Ok(()),
        Some(users)
            if mode(users.mode) == Ok(NamespaceMode::Node) && users.uids.is_empty() && users.gids.is_empty() =>
        {
            Ok(())
        }
        Some(_) => Err(Ineligible::UserNamespace),
    }
}

/// A sandbox's user and groups are its pause process's alone. Containers see that only in a shared PID namespace.
fn check_identity(context: &LinuxSandboxSecurityContext, pid: i32, policy: &Policy) -> Result<(), Ineligible> {
    let ids = [&context.run_as_user, &context.run_as_group];
    let ids = ids.into_iter().flatten().map(|id| id.value);
    let mut ids = ids.chain(context.supplemental_groups.iter().copied());
    // What is no user or group, and a group without a user, containerd refuses.
    let refused = ids.clone().any(|id| u32::try_from(id).is_err())
        || (context.run_as_group.is_some() && context.run_as_user.is_none())
        || SupplementalGroupsPolicy::try_from(context.supplemental_groups_policy).is_err();
    let any = ids.next().is_some();
    if any && pid == NamespaceMode::Pod as i32 {
        return Err(Ineligible::SharedPid);
    }
    if refused || (any && policy.strict) {
        Err(Ineligible::RunAs)
    } else {
        Ok(())
    }
}

/// The profile of the sandbox is its pause process's alone; containers have their own. A hull's is the runtime's default.
///
/// A sandbox that names none has none in containerd, or the one that `unset_seccomp_profile` names. The hull's is
/// stricter than none, and nobody but the pause process feels it; only a strict policy refuses.
fn check_seccomp(context: &LinuxSandboxSecurityContext, policy: &Policy) -> Result<(), Ineligible> {
    let default = match &context.seccomp {
        Some(SecurityProfile {
            profile_type,
            localhost_ref,
        }) => *profile_type == ProfileType::RuntimeDefault as i32 && localhost_ref.is_empty(),
        // The old field counts only where the new one is not there.
        None => match context.seccomp_profile_path.as_str() {
            "" => !policy.strict,
            path => matches!(path, "runtime/default" | "docker/default"),
        },
    };
    if default { Ok(()) } else { Err(Ineligible::Seccomp) }
}

#[cfg(test)]
mod tests;
