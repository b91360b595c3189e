//! Every row of the table of fields.

use std::collections::BTreeMap;

use hullspeed_proto::cri::v1::{
    IdMapping, Int64Value, LinuxContainerResources, PortMapping, SeLinuxOption, UserNamespace, WindowsPodSandboxConfig,
};
use proptest::prelude::*;

use super::*;
use crate::adopt::samples::any_config;
use crate::adopt::testing;

fn facts() -> Facts {
    testing::facts("/nowhere")
}

/// A pod as a kubelet asks for it.
fn pod() -> PodSandboxConfig {
    testing::pod("web")
}

fn with(change: impl FnOnce(&mut PodSandboxConfig)) -> Result<(), Ineligible> {
    let mut config = pod();
    change(&mut config);
    check(&config, "", &facts(), &Policy::default())
}

fn linux(change: impl FnOnce(&mut LinuxPodSandboxConfig)) -> Result<(), Ineligible> {
    with(|config| change(config.linux.get_or_insert_default()))
}

fn context(change: impl FnOnce(&mut LinuxSandboxSecurityContext)) -> Result<(), Ineligible> {
    linux(|linux| change(linux.security_context.get_or_insert_default()))
}

fn namespaces(change: impl FnOnce(&mut NamespaceOption)) -> Result<(), Ineligible> {
    context(|context| change(context.namespace_options.get_or_insert_default()))
}

#[test]
fn the_kubelets_ordinary_pod_is_eligible() {
    assert_eq!(with(|_| {}), Ok(()));
    assert_eq!(with(|config| config.linux = None), Ok(()));
    assert_eq!(with(|config| config.dns_config = None), Ok(()));
    let limits = LinuxContainerResources {
        cpu_shares: 2,
        ..Default::default()
    };
    assert_eq!(linux(|linux| linux.overhead = Some(limits)), Ok(()));
}

#[test]
fn metadata_must_be_there_and_ordinary() {
    assert_eq!(with(|config| config.metadata = None), Err(Ineligible::Metadata));
    for name in ["", "a;b", "a=b", "a b", "ü"] {
        let refused = with(|config| config.metadata.as_mut().unwrap().name = name.into());
        assert_eq!(refused, Err(Ineligible::Metadata), "{name}");
    }
}

#[test]
fn only_runcs_own_sandboxes() {
    let check = |handler: &str| check(&pod(), handler, &facts(), &Policy::default());
    assert_eq!(check("runc"), Ok(()));
    for handler in ["kata", "shim", "unknown"] {
        assert_eq!(check(handler), Err(Ineligible::Handler), "{handler}");
    }
    assert_eq!(
        with(|config| config.windows = Some(WindowsPodSandboxConfig {})),
        Err(Ineligible::Windows)
    );
}

#[test]
fn ports_of_the_host() {
    let port = |host_port| PortMapping {
        host_port,
        container_port: 80,
        ..Default::default()
    };
    assert_eq!(with(|config| config.port_mappings = vec![port(0), port(-1)]), Ok(()));
    let refused = with(|config| config.port_mappings = vec![port(0), port(8080)]);
    assert_eq!(refused, Err(Ineligible::HostPort));
}

#[test]
fn namespaces_that_a_hull_has_not() {
    for mode in [1, 2, 3, 4, -1] {
        assert_eq!(namespaces(|of| of.network = mode), Err(Ineligible::Network), "{mode}");
        assert_eq!(namespaces(|of| of.ipc = mode), Err(Ineligible::Ipc), "{mode}");
        let pid = namespaces(|of| of.pid = mode);
        assert_eq!(pid, if mode == 1 { Ok(()) } else { Err(Ineligible::Pid) }, "{mode}");
    }
    let users = |mode, uids| {
        let users = UserNamespace {
            mode,
            uids,
            gids: vec![],
        };
        namespaces(|of| of.userns_options = Some(users))
    };
    assert_eq!(users(2, vec![]), Ok(()));
    assert_eq!(users(2, vec![IdMapping::default()]), Err(Ineligible::UserNamespace));
    assert_eq!(users(0, vec![]), Err(Ineligible::UserNamespace));
}

