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
        recovered = recover(&containerd, &adopter) => pool.take_back(ready(recovered)),
        () = stopping.cancelled() => return,
    }
    let mut facts = pool.facts();
    let follow = async {
        while facts.changed().await.is_ok() {
            let there = facts.borrow_and_update().is_some();
            if there {
                // The pool knows its own hulls by now, and finds the others.
                drop(recover(&containerd, &adopter).await);
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
async fn recover(containerd: &Containerd, adopter: &Adopter) -> Recovered {
    let mut wait = FIRST_WAIT;
    loop {
        let error = match Facts::read(containerd).await {
            Ok(facts) => match adopter.recover(Arc::new(facts)).await {
                Ok(recovered) => {
                    tracing::info!(
                        hulls = recovered.idle.len(),
                        adopted = recovered.adopted.len(),
                        dropped = recovered.dropped.len(),
                        "sandboxes of before are known"
                    );
                    return recovered;
                }
                Err(error) => chain(&error),
            },
            Err(error) => chain(&error),
        };
        tracing::warn!(error, retry_in = ?wait, "containerd is not known yet; every call is only passed on");
        tokio::time::sleep(wait).await;
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

/// Hulls that the pool may take back. Every other is removed by the pool, as one that nobody knows.
fn ready(recovered: Recovered) -> Vec<String> {
    let ready = recovered.idle.into_iter().filter(|hull| hull.ready);
    ready.map(|hull| hull.id).collect()
}
