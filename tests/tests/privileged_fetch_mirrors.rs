//! Mirrors of a registry, as containerd's hosts.toml names them: one that dies or does wrong costs nothing but its requests.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hullspeed_tests::content::ContentFile;
use hullspeed_tests::lazy::{LazyNode, Published, Source, check_all, stored};
use hullspeed_tests::operator;
use hullspeed_tests::proxy::fault::{Fault, FaultRule};
use hullspeed_tests::proxy::record::{RequestRecord, sent_again};
use hullspeed_tests::proxy::{Carrier, LinkOptions, Proxy};
use hullspeed_tests::scenario::Scenario;

/// A registry with two mirrors, and an image that all have.
struct Mirrored {
    first: Proxy,
    second: Proxy,
    image: Published,
    source: Source,
}

fn files() -> Vec<ContentFile> {
    (0..16)
        .map(|number| ContentFile::new(format!("file-{number:02}"), 1 << 20))
        .collect()
}

/// Some of the files, of which none follows another: what follows a sequence of reads is fetched before it is read.
fn scattered(files: &[ContentFile], numbers: [usize; 3]) -> Vec<ContentFile> {
    numbers.map(|number| files[number].clone()).to_vec()
}

impl Mirrored {
    async fn start() -> Self {
        let source = Source::start(Scenario::prepare().unwrap(), LinkOptions::default())
            .await
            .unwrap();
        let image = source.publish("image", &[files()], &[]).unwrap();
        let (first, second) = (
            source.mirror(LinkOptions::default()).await.unwrap(),
            source.mirror(LinkOptions::default()).await.unwrap(),
        );
        Self {
            first,
            second,
            image,
            source,
        }
    }

    /// Names `mirrors` in this order, the registry last.
    fn name(&self, mirrors: &[&Proxy]) {
        let registry = self.source.proxy.address();
        let directory = self.certificates().join(registry.to_string());
        fs::create_dir_all(&directory).unwrap();
        let mut text = format!("server = \"http://{registry}\"\n");
        for mirror in mirrors {
            let address = mirror.address();
            text += &format!("[host.\"http://{address}\"]\n  capabilities = [\"pull\", \"resolve\"]\n");
        }
        fs::write(directory.join("hosts.toml"), text).unwrap();
    }

    fn certificates(&self) -> PathBuf {
        self.source.run.directory("certs.d").unwrap()
    }

    /// A daemon that asks the mirrors in their order, the registry last.
    async fn node(&self) -> LazyNode {
        self.name(&[&self.first, &self.second]);
        self.node_as_named().await
    }

    async fn node_as_named(&self) -> LazyNode {
        let hosts = self.certificates();
        let config = format!(
            "[registry]\nstall_timeout = \"1s\"\nhosts_directory = \"{}\"\n\n[fetch]\nprefetch = false\nbackground = false\n",
            hosts.display()
        );
        self.source.node("node", &config).await.unwrap()
    }

    fn records(&self) -> [Vec<RequestRecord>; 3] {
        [&self.first, &self.second, &self.source.proxy].map(Proxy::requests)
    }
}

