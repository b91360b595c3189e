//! Pure functions over generated messages with fields that nobody knows.

use hullspeed_proto::cri::v1::{
    CpuUsage, LinuxPodSandboxStats, LinuxPodSandboxStatus, ListPodSandboxRequest, ListPodSandboxResponse, MemoryUsage,
    Metric, Namespace, NetworkUsage, PodSandbox, PodSandboxAttributes, PodSandboxFilter, PodSandboxMetrics,
    PodSandboxStateValue, PodSandboxStats, PodSandboxStatus, UInt64Value,
};
use proptest::collection::{hash_map, vec};
use proptest::prelude::*;
use prost::Message;

use super::*;
use crate::adopt::gojson;
use crate::containerd::facts::Facts;
use crate::rules::identity::Identities;
use crate::rules::listing::{self, Asked, List};
use crate::rules::overlay::{self, Era};
use crate::rules::parts::{inner, with_inner, without};
use crate::rules::stats::cgroup::{Memory, Reading};
use crate::rules::stats::{self, Rates};
use crate::rules::{info, samples};
use crate::wire::{fields, put_bytes};

/// Fields that no version of CRI has, of every wire type, as a newer peer may send them.
fn unknown() -> impl Strategy<Value = Vec<u8>> {
    let one =
        (1000_u32..2000, 0..4_u8, any::<u64>(), vec(any::<u8>(), 0..12)).prop_map(|(field, kind, value, bytes)| {
            let mut out = Vec::new();
            let tag = |wire: u64, out: &mut Vec<u8>| prost::encoding::encode_varint(u64::from(field) << 3 | wire, out);
            match kind {
                0 => {
                    tag(0, &mut out);
                    prost::encoding::encode_varint(value, &mut out);
                }
                1 => {
                    tag(1, &mut out);
                    out.extend_from_slice(&value.to_le_bytes());
                }
                2 => put_bytes(&mut out, field, &bytes),
                _ => {
                    tag(5, &mut out);
                    out.extend_from_slice(&value.to_le_bytes()[..4]);
                }
            }
            out
        });
    vec(one, 0..3).prop_map(|fields| fields.concat())
}

fn labels() -> impl Strategy<Value = HashMap<String, String>> {
    hash_map("[ab]", "[xy]?", 0..3)
}

/// Field-wise equality of what is left when `numbers` are taken away.
fn same_without(left: &[u8], right: &[u8], numbers: &[u32]) -> bool {
    without(left, numbers).unwrap() == without(right, numbers).unwrap()
}

/// How a sandbox came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Native,
    Known,
    Marked,
    Retired,
    Adopted,
}

#[derive(Debug, Clone)]
struct Made {
    kind: Kind,
    own: HashMap<String, String>,
    ready: bool,
    unknown: Vec<u8>,
}

fn made() -> impl Strategy<Value = Made> {
    use Kind::{Adopted, Known, Marked, Native, Retired};
    let kind = prop::sample::select(vec![Native, Known, Marked, Retired, Adopted]);
    (kind, labels(), any::<bool>(), unknown()).prop_map(|(kind, own, ready, unknown)| Made {
        kind,
        own,
        ready,
        unknown,
    })
}

/// containerd's list, the ledger that belongs to it, and the list that a client would get if there were no hulls.
fn world(all: &[Made]) -> (Vec<u8>, Identities, Vec<PodSandbox>) {
    let ledger = ledger();
    let mut answer = Vec::new();
    let mut model = Vec::new();
    for (n, one) in all.iter().enumerate() {
        let id = full_id(u8::try_from(n).unwrap());
        match one.kind {
            Kind::Known => ledger.add_hull(&id),
            Kind::Retired => ledger.retire_hull(&id),
            Kind::Adopted => drop(ledger.adopt(adoption(&id, "pod", one.own.clone()))),
            Kind::Native | Kind::Marked => {}
        }
        let native = PodSandbox {
            id: id.clone(),
            metadata: Some(metadata("native")),
            created_at: 17,
            state: i32::from(!one.ready),
            labels: if one.kind == Kind::Native {
                one.own.clone()
            } else {
                marked()
            },
            ..Default::default()
        };
        let mut item = native.encode_to_vec();
        item.extend_from_slice(&one.unknown);
        put_bytes(&mut answer, 1, &item);
        match one.kind {
            Kind::Native => model.push(native),
            Kind::Adopted => {
                let Adoption { config, .. } = adoption(&id, "pod", one.own.clone());
                model.push(PodSandbox {
                    metadata: config.metadata,
                    labels: config.labels,
                    annotations: config.annotations,
                    created_at: 1_700_000_000_000_000_000,
                    runtime_handler: "runc".into(),
                    ..native
                });
            }
            Kind::Known | Kind::Marked | Kind::Retired => {}
        }
    }
    (answer, Identities::new(ledger), model)
}

