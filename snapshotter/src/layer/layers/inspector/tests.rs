//! Reports, verification and removal on layers of a real registry. What mounts needs root and `/dev/fuse`.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

use tokio::runtime::Handle;

use super::super::tests::{Registry, blocking, config, contents, layers, layers_mounted_by, request};
use super::super::warming::{Share, WarmRequest};
use super::*;
use crate::config::MountChoice;
use crate::layer::LayerMounts as _;
use crate::layer::cache::limits::Amount;
use crate::layer::layers::Layers;
use crate::layer::mounts::kept::Descriptors;
use crate::layer::platform::Platform;
use crate::layer::testing::{Packing, Sample};
use crate::metrics::Metrics;

fn samples() -> [Sample; 2] {
    let packed = Packing {
        chunk: 5_000,
        per_member: 4,
        prioritized: None,
    };
    [
        Sample::uniform(9, 50_000, Packing::default()),
        Sample::uniform(20, 30_000, packed),
    ]
}

async fn warm(layers: &Layers, registry: &Registry) {
    let request = WarmRequest {
        image: registry.image(),
        manifest: None,
        share: Share::All,
        platform: Platform::own(),
    };
    let mut warming = layers.warmer().unwrap().warm(request).await.unwrap();
    while warming.next().await.is_some() {}
}

/// Changes a byte of the layer's chunk 3 behind everybody's back; the path of its file.
fn spoil(layers: &Layers, sample: &Sample) -> String {
    let cached = layers.shared.store.load(&sample.toc_digest).unwrap().unwrap();
    let chunk = cached.index().chunk(3).unwrap();
    let data = File::options().write(true).open(cached.dir().join("data")).unwrap();
    data.write_all_at(b"!", chunk.data_offset + 7).unwrap();
    String::from_utf8(cached.index().path_of(chunk.ino)).unwrap()
}

