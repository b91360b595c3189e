//! Where one layer can be fetched from.
//!
//! Images share layers, so a mounted layer may be known from several images, each with its own registry and credentials. Each image
//! may have several hosts (mirrors). None of them may take the layer away from the others: a pull adds remotes and replaces none, and
//! a fetch that one remote fails goes on at the next. [`download`](super::download) walks the list.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::health::{Host, Hosts};
use super::layer::{LayerFetch, LayerNames};
use crate::layer::source::BlobSource;

/// Remotes kept for one layer: bounds memory, and what a read that all of them fail can cost.
const MAX_REMOTES: usize = 8;

/// One way to fetch a layer.
pub(super) struct Remote {
    pub(super) source: Arc<dyn BlobSource>,
    pub(super) names: LayerNames,
    /// What is known of its host.
    pub(super) host: Arc<Host>,
    /// Whether verified bytes ever came from it.
    proven: AtomicBool,
}

impl Remote {
    pub(super) fn new(source: Arc<dyn BlobSource>, names: LayerNames, hosts: &Hosts) -> Arc<Self> {
        let (host, proven) = (hosts.of(source.host()), AtomicBool::new(false));
        Arc::new(Self {
            source,
            names,
            host,
            proven,
        })
    }

    /// Whether both ask the same host in the same way for the same blob of the same image. One host may serve several roots, and
    /// health is the host's.
    fn is_same(&self, other: &Self) -> bool {
        self.names == other.names && self.source.identity() == other.source.identity()
    }

    /// Notes that verified bytes came from it.
    pub(super) fn has_delivered(&self) {
        self.proven.store(true, Ordering::Relaxed);
    }

    fn is_proven(&self) -> bool {
        self.proven.load(Ordering::Relaxed)
    }
}

/// The remotes of one layer, the one to be asked first at the front; never two that are the same.
#[derive(Default)]
pub(super) struct Remotes(RwLock<Vec<Arc<Remote>>>);

impl Remotes {
    /// The remotes in the order in which they are to be asked.
    pub(super) fn all(&self) -> Vec<Arc<Remote>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the one that is asked next sends the whole blob for each range.
    pub(super) fn ignore_ranges(&self) -> bool {
        let list = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let next = list
            .iter()
            .find(|remote| remote.host.pause().is_none())
            .or(list.first());
        next.is_some_and(|remote| remote.source.ignores_ranges())
    }

    /// Asks `remotes` first from now on, in this order.
    pub(super) fn prefer(&self, remotes: Vec<Arc<Remote>>) {
        self.change(|list| {
            for remote in bounded(remotes).into_iter().rev() {
                if let Some(known) = list.iter().position(|known| known.is_same(&remote)) {
                    let known = list.remove(known);
                    remote.proven.fetch_or(known.is_proven(), Ordering::Relaxed);
                }
                list.insert(0, remote);
            }
            shorten(list);
        });
    }

    /// Asks `remotes` in the place of those that are known for the same image, whose hosts are others now.
    pub(super) fn renew(&self, names: &LayerNames, remotes: Vec<Arc<Remote>>) {
        self.change(|list| {
            let Some(at) = list.iter().position(|known| known.names == *names) else {
                return;
            };
            let (known, others) = std::mem::take(list)
                .into_iter()
                .partition(|known| known.names == *names);
            let known: Vec<Arc<Remote>> = known;
            let remotes = bounded(remotes);
            for remote in &remotes {
                let proven = known.iter().any(|known| known.is_same(remote) && known.is_proven());
                remote.proven.fetch_or(proven, Ordering::Relaxed);
            }
            *list = others;
            // What was before the first of them is so still.
            list.splice(at..at, remotes);
            shorten(list);
        });
    }

    /// The images that the layer is known from, each once.
    pub(super) fn images(&self) -> Vec<LayerNames> {
        let mut images: Vec<LayerNames> = Vec::new();
        for remote in self.all() {
            if !images.contains(&remote.names) {
                images.push(remote.names.clone());
            }
        }
        images
    }

