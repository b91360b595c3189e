//! The pool of hulls against real containerds: what it keeps, what it hands out, what it leaves behind.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hullspeed_prewarm::adopt::hull::Hull;
use hullspeed_prewarm::adopt::{HullSource as _, Miss};
use hullspeed_prewarm::containerd::facts::Facts;
use hullspeed_prewarm::ledger::{Ledger, Mark};
use hullspeed_prewarm::metrics::Metrics;
use hullspeed_prewarm::pool::{HandlerPool, Pool, PoolOptions};
use hullspeed_proto::cri::v1::{PodSandboxFilter, PodSandboxState};
use hullspeed_tests::census;
use hullspeed_tests::containerd::{Containerd, ContainerdOptions, SnapshotterChoice};
use hullspeed_tests::cri::Cri;
use hullspeed_tests::network::Network;
use hullspeed_tests::pause;
use hullspeed_tests::process;
use hullspeed_tests::registry::Registry;
use hullspeed_tests::release::Release;
use hullspeed_tests::run::RunDir;
use hullspeed_tests::scenario::Scenario;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// For whatever should happen; on a busy machine, making a hull takes a second.
const LIMIT: Duration = Duration::from_secs(60);

const MARK: &str = "0123456789abcdef";

/// A containerd, and what pools of it need. The run goes last.
struct Node {
    containerd: Containerd,
    cri: Cri,
    pause_image: String,
    _registry: Registry,
    network: Network,
    run: RunDir,
}

/// A pool that is kept.
struct Kept {
    pool: Pool,
    ledger: Ledger,
    stopping: CancellationToken,
    keeper: JoinHandle<()>,
}

impl Kept {
    async fn stop(self) {
        self.stopping.cancel();
        self.keeper.await.unwrap();
    }
}

impl Node {
    async fn start(release: Release) -> Self {
        let run = Scenario::prepare().unwrap();
        let registry = Registry::start(&run, &run.directory("storage").unwrap()).unwrap();
        let layout = run.path().join("pause-image");
        pause::build(&layout, run.path()).unwrap();
        registry
            .push(&format!("oci:{}:latest", layout.display()), "pause:latest")
            .unwrap();
        let network = Network::create(&run).unwrap();
        let options = ContainerdOptions {
            name: format!("containerd-{}", release.name()),
            snapshotter: SnapshotterChoice::Overlayfs,
            pause_image: format!("{}/pause:latest", registry.address()),
            release,
        };
        let containerd = Containerd::start(&run, &network, &options).await.unwrap();
        let cri = containerd.cri().await.unwrap();
        Self {
            containerd,
            cri,
            pause_image: options.pause_image,
            _registry: registry,
            network,
            run,
        }
    }

    fn cgroup(&self) -> String {
        format!("{}/hullspeed", self.run.names().cgroup)
    }

    fn options(&self, min: usize) -> PoolOptions {
        PoolOptions {
            handlers: vec![HandlerPool {
                runtime_handler: String::new(),
                min,
                max: 8,
            }],
            release_interval: Duration::from_secs(1),
            quiet: Duration::from_millis(200),
            cgroup: self.cgroup(),
            ..Default::default()
        }
    }

    fn keep(&self, options: PoolOptions, take_back: Vec<String>) -> Kept {
        let kept = self.keep_before_recovery(options);
        kept.pool.take_back(take_back);
        kept
    }

    fn keep_before_recovery(&self, options: PoolOptions) -> Kept {
        let ledger = Ledger::new(Mark::new(MARK.into()));
        let client = hullspeed_prewarm::containerd::Containerd::at(&self.containerd.socket());
        let pool = Pool::new(options, client, ledger.clone(), Metrics::unregistered());
        let stopping = CancellationToken::new();
        let keeper = tokio::spawn({
            let (pool, stopping) = (pool.clone(), stopping.clone());
            async move { pool.run(stopping).await }
        });
        Kept {
            pool,
            ledger,
            stopping,
            keeper,
        }
    }