async fn verified(inspector: &Inspector, layer: Option<Digest>) -> VerifyReport {
    let mut verifying = inspector.verify(layer).await.unwrap();
    let mut last = VerifyReport::default();
    while let Some(report) = verifying.next().await {
        last = report;
    }
    assert!(last.done, "{last:?}");
    last
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_reports_tell_what_is_open_and_what_is_only_cached() {
    let registry = Registry::start();
    let samples = samples();
    let manifest = registry.push(&samples).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = layers(dir.path());
    let inspector = layers.inspector().unwrap();
    warm(&layers, &registry).await;
    assert!(inspector.live().is_empty());
    let surveys = inspector.survey().await;
    assert_eq!(surveys.len(), 2);
    for sample in &samples {
        let survey = surveys.iter().find(|survey| survey.toc == sample.toc_digest).unwrap();
        assert_eq!(
            (survey.layer, survey.image.as_str()),
            (sample.origin().layer_digest, registry.image().as_str())
        );
        assert!(survey.last_used.is_some());
        let report = inspector.closed(survey);
        assert!(
            report.residence.is_complete() && report.residence.chunks > 0,
            "{report:?}"
        );
        assert!(report.cost.is_none() && !report.mounted);
        assert_eq!(report.residence.blob_bytes, sample.blob.len() as u64);
    }

    let path = layers
        .mount(request(&registry, &samples[1], Some(manifest)))
        .await
        .unwrap()
        .path;
    let live = inspector.live();
    assert_eq!(live.len(), 1);
    assert!(live[0].is_mounted() && live[0].is_complete() && live[0].toc_digest() == samples[1].toc_digest);
    assert!(blocking(move || contents(&path)).await == samples[1].files);
    let report = inspector.report(&live[0]);
    let content = report.residence.content.unwrap();
    let bytes: usize = samples[1].files.values().map(Vec::len).sum();
    assert!(
        content.bytes.abs_diff(bytes as u64) <= 16 && content.resident == content.bytes,
        "{content:?}"
    );
    assert_eq!(content.saved, 0);
    assert!(report.mounted);
    let cost = report.cost.unwrap();
    assert_eq!((cost.stalls, cost.bytes_fetched()), (0, 0));
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_wrong_bytes_are_found_dropped_and_fetched_again() {
    wrong_bytes_are_found(MountChoice::Fuse).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_wrong_bytes_that_the_kernel_may_read_are_found_and_written_over() {
    wrong_bytes_are_found(MountChoice::Auto).await;
}

async fn wrong_bytes_are_found(by: MountChoice) {
    let registry = Registry::start();
    let samples = samples();
    let manifest = registry.push(&samples).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, metrics) = layers_mounted_by(dir.path(), by);
    let inspector = layers.inspector().unwrap();
    warm(&layers, &registry).await;
    let mount = layers
        .mount(request(&registry, &samples[0], Some(manifest)))
        .await
        .unwrap();
    let sound = verified(&inspector, None).await;
    assert_eq!(
        (sound.layers, sound.layers_done, sound.wrong, sound.failed),
        (2, 2, 0, 0),
        "{sound:?}"
    );

    // Somebody's hand, in a mounted layer and in one that nobody has open.
    let places = [&samples[0], &samples[1]].map(|sample| spoil(&layers, sample));
    let one = verified(&inspector, Some(samples[1].origin().layer_digest)).await;
    assert_eq!((one.layers, one.wrong), (1, 1));
    let told = WrongChunk {
        toc_digest: samples[1].toc_digest,
        chunk: 3,
        file: places[1].clone(),
        offset: one.told[0].offset,
    };
    assert_eq!(one.told, [told]);
    let other = verified(&inspector, None).await;
    assert_eq!((other.wrong, other.told[0].toc_digest), (1, samples[0].toc_digest));
    assert_eq!((other.chunks, other.bytes < sound.bytes), (sound.chunks - 1, true));
    assert_eq!(metrics.verify_failures.get(), 2);
    // The mounted layer fetches what it lacks; nothing wrong was ever read. The kernel does not ask any more.
    assert_eq!(inspector.live()[0].is_complete(), by == MountChoice::Auto);
    assert!(blocking(move || contents(&mount.path)).await == samples[0].files);
    assert_eq!(verified(&inspector, Some(samples[0].toc_digest)).await.wrong, 0);
    assert!(inspector.live()[0].is_complete());
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_wrong_bytes_that_were_read_leave_the_page_cache() {
    for by in [MountChoice::Fuse, MountChoice::Auto] {
        wrong_bytes_leave_the_page_cache(by).await;
    }
}

async fn wrong_bytes_leave_the_page_cache(by: MountChoice) {
    let registry = Registry::start();
    let samples = samples();
    let manifest = registry.push(&samples).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = layers_mounted_by(dir.path(), by);
    let inspector = layers.inspector().unwrap();
    warm(&layers, &registry).await;
    let request = request(&registry, &samples[1], Some(manifest));
    let path = layers.mount(request).await.unwrap().path;
    spoil(&layers, &samples[1]);
    let read = async || {
        let path = path.clone();
        blocking(move || contents(&path)).await
    };
    assert!(read().await != samples[1].files);
    let report = verified(&inspector, Some(samples[1].toc_digest)).await;
    assert_eq!((report.wrong, report.failed), (1, 0), "{report:?}");
    assert!(read().await == samples[1].files);
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_verified_layers_are_as_old_as_before() {
    let registry = Registry::start();
    registry.push(&samples()).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = layers(dir.path());
    let inspector = layers.inspector().unwrap();
    warm(&layers, &registry).await;
    let ages = async || {
        let age = |survey: Survey| survey.last_used.unwrap().elapsed().unwrap().as_secs();
        inspector.survey().await.into_iter().map(age).collect::<Vec<_>>()
    };
    tokio::time::sleep(Duration::from_millis(2_500)).await;
    let mut verifying = inspector.verify(None).await.unwrap();
    while let Some(report) = verifying.next().await {
        assert!(ages().await.iter().all(|age| *age >= 1), "{report:?}");
        layers.shared.store.tidy();
    }
    assert!(ages().await.iter().all(|age| *age >= 2), "{:?}", ages().await);
    // To warm a layer is to use it, also if all of it is here.
    warm(&layers, &registry).await;
    assert!(ages().await.iter().all(|age| *age < 2), "{:?}", ages().await);
    layers.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_a_verification_is_refused_or_ended_where_it_must() {
    let registry = Registry::start();
    registry.push(&samples()).await;
    let dir = tempfile::tempdir().unwrap();
    let (layers, _) = layers(dir.path());
    let inspector = layers.inspector().unwrap();
    warm(&layers, &registry).await;
    let unknown = Digest::of(b"unknown");
    let error = inspector.verify(Some(unknown)).await.err();
    assert!(matches!(error, Some(VerifyError::NotFound { digest }) if digest == unknown));
    let turn = inspector.verifying.clone().try_acquire_owned().unwrap();
    assert!(matches!(inspector.verify(None).await.err(), Some(VerifyError::Busy)));
    drop(turn);
    // One that is dropped gives its turn back and holds no layer.
    drop(inspector.verify(None).await.unwrap());
    let turn = inspector.verifying.clone().acquire_owned().await.unwrap();
    drop(turn);
    layers.shutdown().await;
    assert!(layers.shared.slots().is_empty());
    assert!(matches!(
        inspector.verify(None).await.err(),
        Some(VerifyError::Stopping)
    ));
}

#[tokio::test(flavor = "multi_thread")]
async fn privileged_pruning_takes_what_nobody_uses_and_nothing_else() {
    let registry = Registry::start();
    let samples = samples();
    let manifest = registry.push(&samples).await;
    let dir = tempfile::tempdir().unwrap();
    // Whatever the disk of this machine has free.
    let mut config = config(dir.path());
    config.cache.quota = Amount::NONE;
    config.cache.min_free = Amount::NONE;
    let layers = Layers::new(
        &config,
        Metrics::unregistered(),
        Descriptors::default(),
        Handle::current(),
    )
    .unwrap();
    let inspector = layers.inspector().unwrap();
    warm(&layers, &registry).await;
    let mount = layers
        .mount(request(&registry, &samples[0], Some(manifest)))
        .await
        .unwrap();
    layers.shared.store.settle();
    assert_eq!(inspector.prune(false).await.layers, 0, "there is no limit");
    let dropped = inspector.prune(true).await;
    assert_eq!((dropped.layers, dropped.failed), (1, 0));
    assert!(dropped.bytes > 500_000, "{dropped:?}");
    let left: Vec<Digest> = inspector.survey().await.iter().map(|survey| survey.toc).collect();
    assert_eq!(left, [samples[0].toc_digest]);
    assert!(blocking(move || contents(&mount.path)).await == samples[0].files);
    layers.shutdown().await;
}
