//! 4 KiB random reads by four readers: our session against fuse3's own, over the same file system in memory.
//!
//! Run as root: `cargo run --release -p fuse-session --example random_read [seconds per round] [rounds] [workers] [direct]`. What
//! counts is the ratio, not the figures.

#![expect(clippy::print_stdout, reason = "an example reports to its user")]

use std::error::Error;
use std::num::NonZeroUsize;
use std::time::Duration;

mod contest;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut arguments = std::env::args().skip(1);
    let seconds: u64 = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let rounds: usize = arguments.next().map_or(Ok(5), |text| text.parse())?;
    let workers: Option<NonZeroUsize> = arguments.next().map(|text| text.parse()).transpose()?;
    let is_direct = arguments.next().is_some_and(|text| text == "direct");
    let mut ratios = Vec::new();
    for (number, round) in contest::hold(Duration::from_secs(seconds), rounds, workers, is_direct)?
        .into_iter()
        .enumerate()
    {
        let contest::Round { ours, theirs, bare } = round;
        println!(
            "round {}: fuse3 {theirs:.0}/s, fuse-session {ours:.0}/s, bare loop {bare:.0}/s, ratio {:.2}",
            number + 1,
            ours / theirs
        );
        ratios.push(ours / theirs);
    }
    ratios.sort_by(f64::total_cmp);
    if let Some(median) = ratios.get(ratios.len() / 2) {
        println!("median ratio {median:.2}");
    }
    Ok(())
}
