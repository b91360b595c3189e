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
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Recovers, then keeps the pool until `stopping`, and recovers again whenever containerd was started anew.
pub(super) async fn run(containerd: Containerd, adopter: Adopter, pool: Pool, stopping: CancellationToken) {
    // Before the pool runs: it removes what nobody knows.
    tokio::select! {
        () = begin(&containerd, &adopter, &pool) => {}
        () = stopping.cancelled() => return,
    }
    let mut facts = pool.facts();
    let follow = async {
        while facts.changed().await.is_ok() {
            let now = facts.borrow_and_update().clone();
            if let Some(facts) = now {
                // The pool knows its own hulls by now, and finds the others.
                drop(recover(&adopter, Some(facts)).await);
                pool.take_back(Vec::new());
            } else {
                adopter.suspend().await;
            }
        }
    };
    tokio::select! {
        () = follow => {}
        () = adopter.keep_books() => {}
        () = pool.run(stopping.clone()) => {}
    }
}

/// First what there is, which calls wait for, then the facts, which only adoptions need.
async fn begin(containerd: &Containerd, adopter: &Adopter, pool: &Pool) {
    let recovered = recover(adopter, None).await;
    let mut wait = FIRST_WAIT;
    loop {
        match Facts::read(containerd).await {
            Ok(facts) => break adopter.resume(Arc::new(facts)).await,
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(error, retry_in = ?wait, "containerd's configuration is not known yet; nothing is adopted");
            }
        }
        sleep(&mut wait).await;
    }
    pool.take_back(ready(recovered));
}

/// Tries until it succeeds.
async fn recover(adopter: &Adopter, facts: Option<Arc<Facts>>) -> Recovered {
    let mut wait = FIRST_WAIT;
    loop {
        match adopter.recover(facts.clone()).await {
            Ok(recovered) => {
                tracing::info!(
                    hulls = recovered.idle.len(),
                    adopted = recovered.adopted.len(),
                    dropped = recovered.dropped.len(),
                    "sandboxes of before are known"
                );
                return recovered;
            }
            Err(error) => {
                let error = chain(&error);
                tracing::warn!(error, retry_in = ?wait, "containerd's sandboxes are not known yet");
            }
        }
        sleep(&mut wait).await;
    }
}

/// The next wait is longer.
async fn sleep(wait: &mut Duration) {
    tokio::time::sleep(*wait).await;
    *wait = (*wait * 2).min(LONGEST_WAIT);
}

/// Hulls that the pool may take back. Every other is removed by the pool, as one that nobody knows.
fn ready(recovered: Recovered) -> Vec<String> {
    let ready = recovered.idle.into_iter().filter(|hull| hull.ready);
    ready.map(|hull| hull.id).collect()
}
