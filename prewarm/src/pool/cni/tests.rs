//! Verdicts on networks: configurations as plugins document them, odd ones, hostile ones.

use std::fs;

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A directory with these configurations.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    for (name, content) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }
    directory
}

fn list(name: &str, plugins: &Value) -> String {
    json!({"cniVersion": "0.4.0", "name": name, "plugins": plugins}).to_string()
}

/// The verdict on one network of these plugins: its reason, empty for none.
fn verdict_with(plugins: &Value, permissions: &CniPermissions) -> &'static str {
    let directory = directory(&[("10-net.conflist", &list("net", plugins))]);
    assess(directory.path(), 1, permissions).map_or_else(|off| off.reason, |_| "")
}

fn verdict(plugins: &Value) -> &'static str {
    verdict_with(plugins, &CniPermissions::default())
}

fn names(directory: &tempfile::TempDir, max: usize) -> Vec<String> {
    let networks = assess(directory.path(), max, &CniPermissions::default()).unwrap();
    networks.into_iter().map(|network| network.name).collect()
}

#[test]
fn the_first_files_by_name_count() {
    let plugins = json!([{"type": "bridge"}]);
    let single = r#"{"cniVersion":"0.3.1","name":"single","type":"ptp"}"#;
    let directory = directory(&[
        ("20-b.conflist", &list("b", &plugins)),
        ("10-a.json", single),
        ("05-ignored.txt", "not JSON"),
        ("06-ignored.conf.bak", "not JSON"),
        ("30-c.conf", &single.replace("single", "c")),
    ]);
    fs::create_dir(directory.path().join("01-directory.conf")).unwrap();
    assert_eq!(names(&directory, 1), ["single"]);
    assert_eq!(names(&directory, 2), ["single", "b"]);
    assert_eq!(names(&directory, 0), ["single", "b", "c"]);
}

#[test]
fn plugins_beside_the_list_are_checked_too() {
    let plugins = json!([{"type": "bridge"}]);
    let directory = directory(&[
        ("10-net.conflist", &list("net", &plugins)),
        ("net/10-x.conf", r#"{"type":"calico"}"#),
    ]);
    let off = assess(directory.path(), 1, &CniPermissions::default()).unwrap_err();
    assert_eq!(off.reason, "cni_plugin");
}

#[test]
fn what_is_no_configuration_is_refused_with_its_file() {
    let no_plugins = r#"{"name":"x","plugins":[]}"#;
    let many = format!("[{}1]", "1,".repeat(600_000));
    for content in [
        "",
        "{",
        "[]",
        "{}",
        r#"{"name":"../x","type":"bridge"}"#,
        no_plugins,
        r#"{"name":"x","plugins":7}"#,
        &many,
    ] {
        let directory = directory(&[("10-net.conflist", content)]);
        let off = assess(directory.path(), 1, &CniPermissions::default()).unwrap_err();
        assert_eq!(off.reason, "cni_invalid");
        assert!(off.detail.contains("10-net.conflist"), "{}", off.detail);
    }
    let empty = directory(&[]);
    let absent = empty.path().join("absent");
    for path in [empty.path(), &absent] {
        assert_eq!(
            assess(path, 1, &CniPermissions::default()).unwrap_err().reason,
            "cni_absent"
        );
    }
    let fifo = directory(&[]);
    std::os::unix::fs::symlink("/dev/zero", fifo.path().join("1.conf")).unwrap();
    assert_eq!(
        assess(fifo.path(), 1, &CniPermissions::default()).unwrap_err().reason,
        "cni_invalid"
    );
}

#[test]
fn networks_that_ignore_identity_are_let_through() {
    let host_local = json!({"type": "host-local", "ranges": [[{"subnet": "10.1.0.0/24"}]]});
    for plugins in [
        // kindnet
        json!([{"type": "ptp", "ipMasq": false, "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam-state",
            "routes": [{"dst": "0.0.0.0/0"}], "ranges": [[{"subnet": "10.244.0.0/24"}]]}, "mtu": 1500},
            {"type": "portmap", "capabilities": {"portMappings": true}}]),
        // flannel
        json!([{"type": "flannel", "delegate": {"hairpinMode": true, "isDefaultGateway": true}},
            {"type": "portmap", "capabilities": {"portMappings": true}}, {"type": "bandwidth", "capabilities": {"bandwidth": true}}]),
        json!([{"type": "macvlan", "master": "eth0", "ipam": host_local}, {"type": "tuning", "capabilities": {"mac": true}}]),
        json!([{"type": "bridge", "ipam": host_local}, {"type": "firewall"}, {"type": "sbr"}, {"type": "loopback"}]),
        json!([{"type": "ipvlan", "ipam": {"type": "static", "addresses": [{"address": "10.1.0.2/24"}]}}]),
        json!([{"type": "bridge", "ipam": {}, "capabilities": {"io.kubernetes.cri.pod-annotations": false}}]),
    ] {
        assert_eq!(verdict(&plugins), "", "{plugins}");
    }
}