/// containerd's label filter.
fn natively(list: Vec<PodSandbox>, selector: &HashMap<String, String>) -> Vec<PodSandbox> {
    let selected = |sandbox: &PodSandbox| {
        selector
            .iter()
            .all(|(key, value)| sandbox.labels.get(key) == Some(value))
    };
    list.into_iter().filter(selected).collect()
}

proptest! {
    #[test]
    fn a_list_shows_what_a_list_without_hulls_would(all in vec(made(), 0..8), selector in labels(), tail in unknown()) {
        let (mut answer, identities, model) = world(&all);
        answer.extend_from_slice(&tail);
        let seen = listing::items(&answer, |item| listing::sandbox(item, &identities, &selector)).unwrap();
        let decoded = ListPodSandboxResponse::decode(seen.as_slice()).unwrap().items;
        prop_assert_eq!(&decoded, &natively(model, &selector));
        prop_assert!(seen.ends_with(&tail));
        // What is unknown in an item is still there, and a native item is untouched.
        let before: Vec<_> = fields(&answer).map(|field| field.unwrap().raw).collect();
        for field in fields(&seen).flatten().filter(|field| field.number == 1) {
            let item = field.value.bytes().unwrap();
            let id = PodSandbox::decode(item).unwrap().id;
            let n = usize::from(u8::from_str_radix(&id[..2], 16).unwrap());
            let rest = without(item, &[1, 2, 3, 4, 5, 6, 7]).unwrap();
            prop_assert_eq!(&rest, &all[n].unknown);
            if all[n].kind == Kind::Native {
                prop_assert!(before.contains(&field.raw));
            }
        }
    }

    #[test]
    fn a_request_loses_its_selector_and_nothing_else(
        id in "[0-9a-f]{0,4}",
        ready in any::<Option<bool>>(),
        selector in labels(),
        in_filter in unknown(),
        in_request in unknown(),
    ) {
        let filter = PodSandboxFilter {
            id: id.clone(),
            state: ready.map(|ready| PodSandboxStateValue { state: i32::from(!ready) }),
            label_selector: selector.clone(),
        };
        let mut filter = filter.encode_to_vec();
        filter.extend_from_slice(&in_filter);
        let mut request = Vec::new();
        put_bytes(&mut request, 1, &filter);
        request.extend_from_slice(&in_request);
        let asked = Asked::of(List::Sandboxes, &request).unwrap();
        prop_assert_eq!((&asked.id, &asked.selector), (&id, &selector));
        let forwarded = asked.forwarded(&request, None).unwrap();
        prop_assert!(same_without(&forwarded, &request, &[1]));
        let kept = inner(&forwarded, 1).unwrap().unwrap().into_owned();
        prop_assert_eq!(&kept, &without(&filter, &[3]).unwrap());
        let renamed = asked.forwarded(&request, Some("full")).unwrap();
        let renamed = ListPodSandboxRequest::decode(renamed.as_slice()).unwrap().filter.unwrap();
        prop_assert_eq!(renamed.id, "full");
        // A filter that comes in pieces is one filter.
        let mut pieces = Vec::new();
        for field in fields(&filter) {
            put_bytes(&mut pieces, 1, field.unwrap().raw);
        }
        if !filter.is_empty() {
            let in_pieces = Asked::of(List::Sandboxes, &pieces).unwrap();
            prop_assert_eq!(in_pieces.forwarded(&pieces, None).unwrap(), {
                let mut whole = Vec::new();
                put_bytes(&mut whole, 1, &kept);
                whole
            });
        }
    }

    #[test]
    fn a_status_carries_the_pod_and_keeps_the_rest(
        own in labels(),
        at_top in unknown(),
        at_linux in unknown(),
        at_namespaces in unknown(),
        era in prop::sample::select(vec![Era::Until1_6, Era::Since1_7]),
        given in any::<bool>(),
    ) {
        let mut adoption = adoption("abc", "pod", own);
        if !given {
            adoption.config.linux = None;
        }
        let hull = PodSandboxStatus {
            id: "abc".into(),
            metadata: Some(metadata("hull")),
            created_at: 5,
            linux: Some(LinuxPodSandboxStatus { namespaces: Some(Namespace { options: Some(NamespaceOption {
                pid: NamespaceMode::Node.into(),
                ..Default::default()
            }) }) }),
            labels: marked(),
            annotations: pairs(&[("hull", "yes")]),
            runtime_handler: String::new(),
            ..Default::default()
        };
        let mut namespaces = Namespace { options: hull.linux.clone().unwrap().namespaces.unwrap().options }.encode_to_vec();
        namespaces.extend_from_slice(&at_namespaces);
        let mut linux = Vec::new();
        put_bytes(&mut linux, 1, &namespaces);
        linux.extend_from_slice(&at_linux);
        let mut message = PodSandboxStatus { linux: None, ..hull.clone() }.encode_to_vec();
        put_bytes(&mut message, 6, &linux);
        message.extend_from_slice(&at_top);

        let seen = overlay::status(&message, &adoption, era).unwrap();
        let decoded = PodSandboxStatus::decode(seen.as_slice()).unwrap();
        prop_assert_eq!(decoded.metadata, adoption.config.metadata.clone());
        prop_assert_eq!(decoded.created_at, adoption.adopted_at);
        prop_assert_eq!(&decoded.labels, &adoption.config.labels);
        prop_assert_eq!(&decoded.annotations, &adoption.config.annotations);
        prop_assert_eq!(&decoded.runtime_handler, "runc");
        let options = decoded.linux.unwrap().namespaces.unwrap().options;
        let expected = match (given, era) {
            (true, _) => Some(NamespaceOption { pid: NamespaceMode::Container.into(), ..Default::default() }),
            (false, Era::Until1_6) => Some(NamespaceOption::default()),
            (false, Era::Since1_7) => None,
        };
        prop_assert_eq!(options, expected);
        prop_assert!(same_without(&seen, &message, &[2, 4, 6, 7, 8, 9]));
        let linux_seen = inner(&seen, 6).unwrap().unwrap();
        prop_assert!(same_without(&linux_seen, &linux, &[1]));
        let namespaces_seen = inner(&linux_seen, 1).unwrap().unwrap();
        prop_assert!(same_without(&namespaces_seen, &namespaces, &[2]));
    }

    #[test]
    fn no_bytes_make_a_rule_panic(bytes in vec(any::<u8>(), 0..160), other in unknown()) {
        let ledger = ledger();
        let one = ledger.adopt(adoption("abc", "pod", HashMap::new()));
        let identities = Identities::new(ledger);
        let reading = Reading { at: 1, cpu: 1, memory: None, pressure: [None; 3] };
        for bytes in [bytes, other] {
            let _ = overlay::status(&bytes, &one, Era::Until1_6);
            let _ = overlay::sandbox(&bytes, &one);
            let _ = stats::dressed(&bytes, &one, &reading, &Rates::default());
            let _ = samples::dressed(&bytes, &one);
            let _ = info::dressed(&bytes, &one, None);
            let _ = listing::items(&bytes, |item| listing::sandbox(item, &identities, &HashMap::new()));
            let _ = listing::visible(&bytes, &identities);
            if let Ok(asked) = Asked::of(List::Stats, &bytes) {
                let _ = asked.forwarded(&bytes, Some("x"));
            }
        }
    }
}

