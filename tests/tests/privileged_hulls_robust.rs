//! What the relay's socket bears: a containerd that is not there, garbage, messages too large, a thousand calls at once.
//! And what many pods leave behind: nothing.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::{PodSandboxFilter, RunPodSandboxResponse};
use hullspeed_tests::census::{self, Census};
use hullspeed_tests::pod_node::PodNode;
use hullspeed_tests::pod_spec::Dice;
use hullspeed_tests::raw::{RUNTIME, RawClient};
use hullspeed_tests::release::Release;
use tonic::Code;

/// Calls at once.
const PARALLEL: usize = 1000;

/// A message that containerd does not take either.
const LARGE: usize = 64 << 20;

/// How much the relay may grow while it is abused.
const MEMORY_KIB: u64 = 192 << 10;

/// Pods that come and go, and as many before that the counts are taken.
const CYCLES: usize = 10;

/// Memory that the allocator may keep.
const SLACK_KIB: u64 = 12 << 10;

async fn version(client: &mut RawClient) -> Result<(), Code> {
    let answer = client.call(&format!("{RUNTIME}/Version"), Vec::new()).await;
    answer.map(|_| ()).map_err(|status| status.code())
}

/// containerd is not there, comes, goes and comes again.
async fn containerd_comes_later(release: Release) {
    let mut node = PodNode::start(release).await.unwrap();
    node.containerd.stop().unwrap();
    node.start_prewarm(1, "").unwrap();
    let socket = node.prewarm().unwrap().socket();
    let mut client = RawClient::connect(&socket).await.unwrap();
    let pod = node.pod("pod-early");
    let run = format!("{RUNTIME}/RunPodSandbox");
    let request = prost::Message::encode_to_vec(&pod.request());
    for away in ["not there yet", "killed"] {
        let start = Instant::now();
        assert_eq!(version(&mut client).await, Err(Code::Unavailable), "{away}");
        // A moment after its end a hull may still be handed out; it has to be good then.
        let early = client.call(&run, request.clone()).await;
        let took = start.elapsed();
        assert!(took < Duration::from_secs(10), "two refusals took {took:?}");
        node.containerd.start_again(&node.run).await.unwrap();
        let mut cri = node.relayed().await.unwrap();
        assert_eq!(version(&mut client).await, Ok(()));
        let sandbox = match early {
            Err(status) => {
                assert_eq!(status.code(), Code::Unavailable, "{away}");
                node.prewarm().unwrap().wait_for_hulls(1).await.unwrap();
                let before = node.prewarm().unwrap().requests("hit").await.unwrap();
                let sandbox = cri.run_sandbox(&pod).await.unwrap();
                assert_eq!(node.prewarm().unwrap().requests("hit").await.unwrap(), before + 1);
                sandbox
            }
            Ok(answer) => {
                assert_eq!(away, "killed");
                let answer: RunPodSandboxResponse = prost::Message::decode(answer).unwrap();
                answer.pod_sandbox_id
            }
        };
        let container = cri.create_container(&sandbox, &pod, "main", &node.image).await.unwrap();
        cri.start_container(&container).await.unwrap();
        let said = cri.exec(&container, &["hostname"]).await.unwrap().stdout;
        assert_eq!(String::from_utf8_lossy(&said).trim(), pod.config().hostname);
        cri.remove_sandbox(&sandbox).await.unwrap();
        node.containerd.process().kill().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_1_comes_later() {
    containerd_comes_later(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn containerd_2_comes_later() {
    containerd_comes_later(Release::Two).await;
}

/// Bytes that are no HTTP/2, or not all of it; the other side may hang up at any time.
fn abuse(socket: &std::path::Path) {
    const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let mut dice = Dice::new(3);
    let mut random =
        |length: usize| -> Vec<u8> { (0..length).map(|_| u8::try_from(dice.below(256)).unwrap()).collect() };
    let settings = [0, 0, 0, 4, 0, 0, 0, 0, 0].to_vec();
    // A HEADERS frame that promises more than comes; a DATA frame on a stream that is none; an unknown kind of frame.
    let truncated = [0, 64, 0, 1, 4, 0, 0, 0, 1, 0x82].to_vec();
    let stray = [0, 0, 4, 0, 0, 0, 0, 0, 9, 1, 2, 3, 4].to_vec();
    let unknown = [0, 0, 1, 77, 0, 0, 0, 0, 0, 7].to_vec();
    let mut attacks = vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        PREFACE[..10].to_vec(),
        Vec::new(),
        random(1 << 20),
    ];
    for frame in [truncated, stray, unknown, random(1 << 16)] {
        attacks.push([PREFACE, &settings, &frame].concat());
    }
    for attack in attacks.iter().cycle().take(attacks.len() * 8) {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(5))).unwrap();
        let _ = stream.write_all(attack);
        let _ = stream.read(&mut [0; 4096]);
    }
}

async fn abuse_is_survived(release: Release) {
    let mut node = PodNode::with_hulls(release, 2).await.unwrap();
    let socket = node.prewarm().unwrap().socket();
    let pid = node.prewarm().unwrap().process().pid();
    let before = census::process(pid).unwrap();
    tokio::task::spawn_blocking({
        let socket = socket.clone();
        move || abuse(&socket)
    })
    .await
    .unwrap();

    let mut client = RawClient::connect(&socket).await.unwrap();
    for method in [
        "RunPodSandbox",
        "ListPodSandbox",
        "StopPodSandbox",
        "CreateContainer",
        "Version",
        "NoSuchMethod",
    ] {
        let status = client
            .call(&format!("{RUNTIME}/{method}"), vec![0_u8; LARGE])
            .await
            .unwrap_err();
        let expected = [
            Code::ResourceExhausted,
            Code::Unimplemented,
            Code::Unavailable,
            Code::Cancelled,
        ];
        assert!(expected.contains(&status.code()), "{method}: {status:?}");
        assert!(
            matches!(method, "NoSuchMethod" | "Version") || status.code() == Code::ResourceExhausted,
            "{method}: {status:?}"
        );
        // And what is no message at all.
        let status = client
            .call(&format!("{RUNTIME}/{method}"), vec![0xff_u8; 1000])
            .await
            .unwrap_err();
        let expected = [
            Code::Internal,
            Code::InvalidArgument,
            Code::Unimplemented,
            Code::Unknown,
        ];
        assert!(expected.contains(&status.code()), "{method}: {status:?}");
    }

    let calls = (0..PARALLEL).map(|number| {
        let mut client = client.clone();
        let method = ["Version", "ListPodSandbox", "ListContainers", "ListPodSandboxStats"][number % 4];
        async move {
            let call = format!("{RUNTIME}/{method}");
            match client.call(&call, Vec::new()).await {
                // containerd 1.6 may end the connection over which it was sent more than it takes; whoever calls again is served.
                Err(status) if status.code() == Code::Unavailable => client.call(&call, Vec::new()).await,
                answer => answer,
            }
        }
    });
    let start = Instant::now();
    let answers = futures_util::future::join_all(calls).await;
    let took = start.elapsed();
    for answer in answers {
        answer.unwrap();
    }
    assert!(took < Duration::from_secs(30), "{PARALLEL} calls took {took:?}");
    let after = census::process(pid).unwrap();
    let grown = after["resident KiB"].saturating_sub(before["resident KiB"]);
    assert!(grown < MEMORY_KIB, "the relay grew by {grown} KiB");

    drop(client);
    let mut cri = node.relayed().await.unwrap();
    let pod = node.pod("pod-after");
    let (sandbox, _) = node.run_pod(&mut cri, &pod).await.unwrap();
    assert_eq!(node.prewarm().unwrap().requests("hit").await.unwrap(), 1);
    cri.remove_sandbox(&sandbox).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn abuse_is_survived_before_containerd_1() {
    abuse_is_survived(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn abuse_is_survived_before_containerd_2() {
    abuse_is_survived(Release::Two).await;
}

async fn cycles(node: &mut PodNode, name: &str) {
    for number in 0..CYCLES {
        node.prewarm().unwrap().wait_for_hulls(1).await.unwrap();
        let mut cri = node.relayed().await.unwrap();
        // All in one cgroup: that of a pod is the kubelet's to remove.
        let pod = node.pod(&format!("pod-{name}-{number}"));
        let pod = pod
            .with(|config| config.linux.as_mut().unwrap().cgroup_parent = format!("/{}/pods", node.run.names().cgroup));
        let (sandbox, _) = node.run_pod(&mut cri, &pod).await.unwrap();
        cri.remove_sandbox(&sandbox).await.unwrap();
    }
}

/// Counts once nothing changes any more, but the counts that must be `like` others.
async fn settled(node: &mut PodNode, like: Option<&Census>) -> Census {
    let end = Instant::now() + Duration::from_secs(20);
    loop {
        node.prewarm().unwrap().wait_for_hulls(2).await.unwrap();
        let mut census = census::take(&node.run).unwrap();
        let own = census::process(node.prewarm().unwrap().process().pid()).unwrap();
        census.insert("descriptors", own["descriptors"]);
        let hulls = node.hulls().await.unwrap().len();
        let all = node.native.sandboxes(PodSandboxFilter::default()).await.unwrap().len();
        let enough = like.is_none_or(|like| *like == census);
        if (hulls == 2 && all == 2 && enough) || Instant::now() > end {
            return census;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

async fn nothing_leaks(release: Release) {
    let mut node = PodNode::with_hulls(release, 2).await.unwrap();
    cycles(&mut node, "before").await;
    // Counts of a moment in which nothing is under way.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let before = settled(&mut node, None).await;
    let pid = node.prewarm().unwrap().process().pid();
    let memory = census::process(pid).unwrap()["resident KiB"];
    cycles(&mut node, "after").await;
    let after = settled(&mut node, Some(&before)).await;
    assert_eq!(before, after);
    let grown = census::process(pid).unwrap()["resident KiB"].saturating_sub(memory);
    assert!(grown < SLACK_KIB, "the relay grew by {grown} KiB");
    let hits = node.prewarm().unwrap().requests("hit").await.unwrap();
    assert_eq!(hits, 2 * CYCLES as u64);

    // Drained, there is nothing left of the pool at all.
    node.prewarm().unwrap().control(&["drain", "--wait"]).unwrap();
    assert_eq!(census::addresses(&node.run).unwrap(), Vec::<String>::new());
    let left = census::take(&node.run).unwrap();
    assert_eq!(
        (left["shims"], left["network namespaces"], left["bridge ports"]),
        (0, 0, 0),
        "{left:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_leaks_on_containerd_1() {
    nothing_leaks(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_leaks_on_containerd_2() {
    nothing_leaks(Release::Two).await;
}
