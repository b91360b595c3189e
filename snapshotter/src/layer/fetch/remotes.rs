//! Where one layer can be fetched from.
//!
//! Images share layers, so a mounted layer may be known from several images, each with its own registry and credentials. None of
//! them may take the layer away from the others: a pull adds a remote and replaces none, and a fetch that one remote
//! fails goes on at the next. [`download`](super::download) and [`group`](super::group) walk the list.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::layer::LayerNames;
use crate::layer::source::BlobSource;

/// Remotes kept for one layer: bounds memory, and what a read that all of them fail can cost.
const MAX_REMOTES: usize = 4;

/// One way to fetch a layer.
pub(super) struct Remote {
    pub(super) source: Arc<dyn BlobSource>,
    pub(super) names: LayerNames,
    /// Whether verified bytes ever came from it.
    proven: AtomicBool,
}

impl Remote {
    pub(super) fn new(source: Arc<dyn BlobSource>, names: LayerNames) -> Arc<Self> {
        let proven = AtomicBool::new(false);
        Arc::new(Self { source, names, proven })
    }

    /// Notes that verified bytes came from it.
    pub(super) fn has_delivered(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }

    fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }
}

/// The remotes of one layer, the one to be asked first at the front; never empty, and never two of the same names.
pub(super) struct Remotes(RwLock<Vec<Arc<Remote>>>);

impl Remotes {
    pub(super) fn new(first: Arc<Remote>) -> Self {
        Self(RwLock::new(vec![first]))
    }

    /// The remotes in the order in which they are to be asked.
    pub(super) fn all(&self) -> Vec<Arc<Remote>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks `remote` first from now on.
    pub(super) fn prefer(&self, remote: Arc<Remote>) {
        self.change(|list| {
            if let Some(known) = list.iter().position(|known| known.names == remote.names) {
                let known = list.remove(known);
                remote.proven.fetch_or(known.is_proven(), Ordering::Relaxed);
            }
            list.insert(0, remote);
            if list.len() > MAX_REMOTES {
                // What nothing has come from yet is the least loss.
                let unproven = list.iter().skip(1).rposition(|remote| !remote.is_proven());
                list.remove(unproven.map_or(MAX_REMOTES, |at| at + 1));
            }
        });
    }

    /// Asks `remote` after all others, if there is room for it.
    pub(super) fn offer(&self, remote: Arc<Remote>) {
        self.change(|list| {
            if list.len() < MAX_REMOTES && list.iter().all(|known| known.names != remote.names) {
                list.push(remote);
            }
        });
    }

    /// Asks a remote first that delivered what another one did not.
    pub(super) fn promote(&self, remote: &Arc<Remote>) {
        self.change(|list| {
            if let Some(at) = list.iter().position(|known| Arc::ptr_eq(known, remote)) {
                let remote = list.remove(at);
                list.insert(0, remote);
            }
        });
    }

    fn change(&self, change: impl FnOnce(&mut Vec<Arc<Remote>>)) {
        // No change can panic halfway: they are moves within one list.
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }
}

#[cfg(test)]
mod tests {
    use estargz::digest::Digest;

    use super::*;
    use crate::layer::source::scripted::Scripted;

    fn remote(image: &str) -> Arc<Remote> {
        let names = LayerNames {
            image: image.to_owned(),
            layer_digest: Digest::of(b"layer"),
        };
        Remote::new(Arc::new(Arc::new(Scripted::new(bytes::Bytes::new()))), names)
    }

    fn images(remotes: &Remotes) -> String {
        remotes.all().iter().map(|remote| remote.names.image.clone()).collect()
    }

    #[test]
    fn the_newest_is_first_none_is_twice_and_the_proven_stay() {
        let remotes = Remotes::new(remote("a"));
        remotes.all()[0].has_delivered();
        for image in ["b", "c", "b"] {
            remotes.prefer(remote(image));
        }
        assert_eq!(images(&remotes), "bca");
        remotes.offer(remote("a"));
        remotes.offer(remote("d"));
        remotes.offer(remote("e"));
        assert_eq!(images(&remotes), "bcad");
        for image in ["f", "g", "h", "i"] {
            remotes.prefer(remote(image));
            assert_eq!(remotes.all().len(), MAX_REMOTES);
        }
        assert_eq!(images(&remotes), "ihga");
        remotes.promote(&remotes.all()[3]);
        remotes.promote(&remote("x"));
        assert_eq!(images(&remotes), "aihg");
        // Pulled again: what came from it is not forgotten.
        remotes.prefer(remote("a"));
        for image in ["j", "k", "l", "m"] {
            remotes.prefer(remote(image));
        }
        assert_eq!(images(&remotes), "mlka");
        for remote in remotes.all() {
            remote.has_delivered();
        }
        remotes.prefer(remote("n"));
        assert_eq!(images(&remotes), "nmlk");
    }
}