    /// Asks `remotes` after all others, as far as there is room for them.
    pub(super) fn offer(&self, remotes: Vec<Arc<Remote>>) {
        self.change(|list| {
            for remote in remotes {
                if list.len() < MAX_REMOTES && list.iter().all(|known| !known.is_same(&remote)) {
                    list.push(remote);
                }
            }
        });
    }

    /// Asks a remote first that delivered what another one never will.
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

impl LayerFetch {
    /// Asks for each image of the layer the sources that `find` knows now, in the place of those that were known.
    pub fn renew_sources(&self, find: impl Fn(&LayerNames) -> Vec<Arc<dyn BlobSource>>) {
        for names in self.remotes().images() {
            let remote = |source| Remote::new(source, names.clone(), &self.engine().hosts);
            let remotes = find(&names).into_iter().map(remote).collect();
            self.remotes().renew(&names, remotes);
        }
    }
}

/// The remotes of one image, each once and not too many; the last of them is the registry itself, which has what no mirror has.
fn bounded(remotes: Vec<Arc<Remote>>) -> Vec<Arc<Remote>> {
    let mut kept: Vec<Arc<Remote>> = Vec::new();
    for remote in remotes {
        if kept.iter().all(|known| !known.is_same(&remote)) {
            kept.push(remote);
        }
    }
    if kept.len() > MAX_REMOTES {
        kept.drain(MAX_REMOTES - 1..kept.len() - 1);
    }
    kept
}

/// Keeps a list within its limit, and its first.
fn shorten(list: &mut Vec<Arc<Remote>>) {
    while list.len() > MAX_REMOTES {
        // What nothing has come from yet is the least loss, and a mirror less than the registry behind it.
        let is_last = |at: usize| list[at + 1..].iter().all(|other| other.names != list[at].names);
        let least = (1..list.len())
            .rev()
            .min_by_key(|at| (list[*at].is_proven(), is_last(*at)));
        list.remove(least.unwrap_or(list.len() - 1));
    }
}

#[cfg(test)]
mod tests {
    use estargz::digest::Digest;

    use super::*;
    use crate::layer::source::scripted::Scripted;

    fn remote(hosts: &Hosts, image: &str, host: &str) -> Arc<Remote> {
        let names = LayerNames {
            image: image.to_owned(),
            layer_digest: Digest::of(b"layer"),
        };
        let source = Arc::new(Scripted::new(bytes::Bytes::new()).at(host));
        Remote::new(Arc::new(source), names, hosts)
    }

    fn order(remotes: &Remotes) -> Vec<String> {
        let name = |remote: &Arc<Remote>| format!("{}{}", remote.names.image, remote.host.name());
        remotes.all().iter().map(name).collect()
    }

    fn images(remotes: &Remotes) -> String {
        remotes.all().iter().map(|remote| remote.names.image.clone()).collect()
    }

    #[test]
    fn the_newest_is_first_none_is_twice_and_the_proven_stay() {
        let hosts = Hosts::new(4);
        let remotes = Remotes::default();
        let prefer = |image: &str| remotes.prefer(vec![remote(&hosts, image, "h")]);
        let offer = |image: &str| remotes.offer(vec![remote(&hosts, image, "h")]);
        prefer("a");
        remotes.all()[0].has_delivered();
        for image in ["b", "c", "b"] {
            prefer(image);
        }
        assert_eq!(images(&remotes), "bca");
        for image in ["a", "d", "e", "f", "g", "h", "i"] {
            offer(image);
        }
        assert_eq!(images(&remotes), "bcadefgh");
        for image in ["1", "2", "3", "4", "5", "6", "7", "8"] {
            prefer(image);
            assert_eq!(remotes.all().len(), MAX_REMOTES);
        }
        assert_eq!(images(&remotes), "8765432a");
        remotes.promote(&remotes.all()[7]);
        remotes.promote(&remote(&hosts, "x", "h"));
        assert_eq!(images(&remotes), "a8765432");
        // Pulled again: what came from it is not forgotten.
        prefer("a");
        assert!(remotes.all()[0].is_proven());
        for remote in remotes.all() {
            remote.has_delivered();
        }
        prefer("n");
        assert_eq!(images(&remotes), "na876543");
    }

