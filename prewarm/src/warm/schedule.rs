//! What is to be warmed, in which order and when. Pure: it is told the time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use hullspeed_proto::hullspeed::control::v1 as api;
use hullspeed_proto::hullspeed::control::v1::layer_progress::State as LayerState;

use super::glob;
use super::policy::{Policy, Share};

/// Most images that are warmed, whatever the patterns fit; those of the lowest priority are left out.
pub const MAX_IMAGES: usize = 1000;
/// Longest text kept of what went wrong.
const MAX_PROBLEM: usize = 500;
/// The first wait after a warm that failed, and the longest.
const BACKOFF_FIRST: Duration = Duration::from_secs(5);
const BACKOFF_LONGEST: Duration = Duration::from_secs(600);

/// An image for a platform; the platform is empty for this machine's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key {
    /// The image's name.
    pub image: String,
    /// The platform.
    pub platform: String,
}

/// What a policy wants of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// The image.
    pub key: Key,
    /// How much of it.
    pub share: Share,
    /// What is warmed first: the higher.
    pub priority: i32,
}

/// How one image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageState {
    /// Its turn has not come.
    Waiting,
    /// It is being warmed.
    Warming,
    /// It was being warmed, and makes room for pods that start.
    Paused,
    /// Its share is resident, or was when it was looked at last.
    Resident,
    /// Of some layers it is not: they cannot be lazy, or were not fetched.
    Partial,
    /// It could not be warmed at all.
    Failed,
}

impl ImageState {
    /// All of them.
    pub const ALL: [Self; 6] = [
        Self::Waiting,
        Self::Warming,
        Self::Paused,
        Self::Resident,
        Self::Partial,
        Self::Failed,
    ];

    /// A short, stable name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Warming => "warming",
            Self::Paused => "paused",
            Self::Resident => "resident",
            Self::Partial => "partial",
            Self::Failed => "failed",
        }
    }
}

/// How one image stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageStatus {
    /// What the policy wants.
    pub target: Target,
    /// How it is.
    pub state: ImageState,
    /// Digest of the manifest that was warmed, where it is known.
    pub manifest: String,
    /// Layers of the image, those whose share is resident, and those that cannot be lazy.
    pub layers: usize,
    /// Layers whose share is resident.
    pub layers_resident: usize,
    /// Layers that cannot be lazy.
    pub layers_not_lazy: usize,
    /// Unpacked bytes of content that the share covers.
    pub bytes_wanted: u64,
    /// How many of those are resident.
    pub bytes_resident: u64,
    /// What went wrong last.
    pub problem: Option<String>,
    /// When it is looked at again; zero while its turn is now.
    pub due_in: Duration,
}

/// How a warm ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The snapshotter did what can be done.
    Done,
    /// It was stopped for pods that start.
    Paused,
    /// It failed: what for a person.
    Failed(String),
}

#[derive(Debug)]
struct Item {
    status: ImageStatus,
    due: Instant,
    failures: u32,
    /// Layers of the last report that may do better next time.
    layers_failed: usize,
    /// The manifest that the image resolved to since it was begun, pauses left out; empty while that is not known.
    under_way: String,
}

/// The images of a policy.
#[derive(Debug, Default)]
pub struct Schedule {
    /// In the order in which they are warmed.
    items: Vec<Item>,
}

/// What `policy` wants of the images that it names and of those of `known` that its patterns fit. An image that several entries fit
/// gets the largest share and the highest priority of them.
#[must_use]
pub fn targets(policy: &Policy, known: &[String]) -> Vec<Target> {
    let mut found: HashMap<Key, Target> = HashMap::new();
    let mut add = |image: &str, entry: &super::policy::Entry| {
        let key = Key {
            image: image.to_owned(),
            platform: entry.platform.clone(),
        };
        let target = found.entry(key.clone()).or_insert_with(|| Target {
            key,
            share: entry.share,
            priority: entry.priority,
        });
        target.share = target.share.max(entry.share);
        target.priority = target.priority.max(entry.priority);
    };
    for entry in &policy.entries {
        if glob::is_pattern(&entry.name) {
            for image in known.iter().filter(|image| glob::fits(&entry.name, image)) {
                add(image, entry);
            }
        } else {
            add(&entry.name, entry);
        }
    }
    let mut targets: Vec<Target> = found.into_values().collect();
    // Of the same priority, what is soon done comes first.
    targets.sort_by(|a, b| {
        let order = b.priority.cmp(&a.priority).then(a.share.cmp(&b.share));
        order.then_with(|| a.key.cmp(&b.key))
    });
    targets.truncate(MAX_IMAGES);
    targets
}

impl Schedule {
    /// Wants exactly `targets` from now on, which come in order. What is known of those that were wanted before is kept.
    pub fn want(&mut self, targets: Vec<Target>, now: Instant) {
        let mut before: HashMap<Key, Item> = std::mem::take(&mut self.items)
            .into_iter()
            .map(|item| (item.status.target.key.clone(), item))
            .collect();
        self.items = targets
            .into_iter()
            .map(|target| match before.remove(&target.key) {
                Some(item) if item.status.target.share == target.share => Item {
                    status: ImageStatus { target, ..item.status },
                    ..item
                },
                _ => Item::new(target, now),
            })
            .collect();
    }

