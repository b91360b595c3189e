//! What a call that is only passed on pays for the relay.

use std::time::Instant;

use anyhow::Result;

use super::Bench;
use crate::figure::{Figure, Times};

/// Times `calls` Version calls of each kind, in turn.
pub(super) async fn measure(bench: &mut Bench, calls: usize) -> Result<Figure> {
    let (mut native, mut relayed) = (Times::default(), Times::default());
    for _ in 0..calls {
        let begin = Instant::now();
        bench.native.version().await?;
        native.push(begin.elapsed());
        let begin = Instant::now();
        bench.relay.version().await?;
        relayed.push(begin.elapsed());
    }
    let (ours, theirs) = (relayed.median()?, native.median()?);
    let said = format!("Version through the relay {ours:.3} ms, at containerd {theirs:.3} ms, medians");
    Ok(bench.figure(
        ("hulls.relay_overhead_ms_p50", "ms"),
        ours - theirs,
        Some(1.0),
        &said,
        calls,
    ))
}