    #[test]
    fn the_hosts_of_an_image_keep_their_order() {
        let hosts = Hosts::new(4);
        let remotes = Remotes::default();
        let of = |image: &str| ["m", "n", "r"].map(|host| remote(&hosts, image, host)).to_vec();
        remotes.prefer(of("a"));
        remotes.prefer(of("b"));
        remotes.prefer(of("a"));
        assert_eq!(order(&remotes), ["am", "an", "ar", "bm", "bn", "br"]);
    }

    #[test]
    fn new_hosts_of_an_image_take_the_place_of_its_old_ones() {
        let hosts = Hosts::new(4);
        let remotes = Remotes::default();
        let of = |image: &str, names: &[&str]| names.iter().map(|host| remote(&hosts, image, host)).collect::<Vec<_>>();
        remotes.prefer(of("b", &["m", "r"]));
        remotes.prefer(of("a", &["m", "r"]));
        remotes.all()[3].has_delivered();
        let names = |image: &str| remote(&hosts, image, "").names.clone();
        remotes.renew(&names("b"), of("b", &["x", "r", "y"]));
        assert_eq!(order(&remotes), ["am", "ar", "bx", "br", "by"]);
        assert!(remotes.all()[3].is_proven() && !remotes.all()[2].is_proven());
        remotes.renew(&names("a"), of("a", &["r"]));
        remotes.renew(&names("c"), of("c", &["r"]));
        assert_eq!(order(&remotes), ["ar", "bx", "br", "by"]);
        remotes.renew(&names("a"), of("a", &["1", "2", "3", "4", "5", "6", "7", "8", "9"]));
        // What has delivered stays, and so does the last of each image, which is the registry itself.
        assert_eq!(order(&remotes), ["a1", "a2", "a3", "a4", "a5", "a9", "br", "by"]);
        assert_eq!(remotes.images(), [names("a"), names("b")]);
    }

    #[test]
    fn roots_of_one_host_are_asked_each() {
        let hosts = Hosts::new(4);
        let names = remote(&hosts, "a", "").names.clone();
        let below = |path: &str| {
            let source = Arc::new(Scripted::new(bytes::Bytes::new()).at("h").below(path));
            Remote::new(Arc::new(source), names.clone(), &hosts)
        };
        let roots = || vec![below("v2/a"), below("v2/b"), below("v2/a"), remote(&hosts, "a", "r")];
        let paths = |remotes: &Remotes| -> Vec<String> {
            let path = |remote: &Arc<Remote>| remote.source.identity().to_owned();
            remotes.all().iter().map(path).collect()
        };
        let remotes = Remotes::default();
        remotes.prefer(roots());
        remotes.offer(roots());
        assert_eq!(paths(&remotes), ["h/v2/a", "h/v2/b", "r"]);
        assert!(Arc::ptr_eq(&remotes.all()[0].host, &remotes.all()[1].host));
        remotes.renew(&names, roots());
        assert_eq!(paths(&remotes), ["h/v2/a", "h/v2/b", "r"]);
    }

    #[test]
    fn of_too_many_hosts_the_registry_is_kept() {
        let hosts = Hosts::new(4);
        let all = || {
            let names = ["1", "2", "3", "4", "5", "6", "7", "8", "r"];
            names.map(|host| remote(&hosts, "a", host)).to_vec()
        };
        let remotes = Remotes::default();
        remotes.prefer(all());
        assert_eq!(order(&remotes), ["a1", "a2", "a3", "a4", "a5", "a6", "a7", "ar"]);
        remotes.prefer(vec![remote(&hosts, "b", "r")]);
        assert_eq!(order(&remotes), ["br", "a1", "a2", "a3", "a4", "a5", "a6", "ar"]);
    }
}