    /// The next to be warmed, if any is due; it is being warmed from now on.
    pub fn begin_next(&mut self, now: Instant) -> Option<Target> {
        let due = |item: &&mut Item| item.status.state != ImageState::Warming && item.due <= now;
        let item = self.items.iter_mut().find(due)?;
        item.status.state = ImageState::Warming;
        Some(item.status.target.clone())
    }

    /// The manifest with which a warm that was paused goes on; empty for one that begins anew.
    #[must_use]
    pub fn resumed(&self, target: &Target) -> String {
        let item = self.items.iter().find(|item| item.is(target));
        item.map(|item| item.under_way.clone()).unwrap_or_default()
    }

    /// Whether exactly this is still wanted.
    #[must_use]
    pub fn wants(&self, target: &Target) -> bool {
        self.items.iter().any(|item| item.is(target))
    }

    /// A report on what is being warmed.
    pub fn report(&mut self, target: &Target, progress: &api::WarmProgress) {
        let Some(item) = self.item(target) else { return };
        let count = |state: LayerState| progress.layers.iter().filter(|layer| layer.state() == state).count();
        let status = &mut item.status;
        status.manifest = shortened(&progress.manifest_digest);
        item.under_way.clone_from(&status.manifest);
        status.layers = progress.layers.len();
        status.layers_resident = count(LayerState::Resident);
        status.layers_not_lazy = count(LayerState::NotLazy);
        status.bytes_wanted = progress.bytes_wanted;
        status.bytes_resident = progress.bytes_resident;
        item.layers_failed = count(LayerState::Failed);
        let bad = progress.layers.iter().find(|layer| !layer.error.is_empty());
        status.problem = bad.map(|layer| shortened(&layer.error));
    }

    /// What was being warmed is not any more. The state it has now; none if nobody wants it.
    pub fn end(&mut self, target: &Target, outcome: Outcome, now: Instant, again: Duration) -> Option<ImageState> {
        let item = self.item(target)?;
        let status = &mut item.status;
        if outcome != Outcome::Paused {
            item.under_way.clear();
        }
        let (state, wait) = match outcome {
            Outcome::Paused => (ImageState::Paused, Duration::ZERO),
            Outcome::Done if item.layers_failed == 0 => {
                item.failures = 0;
                let whole = status.layers_not_lazy == 0;
                (
                    if whole {
                        ImageState::Resident
                    } else {
                        ImageState::Partial
                    },
                    again,
                )
            }
            Outcome::Done => {
                item.failures = item.failures.saturating_add(1);
                (ImageState::Partial, backoff(item.failures))
            }
            Outcome::Failed(why) => {
                item.failures = item.failures.saturating_add(1);
                status.problem = Some(shortened(&why));
                (ImageState::Failed, backoff(item.failures))
            }
        };
        status.state = state;
        item.due = now + wait;
        Some(state)
    }

    /// How all images stand.
    #[must_use]
    pub fn status(&self, now: Instant) -> Vec<ImageStatus> {
        let status = |item: &Item| ImageStatus {
            due_in: item.due.saturating_duration_since(now),
            ..item.status.clone()
        };
        self.items.iter().map(status).collect()
    }

    fn item(&mut self, target: &Target) -> Option<&mut Item> {
        self.items.iter_mut().find(|item| item.is(target))
    }
}

impl Item {
    fn new(target: Target, now: Instant) -> Self {
        Self {
            status: ImageStatus {
                target,
                state: ImageState::Waiting,
                manifest: String::new(),
                layers: 0,
                layers_resident: 0,
                layers_not_lazy: 0,
                bytes_wanted: 0,
                bytes_resident: 0,
                problem: None,
                due_in: Duration::ZERO,
            },
            due: now,
            failures: 0,
            layers_failed: 0,
            under_way: String::new(),
        }
    }

    /// Whether it is this image and this share; its priority may have changed meanwhile.
    fn is(&self, target: &Target) -> bool {
        self.status.target.key == target.key && self.status.target.share == target.share
    }
}

fn backoff(failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    BACKOFF_FIRST.saturating_mul(1 << doublings).min(BACKOFF_LONGEST)
}

