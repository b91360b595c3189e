//! Why images and layers are served as they are: what snapshots, the memory of decisions and the layers tell, brought together.
//!
//! [`find`] is pure: it looks for the subject in the [`Facts`], and names the layers to ask about. [`Explainer`] gathers facts and
//! reports. Nothing here changes anything.

use std::collections::{BTreeMap, HashMap, HashSet};

use estargz::digest::Digest;
use hullspeed_registry::Reference;

use crate::layer::report::LayerReport;
use crate::snapshot::Kind;
use crate::snapshot::decisions::{Fallback, Refused};
use crate::snapshot::outline::Outline;

mod explainer;
pub(crate) mod filesystem;
#[cfg(test)]
mod tests;

pub use explainer::{ExplainError, Explainer, Listing, Overview, References, Usage};

/// Things explained in one answer.
pub const MAX_FOUND: usize = 16;
/// Layers of one of them; overlayfs can stack no more than 500.
pub const MAX_LAYERS: usize = 512;
/// Snapshots and images named for one layer.
pub const MAX_NAMED: usize = 4;
/// Longest subject.
pub const MAX_SUBJECT: usize = 4096;

/// A layer of the cache and where it came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cached {
    /// Identity of the layer.
    pub toc: Digest,
    /// Digest of its blob.
    pub layer: Digest,
    /// The image it was first fetched for.
    pub image: String,
}

/// All that is known of images.
#[derive(Debug, Default)]
pub struct Facts {
    /// The snapshots.
    pub outlines: Vec<Outline>,
    /// Layers that are not lazy, the oldest decision first.
    pub refused: Vec<Refused>,
    /// Layers of the cache.
    pub cached: Vec<Cached>,
}

/// What the subject turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubjectKind {
    /// An image.
    Image,
    /// A snapshot.
    Snapshot,
    /// A layer.
    Layer,
}

/// How a layer is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serving {
    /// A lazy snapshot.
    Lazy,
    /// A snapshot that containerd has unpacked.
    Overlay,
    /// It is to be unpacked, and that has not come to an end.
    Refused,
    /// It is in the cache, and no snapshot uses it.
    Cached,
}

/// One image, snapshot or layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// What it is.
    pub kind: SubjectKind,
    /// Its name.
    pub name: String,
    /// The image's manifest, where it is known.
    pub manifest: Option<Digest>,
    /// Lowest first.
    pub layers: Vec<LayerExplanation>,
}

/// Why a layer is served as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerExplanation {
    /// Digest of the blob, where it is known.
    pub digest: Option<Digest>,
    /// Identity of a layer that is or could be lazy.
    pub toc: Option<Digest>,
    /// How it is served.
    pub serving: Serving,
    /// Why it is not lazy, where that is known.
    pub fallback: Option<Fallback>,
    /// Some of its snapshots.
    pub snapshots: Vec<String>,
    /// Some of the images that it is known from.
    pub images: Vec<String>,
    /// What the cache says.
    pub report: Option<LayerReport>,
}

/// Sums over layers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sums {
    /// Layers.
    pub layers: usize,
    /// Those that are lazy.
    pub lazy: usize,
    /// Unpacked bytes of those that are open.
    pub bytes: u64,
    /// Those that are resident.
    pub resident: u64,
    /// Compressed bytes that were never fetched.
    pub saved: u64,
    /// Bytes received from registries.
    pub fetched: u64,
    /// Bytes copied from other layers.
    pub reused: u64,
    /// Reads that waited for the network.
    pub stalls: u64,
    /// How long.
    pub stall_time: std::time::Duration,
}

impl Explanation {
    /// Sums over the layers.
    pub fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        for layer in &self.layers {
            sums.layers += 1;
            sums.lazy += usize::from(layer.serving == Serving::Lazy);
            let Some(report) = &layer.report else { continue };
            if let Some(content) = report.residence.content {
                sums.bytes += content.bytes;
                sums.resident += content.resident;
                sums.saved += content.saved;
            }
            if let Some(cost) = &report.cost {
                sums.fetched += cost.bytes_fetched();
                sums.reused += cost.reused;
                sums.stalls += cost.stalls;
                sums.stall_time += cost.stall_time;
            }
        }
        sums
    }
}