fn served(records: &[RequestRecord]) -> usize {
    records.iter().filter(|record| record.is_served()).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dying_mirror_is_replaced_within_the_read() {
    let hosts = Mirrored::start().await;
    let mut node = hosts.node().await;
    node.mount(&hosts.image).await.unwrap();
    let [first, second, registry] = hosts.records();
    assert!(
        served(&first) > 0 && served(&second) + served(&registry) == 0,
        "{first:#?}"
    );
    for proxy in [&hosts.first, &hosts.second, &hosts.source.proxy] {
        proxy.reset();
    }
    let view = node.view(&hosts.image, "view").await.unwrap();
    let all = files();
    // Nobody listens at the first; the second closes its connections in the middle of bodies, once.
    hosts.first.set_carrier(Carrier::Refusing);
    let digest = hosts.image.layer(0).unwrap();
    hosts
        .second
        .inject(FaultRule::get(digest.clone(), Fault::Truncate(500_000)).times(1));
    check_all(view.path(), &scattered(&all, [0, 6, 12])).await.unwrap();
    let [first, second, _] = hosts.records();
    assert_eq!(served(&first), 0, "{first:#?}");
    assert!(second.iter().any(|record| record.faulted), "{second:#?}");
    // Then the second denies everything, and the first resets what it accepts.
    hosts.first.set_carrier(Carrier::Resetting);
    hosts.second.inject(FaultRule::get(digest, Fault::Status(403)));
    check_all(view.path(), &all).await.unwrap();
    let every = hosts.records();
    assert!(served(&every[2]) > 0, "{every:#?}");
    assert_eq!(sent_again(&every.concat()), 0, "{every:#?}");
    let kept = stored(&node.cache(&hosts.image, 0).unwrap(), &all).unwrap();
    assert_eq!((kept.wrong, kept.absent), (0, 0), "{kept:?}");
    node.snapshots.remove(view).await.unwrap();
}

/// A mirror whose bytes are wrong is not believed, and the right ones come from elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_lying_mirror_is_not_believed() {
    let hosts = Mirrored::start().await;
    let mut node = hosts.node().await;
    node.mount(&hosts.image).await.unwrap();
    let view = node.view(&hosts.image, "view").await.unwrap();
    let digest = hosts.image.layer(0).unwrap();
    hosts.first.inject(FaultRule::get(digest, Fault::Corrupt(0..u64::MAX)));
    check_all(view.path(), &files()).await.unwrap();
    let [first, second, registry] = hosts.records();
    assert!(first.iter().any(|record| record.faulted), "{first:#?}");
    assert!(served(&second) + served(&registry) > 0, "{second:#?}");
    let failures = node
        .snapshotter
        .metric("hullspeed_verify_failures_total", &[])
        .await
        .unwrap();
    assert!(failures >= 1.0, "{failures} wrong chunks are counted");
    let kept = stored(&node.cache(&hosts.image, 0).unwrap(), &files()).unwrap();
    assert_eq!((kept.wrong, kept.absent), (0, 0), "{kept:?}");
    node.snapshots.remove(view).await.unwrap();
}

/// Hosts of a layer as `explain` tells them.
fn hosts_told(node: &LazyNode, image: &Published) -> Vec<String> {
    let found = operator::explained(&node.snapshotter.config(), &node.reference(image)).unwrap();
    let hosts = found["layers"][0]["cost"]["hosts"].as_array().unwrap();
    hosts
        .iter()
        .map(|host| host["host"].as_str().unwrap().to_owned())
        .collect()
}

/// A layer that stays mounted is fetched from the hosts that `hosts.toml` names now, in the middle of a read if need be, and no
/// longer from those that it names no more.
#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_layer_follows_the_hosts_that_are_named_now() {
    let hosts = Mirrored::start().await;
    hosts.name(&[]);
    let mut node = hosts.node_as_named().await;
    node.mount(&hosts.image).await.unwrap();
    let view = node.view(&hosts.image, "view").await.unwrap();
    let all = files();
    check_all(view.path(), &scattered(&all, [0, 6, 12])).await.unwrap();
    // The registry is gone, and nobody else is named; while a reader waits, somebody is.
    hosts.source.proxy.set_carrier(Carrier::Refusing);
    let naming = async {
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(served(&hosts.first.requests()), 0);
        hosts.name(&[&hosts.first]);
    };
    let waited_for = scattered(&all, [3, 9, 15]);
    let (read, ()) = tokio::join!(check_all(view.path(), &waited_for), naming);
    read.unwrap();
    assert!(served(&hosts.first.requests()) > 0);
    let [first, second, registry] =
        [&hosts.first, &hosts.second, &hosts.source.proxy].map(|proxy| proxy.address().to_string());
    assert_eq!(hosts_told(&node, &hosts.image), [first, registry.clone()]);

    // All is well again, and another one is named in its place.
    hosts.source.proxy.set_carrier(Carrier::Up);
    hosts.name(&[&hosts.second]);
    let end = Instant::now() + Duration::from_secs(20);
    while hosts_told(&node, &hosts.image) != [second.clone(), registry.clone()] {
        assert!(Instant::now() < end, "{:?}", hosts_told(&node, &hosts.image));
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    hosts.first.reset();
    check_all(view.path(), &all).await.unwrap();
    let every = hosts.records();
    assert!(served(&every[0]) == 0 && served(&every[1]) > 0, "{every:#?}");
    let kept = stored(&node.cache(&hosts.image, 0).unwrap(), &all).unwrap();
    assert_eq!((kept.wrong, kept.absent), (0, 0), "{kept:?}");
    node.snapshots.remove(view).await.unwrap();
}
