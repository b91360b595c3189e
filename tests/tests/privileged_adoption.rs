//! Adoption against a real containerd: what a pod gets is what containerd would have given it, at once and after
//! restarts of either side.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hullspeed_prewarm::adopt::{Outcome, fault};
use hullspeed_prewarm::containerd::Containerd as Client;
use hullspeed_prewarm::containerd::facts::Facts;
use hullspeed_prewarm::ledger::HULL_LABEL;
use hullspeed_proto::containerd::services::sandbox::v1::StoreGetRequest;
use hullspeed_proto::cri::v1::{DnsConfig, PodSandboxFilter};
use hullspeed_tests::cri::{Pod, container_config};
use hullspeed_tests::process;
use hullspeed_tests::release::Release;
use prost::Message as _;
use serde_json::Value;

#[path = "adoption/node.rs"]
mod node;

use node::{LIMIT, Life, Node, inside, seen_by};

/// A pod with everything that adoption has to put right.
fn demanding(node: &Node, name: &str) -> Pod {
    node.pod(name)
        .dns(&["10.96.0.10", "fd00::a"], &["a.svc", "svc"], &["ndots:5", "edns0"])
        .label("io.kubernetes.pod.name", name)
        .annotation("example.com/plain", "value <&>")
        .sysctl("net.ipv4.ip_unprivileged_port_start", "80")
        .sysctl("net.ipv4.ip_local_port_range", "40000 41000")
        .sysctl("kernel.shm_rmid_forced", "1")
        .security(|security| security.supplemental_groups = vec![1234])
        .with(|config| {
            let linux = config.linux.as_mut().unwrap();
            let context = linux.security_context.as_mut().unwrap();
            context.namespace_options.get_or_insert_default().pid = 1;
        })
}

/// What a sandbox is, seen from inside and on disk.
async fn looks(node: &mut Node, id: &str) -> Vec<(&'static str, String)> {
    let pid = node.pid(id).await;
    let cat = |namespace: &str, path: &str| inside(pid, &[namespace], &["cat", path]);
    vec![
        ("hostname", inside(pid, &["uts"], &["uname", "-n"])),
        ("domain", cat("uts", "/proc/sys/kernel/domainname")),
        (
            "port start",
            cat("net", "/proc/sys/net/ipv4/ip_unprivileged_port_start"),
        ),
        ("port range", cat("net", "/proc/sys/net/ipv4/ip_local_port_range")),
        ("rmid", cat("ipc", "/proc/sys/kernel/shm_rmid_forced")),
        ("hostname file", node.file(id, "hostname")),
        ("resolv.conf", node.file(id, "resolv.conf")),
        ("hosts", node.file(id, "hosts")),
    ]
}

/// The configuration in containerd's record, apart from what names the pod, and from the sysctl that containerd 2.x
/// writes into a pod's own configuration, if that has any, when it makes the pause process's.
fn nameless(record: &Value, name: &str) -> Value {
    let text = record["Metadata"]["Config"].to_string();
    let mut config: Value = serde_json::from_str(&text.replace(name, "NAME")).unwrap();
    let sysctls = config["linux"]["sysctls"].as_object_mut().unwrap();
    sysctls.remove("net.ipv4.ping_group_range");
    config
}

