//! Gathers what [`super::find`] looks at, and asks the layers about what it has found.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use estargz::digest::Digest;

use super::{Cached, Explanation, Facts, MAX_NAMED, MAX_SUBJECT, filesystem, find};
use crate::config::Config;
use crate::layer::layers::inspector::{Inspector, Live, Space, Survey};
use crate::layer::mounts::Kind;
use crate::layer::report::{Failure, HostReport, LayerReport};
use crate::snapshot::decisions::{Counts, Refused};
use crate::snapshot::outline::Outline;
use crate::snapshot::{self, Service};

/// Failures told in an overview.
const MAX_FAILURES: usize = 10;
/// Refusals that are no failure: nothing says that the layer could be lazy.
const ORDINARY: [&str; 4] = ["no_toc_digest", "not_estargz", "no_labels", "disabled"];
/// Layers of the cache in one page.
const MAX_PAGE: usize = 200;

/// Why nothing is explained.
#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    /// Nothing is asked for, or far too much.
    #[error("the subject must have 1 to {MAX_SUBJECT} bytes, not {length}")]
    Subject {
        /// Its length.
        length: usize,
    },
    /// It is unknown.
    #[error(
        "nothing is known of {subject:?}: no snapshot was made for such an image, key or layer, none is in the cache, and none was \
         refused lately"
    )]
    Unknown {
        /// What was asked for.
        subject: String,
    },
    /// The snapshots cannot be read.
    #[error("the snapshots cannot be read")]
    Snapshots(#[source] snapshot::Error),
}

/// How the daemon is.
#[derive(Debug, Clone)]
pub struct Overview {
    /// Time since the start.
    pub uptime: Duration,
    /// Layers mounted.
    pub mounted: usize,
    /// Of these, layers of which everything is resident.
    pub complete: usize,
    /// Of the layers mounted, those that the kernel serves.
    pub erofs: usize,
    /// Of these, those that nobody else serves any more.
    pub kernel_alone: usize,
    /// How layers are mounted from now on; nothing where none are lazy.
    pub mount: &'static str,
    /// Layers being opened.
    pub opening: usize,
    /// Requests under way, by what they are for.
    pub in_flight: Vec<(&'static str, u64)>,
    /// The hosts that were asked.
    pub hosts: Vec<HostReport>,
    /// What was decided since the start.
    pub decisions: Counts,
    /// What went wrong last, the newest first.
    pub failures: Vec<Failure>,
}

/// What the cache takes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    /// Layers.
    pub layers: usize,
    /// Bytes of their files on disk.
    pub bytes: u64,
    /// Layers that no snapshot refers to.
    pub unreferenced: usize,
    /// Their bytes.
    pub unreferenced_bytes: u64,
}

/// Who refers to a layer of the cache.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct References {
    /// How many snapshots.
    pub count: usize,
    /// A few of their names.
    pub snapshots: Vec<String>,
}

/// A page of the cache.
#[derive(Debug, Clone)]
pub struct Listing {
    /// The layers.
    pub layers: Vec<(Survey, LayerReport, References)>,
    /// How many come after them.
    pub more: usize,
}

/// Answers operators. Cheap to clone.
#[derive(Clone)]
pub struct Explainer {
    service: Service,
    inspector: Option<Inspector>,
    config: Arc<Config>,
    started: Instant,
}

impl Explainer {
    /// Explains what `service` and the layers (none where they are off) do, from now on.
    pub fn new(service: Service, inspector: Option<Inspector>, config: Arc<Config>) -> Self {
        Self {
            service,
            inspector,
            config,
            started: Instant::now(),
        }
    }

    /// The configuration that the daemon runs with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What looks at layers; none where no layer is lazy.
    pub fn inspector(&self) -> Option<&Inspector> {
        self.inspector.as_ref()
    }

    /// The snapshots service.
    pub fn service(&self) -> &Service {
        &self.service
    }

