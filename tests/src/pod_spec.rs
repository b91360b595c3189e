//! Pod specifications of every kind, made from a seed: what a kubelet sends, what it might send, and what it never would.

use hullspeed_proto::cri::v1::security_profile::ProfileType;
use hullspeed_proto::cri::v1::{
    Int64Value, LinuxContainerResources, NamespaceMode, PodSandboxConfig, SeLinuxOption, SecurityProfile,
    UserNamespace, WindowsPodSandboxConfig,
};

use crate::cri::Pod;

/// A small generator of numbers: the same ones for the same seed, everywhere.
#[derive(Debug, Clone)]
pub struct Dice {
    state: u64,
}

impl Dice {
    /// Dice for this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // No state of the generator may be zero.
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        usize::try_from(self.state >> 33).unwrap_or(0) % end
    }

    /// True in `percent` of cases.
    pub fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// One of them.
    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// What should become of a pod at the relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It gets a hull.
    Adopted,
    /// containerd makes its sandbox.
    Ordinary,
    /// It does not matter which, as long as nobody can tell.
    Either,
}

/// A pod, and what should become of it.
#[derive(Debug, Clone)]
pub struct PodSpec {
    /// The pod.
    pub pod: Pod,
    /// At the relay.
    pub fate: Fate,
    /// What is special about it.
    pub note: String,
}

type Change = fn(&mut PodSandboxConfig);

/// Changes that a hull can follow, several of them in one pod.
const HARMLESS: &[(&str, Change)] = &[
    ("no hostname", |c| c.hostname.clear()),
    ("long hostname", |c| c.hostname = "h".repeat(63)),
    ("dotted hostname", |c| c.hostname = "web-0.web.default.svc".into()),
    ("dns", |c| {
        dns(
            c,
            &["10.96.0.10"],
            &["a.svc.cluster.local", "cluster.local"],
            &["ndots:5"],
        )
    }),
    ("many name servers", |c| {
        dns(c, &["1.1.1.1", "fd00::53", "8.8.8.8", "9.9.9.9"], &[], &[])
    }),
    ("empty dns", |c| dns(c, &[], &[], &[])),
    ("searches only", |c| {
        dns(c, &[], &["example.org"], &["timeout:1", "attempts:2"])
    }),
    ("seven searches", |c| {
        dns(c, &["10.0.0.1"], &["a", "b", "c", "d", "e", "f", "g"], &[])
    }),
    ("labels", labels),
    ("annotations", annotations),
    ("attempt", |c| c.metadata.get_or_insert_default().attempt = 7),
    ("last attempt", |c| {
        c.metadata.get_or_insert_default().attempt = u32::MAX
    }),
    ("container ports", |c| c.port_mappings = ports(0)),
    ("seccomp by the runtime", |c| {
        seccomp(c, ProfileType::RuntimeDefault, "")
    }),
    // As kubelets ask: with a pid namespace for each container. In a shared one the user of the pause shows.
    ("user", |c| {
        by_container(c);
        security(c).run_as_user = Some(Int64Value { value: 1000 });
    }),
    ("user and group", |c| {
        by_container(c);
        security(c).run_as_user = Some(Int64Value { value: 1000 });
        security(c).run_as_group = Some(Int64Value { value: 2000 });
    }),
    ("groups", |c| {
        by_container(c);
        security(c).supplemental_groups = vec![3000, 4000];
    }),
    ("read-only root", |c| security(c).readonly_rootfs = true),
    ("port range", |c| {
        sysctl(c, "net.ipv4.ip_local_port_range", "20000 30000")
    }),
    ("unprivileged ports", |c| {
        sysctl(c, "net.ipv4.ip_unprivileged_port_start", "1024")
    }),
    ("ping groups", |c| sysctl(c, "net.ipv4.ping_group_range", "0 1000")),
    ("syncookies", |c| sysctl(c, "net.ipv4.tcp_syncookies", "0")),
    ("shared memory", |c| sysctl(c, "kernel.shm_rmid_forced", "1")),
    ("resources", |c| {
        let resources = LinuxContainerResources {
            cpu_shares: 512,
            memory_limit_in_bytes: 256 << 20,
            ..Default::default()
        };
        c.linux.get_or_insert_default().resources = Some(resources);
        c.linux.get_or_insert_default().overhead = Some(LinuxContainerResources::default());
    }),
    ("pid namespace by container", by_container),
    ("no log directory", |c| c.log_directory.clear()),
];