fn shortened(text: &str) -> String {
    text.chars().take(MAX_PROBLEM).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGAIN: Duration = Duration::from_secs(600);

    fn policy(entries: &[(&str, &str, i32)]) -> Policy {
        let text = entries
            .iter()
            .map(|(name, share, priority)| {
                format!("[[image]]\nname = \"{name}\"\nshare = \"{share}\"\npriority = {priority}\n")
            })
            .collect::<String>();
        Policy::parse(&text).unwrap()
    }

    fn names(targets: &[Target]) -> Vec<(&str, Share, i32)> {
        targets
            .iter()
            .map(|target| (target.key.image.as_str(), target.share, target.priority))
            .collect()
    }

    fn progress(states: &[LayerState]) -> api::WarmProgress {
        let layers = states.iter().map(|state| api::LayerProgress {
            state: (*state).into(),
            error: if *state == LayerState::Resident {
                String::new()
            } else {
                "bad".to_owned()
            },
            ..api::LayerProgress::default()
        });
        api::WarmProgress {
            layers: layers.collect(),
            bytes_wanted: 9,
            bytes_resident: 9,
            done: true,
            ..api::WarmProgress::default()
        }
    }

    #[test]
    fn entries_and_patterns_make_one_ordered_list() {
        let known = ["r.io/a:1", "r.io/b:1", "x.io/c:1"].map(str::to_owned);
        let policy = policy(&[
            ("r.io/*", "toc", 1),
            ("r.io/b:1", "hot", 0),
            ("q.io/z", "all", 5),
            ("r.io/q", "toc", 0),
        ]);
        let expected = [
            ("q.io/z", Share::All, 5),
            ("r.io/a:1", Share::Toc, 1),
            ("r.io/b:1", Share::Hot, 1),
            ("r.io/q", Share::Toc, 0),
        ];
        assert_eq!(names(&targets(&policy, &known)), expected);
        let many: Vec<String> = (0..MAX_IMAGES * 2).map(|n| format!("r.io/{n}")).collect();
        let found = targets(&policy, &many);
        assert!(found.len() == MAX_IMAGES && found[0].priority == 5);
    }

    #[test]
    fn images_take_turns_and_come_again_sooner_after_failures() {
        let mut schedule = Schedule::default();
        let now = Instant::now();
        let wanted = targets(&policy(&[("a", "all", 1), ("b", "all", 0)]), &[]);
        schedule.want(wanted.clone(), now);
        let first = schedule.begin_next(now).unwrap();
        let second = schedule.begin_next(now).unwrap();
        assert_eq!((first.key.image.as_str(), second.key.image.as_str()), ("a", "b"));
        assert!(schedule.begin_next(now).is_none());

        schedule.report(&first, &progress(&[LayerState::Resident; 2]));
        assert_eq!(
            schedule.end(&first, Outcome::Done, now, AGAIN),
            Some(ImageState::Resident)
        );
        assert_eq!(
            schedule.end(&second, Outcome::Paused, now, AGAIN),
            Some(ImageState::Paused)
        );
        assert_eq!(schedule.begin_next(now).unwrap(), second);
        let mut last = Duration::ZERO;
        for failure in 1..12 {
            schedule.end(
                &second,
                Outcome::Failed(format!("{failure}{}", "x".repeat(9999))),
                now,
                AGAIN,
            );
            let status = schedule.status(now)[1].clone();
            assert!(status.due_in >= last && status.due_in <= BACKOFF_LONGEST);
            last = status.due_in;
            assert_eq!(status.problem.unwrap().chars().count(), MAX_PROBLEM);
            assert!(schedule.begin_next(now).is_none());
            assert!(schedule.begin_next(now + last).is_some());
        }
        assert_eq!(last, BACKOFF_LONGEST);
        schedule.report(&second, &progress(&[LayerState::Resident, LayerState::NotLazy]));
        assert_eq!(
            schedule.end(&second, Outcome::Done, now, AGAIN),
            Some(ImageState::Partial)
        );
        assert_eq!(schedule.status(now)[1].due_in, AGAIN);
        assert!(schedule.begin_next(now + AGAIN).is_some());
        schedule.report(&first, &progress(&[LayerState::Failed]));
        assert_eq!(
            schedule.end(&first, Outcome::Done, now, AGAIN),
            Some(ImageState::Partial)
        );
        assert_eq!(schedule.status(now)[0].due_in, BACKOFF_FIRST);

        // A pause resolves no tag again; an end does.
        let report = api::WarmProgress {
            manifest_digest: "sha256:1".to_owned(),
            ..progress(&[LayerState::Resident])
        };
        assert_eq!(schedule.resumed(&first), "");
        schedule.report(&first, &report);
        schedule.end(&first, Outcome::Paused, now, AGAIN);
        assert_eq!(
            (schedule.resumed(&first).as_str(), schedule.resumed(&second).as_str()),
            ("sha256:1", "")
        );
        schedule.report(&first, &report);
        schedule.end(&first, Outcome::Failed("x".to_owned()), now, AGAIN);
        assert_eq!(schedule.resumed(&first), "");

        // Another priority changes the order only; another share begins anew; what is not wanted is gone.
        schedule.want(targets(&policy(&[("a", "all", 0), ("b", "hot", 0)]), &[]), now);
        assert_eq!(schedule.status(now)[0].target.key.image, "b");
        assert_eq!(schedule.status(now)[0].state, ImageState::Waiting);
        assert!(!schedule.wants(&second) && schedule.wants(&first));
        assert_eq!(schedule.end(&second, Outcome::Done, now, AGAIN), None);
        schedule.want(Vec::new(), now);
        assert!(schedule.status(now).is_empty());
    }
}