    /// How the daemon is.
    pub fn overview(&self) -> Overview {
        let inspector = self.inspector.as_ref();
        let live = inspector.map(Inspector::live).unwrap_or_default();
        let mounted = || live.iter().filter(|live| live.is_mounted());
        let failures = live.iter().filter_map(Live::last_failure);
        let refused = self.service.refused().into_iter();
        let refused = refused.filter(|refused| !ORDINARY.contains(&refused.fallback.reason.as_str()));
        let failures = failures.chain(refused.map(failure));
        Overview {
            uptime: self.started.elapsed(),
            mounted: mounted().count(),
            complete: mounted().filter(|live| live.is_complete()).count(),
            erofs: mounted()
                .filter(|live| live.mount() == Some(Kind::Erofs.name()))
                .count(),
            kernel_alone: mounted().filter(|live| live.is_kernel_alone()).count(),
            mount: inspector.map(|inspector| inspector.mounts().chosen).unwrap_or_default(),
            opening: inspector.map_or(0, Inspector::opening),
            in_flight: inspector.map(Inspector::in_flight).unwrap_or_default(),
            hosts: inspector.map(Inspector::hosts).unwrap_or_default(),
            decisions: self.service.decisions(),
            failures: newest(failures.collect()),
        }
    }

    /// Why `subject` is served as it is; the second number is how many things of that name were left out.
    pub async fn explain(&self, subject: &str) -> Result<(Vec<Explanation>, usize), ExplainError> {
        if subject.is_empty() || subject.len() > MAX_SUBJECT {
            return Err(ExplainError::Subject { length: subject.len() });
        }
        let surveys = self.surveys().await;
        let cached = surveys.iter().map(|survey| Cached {
            toc: survey.toc,
            layer: survey.layer,
            image: survey.image.clone(),
        });
        let facts = Facts {
            outlines: self.service.outlines().await.map_err(ExplainError::Snapshots)?,
            refused: self.service.refused(),
            cached: cached.collect(),
        };
        let explainer = self.clone();
        let subject = subject.to_owned();
        let unknown = ExplainError::Unknown {
            subject: subject.clone(),
        };
        // Every chunk of every layer concerned is looked at.
        let explained = tokio::task::spawn_blocking(move || {
            let (mut found, more) = find(&subject, &facts);
            explainer.add_reports(&mut found, &surveys);
            (found, more)
        })
        .await;
        let (found, more) = explained
            .map_err(snapshot::Error::Interrupted)
            .map_err(ExplainError::Snapshots)?;
        if found.is_empty() {
            return Err(unknown);
        }
        Ok((found, more))
    }

    fn add_reports(&self, found: &mut [Explanation], surveys: &[Survey]) {
        let Some(inspector) = &self.inspector else { return };
        let live: HashMap<Digest, Live> = inspector
            .live()
            .into_iter()
            .map(|live| (live.toc_digest(), live))
            .collect();
        let surveys: HashMap<Digest, &Survey> = surveys.iter().map(|survey| (survey.toc, survey)).collect();
        // Images share layers.
        let mut reports: HashMap<Digest, Option<LayerReport>> = HashMap::new();
        for layer in found.iter_mut().flat_map(|explanation| &mut explanation.layers) {
            let Some(toc) = layer.toc else { continue };
            let report = || match (live.get(&toc), surveys.get(&toc)) {
                (Some(live), _) => Some(inspector.report(live)),
                (None, Some(survey)) => Some(inspector.closed(survey)),
                (None, None) => None,
            };
            layer.report = reports.entry(toc).or_insert_with(report).clone();
        }
    }

