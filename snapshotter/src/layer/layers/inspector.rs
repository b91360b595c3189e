//! What operators ask of the layers and have done to their cache: reports, the list of what is cached, removal, verification.
//!
//! Reports never wait for a layer's locks: a layer whose mount hangs is the one that is asked about.

mod space;
mod survey;
#[cfg(test)]
mod tests;
mod verification;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use estargz::digest::Digest;
use tokio::sync::Semaphore;

use super::mounted::Mounted;
use super::{MAX_OPENING, Shared};
use crate::layer::fetch::{BackgroundState, LayerFetch};
use crate::layer::mounts::Kind;
use crate::layer::report::{Cost, Failure, HostReport, LayerReport, MountReport, Residence};

pub use space::Space;
pub use survey::Survey;
pub use verification::{MAX_WRONG_TOLD, VerifyError, VerifyReport, Verifying, WrongChunk};

/// What the completion of a layer waits for that is paused, where that is known.
const NO_ROOM: &str = "no_room";
/// How a layer is mounted that the kernel serves.
const EROFS: &str = Kind::Erofs.name();

/// Looks at the layers of this daemon. Cheap to clone.
#[derive(Clone)]
pub struct Inspector {
    shared: Arc<Shared>,
    /// One verification at a time: it reads the whole cache.
    verifying: Arc<Semaphore>,
}

/// A layer that somebody has open.
pub struct Live {
    fetch: Arc<LayerFetch>,
    mounted: bool,
    mount: Option<&'static str>,
    former: Option<&'static str>,
    /// What went wrong when it was opened.
    opening_failure: Option<Failure>,
}

impl Live {
    /// Identity of the layer.
    pub fn toc_digest(&self) -> Digest {
        self.fetch.layer().toc_digest()
    }

    /// Whether it is mounted, and not only being warmed.
    pub fn is_mounted(&self) -> bool {
        self.mounted
    }

    /// How it is mounted: `erofs` or `fuse`; none where it is not, or its mount is being changed.
    pub fn mount(&self) -> Option<&'static str> {
        self.mount
    }

    /// Whether the kernel serves it alone: it is mounted natively, and nothing is missing that anybody could ask for.
    pub fn is_kernel_alone(&self) -> bool {
        self.mount == Some(EROFS) && self.fetch.is_complete()
    }

    /// The last request for it that failed.
    pub fn last_failure(&self) -> Option<Failure> {
        self.cost().last_failure
    }

    fn cost(&self) -> Cost {
        let mut cost = self.fetch.cost();
        // Opening comes before all else.
        cost.last_failure = cost.last_failure.or_else(|| self.opening_failure.clone());
        cost
    }

    /// Whether all of it is resident.
    pub fn is_complete(&self) -> bool {
        self.fetch.layer().residency().is_complete()
    }
}

impl Inspector {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            verifying: Arc::new(Semaphore::new(1)),
        }
    }

    /// The layers that are mounted or being warmed.
    pub fn live(&self) -> Vec<Live> {
        let slots: Vec<_> = self.shared.slots().values().cloned().collect();
        let live = slots.iter().filter_map(|slot| {
            let fetch = slot.live()?;
            let (mounted, mount, former) = match slot.mounted.try_lock() {
                Ok(mounted) => (
                    mounted.is_some(),
                    mounted.as_ref().map(Mounted::kind),
                    mounted.as_ref().and_then(Mounted::former_kind),
                ),
                // It is being mounted, unmounted or looked at.
                Err(_) => (slot.warms.load(Ordering::Relaxed) == 0, None, None),
            };
            let opening_failure = self.shared.opening_failures.of(&fetch.layer().toc_digest());
            Some(Live {
                fetch,
                mounted,
                mount,
                former,
                opening_failure,
            })
        });
        live.collect()
    }

    /// Layers whose tables of contents are being fetched.
    pub fn opening(&self) -> usize {
        MAX_OPENING.saturating_sub(self.shared.opening.available_permits())
    }

    /// The hosts that were asked, by name.
    pub fn hosts(&self) -> Vec<HostReport> {
        self.shared.engine.hosts()
    }

    /// How layers are mounted, and why so.
    pub fn mounts(&self) -> MountReport {
        self.shared.ways.report()
    }

    /// Requests to registries under way, by what they are for.
    pub fn in_flight(&self) -> Vec<(&'static str, u64)> {
        let mut in_flight = self.shared.engine.in_flight();
        in_flight.push(("toc", self.opening() as u64));
        in_flight
    }

    /// All that can be told of a layer that is open. Looks at every chunk, and at the disk.
    pub fn report(&self, live: &Live) -> LayerReport {
        let layer = live.fetch.layer();
        let mut cost = live.cost();
        if cost.background == BackgroundState::Paused.name() && self.no_room().is_some() {
            cost.background = NO_ROOM;
        }
        let disk = self.shared.store.usage(&layer.toc_digest()).bytes;
        LayerReport {
            toc_digest: layer.toc_digest(),
            mounted: live.mounted,
            mount: live.mount,
            former_mount: live.former,
            kernel_alone: live.is_kernel_alone(),
            residence: Residence::measured(layer.index(), layer.residency(), disk),
            cost: Some(cost),
            readers: live.fetch.readers().report(),
        }
    }
}
