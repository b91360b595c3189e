//! Warming from a real registry. What mounts needs root and `/dev/fuse`.

use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use futures_util::FutureExt as _;

use super::super::tests::{Registry, blocking, config, contents, is_mount_point, layers, request, toc_requests};
use super::*;
use crate::layer::fetch::Extent;
use crate::layer::mounts::kept::Descriptors;
use crate::layer::testing::{Packing, Sample};
use crate::layer::{LayerMounts as _, LayerRequest};
use crate::metrics::Metrics;
use crate::metrics::defs::{FetchLabels, KindLabels};

fn samples() -> [Sample; 2] {
    let prioritized = Packing {
        prioritized: Some(4),
        ..Packing::default()
    };
    let packed = Packing {
        chunk: 5_000,
        per_member: 4,
        prioritized: None,
    };
    // With tails much longer than what the first request brings along.
    [
        Sample::uniform(40, 50_000, prioritized),
        Sample::uniform(60, 30_000, packed),
    ]
}

fn warm(registry: &Registry, share: Share) -> WarmRequest {
    WarmRequest {
        image: registry.image(),
        manifest: None,
        share,
        platform: Platform::own(),
    }
}

async fn last(warming: &mut Warming) -> WarmReport {
    let mut last = None;
    while let Some(report) = warming.next().await {
        last = Some(report);
    }
    last.filter(|report| report.done).expect("the last report says so")
}

fn content_requests(metrics: &Metrics) -> u64 {
    let of = |kind| {
        let labels = FetchLabels { kind, result: "ok" };
        metrics.fetch_requests.get_or_create(&labels).get()
    };
    of("warm") + of("demand") + of("prefetch")
}

