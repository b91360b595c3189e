//! Learning from containerd, at the start and whenever it has been away, which sandboxes are hulls and which are pods.

use std::sync::Arc;
use std::time::Duration;

use hullspeed_daemon::error::chain;
use tokio_util::sync::CancellationToken;

use crate::adopt::{Adopter, Recovered};
use crate::containerd::Containerd;
use crate::containerd::facts::Facts;
use crate::pool::Pool;

/// The first wait for a containerd that does not answer, and the longest.
const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// Recovers, then keeps the pool until `stopping`, and recovers again whenever containerd was started anew.
pub(super) async fn run(containerd: Containerd, adopter: Adopter, pool: Pool, stopping: CancellationToken) {
    // Before the pool runs: it removes what nobody knows.
    tokio::select! {
        () = recover(&containerd, &adopter, &pool) => {}
        () = stopping.cancelled() => return,
    }
    let mut facts = pool.facts();
    let follow = async {
        // The first that the pool reads are those of the recovery before, or newer.
        while facts.changed().await.is_ok() {
            let there = facts.borrow_and_update().is_some();
            if there {
                recover(&containerd, &adopter, &pool).await;
            } else {
                adopter.suspend().await;
            }
        }
    };
    tokio::select! {
        () = follow => {}
        () = pool.run(stopping.clone()) => {}
    }
}

/// Tries until it succeeds.
async fn recover(containerd: &Containerd, adopter: &Adopter, pool: &Pool) {
    let mut wait = FIRST_WAIT;
    loop {
        let error = match Facts::read(containerd).await {
            Ok(facts) => match adopter.recover(Arc::new(facts)).await {
                Ok(recovered) => return settle(pool, recovered),
                Err(error) => chain(&error),
            },
            Err(error) => chain(&error),
        };
        tracing::warn!(error, retry_in = ?wait, "containerd is not known yet; every call is only passed on");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

fn settle(pool: &Pool, recovered: Recovered) {
    let Recovered { idle, adopted, dropped } = recovered;
    tracing::info!(
        hulls = idle.len(),
        adopted = adopted.len(),
        dropped = dropped.len(),
        "sandboxes of before are known"
    );
    // What is not taken back, the pool removes as it does with every hull that nobody knows.
    let ready = idle.into_iter().filter(|hull| hull.ready).map(|hull| hull.id);
    pool.take_back(ready.collect());
}