#[test]
fn users_and_groups_are_the_pause_processs() {
    let user = |value| Some(Int64Value { value });
    assert_eq!(context(|of| of.run_as_user = user(1000)), Ok(()));
    assert_eq!(context(|of| of.supplemental_groups = vec![1, 2]), Ok(()));
    assert_eq!(context(|of| of.run_as_group = user(1000)), Err(Ineligible::RunAs));
    assert_eq!(context(|of| of.run_as_user = user(-1)), Err(Ineligible::RunAs));
    assert_eq!(
        context(|of| of.supplemental_groups = vec![1 << 32]),
        Err(Ineligible::RunAs)
    );
    assert_eq!(context(|of| of.supplemental_groups_policy = 7), Err(Ineligible::RunAs));
    let shared = context(|of| {
        of.run_as_user = user(0);
        of.namespace_options = Some(NamespaceOption::default());
    });
    assert_eq!(shared, Err(Ineligible::SharedPid));
    assert_eq!(namespaces(|of| of.pid = 0), Ok(()));
    let strict = Policy {
        strict: true,
        ..Default::default()
    };
    let mut config = pod();
    assert_eq!(check(&config, "", &facts(), &strict), Ok(()));
    let linux = config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().run_as_user = user(1000);
    assert_eq!(check(&config, "", &facts(), &strict), Err(Ineligible::RunAs));
}

#[test]
fn seccomp_is_the_runtimes_default() {
    let profile = |profile_type, localhost_ref: &str| {
        let profile = SecurityProfile {
            profile_type,
            localhost_ref: localhost_ref.into(),
        };
        context(|of| of.seccomp = Some(profile))
    };
    assert_eq!(profile(0, ""), Ok(()));
    for (kind, path) in [(0, "x"), (1, ""), (2, "x"), (3, "")] {
        assert_eq!(profile(kind, path), Err(Ineligible::Seccomp), "{kind} {path}");
    }
    let old = |path: &str| {
        context(|of| {
            of.seccomp = None;
            of.seccomp_profile_path = path.into();
        })
    };
    assert_eq!(old("runtime/default"), Ok(()));
    assert_eq!(old("docker/default"), Ok(()));
    assert_eq!(old(""), Ok(()));
    for path in ["unconfined", "localhost/x", "x"] {
        assert_eq!(old(path), Err(Ineligible::Seccomp), "{path}");
    }
    let both = context(|of| of.seccomp_profile_path = "localhost/ignored".into());
    assert_eq!(both, Ok(()), "the old field is not read beside the new one");
}

#[test]
fn privileged_only_without_selinux() {
    let mut config = pod();
    let linux = config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap().privileged = true;
    let mut facts = facts();
    let policy = Policy::default();
    assert_eq!(check(&config, "", &facts, &policy), Ok(()));
    let forbidden = Policy {
        privileged: false,
        ..policy
    };
    assert_eq!(check(&config, "", &facts, &forbidden), Err(Ineligible::Privileged));
    facts.selinux = true;
    assert_eq!(check(&config, "", &facts, &policy), Err(Ineligible::Privileged));
    let label = SeLinuxOption {
        level: "s0".into(),
        ..Default::default()
    };
    assert_eq!(context(|of| of.selinux_options = Some(label)), Err(Ineligible::Selinux));
    assert_eq!(
        context(|of| of.selinux_options = Some(SeLinuxOption::default())),
        Ok(())
    );
}

#[test]
fn sysctls_of_the_safe_set() {
    let set = |name: &str| linux(|linux| linux.sysctls = [(name.to_owned(), "1".to_owned())].into());
    for name in SAFE_SYSCTLS {
        assert_eq!(set(name), Ok(()), "{name}");
    }
    for name in [
        "net.core.somaxconn",
        "kernel.msgmax",
        "net/ipv4/tcp_syncookies",
        "",
        "../../etc",
    ] {
        assert_eq!(set(name), Err(Ineligible::Sysctls), "{name}");
    }
}

