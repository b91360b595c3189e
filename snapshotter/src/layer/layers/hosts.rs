//! New hosts for layers that are mounted: `hosts.toml` may change at any time, and a layer may be mounted for months.
//!
//! A layer's sources are found when it is opened. Here the files are looked at every now and then, beside all reads; only when they
//! have changed are the sources of the open layers found anew.

use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::MissedTickBehavior;

use super::{Layers, Shared};

/// How often it is looked: a read that nobody can serve waits for its deadline, which is much longer.
const LOOK_EVERY: Duration = Duration::from_secs(2);

impl Layers {
    /// Gives open layers the hosts that `hosts.toml` names now.
    pub(super) fn spawn_host_watch(&self, runtime: &Handle) {
        let (shared, stop) = (self.shared.clone(), self.shared.stop.clone());
        let mut ticks = {
            let _guard = runtime.enter();
            tokio::time::interval(LOOK_EVERY)
        };
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let watch = async move {
            let mut seen = 0;
            loop {
                ticks.tick().await;
                if shared.slots().is_empty() {
                    continue;
                }
                let looking = shared.clone();
                let renewed = tokio::task::spawn_blocking(move || looking.renew_hosts(seen)).await;
                // A panic there has been reported; the next look may do better.
                seen = renewed.unwrap_or(seen);
            }
        };
        self.shared
            .tasks
            .spawn_on(async move { stop.run_until_cancelled(watch).await }, runtime);
    }
}

impl Shared {
    /// Finds the sources of all open layers anew if hosts are not as they were at version `seen`; the version now. Blocks.
    fn renew_hosts(self: &Arc<Self>, seen: u64) -> u64 {
        // Taken first: what changes from here on is found at the next look.
        let version = self.registries.version();
        if version == seen {
            return version;
        }
        let live: Vec<_> = self.slots().values().filter_map(|slot| slot.live()).collect();
        tracing::info!(
            layers = live.len(),
            "hosts of registries have changed; open layers are fetched from the new ones"
        );
        for fetch in live {
            let size = fetch.layer().index().blob_size();
            fetch.renew_sources(|names| self.sources(&names.image, &names.layer_digest, Some(size)));
        }
        version
    }
}