fn states(report: &WarmReport) -> Vec<LayerState> {
    report.layers.iter().map(|layer| layer.state).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn each_share_brings_what_it_says_and_nothing_twice() {
    let registry = Registry::start();
    let samples = samples();
    let manifest = registry.push(&samples).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, metrics) = layers(dir.path());
    let warmer = layers.warmer().unwrap();
    for share in [Share::Toc, Share::Hot, Share::All] {
        let mut warming = warmer.warm(warm(&registry, share)).await.unwrap();
        let report = last(&mut warming).await;
        assert_eq!(warming.next().now_or_never(), Some(None));
        assert_eq!(report.manifest, manifest);
        assert_eq!(states(&report), [LayerState::Resident; 2], "{report:?}");
        assert_eq!(toc_requests(&metrics), 2);
        let extents: Vec<Extent> = report.layers.iter().map(|layer| layer.extent).collect();
        for extent in &extents {
            assert_eq!(extent.resident, extent.wanted);
        }
        match share {
            Share::Toc => assert_eq!((extents[0].wanted, content_requests(&metrics)), (0, 0)),
            // Four files, and no landmark in the other layer. The landmark's own byte counts or does not.
            Share::Hot => assert!(extents[0].wanted / 1000 == 200 && extents[1].wanted == 0, "{extents:?}"),
            Share::All => {
                for (extent, sample) in extents.iter().zip(&samples) {
                    let content: usize = sample.files.values().map(Vec::len).sum();
                    assert!(extent.wanted.abs_diff(content as u64) <= 16, "{extent:?} {content}");
                }
            }
        }
    }
    let asked = content_requests(&metrics);
    assert!(asked >= 2);
    assert!(layers.shared.slots().is_empty(), "a warm that is over holds nothing");
    // Without the registry, named by the manifest: nothing is needed of it.
    drop(registry);
    let request = WarmRequest {
        manifest: Some(manifest),
        image: "127.0.0.1:1/image:1".to_owned(),
        share: Share::All,
        platform: Platform::own(),
    };
    let report = last(&mut warmer.warm(request).await.unwrap()).await;
    assert_eq!(states(&report), [LayerState::Resident; 2]);
    assert_eq!((toc_requests(&metrics), content_requests(&metrics)), (2, asked));
    assert_eq!(warmer.warms(), 0);
    layers.shutdown().await;
    let stopped = warmer.warm(WarmRequest {
        manifest: Some(manifest),
        image: "127.0.0.1:1/image:1".to_owned(),
        share: Share::Toc,
        platform: Platform::own(),
    });
    assert!(matches!(stopped.await.err(), Some(WarmError::Stopping)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_warmed_says_why() {
    let registry = Registry::start();
    let mut samples = samples();
    // Its manifest promises another table of contents.
    samples[1].toc_digest = Digest::of(b"another");
    registry.push(&samples).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = layers(dir.path());
    let warmer = layers.warmer().unwrap();
    let report = last(&mut warmer.warm(warm(&registry, Share::All)).await.unwrap()).await;
    assert_eq!(states(&report), [LayerState::Resident, LayerState::NotLazy]);
    let (reason, text) = report.layers[1].problem.clone().unwrap();
    assert!(reason == "toc_mismatch" && text.contains("promises"), "{text}");

    let mut other = warm(&registry, Share::Toc);
    other.image = registry.image().replace(":1", ":2");
    let error = warmer.warm(other).await.err().unwrap();
    let WarmError::Manifest { source, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(source.class(), "not_found");
    let mut none = warm(&registry, Share::Toc);
    none.image = "UPPER".to_owned();
    assert!(matches!(warmer.warm(none).await.err(), Some(WarmError::Reference(_))));
    assert_eq!(warmer.warms(), 0);
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn there_is_a_bound_and_who_gives_up_makes_room() {
    // A registry that takes connections and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let image = format!("{}/image:1", silent.local_addr().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = layers(dir.path());
    let warmer = layers.warmer().unwrap();
    let request = || WarmRequest {
        image: image.clone(),
        manifest: None,
        share: Share::Toc,
        platform: Platform::own(),
    };
    let waiting: Vec<_> = (0..MAX_ADMITTED)
        .map(|_| {
            let (warmer, request) = (warmer.clone(), request());
            tokio::spawn(async move { warmer.warm(request).await.is_ok() })
        })
        .collect();
    while warmer.warms() < MAX_ADMITTED {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(matches!(warmer.warm(request()).await.err(), Some(WarmError::Busy)));
    for waiter in &waiting {
        waiter.abort();
    }
    for waiter in waiting {
        assert!(waiter.await.is_err());
    }
    assert_eq!(warmer.warms(), 0);
    layers.shutdown().await;
}

fn live(layers: &super::super::Layers, sample: &Sample) -> Option<Arc<LayerFetch>> {
    layers
        .shared
        .slots()
        .get(&sample.toc_digest)
        .and_then(|slot| slot.live())
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_mount_and_a_warm_of_a_layer_are_one_and_a_warmed_layer_needs_no_registry() {
    let registry = Registry::start();
    let [sample, _] = samples();
    let manifest = registry.push(std::slice::from_ref(&sample)).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, metrics) = layers(dir.path());
    let warmer = layers.warmer().unwrap();
    last(&mut warmer.warm(warm(&registry, Share::Toc)).await.unwrap()).await;

    // Held by a warm, then mounted, then unmounted: there is one view of the layer all the time.
    let names = LayerNames {
        image: registry.image(),
        layer_digest: sample.origin().layer_digest,
    };
    let used = Used::new(&layers.shared, sample.toc_digest);
    let held = layers.shared.hold(&used.slot, sample.toc_digest, names).await.unwrap();
    let mount = layers.mount(request(&registry, &sample, Some(manifest))).await.unwrap();
    assert!(live(&layers, &sample).is_some_and(|live| Arc::ptr_eq(&live, &held)));
    layers.release(&sample.toc_digest).await;
    assert!(!is_mount_point(&mount.path));
    assert!(live(&layers, &sample).is_some_and(|live| Arc::ptr_eq(&live, &held)));
    held.warm(u64::MAX).await.unwrap();
    layers.shared.let_go(&used.slot, held).await;
    drop(used);
    // It is complete, and somebody may look whether it is mounted by FUSE.
    let forgotten = async {
        while !layers.shared.slots().is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), forgotten).await.unwrap();
    assert_eq!(toc_requests(&metrics), 1);

    // A warm of a mounted layer leaves it mounted.
    drop(registry);
    let mount = layers
        .mount(LayerRequest {
            image: "127.0.0.1:1/image:1".to_owned(),
            manifest_digest: Some(manifest),
            layer_digest: sample.origin().layer_digest,
            toc_digest: Some(sample.toc_digest),
            siblings: Vec::new(),
        })
        .await
        .unwrap();
    let again = WarmRequest {
        image: "127.0.0.1:1/image:1".to_owned(),
        manifest: Some(manifest),
        share: Share::All,
        platform: Platform::own(),
    };
    let report = last(&mut warmer.warm(again).await.unwrap()).await;
    assert_eq!(states(&report), [LayerState::Resident]);
    assert!(is_mount_point(&mount.path) && live(&layers, &sample).is_some());
    let path = mount.path.clone();
    assert!(blocking(move || contents(Path::new(&path))).await == sample.files);
    layers.shutdown().await;
    assert!(!is_mount_point(&mount.path));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_image_of_an_index_is_the_one_for_the_platform() {
    let registry = Registry::start();
    let [first, second] = samples();
    let other = registry.push(&[first]).await;
    let own = registry.push(&[second]).await;
    let entry = |digest: Digest, platform: &Platform| {
        let name = platform.to_string();
        let (os, architecture) = name.split_once('/').unwrap();
        serde_json::json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest,
            "size": 1,
            "platform": {"os": os, "architecture": architecture},
        })
    };
    let kind = "application/vnd.oci.image.index.v1+json";
    let nonesuch: Platform = "linux/nonesuch".parse().unwrap();
    let entries = [entry(other, &nonesuch), entry(own, &Platform::own())];
    let index = serde_json::json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries});
    let image = Reference::parse(&registry.image().replace(":1", ":index")).unwrap();
    let client = hullspeed_registry::Client::new(hullspeed_registry::ClientOptions::default()).unwrap();
    let bytes = serde_json::to_vec(&index).unwrap().into();
    client
        .put_manifest(&image, &image.version(), bytes, kind)
        .await
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = layers(dir.path());
    let warmer = layers.warmer().unwrap();
    let request = |platform: Platform| WarmRequest {
        image: image.to_string(),
        manifest: None,
        share: Share::Toc,
        platform,
    };
    for (platform, manifest) in [(nonesuch, other), (Platform::own(), own)] {
        let report = last(&mut warmer.warm(request(platform)).await.unwrap()).await;
        assert_eq!(report.manifest, manifest);
        assert_eq!(states(&report), [LayerState::Resident]);
    }
    let error = warmer
        .warm(request("windows/amd64".parse().unwrap()))
        .await
        .err()
        .unwrap();
    assert!(
        matches!(&error, WarmError::Manifest { source, .. } if source.class() == "not_found"),
        "{error}"
    );
    layers.shutdown().await;
}

/// Files of these numbers; a number is a content.
fn numbered(numbers: impl Iterator<Item = u64>, prioritized: usize) -> Sample {
    let files = numbers.map(|number| {
        (
            format!("f{number:03}"),
            crate::layer::testing::noise(number + 1, 50_000),
        )
    });
    let packing = Packing {
        prioritized: Some(prioritized),
        ..Packing::default()
    };
    Sample::new(files.collect(), packing)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_layer_of_the_node_has_is_not_fetched_by_a_warm() {
    let registry = Registry::start();
    let (first, second) = (numbered(0..20, 4), numbered(2..22, 4));
    let dir = tempfile::tempdir().unwrap();
    let (layers, metrics) = layers(dir.path());
    let warmer = layers.warmer().unwrap();
    let fetched = || metrics.fetch_bytes.get_or_create(&KindLabels { kind: "warm" }).get();
    registry.push(std::slice::from_ref(&first)).await;
    last(&mut warmer.warm(warm(&registry, Share::All)).await.unwrap()).await;
    let once = fetched();
    assert!(once > 20 * 40_000 && metrics.cache_reused_bytes.get() <= 16, "{once}");
    registry.push(std::slice::from_ref(&second)).await;
    // What is hot of it is there: four files of the other layer.
    let report = last(&mut warmer.warm(warm(&registry, Share::Hot)).await.unwrap()).await;
    assert_eq!(states(&report), [LayerState::Resident]);
    assert!(fetched() - once < 1000, "{once} and then {}", fetched());
    let reused = metrics.cache_reused_bytes.get();
    assert!(
        (4 * 50_000..6 * 50_000).contains(&reused),
        "{reused}: no more than the share"
    );
    let report = last(&mut warmer.warm(warm(&registry, Share::All)).await.unwrap()).await;
    assert_eq!(states(&report), [LayerState::Resident]);
    let twice = fetched() - once;
    assert!(twice < 2 * 60_000, "two files are new, and {twice} bytes were fetched");
    assert!(metrics.cache_reused_bytes.get() >= 18 * 50_000);
    let cached = layers.shared.store.load(&second.toc_digest).unwrap().unwrap();
    assert!(cached.residency().is_complete());
    crate::layer::testing::assert_only_verified(&cached);
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_leaves_what_is_free_to_others_and_says_so() {
    let registry = Registry::start();
    let samples = samples();
    registry.push(&samples[..1]).await;
    let dir = tempfile::tempdir().unwrap();
    let (roomy, metrics) = layers(dir.path());
    last(&mut roomy.warmer().unwrap().warm(warm(&registry, Share::All)).await.unwrap()).await;
    roomy.shutdown().await;
    assert!(content_requests(&metrics) > 0);
    registry.push(&samples).await;
    let mut config = config(dir.path());
    config.cache.min_free = crate::layer::cache::limits::Amount::Percent(100);
    let metrics = Metrics::unregistered();
    let full = super::super::Layers::new(
        &config,
        metrics.clone(),
        Descriptors::default(),
        tokio::runtime::Handle::current(),
    )
    .unwrap();
    for share in [Share::Toc, Share::All] {
        let report = last(&mut full.warmer().unwrap().warm(warm(&registry, share)).await.unwrap()).await;
        // What is there is there.
        assert_eq!(
            states(&report),
            [LayerState::Resident, LayerState::Failed],
            "{report:?}"
        );
        let (reason, text) = report.layers[1].problem.clone().unwrap();
        assert!(reason == "no_room" && text.contains("cache.min_free"), "{text}");
    }
    assert_eq!((toc_requests(&metrics), content_requests(&metrics)), (0, 0));
    full.shutdown().await;
}