#[test]
fn annotations_that_do_something() {
    let annotated = |name: &str| with(|config| config.annotations = [(name.to_owned(), "1M".to_owned())].into());
    assert_eq!(annotated("example.com/plain"), Ok(()));
    assert_eq!(annotated("kubernetes.io/egress-bandwidth"), Err(Ineligible::Bandwidth));
    assert_eq!(annotated(UNTRUSTED), Err(Ineligible::Untrusted));
    assert_eq!(annotated("containerd.io/snapshot/x"), Err(Ineligible::Annotation));
    assert_eq!(annotated("io.passed.x"), Err(Ineligible::Annotation));
    assert_eq!(annotated("io.passed/x"), Ok(()));
}

#[test]
fn what_containerd_or_the_kernel_would_refuse() {
    let label = |bytes: usize| with(|config| config.labels = [("k".to_owned(), "v".repeat(bytes))].into());
    assert_eq!((label(4095), label(4096)), (Ok(()), Err(Ineligible::Label)));
    let hostname = |name: &str| with(|config| config.hostname = name.into());
    assert_eq!(hostname(""), Ok(()));
    assert_eq!(
        (hostname(&"h".repeat(64)), hostname(&"h".repeat(65))),
        (Ok(()), Err(Ineligible::Hostname))
    );
    assert_eq!(hostname("a\nb"), Err(Ineligible::Hostname));
    let parent = |path: &str| linux(|linux| linux.cgroup_parent = path.into());
    assert_eq!(parent("/kubepods/pod1"), Ok(()));
    assert_eq!(parent("/kubepods.slice"), Err(Ineligible::CgroupParent));
}

#[test]
fn an_empty_dns_configuration_by_version() {
    let table = [
        ("1.6.20~ds1", Some(EmptyDns::Host)),
        ("v1.6.34", Some(EmptyDns::Empty)),
        ("1.7.19", Some(EmptyDns::Host)),
        ("1.7.20-k3s1", Some(EmptyDns::Empty)),
        ("2.1.9+ds1", Some(EmptyDns::Empty)),
        ("2.0-rc.1", Some(EmptyDns::Empty)),
        ("1.6", None),
        ("unknown", None),
        ("", None),
    ];
    for (version, expected) in table {
        assert_eq!(empty_dns(version), expected, "{version}");
    }
    let mut config = pod();
    config.dns_config = Some(DnsConfig::default());
    let mut facts = facts();
    assert_eq!(check(&config, "", &facts, &Policy::default()), Ok(()));
    facts.version = "nightly".into();
    assert_eq!(check(&config, "", &facts, &Policy::default()), Err(Ineligible::Dns));
}

#[test]
fn every_reason_has_a_name_of_its_own() {
    let reasons: BTreeMap<&str, ()> = ALL.iter().map(|one| (one.reason(), ())).collect();
    assert_eq!(reasons.len(), ALL.len());
}

const ALL: [Ineligible; 21] = [
    Ineligible::Metadata,
    Ineligible::Handler,
    Ineligible::Windows,
    Ineligible::HostPort,
    Ineligible::Network,
    Ineligible::Pid,
    Ineligible::Ipc,
    Ineligible::SharedPid,
    Ineligible::UserNamespace,
    Ineligible::Selinux,
    Ineligible::Seccomp,
    Ineligible::Privileged,
    Ineligible::RunAs,
    Ineligible::Sysctls,
    Ineligible::Bandwidth,
    Ineligible::Untrusted,
    Ineligible::Annotation,
    Ineligible::Label,
    Ineligible::Hostname,
    Ineligible::Dns,
    Ineligible::CgroupParent,
];

proptest! {
    #[test]
    fn whatever_is_asked_for_has_an_answer(config in any_config(), handler in "[a-z]{0,4}") {
        let answer = check(&config, &handler, &facts(), &Policy::default());
        // A pod of the host's network never gets a hull, whatever else it says.
        let context = config.linux.and_then(|linux| linux.security_context);
        let host = context.and_then(|context| context.namespace_options).is_some_and(|of| of.network == 2);
        prop_assert!(!host || answer.is_err());
    }
}
