//! Making a share of an image resident ahead of its use, without mounting anything.
//!
//! A warm goes through all layers share by share: every table of contents, then what is read first, then the rest. It uses what
//! mounts use, [`Shared::open_described`] and one [`LayerFetch`] per layer, so nothing is fetched twice whoever comes first; and what it
//! asks of a registry gives way to everybody else.

mod progress;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use estargz::digest::Digest;
use futures_util::{StreamExt, stream};
use hullspeed_registry::{HandedOver, Reference, ReferenceError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::progress::Progress;
pub use self::progress::{LayerReport, LayerState, WarmReport};
use super::{Shared, Used};
use crate::layer::cache::NoRoom;
use crate::layer::fetch::{LayerFetch, LayerNames};
use crate::layer::image::LayerDescriptor;
use crate::layer::platform::Platform;
use crate::layer::source::SourceError;

/// Warms that work at once.
const MAX_RUNNING: usize = 2;
/// Warms that work or wait for their turn.
pub const MAX_ADMITTED: usize = 16;
/// Tables of contents that one warm asks for at once; all of them together leave mounts most of [`super::MAX_OPENING`].
const PARALLEL_OPENINGS: usize = 4;
/// Layers whose content one warm fetches at once.
const PARALLEL_LAYERS: usize = 2;
/// How often it is looked whether there is still room for what nobody waits for.
const LOOK_FOR_ROOM: Duration = Duration::from_secs(1);

/// How much of an image is to be resident.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Share {
    /// The tables of contents.
    Toc,
    /// Also what the image's maker put first.
    Hot,
    /// Everything.
    All,
}

/// What is to be warmed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmRequest {
    /// The image.
    pub image: String,
    /// Its manifest, where it is known.
    pub manifest: Option<Digest>,
    /// How much of it.
    pub share: Share,
    /// For which platform, if it is an index.
    pub platform: Platform,
}

/// Why an image cannot be warmed at all.
#[derive(Debug, thiserror::Error)]
pub enum WarmError {
    /// The image's name is none.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// Too many warms.
    #[error("{MAX_ADMITTED} images are being warmed or wait for it already")]
    Busy,
    /// The daemon stops.
    #[error("the daemon is stopping")]
    Stopping,
    /// The manifest cannot be had.
    #[error("cannot read the manifest of {image}")]
    Manifest {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: Arc<SourceError>,
    },
}

/// Bounds on warms.
pub(super) struct Turns {
    admitted: Arc<Semaphore>,
    running: Arc<Semaphore>,
}

impl Turns {
    pub(super) fn new() -> Self {
        Self {
            admitted: Arc::new(Semaphore::new(MAX_ADMITTED)),
            running: Arc::new(Semaphore::new(MAX_RUNNING)),
        }
    }
}

/// Warms images of this daemon's layers, and holds the logins that were handed over. Cheap to clone.
#[derive(Clone)]
pub struct Warmer {
    shared: Arc<Shared>,
}

/// A warm under way; dropping it stops the work.
pub struct Warming {
    progress: Arc<Progress>,
    follower: progress::Follower,
    _stop: DropGuard,
}

/// One image and what is to become of it.
struct Work {
    image: String,
    share: Share,
    layers: Vec<LayerDescriptor>,
    progress: Arc<Progress>,
    _admitted: OwnedSemaphorePermit,
    _running: OwnedSemaphorePermit,
}

/// A layer that a warm has open.
struct HeldLayer {
    /// Its place in [`Work::layers`].
    number: usize,
    used: Used,
    fetch: Arc<LayerFetch>,
}

impl Warmer {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// The logins that were handed over.
    pub fn handed_over(&self) -> &HandedOver {
        &self.shared.handed_over
    }

    /// Warms that work or wait for their turn.
    pub fn warms(&self) -> usize {
        MAX_ADMITTED.saturating_sub(self.shared.warms.admitted.available_permits())
    }

    /// Starts to warm an image, once it is its turn and its manifest is there. Dropping the future is fine.
    pub async fn warm(&self, request: WarmRequest) -> Result<Warming, WarmError> {
        let shared = &self.shared;
        let image = Reference::parse(&request.image)?;
        let admitted = shared.warms.admitted.clone().try_acquire_owned();
        let admitted = admitted.map_err(|_| WarmError::Busy)?;
        let begin = async {
            let running = shared.warms.running.clone().acquire_owned().await;
            let running = running.map_err(|_| WarmError::Stopping)?;
            let (manifest, layers) = shared.resolve(&image, &request).await?;
            let progress = Arc::new(Progress::new(manifest, &layers));
            let work = Work {
                image: request.image,
                share: request.share,
                layers,
                progress: progress.clone(),
                _admitted: admitted,
                _running: running,
            };
            Ok((work, progress))
        };
        let begun = shared.stop.run_until_cancelled(begin).await;
        let (work, progress) = begun.unwrap_or(Err(WarmError::Stopping))?;
        let stop = shared.stop.child_token();
        let guard = stop.clone().drop_guard();
        let follower = progress.follow();
        // A task of its own: it gives back what it holds, also when nobody waits for it any more.
        let run = shared.clone().run(work, stop);
        shared.tasks.spawn_on(run, &shared.runtime);
        Ok(Warming {
            progress,
            follower,
            _stop: guard,
        })
    }
}

impl Warming {
    /// How far it is, at each change and about twice a second; `None` after the last report.
    pub async fn next(&mut self) -> Option<WarmReport> {
        self.follower.changed().await.then(|| self.progress.report())
    }
}