/// Looks for `subject`; nothing where it is unknown. The second number is how many were left out.
pub fn find(subject: &str, facts: &Facts) -> (Vec<Explanation>, usize) {
    let finder = Finder::new(facts);
    let digest = subject.parse::<Digest>().ok();
    let mut found = finder.images(subject, digest);
    if found.is_empty()
        && let Some(digest) = digest
    {
        found = finder.layer(digest);
    }
    if found.is_empty() {
        found = finder.snapshots(subject);
    }
    let more = found.len().saturating_sub(MAX_FOUND);
    found.truncate(MAX_FOUND);
    (found, more)
}

/// Two references are the same where they differ only in what is left out: Docker Hub's host, or the tag `latest`.
fn same_image(subject: &str, parsed: Option<&Reference>, image: &str) -> bool {
    if image == subject {
        return true;
    }
    let (Some(a), Ok(b)) = (parsed, Reference::parse(image)) else {
        return false;
    };
    (a.host(), a.repository()) == (b.host(), b.repository()) && a.version() == b.version()
}

struct Finder<'a> {
    facts: &'a Facts,
    by_name: HashMap<&'a str, &'a Outline>,
}

impl<'a> Finder<'a> {
    fn new(facts: &'a Facts) -> Self {
        let by_name = facts
            .outlines
            .iter()
            .map(|outline| (outline.name.as_str(), outline))
            .collect();
        Self { facts, by_name }
    }

    fn images(&self, subject: &str, manifest: Option<Digest>) -> Vec<Explanation> {
        let parsed = manifest.is_none().then(|| Reference::parse(subject).ok()).flatten();
        let is_meant = |image: Option<&str>, of: Option<Digest>| match manifest {
            Some(manifest) => {
                of == Some(manifest) || image.is_some_and(|image| image.ends_with(&format!("@{manifest}")))
            }
            None => image.is_some_and(|image| same_image(subject, parsed.as_ref(), image)),
        };
        let meant: Vec<&Outline> = self
            .facts
            .outlines
            .iter()
            .filter(|outline| is_meant(outline.image.as_deref(), outline.manifest))
            .collect();
        let below: HashSet<&str> = meant.iter().filter_map(|outline| outline.parent.as_deref()).collect();
        let tops = meant.iter().filter(|outline| !below.contains(outline.name.as_str()));
        let mut found: Vec<Explanation> = tops.map(|top| self.image(top)).collect();
        let refused = self.facts.refused.iter().filter(|refused| {
            let image = (!refused.image.is_empty()).then_some(refused.image.as_str());
            is_meant(image, refused.manifest)
        });
        for refused in refused {
            self.add_refused(&mut found, refused);
        }
        if found.is_empty() {
            let warm = self
                .facts
                .cached
                .iter()
                .filter(|cached| is_meant(Some(&cached.image), None));
            let layers: Vec<_> = warm.take(MAX_LAYERS).map(|cached| self.cached(cached)).collect();
            if let Some(first) = layers.first() {
                found.push(Explanation {
                    kind: SubjectKind::Image,
                    name: first.images.first().cloned().unwrap_or_default(),
                    manifest: None,
                    layers,
                });
            }
        }
        found
    }

    fn image(&self, top: &Outline) -> Explanation {
        Explanation {
            kind: SubjectKind::Image,
            name: top.image.clone().unwrap_or_default(),
            manifest: top.manifest,
            layers: self.chain(top),
        }
    }

    /// A refused layer belongs to the image it was refused for, unless it is there already.
    fn add_refused(&self, found: &mut Vec<Explanation>, refused: &Refused) {
        let is_known = |layer: &LayerExplanation| layer.digest == refused.layer;
        if found.iter().any(|explanation| explanation.layers.iter().any(is_known)) {
            return;
        }
        let layer = LayerExplanation {
            digest: refused.layer,
            toc: None,
            serving: Serving::Refused,
            fallback: Some(refused.fallback.clone()),
            snapshots: vec![refused.snapshot.clone()],
            images: vec![refused.image.clone()],
            report: None,
        };
        let own = found
            .iter_mut()
            .find(|explanation| explanation.name == refused.image && explanation.manifest == refused.manifest);
        match own {
            Some(own) if own.layers.len() < MAX_LAYERS => own.layers.push(layer),
            Some(_) => {}
            None => found.push(Explanation {
                kind: SubjectKind::Image,
                name: refused.image.clone(),
                manifest: refused.manifest,
                layers: vec![layer],
            }),
        }
    }

