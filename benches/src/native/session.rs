//! Our session loop against fuse3's own, on a file system in memory.

use std::time::Duration;

use anyhow::{Result, anyhow};

use super::{Amounts, Goal, blocking, figure};
use crate::figure::{Figure, median};

#[path = "../../../fuse-session/examples/random_read/contest.rs"]
mod contest;

/// Length of a round of each.
const ROUND: Duration = Duration::from_secs(1);

pub(super) async fn measure(amounts: &Amounts) -> Result<Vec<Figure>> {
    let missing = contest(
        "native.fuse_rand4k_4_readers_vs_fuse3",
        amounts,
        false,
        Some(Goal::AtLeast(5.0)),
    );
    let direct = "native.fuse_rand4k_4_readers_vs_fuse3_direct";
    Ok(vec![missing.await?, contest(direct, amounts, true, None).await?])
}

async fn contest(name: &'static str, amounts: &Amounts, is_direct: bool, goal: Option<Goal>) -> Result<Figure> {
    let rounds = amounts.rounds;
    let held = move || contest::hold(ROUND, rounds, None, is_direct).map_err(|error| anyhow!("{error}"));
    // It has a runtime of its own.
    let held = blocking(held).await?;
    let of = |rate: fn(&contest::Round) -> f64| median(&held.iter().map(rate).collect::<Vec<_>>());
    let said = format!(
        "random 4 KiB by 4 readers, {}, the same file system in memory: {:.0} reads/s by fuse3's session, {:.0} by ours with its default workers, {:.0} by a bare loop of the two system calls that decodes nothing",
        if is_direct {
            "O_DIRECT"
        } else {
            "all misses of the page cache"
        },
        of(|round| round.theirs)?,
        of(|round| round.ours)?,
        of(|round| round.bare)?
    );
    let ratio = of(|round| round.ours / round.theirs)?;
    Ok(figure((name, "ratio"), ratio, goal, said, held.len()))
}