#[test]
fn everything_else_is_refused() {
    for (plugins, reason) in [
        (json!([{"type": "calico"}]), "cni_plugin"),
        (json!([{"type": "bridge"}, {"type": "istio-cni"}]), "cni_plugin"),
        (json!([{"type": "host-device", "device": "eth1"}]), "cni_plugin"),
        (json!([{"type": "mine"}]), "cni_plugin"),
        (json!([{"type": "/opt/bridge"}]), "cni_plugin"),
        (json!([{"type": ["bridge"]}]), "cni_plugin"),
        (
            json!([{"type": "flannel", "delegate": {"type": "calico"}}]),
            "cni_plugin",
        ),
        (
            json!([{"type": "flannel", "delegate": {"ipam": {"type": "dhcp"}}}]),
            "cni_ipam",
        ),
        (json!([{"type": "bridge", "ipam": {"type": "dhcp"}}]), "cni_ipam"),
        (json!([{"type": "bridge", "ipam": {"type": "whereabouts"}}]), "cni_ipam"),
        (json!([{"type": "bridge", "ipam": {"type": 7}}]), "cni_ipam"),
        (json!([{"type": "bridge", "ipam": {"type": "static"}}]), "cni_ipam"),
        (
            json!([{"type": "bridge", "capabilities": {"io.kubernetes.cri.pod-annotations": true}}]),
            "cni_capability",
        ),
        (
            json!([{"type": "bridge", "capabilities": {"cgroupPath": true}}]),
            "cni_capability",
        ),
        (
            json!([{"type": "bridge", "capabilities": {"new": "yes"}}]),
            "cni_capability",
        ),
        (json!([{"type": "bridge", "Type": "calico"}]), "cni_invalid"),
        (json!([{"type": "bridge", "IPAM": {"type": "dhcp"}}]), "cni_invalid"),
        (
            json!([{"type": "bridge", "capabilitieſ": {"cgroupPath": true}}]),
            "cni_invalid",
        ),
        (json!([{"type": "bridge", "ipam": 7}]), "cni_invalid"),
        (json!([7]), "cni_invalid"),
    ] {
        assert_eq!(verdict(&plugins), reason, "{plugins}");
    }
}

#[test]
fn the_operator_may_vouch_for_plugins_or_for_all() {
    let plugins = json!([{"type": "mine", "ipam": {"type": "pool"}}]);
    let vouched = |types: &[&str]| CniPermissions {
        extra_types: types.iter().map(ToString::to_string).collect(),
        allow_any: false,
    };
    assert_eq!(verdict_with(&plugins, &vouched(&["mine"])), "cni_ipam");
    assert_eq!(verdict_with(&plugins, &vouched(&["mine", "pool"])), "");
    let any = CniPermissions {
        allow_any: true,
        ..Default::default()
    };
    assert_eq!(verdict_with(&json!([{"type": "calico"}]), &any), "");
    assert_eq!(verdict_with(&json!("x"), &any), "cni_invalid");
}

/// Free addresses of a network with this IPAM, after these have been handed out.
fn left(ipam: Value, allocated: &[&str]) -> Option<u64> {
    let data = tempfile::tempdir().unwrap();
    fs::create_dir(data.path().join("net")).unwrap();
    for name in allocated {
        fs::write(data.path().join("net").join(name), "id").unwrap();
    }
    let mut ipam = ipam;
    ipam["dataDir"] = json!(data.path());
    let directory = directory(&[("1.conflist", &list("net", &json!([{"type": "bridge", "ipam": ipam}])))]);
    let any = CniPermissions {
        allow_any: true,
        ..Default::default()
    };
    free(assess(directory.path(), 1, &any).unwrap().iter())
}

#[test]
fn addresses_are_counted_as_host_local_hands_them_out() {
    let sets = |sets: Value| json!({"type": "host-local", "ranges": sets});
    let small = json!({"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.10", "rangeEnd": "10.1.0.19"});
    // All but network, gateway and broadcast.
    assert_eq!(
        left(json!({"type": "host-local", "subnet": "10.1.0.0/24"}), &[]),
        Some(253)
    );
    assert_eq!(left(sets(json!([[small]])), &["lock", "last_reserved_ip.0"]), Some(10));
    assert_eq!(
        left(sets(json!([[small]])), &["10.1.0.10", "10.1.0.19", "10.1.0.20"]),
        Some(8)
    );
    let gateway =
        json!({"subnet": "10.1.0.0/24", "rangeStart": "10.1.0.10", "rangeEnd": "10.1.0.19", "gateway": "10.1.0.12"});
    assert_eq!(left(sets(json!([[gateway]])), &["10.1.0.10"]), Some(8));
    // Two ranges of one set add up; of two sets the smaller one decides.
    assert_eq!(
        left(sets(json!([[small, {"subnet": "10.2.0.0/30"}]])), &["10.2.0.2"]),
        Some(10)
    );
    let v6 = json!({"subnet": "fd00::/64"});
    assert_eq!(left(sets(json!([[small], [v6]])), &["10.1.0.11", "fd00::5"]), Some(9));
    assert_eq!(left(sets(json!([[v6]])), &[]), Some(u64::MAX - 1));
    assert_eq!(left(sets(json!([[{"subnet": "fd00::/126"}]])), &["fd00::3"]), Some(1));
    let full: Vec<String> = (10..20).map(|last| format!("10.1.0.{last}")).collect();
    let full: Vec<&str> = full.iter().map(String::as_str).collect();
    assert_eq!(left(sets(json!([[small]])), &full), Some(0));
}