    /// A page of the cache: at most `limit` layers after the one called `after`.
    pub async fn list(&self, after: Option<Digest>, limit: usize) -> Result<Listing, ExplainError> {
        let Some(inspector) = self.inspector.clone() else {
            return Ok(Listing {
                layers: Vec::new(),
                more: 0,
            });
        };
        let outlines = self.service.outlines().await.map_err(ExplainError::Snapshots)?;
        let surveys = self.surveys().await;
        let limit = limit.clamp(1, MAX_PAGE);
        let listed = tokio::task::spawn_blocking(move || {
            let mut rest = surveys.into_iter().filter(|survey| {
                let is_after = |after: Digest| survey.toc.as_bytes() > after.as_bytes();
                after.is_none_or(is_after)
            });
            let page: Vec<Survey> = rest.by_ref().take(limit).collect();
            let more = rest.count();
            let live: HashMap<Digest, Live> = inspector
                .live()
                .into_iter()
                .map(|live| (live.toc_digest(), live))
                .collect();
            let mut references = references(&outlines);
            let row = |survey: Survey| {
                let report = live
                    .get(&survey.toc)
                    .map_or_else(|| inspector.closed(&survey), |live| inspector.report(live));
                let references = references.remove(&survey.toc).unwrap_or_default();
                (survey, report, references)
            };
            Listing {
                layers: page.into_iter().map(row).collect(),
                more,
            }
        });
        let listed = listed.await.map_err(snapshot::Error::Interrupted);
        listed.map_err(ExplainError::Snapshots)
    }

    /// What the cache takes.
    pub async fn usage(&self) -> Result<Usage, ExplainError> {
        let outlines = self.service.outlines().await.map_err(ExplainError::Snapshots)?;
        let references = references(&outlines);
        let mut usage = Usage::default();
        for survey in self.surveys().await {
            usage.layers += 1;
            usage.bytes += survey.disk_bytes;
            if !references.contains_key(&survey.toc) {
                usage.unreferenced += 1;
                usage.unreferenced_bytes += survey.disk_bytes;
            }
        }
        Ok(usage)
    }

    /// The room that the cache takes and may take.
    pub fn space(&self) -> Space {
        let space = Space {
            limits: self.inspector.as_ref().map(Inspector::limits).unwrap_or_default(),
            no_room: self.inspector.as_ref().and_then(Inspector::no_room),
            ..Space::default()
        };
        filesystem::measure(&self.config.root, space).unwrap_or_else(|error| {
            tracing::warn!(root = %self.config.root.display(), %error, "cannot measure the filesystem");
            space
        })
    }

    async fn surveys(&self) -> Vec<Survey> {
        match &self.inspector {
            Some(inspector) => inspector.survey().await,
            None => Vec::new(),
        }
    }
}

/// Who refers to each layer.
fn references(outlines: &[Outline]) -> HashMap<Digest, References> {
    let mut references: HashMap<Digest, References> = HashMap::new();
    for outline in outlines {
        let Some(toc) = outline.lazy else { continue };
        let references = references.entry(toc).or_default();
        references.count += 1;
        if references.snapshots.len() < MAX_NAMED {
            references.snapshots.push(outline.name.clone());
        }
    }
    references
}

fn failure(refused: Refused) -> Failure {
    let Refused {
        snapshot: _,
        image,
        manifest: _,
        layer,
        fallback,
    } = refused;
    Failure {
        at: fallback.at,
        reason: fallback.reason,
        what: fallback.error,
        host: fallback.host,
        image,
        layer,
    }
}

fn newest(mut failures: Vec<Failure>) -> Vec<Failure> {
    failures.sort_by_key(|failure| std::cmp::Reverse(failure.at));
    failures.truncate(MAX_FAILURES);
    failures
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn the_newest_failures_come_first_and_are_few() {
        let at = |seconds: u64| Failure {
            at: SystemTime::UNIX_EPOCH + Duration::from_secs(seconds),
            reason: "registry".to_owned(),
            what: seconds.to_string(),
            host: String::new(),
            image: String::new(),
            layer: None,
        };
        let told = newest((0..30).map(|n| at(n * 7 % 30)).collect());
        let told: Vec<&str> = told.iter().map(|failure| failure.what.as_str()).collect();
        assert_eq!(told, ["29", "28", "27", "26", "25", "24", "23", "22", "21", "20"]);
    }
}