    /// The snapshots called `name`, and those whose last part is: containerd puts its namespace and a number before the keys that its
    /// clients choose.
    fn snapshots(&self, name: &str) -> Vec<Explanation> {
        let is_meant = |outline: &&Outline| {
            let last = outline.name.strip_suffix(name);
            last.is_some_and(|before| before.is_empty() || before.ends_with('/'))
        };
        let explain = |outline: &Outline| Explanation {
            kind: SubjectKind::Snapshot,
            name: outline.name.clone(),
            manifest: outline.manifest,
            layers: self.chain(outline),
        };
        self.facts.outlines.iter().filter(is_meant).map(explain).collect()
    }

    fn layer(&self, digest: Digest) -> Vec<Explanation> {
        let mut layers: BTreeMap<String, LayerExplanation> = BTreeMap::new();
        let outlines = self.facts.outlines.iter();
        for outline in outlines.filter(|outline| outline.layer == Some(digest) || outline.lazy == Some(digest)) {
            let layer = self.outline(outline);
            // The same layer in several chains is one if it is lazy, and several if it is not.
            let key = outline.lazy.map_or_else(|| outline.name.clone(), |toc| toc.to_string());
            layers.entry(key).or_insert(layer);
        }
        let cached = self.facts.cached.iter();
        for cached in cached.filter(|cached| cached.toc == digest || cached.layer == digest) {
            layers
                .entry(cached.toc.to_string())
                .or_insert_with(|| self.cached(cached));
        }
        let mut layers: Vec<_> = layers.into_values().take(MAX_LAYERS).collect();
        let refused = self.facts.refused.iter().rev();
        for refused in refused.filter(|refused| refused.layer == Some(digest)) {
            if layers.is_empty() {
                let mut found = Vec::new();
                self.add_refused(&mut found, refused);
                layers.extend(found.into_iter().flat_map(|explanation| explanation.layers));
            }
        }
        if layers.is_empty() {
            return Vec::new();
        }
        vec![Explanation {
            kind: SubjectKind::Layer,
            name: digest.to_string(),
            manifest: None,
            layers,
        }]
    }

    /// The layers that a snapshot stands on and is, lowest first.
    fn chain(&self, top: &Outline) -> Vec<LayerExplanation> {
        let mut layers = Vec::new();
        let mut seen = HashSet::new();
        let mut next = Some(top);
        // A chain that ends in itself would be a defect of the store, and no reason to go on for ever.
        while let Some(outline) = next.filter(|outline| seen.insert(outline.name.as_str()))
            && layers.len() < MAX_LAYERS
        {
            // What a container writes is no layer; what is being unpacked is one.
            if outline.kind == Kind::Committed || outline.fallback.is_some() {
                layers.push(self.outline(outline));
            }
            next = outline
                .parent
                .as_deref()
                .and_then(|parent| self.by_name.get(parent))
                .copied();
        }
        layers.reverse();
        layers
    }

    fn outline(&self, outline: &Outline) -> LayerExplanation {
        let serving = match (outline.lazy, outline.kind) {
            (Some(_), _) => Serving::Lazy,
            (None, Kind::Committed) => Serving::Overlay,
            (None, Kind::Active | Kind::View) => Serving::Refused,
        };
        let same = |other: &&Outline| match outline.lazy {
            Some(toc) => other.lazy == Some(toc),
            None => other.name == outline.name,
        };
        let mut layer = LayerExplanation {
            digest: outline.layer,
            toc: outline.lazy,
            serving,
            fallback: outline.fallback.clone().filter(|_| outline.lazy.is_none()),
            snapshots: vec![outline.name.clone()],
            images: outline.image.iter().cloned().collect(),
            report: None,
        };
        for other in self.facts.outlines.iter().filter(same) {
            name(&mut layer.snapshots, &other.name);
            if let Some(image) = &other.image {
                name(&mut layer.images, image);
            }
        }
        layer
    }

    fn cached(&self, cached: &Cached) -> LayerExplanation {
        let of_snapshot = self
            .facts
            .outlines
            .iter()
            .find(|outline| outline.lazy == Some(cached.toc));
        if let Some(outline) = of_snapshot {
            return self.outline(outline);
        }
        LayerExplanation {
            digest: Some(cached.layer),
            toc: Some(cached.toc),
            serving: Serving::Cached,
            fallback: None,
            snapshots: Vec::new(),
            images: vec![cached.image.clone()],
            report: None,
        }
    }
}

/// Adds a name to a few.
fn name(names: &mut Vec<String>, name: &str) {
    if names.len() < MAX_NAMED && names.iter().all(|known| known != name) {
        names.push(name.to_owned());
    }
}