async fn adopted_equals_native(release: Release) {
    let mut node = Node::new(release).await;
    node.begin_life();
    let none = node.life().adopter.recover(node.facts.clone()).await.unwrap();
    assert!(none.idle.is_empty() && none.adopted.is_empty());
    let hull = node.stock().await;
    let pod = demanding(&node, "adopted-pod");
    let id = node.run_pod(&pod).await.unwrap();
    assert_eq!(id, hull);
    assert_eq!(*node.life().counts.requests.lock().unwrap(), [(Outcome::Hit, "")]);
    assert_eq!(*node.life().hulls.begun.lock().unwrap(), std::slice::from_ref(&id));
    // The same pod from containerd itself.
    let twin = demanding(&node, "natives-pod");
    let native = node.cri.run_sandbox(&twin).await.unwrap();
    let rename = |looks: Vec<(&'static str, String)>, name: &str| -> Vec<(&'static str, String)> {
        looks
            .into_iter()
            .map(|(what, text)| (what, text.replace(name, "NAME")))
            .collect()
    };
    let adopted_looks = rename(looks(&mut node, &id).await, "adopted-pod");
    let native_looks = rename(looks(&mut node, &native).await, "natives-pod");
    assert_eq!(adopted_looks, native_looks);
    assert_eq!(adopted_looks[0].1, "NAME");

    // A container sees them, and runs in them.
    let image = node.image.clone();
    let container = node.cri.create_container(&id, &pod, "main", &image).await.unwrap();
    node.cri.start_container(&container).await.unwrap();
    let info = node.cri.container(&container).await.unwrap().info;
    let info: Value = serde_json::from_str(&info["info"]).unwrap();
    let pid = info["pid"].as_i64().unwrap();
    assert_eq!(seen_by(pid, "etc/hostname"), "adopted-pod\n");
    assert!(seen_by(pid, "etc/resolv.conf").starts_with("search a.svc svc\nnameserver 10.96.0.10\n"));
    let uts = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/uts")).unwrap();
    let pause = node.pid(&id).await;
    assert_eq!(uts(&pid.to_string()), uts(&pause.to_string()));

    // The record is the native one's twin.
    node.rebranded(&id).await;
    let (labels, record) = node.record(&id).await;
    let (native_labels, native_record) = node.record(&native).await;
    assert_eq!(record["Metadata"]["Name"], "adopted-pod_hullspeed_adopted-pod_0");
    assert_eq!(
        nameless(&record, "adopted-pod"),
        nameless(&native_record, "natives-pod")
    );
    let plain = |labels: HashMap<String, String>, name: &str| -> HashMap<String, String> {
        labels
            .into_iter()
            .map(|(key, value)| (key, value.replace(name, "NAME")))
            .collect()
    };
    assert_eq!(plain(labels, "adopted-pod"), plain(native_labels, "natives-pod"));
    if release == Release::Two {
        let sandbox_id = id.clone();
        let stored = node
            .client
            .sandboxes()
            .get(StoreGetRequest { sandbox_id })
            .await
            .unwrap();
        let stored = stored.into_inner().sandbox.unwrap();
        assert_eq!(stored.labels["name"], "adopted-pod_hullspeed_adopted-pod_0");
        let second: Value = serde_json::from_slice(&stored.extensions["metadata"].value).unwrap();
        assert_eq!(second["Metadata"]["Config"], record["Metadata"]["Config"]);
    }

    // containerd alone: the pod is there, and can be taken down.
    node.life().adopter.shutdown().await;
    node.restart_containerd().await;
    let listed = node.cri.sandboxes(PodSandboxFilter::default()).await.unwrap();
    let listed = listed.iter().find(|sandbox| sandbox.id == id).unwrap();
    assert_eq!(listed.metadata, pod.config().metadata);
    assert_eq!(listed.labels, pod.config().labels);
    assert_eq!(listed.annotations, pod.config().annotations);
    assert_eq!(listed.state, 0, "it runs");
    let status = node.cri.container(&container).await.unwrap().status.unwrap();
    assert_eq!(status.state, 1, "its container runs");
    let ip = node.cri.sandbox_ip(&id).await.unwrap().to_string();
    assert!(node.addresses().contains(&ip));
    node.cri.remove_sandbox(&id).await.unwrap();
    assert!(!node.addresses().contains(&ip), "the address is free again");
    node.cri.remove_everything().await.unwrap();
    assert_eq!(node.addresses(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_pod_equals_a_native_one() {
    adopted_equals_native(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_pod_equals_a_native_one_of_containerd_2() {
    adopted_equals_native(Release::Two).await;
}

/// DNS that is absent and DNS that is empty differ, and between versions; so does an empty hostname from any other.
async fn corners(release: Release) {
    let mut node = Node::new(release).await;
    node.begin_life();
    node.life().adopter.recover(node.facts.clone()).await.unwrap();
    let shapes: [fn(Pod) -> Pod; 4] = [
        |pod| pod.with(|config| config.dns_config = None),
        |pod| pod.with(|config| config.dns_config = Some(DnsConfig::default())),
        |pod| pod.dns(&[], &["only.search"], &[]),
        |pod| pod.with(|config| config.hostname = String::new()),
    ];
    for (index, shape) in shapes.into_iter().enumerate() {
        let hull = node.stock().await;
        let id = node.run_pod(&shape(node.pod(&format!("same-{index}")))).await.unwrap();
        assert_eq!(id, hull);
        let twin = shape(node.pod(&format!("twin-{index}")));
        let native = node.cri.run_sandbox(&twin).await.unwrap();
        let strip = |looks: Vec<(&'static str, String)>| -> Vec<String> {
            looks
                .into_iter()
                .map(|(_, text)| text.replace("twin-", "same-"))
                .collect()
        };
        let (ours, theirs) = (looks(&mut node, &id).await, looks(&mut node, &native).await);
        assert_eq!(strip(ours), strip(theirs), "shape {index}");
    }
    node.life().adopter.shutdown().await;
    node.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_and_empty_values_are_containerds() {
    corners(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn absent_and_empty_values_are_those_of_containerd_2() {
    corners(Release::Two).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_life_finds_hulls_and_pods() {
    let mut node = Node::new(Release::One).await;
    node.begin_life();
    node.life().adopter.recover(node.facts.clone()).await.unwrap();
    let first = node.stock().await;
    let (idle, _) = node.hull().await;
    // With containerd stopped, the record cannot be rewritten: only the journal knows.
    node.containerd.process().stop().unwrap();
    let pod = demanding(&node, "adopted-pod");
    assert_eq!(node.run_pod(&pod).await.unwrap(), first);
    let adopted_at = node.life().ledger.adoption(&first).unwrap().adopted_at;
    node.life().adopter.shutdown().await;
    node.containerd.start_again(&node.run).await.unwrap();
    node.cri = node.containerd.cri().await.unwrap();
    // The pod's own from now on: what it writes there stays.
    let hostname = node.facts.root.join("sandboxes").join(&first).join("hostname");
    std::fs::write(&hostname, "its own\n").unwrap();

    node.begin_life();
    assert!(
        node.life().ledger.adoption(&first).is_some(),
        "the journal tells, at once"
    );
    let found = node.life().adopter.recover(node.facts.clone()).await.unwrap();
    assert_eq!(
        found.idle.iter().map(|hull| hull.id.as_str()).collect::<Vec<_>>(),
        [idle.as_str()]
    );
    assert!(found.idle[0].ready && found.dropped.is_empty());
    assert_eq!(found.adopted.len(), 1);
    assert_eq!(found.adopted[0].adopted_at, adopted_at);
    assert_eq!(found.adopted[0].config, *pod.config());
    assert_eq!(std::fs::read_to_string(&hostname).unwrap(), "its own\n");
    node.rebranded(&first).await;
    let refused = node.run_pod(&pod).await.unwrap_err();
    let text = format!("name \"adopted-pod_hullspeed_adopted-pod_0\" is reserved for \"{first}\"");
    assert!(refused.message().ends_with(&text), "{refused}");

    // Without a journal the record tells, before and after containerd is restarted.
    for restart in [false, true] {
        node.life().adopter.shutdown().await;
        std::fs::remove_file(node.state.join("journal")).unwrap();
        if restart {
            node.restart_containerd().await;
        }
        node.begin_life();
        let found = node.life().adopter.recover(node.facts.clone()).await.unwrap();
        assert_eq!(found.adopted.len(), 1, "after a restart of containerd: {restart}");
        assert_eq!(found.adopted[0].adopted_at, adopted_at);
        assert!(found.idle.is_empty(), "it may have been handed out");
        let dropped: Vec<_> = found.dropped.iter().map(|hull| &hull.id).collect();
        assert_eq!(dropped, [&idle]);
    }

    // A hull with a container in it is nobody's to hand out.
    let strange = node.pod("strange");
    let image = node.image.clone();
    node.cri
        .create_container(&idle, &strange, "main", &image)
        .await
        .unwrap();
    let found = node.life().adopter.recover(node.facts.clone()).await.unwrap();
    assert_eq!(
        found.dropped.iter().map(|hull| hull.id.as_str()).collect::<Vec<_>>(),
        [idle.as_str()]
    );
    assert!(found.idle.is_empty());

    // Removed behind our back, its name is free.
    node.cri.remove_sandbox(&first).await.unwrap();
    let again = node.run_pod(&pod).await.unwrap();
    assert_ne!(again, first);
    node.life().adopter.shutdown().await;
    node.cri.remove_everything().await.unwrap();
    assert_eq!(node.addresses(), Vec::<String>::new());
}

/// Two records of one name keep containerd from starting.
async fn of_two_sandboxes_one_remains(release: Release) {
    let mut node = Node::new(release).await;
    node.begin_life();
    node.life().adopter.recover(node.facts.clone()).await.unwrap();
    let hull = node.stock().await;
    let pod = demanding(&node, "twice");
    assert_eq!(node.run_pod(&pod).await.unwrap(), hull);
    node.rebranded(&hull).await;
    // By somebody who does not ask the relay.
    let native = node.cri.run_sandbox(&pod).await.unwrap();
    let found = node.life().adopter.recover(node.facts.clone()).await.unwrap();
    assert!(found.adopted.is_empty() && found.dropped.len() == 1);
    let end = Instant::now() + LIMIT;
    while node.cri.sandboxes(PodSandboxFilter::default()).await.unwrap().len() > 1 {
        assert!(Instant::now() < end, "the second one stays");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    node.life().adopter.shutdown().await;
    node.restart_containerd().await;
    let left = node.cri.sandboxes(PodSandboxFilter::default()).await.unwrap();
    assert_eq!(left.iter().map(|one| &one.id).collect::<Vec<_>>(), [&native]);
    node.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sandbox_of_a_name_goes() {
    of_two_sandboxes_one_remains(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sandbox_of_a_name_goes_on_containerd_2() {
    of_two_sandboxes_one_remains(Release::Two).await;
}

/// What a privileged container can do to its network namespace's sysfs: how that is mounted, and whether it takes a write.
async fn sysfs_of(node: &mut Node, pod: &Pod, id: &str) -> String {
    let mut config = container_config("main", &node.image, &[]);
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().privileged = true;
    let container = node.cri.create_container_from(id, pod, config).await.unwrap();
    node.cri.start_container(&container).await.unwrap();
    let info = node.cri.container(&container).await.unwrap().info;
    let info: Value = serde_json::from_str(&info["info"]).unwrap();
    let pid = info["pid"].as_i64().unwrap();
    let mounts = std::fs::read_to_string(format!("/proc/{pid}/mounts")).unwrap();
    let of_sysfs: Vec<_> = mounts.lines().filter(|line| line.starts_with("sysfs /sys ")).collect();
    let alias = format!("/proc/{pid}/root/sys/class/net/eth0/ifalias");
    let written = std::fs::write(&alias, "written\n").map_err(|error| error.kind());
    format!("{of_sysfs:?} {written:?} {}", std::fs::read_to_string(&alias).unwrap())
}

async fn privileged_pods_write_to_sysfs(release: Release) {
    let mut node = Node::new(release).await;
    node.begin_life();
    node.life().adopter.recover(node.facts.clone()).await.unwrap();
    let hull = node.stock().await;
    let pod = |name: &str| node.pod(name).security(|security| security.privileged = true);
    let (ours, theirs) = (pod("ours"), pod("theirs"));
    let id = node.run_pod(&ours).await.unwrap();
    assert_eq!(id, hull);
    let native = node.cri.run_sandbox(&theirs).await.unwrap();
    let adopted = sysfs_of(&mut node, &ours, &id).await;
    // Before 2.1 a privileged pod of containerd's own cannot, either.
    let writes = release == Release::Two;
    assert_eq!(adopted.ends_with("written\n"), writes, "{adopted}");
    assert_eq!(adopted, sysfs_of(&mut node, &theirs, &native).await);
    node.life().adopter.shutdown().await;
    node.cri.remove_everything().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_pods_write_to_sysfs_on_containerd_1() {
    privileged_pods_write_to_sysfs(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_pods_write_to_sysfs_on_containerd_2() {
    privileged_pods_write_to_sysfs(Release::Two).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_adopted_is_made_by_containerd() {
    let mut node = Node::new(Release::One).await;
    node.begin_life();
    // Before the facts are known.
    let early = node.pod("early");
    node.run_pod(&early).await.unwrap();
    node.life().adopter.recover(node.facts.clone()).await.unwrap();
    // Ineligible; no hull; a name that containerd has.
    let hull = node.stock().await;
    let port = node.pod("port").sysctl("net.core.somaxconn", "99");
    let id = node.run_pod(&port).await.unwrap();
    assert_ne!(id, hull);
    assert!(
        node.run_pod(&early)
            .await
            .unwrap_err()
            .message()
            .contains("failed to reserve sandbox name")
    );
    // The kernel refuses a sysctl, and so does containerd.
    let bad = node.pod("bad").sysctl("net.ipv4.ip_local_port_range", "2 1");
    node.run_pod(&bad).await.unwrap_err();
    assert_eq!(
        *node.life().hulls.discarded.lock().unwrap(),
        [(hull.clone(), "patch_sysctl")]
    );
    assert!(node.life().ledger.is_hull(&hull), "it stays hidden");
    assert!(node.life().ledger.adoption(&hull).is_none());
    // It costs no second hull.
    let spared = node.stock().await;
    let another = node.pod("another").sysctl("net.ipv4.ip_local_port_range", "2 1");
    node.run_pod(&another).await.unwrap_err();
    assert_eq!(node.life().hulls.hulls.lock().unwrap().pop().unwrap().id, spared);
    let miss = node.pod("miss");
    node.run_pod(&miss).await.unwrap();
    let counted: Vec<_> = node.life().counts.requests.lock().unwrap().clone();
    let expected = [
        (Outcome::NativeOnly, "recovering"),
        (Outcome::Ineligible, "sysctls"),
        (Outcome::NativeOnly, "name_contested"),
        (Outcome::Failed, "patch_sysctl"),
        (Outcome::Ineligible, "sysctl_refused"),
        (Outcome::Miss, "empty"),
    ];
    assert_eq!(counted, expected);

    // Given up by its client, an adoption is completed.
    let hull = node.stock().await;
    let pod = node.pod("impatient");
    let call = node.call(&pod);
    let adopter = node.life().adopter.clone();
    let mut running = Box::pin(async move { adopter.run_pod_sandbox(call).await });
    assert!(futures_util::poll!(&mut running).is_pending());
    drop(running);
    let end = Instant::now() + LIMIT;
    while node.life().ledger.adoption(&hull).is_none() {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(node.file(&hull, "hostname"), "impatient\n");

    // A dead hull is known to be dead.
    let hull = node.stock().await;
    let pid = node.pid(&hull).await;
    process::output(Command::new("kill").args(["-9", &pid.to_string()])).unwrap();
    let end = Instant::now() + LIMIT;
    while node.life().hulls.hulls.lock().unwrap()[0].is_alive() {
        assert!(Instant::now() < end);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let dead = node.pod("dead");
    let id = node.run_pod(&dead).await.unwrap();
    assert_ne!(id, hull);
    let counted = node.life().counts.requests.lock().unwrap().last().copied();
    assert_eq!(counted, Some((Outcome::Failed, "died")));
    node.life().adopter.shutdown().await;
    node.cri.remove_everything().await.unwrap();
}

/// Where the relay that is to be killed finds its request; socket, state, hull and pause process are beside it.
const CHILD: &str = "HULLSPEED_TEST_CHILD";

/// A relay of one adoption.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "started, and killed, by the test below"]
async fn a_relay_to_be_killed() {
    let spec: Value = serde_json::from_str(&std::env::var(CHILD).unwrap()).unwrap();
    let client = Client::at(spec["socket"].as_str().unwrap().as_ref());
    let facts = Arc::new(Facts::read(&client).await.unwrap());
    let life = Life::begin(&client, spec["state"].as_str().unwrap().as_ref());
    life.adopter.recover(facts.clone()).await.unwrap();
    let pid = i32::try_from(spec["pid"].as_i64().unwrap()).unwrap();
    life.stock(spec["hull"].as_str().unwrap(), pid, &facts);
    let request = hex::decode(spec["request"].as_str().unwrap()).unwrap();
    let id = life.run_pod(&client, request).await.unwrap();
    println!("answered {id}");
    tokio::time::sleep(LIMIT).await;
}

/// Runs an adoption in a process that kills itself at `point`; whether it has answered before.
async fn die_at(point: &str, node: &mut Node, pod: &Pod) -> (String, bool) {
    let (hull, pid) = node.hull().await;
    let spec = serde_json::json!({
        "socket": node.containerd.socket(),
        "state": node.state,
        "hull": hull,
        "pid": pid,
        "request": hex::encode(pod.request().encode_to_vec()),
    });
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--ignored", "--exact", "a_relay_to_be_killed", "--nocapture"]);
    child.env(CHILD, spec.to_string()).env(fault::VARIABLE, point);
    let output = tokio::task::spawn_blocking(move || child.output())
        .await
        .unwrap()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.signal(), Some(9), "at {point}: {text}{errors}");
    (hull, text.contains("answered"))
}

async fn killed_at_every_step(release: Release) {
    let mut node = Node::new(release).await;
    // Without a journal of before, no hull of before would be one.
    node.begin_life();
    node.life().adopter.shutdown().await;
    for (index, point) in fault::POINTS.into_iter().enumerate() {
        let pod = demanding(&node, &format!("pod-{point}"));
        let (hull, answered) = die_at(point, &mut node, &pod).await;
        assert!(!answered || index >= 6, "an answer before {point}");
        node.begin_life();
        let found = node.life().adopter.recover(node.facts.clone()).await.unwrap();
        if index < 5 {
            // Nobody was told: the hull is as it was, or nobody's.
            let of = if point == "taken" { &found.idle } else { &found.dropped };
            assert_eq!(
                of.iter().map(|hull| &hull.id).collect::<Vec<_>>(),
                [&hull],
                "after {point}"
            );
            assert_eq!(found.idle.len() + found.dropped.len(), 1, "after {point}");
            let native = node.run_pod(&pod).await.unwrap();
            assert_ne!(native, hull);
            node.life().adopter.shutdown().await;
            node.cri.remove_sandbox(&hull).await.unwrap();
            node.cri.remove_sandbox(&native).await.unwrap();
            continue;
        }
        assert!(found.idle.is_empty() && found.dropped.is_empty(), "after {point}");
        let adoption = found
            .adopted
            .iter()
            .find(|adoption| adoption.sandbox_id == hull)
            .unwrap();
        assert_eq!(adoption.config, *pod.config(), "after {point}");
        let looks = looks(&mut node, &hull).await;
        let expected = |what: &str| looks.iter().find(|(name, _)| *name == what).unwrap().1.clone();
        assert_eq!(expected("hostname"), format!("pod-{point}"));
        assert_eq!(expected("hostname file"), format!("pod-{point}\n"));
        assert_eq!(expected("port start"), "80", "after {point}");
        assert_eq!(expected("rmid"), "1", "after {point}");
        node.run_pod(&pod).await.unwrap_err();
        node.rebranded(&hull).await;
        node.life().adopter.shutdown().await;
    }
    node.restart_containerd().await;
    let listed = node.cri.sandboxes(PodSandboxFilter::default()).await.unwrap();
    let mut names: Vec<_> = listed.into_iter().map(|one| one.metadata.unwrap().name).collect();
    names.sort();
    let mut expected: Vec<_> = fault::POINTS[5..].iter().map(|point| format!("pod-{point}")).collect();
    expected.sort();
    assert_eq!(names, expected);
    node.cri.remove_everything().await.unwrap();
    assert_eq!(node.addresses(), Vec::<String>::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_an_adoption_is_whole_or_has_not_been() {
    killed_at_every_step(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_any_step_before_containerd_2() {
    killed_at_every_step(Release::Two).await;
}

/// Not a test of speed, which needs a quiet machine: it prints, and notices only what is far off.
#[tokio::test(flavor = "multi_thread")]
async fn adoption_takes_a_moment() {
    const PODS: usize = 12;
    let mut node = Node::new(Release::One).await;
    node.begin_life();
    node.life().adopter.recover(node.facts.clone()).await.unwrap();
    for index in 0..PODS {
        let hull = node.stock().await;
        let pod = node
            .pod(&format!("pod-{index}"))
            .dns(&["10.96.0.10"], &["svc"], &["ndots:5"]);
        assert_eq!(node.run_pod(&pod).await.unwrap(), hull);
        node.rebranded(&hull).await;
    }
    let mut took = node.life().counts.took.lock().unwrap().clone();
    took.sort();
    eprintln!(
        "adoption: median {:?}, longest {:?} of {PODS}",
        took[PODS / 2],
        took[PODS - 1]
    );
    assert!(took[PODS / 2] < Duration::from_millis(50));
    let listed = node.cri.sandboxes(PodSandboxFilter::default()).await.unwrap();
    assert!(
        listed.iter().all(|sandbox| sandbox.labels.contains_key(HULL_LABEL)),
        "until a restart"
    );
    node.life().adopter.shutdown().await;
    node.cri.remove_everything().await.unwrap();
}
