//! The link itself, so that the other figures can be believed: what it carries when it is not shaped, what it carries when
//! it is, and what it costs.

use std::time::Instant;

use anyhow::{Context as _, Result};
use hullspeed_tests::content::ContentFile;
use hullspeed_tests::lazy::Source;
use hullspeed_tests::plain::PlainClient;
use hullspeed_tests::proxy::LinkOptions;
use hullspeed_tests::run::RunDir;

use super::{Amounts, figure, link_text};
use crate::figure::{Figure, Times};

/// Bytes of one transfer.
const BYTES: u64 = 64 << 20;

pub(super) async fn measure(run: RunDir, amounts: &Amounts) -> Result<Vec<Figure>> {
    let source = Source::start(run, LinkOptions::GIGABIT).await?;
    let size = usize::try_from(BYTES).context("a size beyond usize")?;
    let image = source.publish("link", &[vec![ContentFile::new("file", size)]], &[])?;
    source.registry.warm()?;
    let open = source.mirror(LinkOptions::default()).await?;
    let digest = image.layer(0)?;
    let mut shaped = PlainClient::connect(source.proxy.address()).await?;
    let mut unshaped = PlainClient::connect(open.address()).await?;
    let (mut times, mut raw_times, mut processor) = (Times::default(), Times::default(), 0.0);
    for _ in 0..amounts.rounds {
        let (begin, used) = (Instant::now(), processor_seconds());
        shaped.range("fetch/link", &digest, 0..BYTES).await?;
        times.push(begin.elapsed());
        processor += processor_seconds() - used;
        let begin = Instant::now();
        unshaped.range("fetch/link", &digest, 0..BYTES).await?;
        raw_times.push(begin.elapsed());
    }
    let raw = BYTES as f64 / 1e6 / (raw_times.median()? / 1e3);
    let delay = LinkOptions::GIGABIT.delay.as_secs_f64();
    let rate = BYTES as f64 * 8.0 / 1e6 / (times.median()? / 1e3 - delay);
    let share = processor / (times.sum() / 1e3);
    Ok(vec![
        figure(
            ("fetch.link_mbit_s", "Mbit/s"),
            rate,
            None,
            format!(
                "64 MiB by a plain client over {}, the delay left out; proxy and client used {share:.2} of one core",
                link_text()
            ),
            amounts.rounds,
        ),
        figure(
            ("fetch.link_raw_mb_s", "MB/s"),
            raw,
            None,
            "the same through the same proxy without a rate".into(),
            amounts.rounds,
        ),
    ])
}

/// Processor time of this process, in which proxy and plain client run.
fn processor_seconds() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}