impl Shared {
    /// The image's manifest and its layers, each of them once.
    async fn resolve(
        &self,
        image: &Reference,
        request: &WarmRequest,
    ) -> Result<(Digest, Vec<LayerDescriptor>), WarmError> {
        let found = async {
            let client = self.registries.client()?;
            match request.manifest {
                Some(digest) => Ok((digest, self.manifests.layers(&client, image, &digest).await?)),
                None => self.manifests.resolve(&client, image, &request.platform).await,
            }
        };
        let (manifest, layers) = found.await.map_err(|source: Arc<SourceError>| WarmError::Manifest {
            image: request.image.clone(),
            source,
        })?;
        let mut seen = std::collections::HashSet::new();
        let layers = layers.iter().filter(|layer| seen.insert(layer.digest)).copied();
        Ok((manifest, layers.collect()))
    }

    async fn run(self: Arc<Self>, work: Work, stop: CancellationToken) {
        stop.run_until_cancelled(self.open_all(&work)).await;
        if work.share > Share::Toc {
            let held = self.hold_all(&work, &stop).await;
            stop.run_until_cancelled(self.fetch_all(&work, &held)).await;
            for HeldLayer { used, fetch, .. } in held {
                self.let_go(&used.slot, fetch).await;
            }
        }
        for toc in work.layers.iter().filter_map(|layer| layer.toc_digest) {
            self.store.note_used(&toc);
        }
        // Who is told of the end finds the place free.
        let progress = work.progress.clone();
        drop(work);
        progress.end();
    }

    /// Brings the tables of contents into the cache.
    async fn open_all(self: &Arc<Self>, work: &Work) {
        let open = |(number, layer): (usize, &LayerDescriptor)| {
            let (shared, layer) = (self.clone(), *layer);
            async move {
                let is_there = layer.toc_digest.is_some_and(|toc| shared.store.contains(&toc));
                if let Some(no_room) = shared.store.no_room().filter(|_| !is_there) {
                    work.progress.no_room(number, &no_room);
                    return;
                }
                work.progress.enter(number, LayerState::Opening);
                match shared.open_described(&work.image, &layer).await {
                    Ok(()) if work.share == Share::Toc => work.progress.enter(number, LayerState::Resident),
                    Ok(()) => work.progress.enter(number, LayerState::Waiting),
                    Err(error) => work.progress.not_opened(number, &error),
                }
            }
        };
        stream::iter(work.layers.iter().enumerate())
            .for_each_concurrent(PARALLEL_OPENINGS, open)
            .await;
    }

    /// Opens what came; local work only.
    async fn hold_all(self: &Arc<Self>, work: &Work, stop: &CancellationToken) -> Vec<HeldLayer> {
        let mut held = Vec::new();
        for (number, layer) in work.layers.iter().enumerate() {
            let Some(toc) = layer.toc_digest.filter(|_| work.progress.is_open(number)) else {
                continue;
            };
            if stop.is_cancelled() {
                break;
            }
            let used = Used::new(self, toc);
            let names = LayerNames {
                image: work.image.clone(),
                layer_digest: layer.digest,
            };
            match self.hold(&used.slot, toc, names).await {
                Ok(fetch) => {
                    work.progress
                        .fetching(number, fetch.clone(), end_of(work.share, &fetch));
                    held.push(HeldLayer { number, used, fetch });
                }
                Err(error) => work.progress.not_opened(number, &error),
            }
        }
        held
    }
}

impl Shared {
    /// Brings the content: of all layers what is read first, then the rest.
    async fn fetch_all(&self, work: &Work, held: &[HeldLayer]) {
        for share in [Share::Hot, Share::All] {
            if share > work.share {
                return;
            }
            let fetch = |layer: &HeldLayer| {
                let (number, fetch) = (layer.number, layer.fetch.clone());
                async move {
                    if !work.progress.is_over(number) && self.fetch_one(work, number, &fetch, share).await {
                        work.progress.enter(number, LayerState::Resident);
                    }
                }
            };
            stream::iter(held).for_each_concurrent(PARALLEL_LAYERS, fetch).await;
        }
    }

    /// Brings a share of one layer, from the node and then from the registry; whether that was all that is wanted of it.
    async fn fetch_one(&self, work: &Work, number: usize, fetch: &Arc<LayerFetch>, share: Share) -> bool {
        let until = end_of(share, fetch);
        fetch.reuse_before(until).await;
        let extent = fetch.extent(until);
        let fetched = tokio::select! {
            biased;
            no_room = self.wait_for_lack(), if extent.resident < extent.wanted => {
                work.progress.no_room(number, &no_room);
                return false;
            }
            fetched = fetch.warm(until) => fetched,
        };
        if let Err(failure) = &fetched {
            work.progress.not_fetched(number, failure);
        }
        fetched.is_ok() && share == work.share
    }

    /// Waits until there is no room for what nobody waits for.
    async fn wait_for_lack(&self) -> NoRoom {
        loop {
            if let Some(no_room) = self.store.no_room() {
                return no_room;
            }
            tokio::time::sleep(LOOK_FOR_ROOM).await;
        }
    }
}

/// Where in a layer's blob the share ends.
fn end_of(share: Share, fetch: &LayerFetch) -> u64 {
    match share {
        Share::Toc => 0,
        Share::Hot => fetch.layer().index().prefetch_end().unwrap_or(0),
        Share::All => u64::MAX,
    }
}