    /// Ids of ready sandboxes.
    async fn ready(&mut self) -> BTreeSet<String> {
        let all = self.cri.sandboxes(PodSandboxFilter::default()).await.unwrap();
        let ready = all
            .into_iter()
            .filter(|one| one.state() == PodSandboxState::SandboxReady);
        ready.map(|one| one.id).collect()
    }

    async fn count(&mut self) -> usize {
        self.cri.sandboxes(PodSandboxFilter::default()).await.unwrap().len()
    }

    async fn pause_pid(&mut self, id: &str) -> i32 {
        let information = self.cri.sandbox(id).await.unwrap().info;
        let information: serde_json::Value = serde_json::from_str(&information["info"]).unwrap();
        i32::try_from(information["pid"].as_i64().unwrap()).unwrap()
    }

    /// Nothing is left of hulls: no sandbox, address, namespace, cgroup, shim.
    async fn assert_nothing_is_left(&mut self) {
        assert_eq!(self.count().await, 0);
        assert_eq!(census::addresses(&self.run).unwrap(), Vec::<String>::new());
        let namespaces = self
            .containerd
            .directory()
            .join("state/io.containerd.grpc.v1.cri/netns");
        assert_eq!(fs::read_dir(namespaces).map_or(0, Iterator::count), 0);
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap() {
            let cgroup = hierarchy.unwrap().path().join(self.cgroup());
            let children = fs::read_dir(&cgroup).into_iter().flatten();
            let left: Vec<_> = children
                .map(|child| child.unwrap())
                .filter(|child| child.path().is_dir())
                .collect();
            assert!(left.is_empty(), "{}: {left:?}", cgroup.display());
        }
        let socket = self.containerd.socket();
        let shims = processes()
            .filter(|(_, line)| line.contains("containerd-shim") && line.contains(&*socket.to_string_lossy()));
        assert_eq!(shims.count(), 0);
    }
}

/// Processes and their command lines.
fn processes() -> impl Iterator<Item = (i32, String)> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let path = entry.ok()?.path();
        let pid = path.file_name()?.to_str()?.parse().ok()?;
        let line = fs::read(path.join("cmdline")).ok()?;
        Some((pid, String::from_utf8_lossy(&line).replace('\0', " ")))
    })
}

fn shim_of(id: &str) -> i32 {
    let mut found = processes().filter(|(_, line)| line.contains("containerd-shim") && line.contains(id));
    found.next().unwrap().0
}

fn kill(pid: i32) {
    process::kill(pid.unsigned_abs()).unwrap();
}

