//! What it costs to mount an image: requests, and how many of them wait for each other.

use std::time::Instant;

use anyhow::{Result, ensure};
use hullspeed_tests::content::{ContentFile, small_files};
use hullspeed_tests::lazy::Source;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::proxy::record::round_trips;
use hullspeed_tests::run::RunDir;

use super::{Amounts, DEMAND_ONLY, blob_requests, figure, link_text};
use crate::figure::{Figure, Times};

/// Layers of the image.
const LAYERS: usize = 10;

pub(super) async fn measure(run: RunDir, amounts: &Amounts) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::GIGABIT).await?;
    let image = source.publish("ten", &layers(), &[])?;
    source.registry.warm()?;
    let (mut cold, mut local, mut trips) = (0.0_f64, 0.0_f64, 0_usize);
    let mut times = Times::default();
    for round in 0..amounts.rounds {
        let mut node = source.node(&format!("mount-{round}"), DEMAND_ONLY).await?;
        source.proxy.reset();
        let begin = Instant::now();
        node.mount(&image).await?;
        times.push(begin.elapsed());
        let requests = blob_requests(&source.proxy);
        ensure!(
            !requests.is_empty(),
            "an image that nobody had was mounted without a request"
        );
        cold = cold.max(requests.len() as f64 / LAYERS as f64);
        trips = trips.max(round_trips(&requests));
        // The image goes and comes back: its layers are in the cache. Then the daemon does.
        source.proxy.reset();
        node.forget(&image).await?;
        node.mount(&image).await?;
        node.snapshotter.process().stop()?;
        node.start_again(&source.run).await?;
        let view = node.view(&image, "view").await?;
        node.snapshots.remove(view).await?;
        local = local.max(source.proxy.totals().requests as f64 / LAYERS as f64);
    }
    let middle = times.median()?;
    Ok(vec![
        figure(
            ("fetch.requests_per_layer_cold", "count"),
            cold,
            Some(1.0),
            "stargz-snapshotter takes 3 or 4, one after the other".into(),
            amounts.rounds,
        ),
        figure(
            ("fetch.requests_per_layer_toc_local", "count"),
            local,
            Some(0.0),
            "all requests of a second mount and of a restart, manifests included".into(),
            amounts.rounds,
        ),
        figure(
            ("fetch.mount_round_trips", "count"),
            trips as f64,
            Some(2.0),
            format!(
                "{LAYERS} layers over {}; {middle:.0} ms with the manifest, until the last layer is mounted",
                link_text()
            ),
            amounts.rounds,
        ),
    ])
}

/// Layers as images have them: a large program, thousands of small files, and things between.
fn layers() -> Vec<Vec<ContentFile>> {
    let other = |number: usize| small_files(&format!("l{number}"), 50 * number, 100_000 / number);
    let first = [
        vec![ContentFile::new("large", 24 << 20)],
        small_files("base", 500, 8000),
    ]
    .concat();
    let many = small_files("many", 2000, 4750);
    [first, many].into_iter().chain((3..=LAYERS).map(other)).collect()
}