/// Changes that a hull cannot follow.
const FOREIGN: &[(&str, Change)] = &[
    ("host network", |c| {
        // With the node's name, so without one of its own.
        c.hostname.clear();
        namespaces(c, NamespaceMode::Node, NamespaceMode::Container, NamespaceMode::Pod);
    }),
    ("host network and a hostname", |c| {
        c.hostname = "own".into();
        namespaces(c, NamespaceMode::Node, NamespaceMode::Container, NamespaceMode::Pod);
    }),
    ("host ipc", |c| {
        namespaces(c, NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Node)
    }),
    ("host pid", |c| {
        namespaces(c, NamespaceMode::Pod, NamespaceMode::Node, NamespaceMode::Pod)
    }),
    ("host port", |c| c.port_mappings = ports(18_080)),
    ("bandwidth", |c| {
        c.annotations
            .insert("kubernetes.io/egress-bandwidth".into(), "10M".into());
    }),
    ("unconfined", |c| seccomp(c, ProfileType::Unconfined, "")),
    ("a seccomp profile that is not there", |c| {
        seccomp(c, ProfileType::Localhost, "/not/there.json")
    }),
    // A namespace's own, but not of the set that Kubernetes calls safe.
    ("semaphores", |c| sysctl(c, "kernel.sem", "250 32000 100 256")),
    ("unreadable name", |c| {
        c.metadata.get_or_insert_default().name += "_with_underscores.and ünïcode"
    }),
    ("windows", |c| c.windows = Some(WindowsPodSandboxConfig {})),
    ("shared pid namespace with a user", |c| {
        namespaces(c, NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Pod);
        security(c).run_as_user = Some(Int64Value { value: 1000 });
    }),
];

/// Changes of which only the outcome matters: containerd refuses some, and those the relay has to refuse alike.
const STRANGE: &[(&str, Change)] = &[
    ("no metadata", |c| c.metadata = None),
    ("no name", |c| c.metadata.get_or_insert_default().name.clear()),
    ("no uid", |c| c.metadata.get_or_insert_default().uid.clear()),
    ("no linux", |c| c.linux = None),
    ("hostname too long", |c| c.hostname = "h".repeat(65)),
    ("hostname with a line break", |c| c.hostname = "a\nb".into()),
    ("label too long", |c| {
        c.labels.insert("large".into(), "x".repeat(4097));
    }),
    ("annotation of 100 KiB", |c| {
        c.annotations.insert("large".into(), "x".repeat(100 << 10));
    }),
    ("a sysctl that is not there", |c| sysctl(c, "net.ipv4.not_there", "1")),
    ("a sysctl of the host", |c| sysctl(c, "vm.swappiness", "10")),
    ("a sysctl that is a path", |c| sysctl(c, "net/../kernel.sem", "1")),
    ("a sysctl with a bad value", |c| {
        sysctl(c, "net.ipv4.tcp_syncookies", "no number")
    }),
    ("dns with a line break", |c| {
        dns(c, &["1.1.1.1\nsearch evil"], &["a b"], &["x\ny"])
    }),
    ("group without user", |c| {
        security(c).run_as_group = Some(Int64Value { value: 2000 })
    }),
    ("negative user", |c| {
        security(c).run_as_user = Some(Int64Value { value: -5 })
    }),
    ("privileged", |c| security(c).privileged = true),
    ("selinux", |c| {
        security(c).selinux_options = Some(SeLinuxOption {
            level: "s0:c1,c2".into(),
            ..Default::default()
        });
    }),
    ("user namespace of its own", |c| {
        namespaces(c, NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
        let userns = UserNamespace {
            mode: NamespaceMode::Pod.into(),
            ..Default::default()
        };
        security(c).namespace_options.get_or_insert_default().userns_options = Some(userns);
    }),
    ("a namespace mode that is none", |c| {
        security(c).namespace_options.get_or_insert_default().network = 77;
    }),
    ("target namespace", |c| {
        namespaces(c, NamespaceMode::Pod, NamespaceMode::Target, NamespaceMode::Pod)
    }),
    ("untrusted workload", |c| {
        c.annotations
            .insert("io.kubernetes.cri.untrusted-workload".into(), "true".into());
    }),
    ("the mark of a hull, guessed", |c| {
        c.labels.insert("io.hullspeed.hull".into(), "guess".into());
    }),
    ("apparmor", |c| {
        security(c).apparmor = Some(SecurityProfile {
            profile_type: ProfileType::RuntimeDefault.into(),
            ..Default::default()
        });
    }),
    ("shared pid namespace", |c| {
        namespaces(c, NamespaceMode::Pod, NamespaceMode::Pod, NamespaceMode::Pod)
    }),
    ("old seccomp field", |c| {
        security(c).seccomp_profile_path = "runtime/default".into()
    }),
];

fn security(config: &mut PodSandboxConfig) -> &mut crate::cri::Security {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default()
}

fn namespaces(config: &mut PodSandboxConfig, network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode) {
    let options = security(config).namespace_options.get_or_insert_default();
    options.network = network.into();
    options.pid = pid.into();
    options.ipc = ipc.into();
}

fn by_container(config: &mut PodSandboxConfig) {
    namespaces(config, NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Pod);
}

fn seccomp(config: &mut PodSandboxConfig, kind: ProfileType, localhost: &str) {
    security(config).seccomp = Some(SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: localhost.into(),
    });
}