async fn until(what: &str, pool: &Pool, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds().await {
        assert!(Instant::now() < end, "{what} did not come: {:#?}", pool.snapshot());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn filled(pool: &Pool, count: usize) {
    let is_full = async || {
        let snapshot = pool.snapshot();
        snapshot.handlers[0].idle == count && snapshot.handlers[0].creating == 0 && snapshot.removing == 0
    };
    until(&format!("a pool of {count}"), pool, is_full).await;
}

/// As many as demand asks for.
async fn full(pool: &Pool) {
    let is_full = async || {
        let snapshot = pool.snapshot();
        let handler = &snapshot.handlers[0];
        handler.target > 0 && handler.idle == handler.target && snapshot.removing == 0
    };
    until("a full pool", pool, is_full).await;
}

/// Takes all that there is.
fn take_all(pool: &Pool) -> Vec<Hull> {
    std::iter::from_fn(|| pool.take("").ok()).collect()
}

fn ids(hulls: &[Hull]) -> BTreeSet<String> {
    hulls.iter().map(|hull| hull.id.clone()).collect()
}

async fn fills_and_hands_out(release: Release) {
    let mut node = Node::start(release).await;
    let kept = node.keep(node.options(3), Vec::new());
    let pool = &kept.pool;
    filled(pool, 3).await;
    let there = node.ready().await;
    assert_eq!(there.len(), 3);
    assert!(there.iter().all(|id| kept.ledger.is_hull(id)));
    let snapshot = pool.snapshot();
    assert_eq!(
        (snapshot.off, snapshot.failure, snapshot.handlers[0].target),
        (None, None, 3)
    );
    assert_eq!(snapshot.networks, [node.run.names().bridge.clone()]);
    // 241 addresses less these.
    until("a count of addresses", pool, async || {
        pool.snapshot().free_addresses == Some(238)
    })
    .await;
    until("a measurement", pool, async || pool.snapshot().bytes_per_hull.is_some()).await;
    let facts = Facts::read(&hullspeed_prewarm::containerd::Containerd::at(
        &node.containerd.socket(),
    ))
    .await
    .unwrap();
    assert_eq!(facts.pause_images.len(), 1, "{facts:?}");
    println!(
        "{}: {:.2} MiB per hull of {}",
        facts.version,
        pool.snapshot().bytes_per_hull.unwrap() as f64 / f64::from(1 << 20),
        there.len()
    );
    // The default handler's own name is served from the same shelf; others are not.
    let asked = Instant::now();
    let first = pool.take("").unwrap();
    println!("taken within {:?}", asked.elapsed());
    let second = pool.take("runc").unwrap();
    assert!(first.id != second.id && first.is_alive() && there.contains(&first.id) && there.contains(&second.id));
    assert_eq!(pool.take("other").unwrap_err(), Miss::Handler);
    filled(pool, 3).await;
    assert_eq!(node.ready().await.len(), 5);
    pool.discard(first, "test");
    pool.discard(second, "test");
    filled(pool, 3).await;
    assert_eq!(node.ready().await.len(), 3);
    pool.drain().await;
    assert_eq!(pool.take("").unwrap_err(), Miss::Off);
    node.assert_nothing_is_left().await;
    pool.resume();
    filled(pool, 3).await;
    pool.drain().await;
    kept.stop().await;
    node.assert_nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_fills_hands_out_and_drains_on_1_6() {
    fills_and_hands_out(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pool_fills_hands_out_and_drains_on_2() {
    fills_and_hands_out(Release::Two).await;
}

/// A hull whose pause process or shim is gone is replaced, and not handed out in the meantime.
#[tokio::test(flavor = "multi_thread")]
async fn dead_hulls_are_not_handed_out() {
    let mut node = Node::start(Release::One).await;
    let kept = node.keep(node.options(4), Vec::new());
    filled(&kept.pool, 4).await;
    let there: Vec<String> = node.ready().await.into_iter().collect();
    kept.pool.pause();
    kill(node.pause_pid(&there[0]).await);
    kill(shim_of(&there[1]));
    // At once: nobody has noticed yet.
    let taken = take_all(&kept.pool);
    assert_eq!(ids(&taken), there[2..].iter().cloned().collect());
    for hull in taken {
        kept.pool.discard(hull, "test");
    }
    kept.pool.resume();
    filled(&kept.pool, 4).await;
    // Without being asked: the keeper notices by itself.
    let victim = node.ready().await.into_iter().next().unwrap();
    kill(node.pause_pid(&victim).await);
    until("a removal", &kept.pool, async || !node.ready().await.contains(&victim)).await;
    filled(&kept.pool, 4).await;
    assert_eq!(node.count().await, 4);
    kept.pool.drain().await;
    kept.stop().await;
    node.assert_nothing_is_left().await;
}

/// No hull of an old network is handed out; one that ties pods to their identity turns the pool off.
#[tokio::test(flavor = "multi_thread")]
async fn a_changed_network_flushes_the_pool() {
    let mut node = Node::start(Release::One).await;
    let kept = node.keep(node.options(2), Vec::new());
    let pool = &kept.pool;
    filled(pool, 2).await;
    let old = node.ready().await;
    node.network
        .edit(|list| list["plugins"][0]["mtu"] = 1400.into())
        .unwrap();
    assert_eq!(pool.take("").unwrap_err(), Miss::Stale);
    until("another pool", pool, async || {
        let snapshot = pool.snapshot();
        snapshot.handlers[0].idle >= 2 && snapshot.removing == 0 && node.ready().await.is_disjoint(&old)
    })
    .await;
    // Rewritten with the same content, nothing is flushed.
    let kept_ones = node.ready().await;
    node.network.edit(|_| {}).unwrap();
    until("a second look", pool, async || {
        pool.take("").is_ok_and(|hull| {
            let is_kept = kept_ones.contains(&hull.id);
            pool.discard(hull, "test");
            is_kept
        })
    })
    .await;
    node.network
        .edit(|list| list["plugins"][0]["type"] = "calico".into())
        .unwrap();
    assert_eq!(pool.take("").unwrap_err(), Miss::Stale);
    until("a refusal", pool, async || {
        let off = pool.snapshot().handlers[0].off.clone();
        off.is_some_and(|off| off.reason == "cni_plugin" && off.detail.contains("calico"))
    })
    .await;
    assert_eq!(pool.take("").unwrap_err(), Miss::Off);
    // The plugin that made them is asked to undo it, and that is another now: containerd cannot remove these wholly
    // until the configuration is back.
    node.network
        .edit(|list| list["plugins"][0]["type"] = "bridge".into())
        .unwrap();
    full(pool).await;
    pool.drain().await;
    kept.stop().await;
}

/// Pods come first where addresses are few.
#[tokio::test(flavor = "multi_thread")]
async fn hulls_give_their_addresses_back() {
    let mut node = Node::start(Release::One).await;
    let kept = node.keep(node.options(4), Vec::new());
    let pool = &kept.pool;
    filled(pool, 4).await;
    let subnet = node.network.address_prefix().unwrap();
    // All but 10 of 241 are taken by others, hulls' own not counted: 8 are to be left to pods, so 2 remain for hulls.
    let free: Vec<PathBuf> = (10..=250)
        .map(|last| node.network.address_files().join(format!("{subnet}{last}")))
        .collect();
    let others: Vec<&Path> = free
        .iter()
        .map(PathBuf::as_path)
        .filter(|path| !path.exists())
        .take(241 - 10)
        .collect();
    for path in &others {
        fs::write(path, "other\neth0").unwrap();
    }
    until("a smaller pool", pool, async || {
        let snapshot = pool.snapshot();
        snapshot.handlers[0].idle == 2 && snapshot.removing == 0
    })
    .await;
    assert_eq!(pool.snapshot().handlers[0].target, 2);
    for path in &others {
        fs::remove_file(path).unwrap();
    }
    filled(pool, 4).await;
    Pool::release_all(pool, "addresses");
    until("an empty pool", pool, async || pool.snapshot().removing == 0).await;
    assert_eq!(node.count().await, 0);
    assert_eq!(pool.take("").unwrap_err(), Miss::Empty);
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(node.count().await, 0, "it makes none while addresses are needed");
    pool.resume();
    filled(pool, 4).await;
    pool.drain().await;
    kept.stop().await;
    node.assert_nothing_is_left().await;
}

/// Hulls are made while no pod starts; but a load that does not end does not keep the pool empty for ever.
#[tokio::test(flavor = "multi_thread")]
async fn hulls_are_made_between_starts() {
    let mut node = Node::start(Release::One).await;
    let options = PoolOptions {
        quiet: Duration::from_secs(2),
        max_deferral: Duration::from_secs(6),
        start_limit: Duration::from_secs(30),
        ..node.options(2)
    };
    let kept = node.keep(options, Vec::new());
    let pool = &kept.pool;
    filled(pool, 2).await;
    pool.start_begins("pod");
    let hull = pool.take("").unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(node.count().await, 2, "a hull was made while a pod started");
    pool.start_ended("pod");
    pool.start_ended(&hull.id);
    let ended = Instant::now();
    filled(pool, 2).await;
    assert!(ended.elapsed() >= Duration::from_secs(2));
    // Now a start is always under way, and pods take what there is.
    pool.start_begins("first");
    let mut taken = vec![hull];
    taken.extend(take_all(pool));
    let begun = Instant::now();
    for round in 0.. {
        pool.start_begins(&format!("pod-{round}"));
        taken.extend(pool.take("").ok());
        if taken.len() >= 6 {
            break;
        }
        assert!(begun.elapsed() < LIMIT, "starved: {:#?}", pool.snapshot());
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!(
        begun.elapsed() > Duration::from_secs(5),
        "the starts were in the way of nothing"
    );
    assert_eq!(ids(&taken).len(), taken.len());
    for hull in taken {
        pool.discard(hull, "test");
    }
    pool.drain().await;
    kept.stop().await;
    node.assert_nothing_is_left().await;
}

async fn restarts(release: Release) {
    let mut node = Node::start(release).await;
    // The very first hull is made without knowing the pause image, and so cannot prove what it was made with.
    node.cri.pull(&node.pause_image).await.unwrap();
    let kept = node.keep(node.options(3), Vec::new());
    filled(&kept.pool, 3).await;
    let there = node.ready().await;
    // containerd.
    node.containerd.restart(&node.run).await.unwrap();
    node.cri = node.containerd.cri().await.unwrap();
    until("a confirmed pool", &kept.pool, async || match kept.pool.take("") {
        Ok(hull) => {
            assert!(hull.is_alive() && there.contains(&hull.id));
            kept.pool.discard(hull, "test");
            true
        }
        Err(_) => false,
    })
    .await;
    filled(&kept.pool, 3).await;
    let mut there = node.ready().await;
    assert_eq!(there.len(), 3);
    kept.stop().await;
    // The daemon, with what recovery found; one of them has died meanwhile.
    let victim = there.pop_first().unwrap();
    kill(node.pause_pid(&victim).await);
    let mut found: Vec<String> = there.iter().cloned().collect();
    found.push(victim.clone());
    let kept = node.keep(node.options(3), found);
    filled(&kept.pool, 3).await;
    let now = node.ready().await;
    assert!(
        there.is_subset(&now) && now.len() == 3 && !now.contains(&victim),
        "{there:?} without {victim} became {now:?}"
    );
    assert_eq!(node.count().await, 3);
    assert_eq!(kept.pool.snapshot().audit.lost, 0);
    kept.stop().await;
    // The daemon, before it knows which sandboxes are pods': nothing happens.
    let kept = node.keep_before_recovery(node.options(3));
    until("an answer", &kept.pool, async || kept.pool.snapshot().off.is_none()).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(kept.pool.take("").unwrap_err(), Miss::Stale);
    assert_eq!(node.ready().await, now);
    // None is its own: they are removed and made anew.
    kept.pool.take_back(Vec::new());
    until("a new pool", &kept.pool, async || {
        let snapshot = kept.pool.snapshot();
        snapshot.handlers[0].idle == 3 && snapshot.removing == 0 && node.ready().await.is_disjoint(&now)
    })
    .await;
    assert_eq!(kept.pool.snapshot().audit.lost, 3);
    kept.pool.drain().await;
    kept.stop().await;
    node.assert_nothing_is_left().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hulls_outlive_restarts_on_1_6() {
    restarts(Release::One).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hulls_outlive_restarts_on_2() {
    restarts(Release::Two).await;
}

/// A creation that fails is tried again, less and less often, and leaves nothing.
#[tokio::test(flavor = "multi_thread")]
async fn failing_creations_back_off_and_leave_nothing() {
    let mut node = Node::start(Release::One).await;
    // Valid for us and for containerd, but no bridge can have this name.
    node.network
        .edit(|list| list["plugins"][0]["bridge"] = "a-name-that-is-much-too-long".into())
        .unwrap();
    let kept = node.keep(node.options(2), Vec::new());
    until("two failures", &kept.pool, async || {
        kept.pool
            .snapshot()
            .failure
            .is_some_and(|failure| failure.in_a_row >= 2)
    })
    .await;
    assert_eq!(kept.pool.take("").unwrap_err(), Miss::Empty);
    kept.pool.pause();
    until("a clean containerd", &kept.pool, async || node.count().await == 0).await;
    assert_eq!(census::addresses(&node.run).unwrap(), Vec::<String>::new());
    let name = node.run.names().bridge.clone();
    node.network
        .edit(|list| list["plugins"][0]["bridge"] = name.into())
        .unwrap();
    kept.pool.resume();
    filled(&kept.pool, 2).await;
    assert_eq!(kept.pool.snapshot().failure, None);
    kept.pool.drain().await;
    kept.stop().await;
    node.assert_nothing_is_left().await;
}