fn boxed(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

#[test]
fn stats_get_the_pod_and_its_usage_but_no_field_that_containerd_leaves_out() {
    let hull = PodSandboxStats {
        attributes: Some(PodSandboxAttributes {
            id: "abc".into(),
            metadata: Some(metadata("hull")),
            labels: marked(),
            ..Default::default()
        }),
        linux: Some(LinuxPodSandboxStats {
            cpu: Some(CpuUsage {
                timestamp: 1,
                usage_core_nano_seconds: boxed(2),
                ..Default::default()
            }),
            memory: Some(MemoryUsage {
                timestamp: 1,
                working_set_bytes: boxed(3),
                available_bytes: boxed(0),
                usage_bytes: boxed(4),
                rss_bytes: boxed(5),
                page_faults: boxed(6),
                ..Default::default()
            }),
            network: Some(NetworkUsage {
                timestamp: 77,
                ..Default::default()
            }),
            ..Default::default()
        }),
    };
    let pod = adoption("abc", "pod", pairs(&[("app", "web")]));
    let reading = |at, cpu| Reading {
        at,
        cpu,
        memory: Some(Memory {
            working_set: 10,
            available: 20,
            usage: 30,
            rss: 40,
            page_faults: 50,
            major_page_faults: 60,
        }),
        pressure: [None; 3],
    };
    let rates = Rates::default();
    let dressed = |item: &PodSandboxStats, at, cpu| {
        let seen = stats::dressed(&item.encode_to_vec(), &pod, &reading(at, cpu), &rates).unwrap();
        PodSandboxStats::decode(seen.as_slice()).unwrap()
    };
    let seen = dressed(&hull, 1_000, 500);
    let attributes = seen.attributes.unwrap();
    assert_eq!(
        (attributes.id.as_str(), attributes.metadata),
        ("abc", pod.config.metadata.clone())
    );
    assert_eq!(attributes.labels, pod.config.labels);
    let linux = seen.linux.unwrap();
    let cpu = linux.cpu.unwrap();
    assert_eq!(
        (cpu.timestamp, cpu.usage_core_nano_seconds, cpu.usage_nano_cores),
        (1_000, boxed(500), None)
    );
    let memory = linux.memory.unwrap();
    assert_eq!(
        (memory.working_set_bytes, memory.available_bytes),
        (boxed(10), boxed(20))
    );
    assert_eq!((memory.page_faults, memory.major_page_faults), (boxed(50), None));
    assert_eq!(linux.network.unwrap().timestamp, 77);

    // Where containerd reports a rate, ours is that of the pod: 250 ns of CPU in 1000 ns.
    let mut older = hull;
    older.linux.as_mut().unwrap().cpu.as_mut().unwrap().usage_nano_cores = boxed(9);
    let seen = dressed(&older, 2_000, 750);
    assert_eq!(seen.linux.unwrap().cpu.unwrap().usage_nano_cores, boxed(250_000_000));
}

#[test]
fn metrics_get_the_pods_name_and_namespace() {
    let metric = |values: &[&str]| Metric {
        name: "container_cpu".into(),
        label_values: values.iter().map(|value| (*value).to_owned()).collect(),
        ..Default::default()
    };
    let mut item = PodSandboxMetrics {
        pod_sandbox_id: "abc".into(),
        metrics: vec![metric(&["hull-1", "hullspeed", "", "abc"])],
        ..Default::default()
    };
    item.container_metrics.push(hullspeed_proto::cri::v1::ContainerMetrics {
        container_id: "c".into(),
        metrics: vec![metric(&["hull-1", "hullspeed", "web", "c"])],
    });
    let seen = samples::dressed(&item.encode_to_vec(), &adoption("abc", "pod", HashMap::new())).unwrap();
    let seen = PodSandboxMetrics::decode(seen.as_slice()).unwrap();
    assert_eq!(seen.metrics[0].label_values, ["pod", "shop", "", "abc"]);
    assert_eq!(
        seen.container_metrics[0].metrics[0].label_values,
        ["pod", "shop", "web", "c"]
    );
}

#[test]
fn the_verbose_document_names_the_pod_and_keeps_the_rest() {
    let document = r#"{"pid":5,"config":{"metadata":{"name":"hull"}},"runtimeHandler":"","runtimeSpec":{"hostname":"hull","annotations":{"io.kubernetes.cri.sandbox-name":"hull","io.hullspeed.made-with":"x","other":"1"},"linux":{"cgroupsPath":"/hullspeed/abc"}},"sandboxMetadata":{"Version":"v1","Metadata":{"ID":"abc","Name":"hull_","Config":null}},"new":{"a":18446744073709551615}}"#;
    let mut entry = Vec::new();
    put_bytes(&mut entry, 1, b"info");
    put_bytes(&mut entry, 2, document.as_bytes());
    let mut response = Vec::new();
    put_bytes(&mut response, 2, &entry);
    let mut pod = adoption("abc", "pod", HashMap::new());
    pod.config.linux.as_mut().unwrap().sysctls = pairs(&[("net.core.somaxconn", "9")]);
    let seen = info::dressed(&response, &pod, None).unwrap();
    let seen = hullspeed_proto::cri::v1::PodSandboxStatusResponse::decode(seen.as_slice()).unwrap();
    let config = gojson::encode(&pod.config).unwrap();
    let expected = r#"{"pid":5,"config":CONFIG,"runtimeHandler":"runc","runtimeSpec":{"hostname":"pod-host","annotations":{"io.kubernetes.cri.sandbox-name":"pod","other":"1"},"linux":{"cgroupsPath":"/hullspeed/abc","sysctl":{"net.core.somaxconn":"9"}}},"sandboxMetadata":{"Version":"v1","Metadata":{"ID":"abc","Name":"pod_shop_uid-pod_3","Config":CONFIG}},"new":{"a":18446744073709551615}}"#;
    let expected = expected.replace("CONFIG", &config);
    assert_eq!(seen.info["info"], expected);
    // containerd's own sysctls are shown where containerd puts them.
    let facts = Facts {
        enable_unprivileged_ports: true,
        ..Facts::default()
    };
    let seen = info::dressed(&response, &pod, Some(&facts)).unwrap();
    let seen = hullspeed_proto::cri::v1::PodSandboxStatusResponse::decode(seen.as_slice()).unwrap();
    let shown = seen.info["info"].matches("net.ipv4.ip_unprivileged_port_start").count();
    assert_eq!(shown, 2, "{}", seen.info["info"]);
    // A privileged pod's sysfs is writable since 2.1.
    let document = r#"{"runtimeSpec":{"mounts":[{"destination":"/proc","options":["ro"]},{"destination":"/sys","options":["nosuid","ro"]}]}}"#;
    let mut entry = Vec::new();
    put_bytes(&mut entry, 1, b"info");
    put_bytes(&mut entry, 2, document.as_bytes());
    let mut of_mounts = Vec::new();
    put_bytes(&mut of_mounts, 2, &entry);
    for (version, privileged, expected) in [
        ("1.6.20", true, r#"["nosuid","ro"]"#),
        ("2.0.7", true, r#"["nosuid","ro"]"#),
        ("2.1.9", false, r#"["nosuid","ro"]"#),
        ("2.1.9", true, r#"["nosuid","rw"]"#),
    ] {
        let facts = Facts {
            version: version.into(),
            ..Facts::default()
        };
        let linux = pod.config.linux.as_mut().unwrap();
        linux.security_context.as_mut().unwrap().privileged = privileged;
        let seen = info::dressed(&of_mounts, &pod, Some(&facts)).unwrap();
        let seen = hullspeed_proto::cri::v1::PodSandboxStatusResponse::decode(seen.as_slice()).unwrap();
        let seen = &seen.info["info"];
        assert!(
            seen.contains(expected) && seen.contains(r#""/proc","options":["ro"]"#),
            "{version} {seen}"
        );
    }
    // Another document, or none, stays.
    let same = with_inner(&response, 2, b"\x0a\x04info\x12\x03{no").unwrap();
    assert_eq!(info::dressed(&same, &pod, None).unwrap(), same);
}