#[test]
fn what_cannot_be_counted_is_unknown() {
    for ipam in [
        json!({"type": "other"}),
        json!({"type": "host-local"}),
        json!({"type": "host-local", "subnet": "10.1.0.0/33"}),
        json!({"type": "host-local", "subnet": "10.1.0.0/31"}),
        json!({"type": "host-local", "subnet": "nonsense"}),
        json!({"type": "host-local", "ranges": [[]]}),
        json!({"type": "host-local", "ranges": [7]}),
        json!({"type": "host-local", "subnet": "10.1.0.0/24", "rangeStart": "fd00::1"}),
        json!({"type": "host-local", "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.9", "rangeEnd": "10.1.0.8"}),
    ] {
        assert_eq!(left(ipam.clone(), &[]), None, "{ipam}");
    }
    assert_eq!(free(std::iter::empty()), None);
}

#[test]
fn flannels_subnet_is_read_and_watched() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("subnet.env");
    fs::write(
        &file,
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.72.1/24\nFLANNEL_MTU=1450\n",
    )
    .unwrap();
    // A name of its own, so that nothing of a real network is counted.
    let name = format!("test-{}", std::process::id());
    let plugins = json!([{"type": "flannel", "subnetFile": file}]);
    let directory = directory(&[("1.conflist", &list(&name, &plugins))]);
    let networks = assess(directory.path(), 1, &CniPermissions::default()).unwrap();
    assert_eq!(networks[0].inputs, [file]);
    assert_eq!(free(networks.iter()), Some(253));
}

#[test]
fn what_containerd_has_loaded_is_compared() {
    let plugins = json!([{"type": "bridge", "mtu": 1500}, {"type": "portmap"}]);
    let directory = directory(&[("1.conflist", &list("net", &plugins))]);
    let networks = assess(directory.path(), 1, &CniPermissions::default()).unwrap();
    let description = |mtu: &str| {
        let loopback = json!({"Config": {"Name": "cni-loopback", "Plugins": [{"Source": "{\"type\":\"loopback\"}"}]}});
        let source = format!(r#"{{"mtu":{mtu},"type":"bridge"}}"#);
        let ours =
            json!({"Config": {"Name": "net", "Plugins": [{"Source": source}, {"Source": "{\"type\":\"portmap\"}"}]}});
        json!({"Networks": [loopback, ours]}).to_string()
    };
    assert_eq!(is_loaded(&networks, &description("1500")), Some(true));
    assert_eq!(is_loaded(&networks, &description("1.5e3")), Some(true));
    assert_eq!(is_loaded(&networks, &description("1400")), Some(false));
    assert_eq!(is_loaded(&networks, r#"{"Networks":[]}"#), Some(false));
    for unknown in ["", "{}", r#"{"Networks":[{"Config":{"Name":"net"}}]}"#] {
        assert_eq!(is_loaded(&networks, unknown), None);
    }
}

fn any_json() -> impl Strategy<Value = Value> {
    let words = [
        "bridge",
        "host-local",
        "calico",
        "flannel",
        "10.0.0.0/8",
        "::/0",
        "",
        "x",
    ];
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop::sample::select(words.to_vec()).prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        let keys = [
            "type",
            "ipam",
            "capabilities",
            "delegate",
            "ranges",
            "subnet",
            "name",
            "plugins",
            "addresses",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(prop::sample::select(keys.to_vec()), inner, 0..5)
                .prop_map(|map| map.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// Nothing panics, and what is let through is made of known types only.
    #[test]
    fn any_plugins_are_survived(plugins in prop::collection::vec(any_json(), 1..4)) {
        let directory = directory(&[("1.conflist", &list("net", &Value::from(plugins.clone())))]);
        if let Ok(networks) = assess(directory.path(), 1, &CniPermissions::default()) {
            for plugin in &networks[0].plugins {
                prop_assert!(matches!(verdict::text(plugin, "type"), "bridge" | "flannel"));
            }
            free(networks.iter());
        }
    }

    #[test]
    fn any_bytes_are_survived(content in prop::collection::vec(any::<u8>(), 0..200)) {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("1.conflist"), &content).unwrap();
        prop_assert!(assess(directory.path(), 1, &CniPermissions::default()).is_err());
    }
}