fn sysctl(config: &mut PodSandboxConfig, name: &str, value: &str) {
    let linux = config.linux.get_or_insert_default();
    linux.sysctls.insert(name.into(), value.into());
}

fn dns(config: &mut PodSandboxConfig, servers: &[&str], searches: &[&str], options: &[&str]) {
    let owned = |texts: &[&str]| texts.iter().map(ToString::to_string).collect();
    config.dns_config = Some(hullspeed_proto::cri::v1::DnsConfig {
        servers: owned(servers),
        searches: owned(searches),
        options: owned(options),
    });
}

fn ports(host_port: i32) -> Vec<hullspeed_proto::cri::v1::PortMapping> {
    let port = hullspeed_proto::cri::v1::PortMapping {
        container_port: 8080,
        host_port,
        ..Default::default()
    };
    vec![port]
}

fn labels(config: &mut PodSandboxConfig) {
    let metadata = config.metadata.clone().unwrap_or_default();
    for (key, value) in [
        ("io.kubernetes.pod.name", metadata.name.as_str()),
        ("io.kubernetes.pod.namespace", &metadata.namespace),
        ("io.kubernetes.pod.uid", &metadata.uid),
        ("app", "ünï \"quoted\" \\ label"),
        ("empty", ""),
    ] {
        config.labels.insert(key.into(), value.into());
    }
}

fn annotations(config: &mut PodSandboxConfig) {
    for (key, value) in [
        ("kubernetes.io/config.seen", "2026-01-01T00:00:00Z"),
        ("json", "{\"a\": [1, 2, \"<&>\"]}"),
        ("lines", "one\ntwo\tthree \u{2028} four"),
    ] {
        config.annotations.insert(key.into(), value.into());
    }
}

/// Every change once, then `random` pods with several, of `base`, whose names end in their number.
pub fn all(seed: u64, random: usize, base: impl Fn(&str) -> Pod) -> Vec<PodSpec> {
    let mut dice = Dice::new(seed);
    let mut specs = vec![PodSpec {
        pod: base("pod-0"),
        fate: Fate::Adopted,
        note: "plain".into(),
    }];
    let kinds = [
        (HARMLESS, Fate::Adopted),
        (FOREIGN, Fate::Ordinary),
        (STRANGE, Fate::Either),
    ];
    for (changes, fate) in kinds {
        for (note, change) in changes {
            let pod = base(&format!("pod-{}", specs.len())).with(change);
            let note = (*note).to_owned();
            specs.push(PodSpec { pod, fate, note });
        }
    }
    for _ in 0..random {
        specs.push(mixed(&mut dice, base(&format!("pod-{}", specs.len()))));
    }
    specs
}

fn mixed(dice: &mut Dice, mut pod: Pod) -> PodSpec {
    let mut notes = Vec::new();
    for _ in 0..2 + dice.below(5) {
        let (note, change) = dice.pick(HARMLESS);
        notes.push(*note);
        pod = pod.with(change);
    }
    let mut fate = Fate::Adopted;
    if dice.chance(20) {
        let (note, change) = dice.pick(FOREIGN);
        notes.push(*note);
        pod = pod.with(change);
        fate = Fate::Ordinary;
    }
    PodSpec {
        pod,
        fate,
        note: notes.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_seed_gives_the_same_pods() {
        let make = |seed| -> Vec<_> {
            let specs = all(seed, 20, |name| Pod::new(name, Path::new("/logs"), "group"));
            specs.into_iter().map(|spec| (spec.note, spec.pod.request())).collect()
        };
        assert_eq!(make(1), make(1));
        assert_ne!(make(1), make(2));
    }
}
