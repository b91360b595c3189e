//! Warms what the schedule says, one `Warm` call per image.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hullspeed_daemon::grpc::code_name;
use hullspeed_proto::cri::v1::ListImagesRequest;
use hullspeed_proto::hullspeed::control::v1 as api;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use super::file::{Look, PolicyFile};
use super::policy::Policy;
use super::schedule::{ImageState, Outcome, Schedule, Target, targets};
use super::seen::SeenImages;
use super::{Quiet, WarmStatus};
use crate::containerd::Containerd;
use crate::metrics::Metrics;
use crate::metrics::defs::{ResultLabels, StateLabels};
use crate::snapshotter::Snapshotter;

/// How often the policy file is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often the images that containerd has are listed, if the policy has patterns.
const LIST_EVERY: Duration = Duration::from_secs(30);
/// Longest wait for that list.
const LIST_LIMIT: Duration = Duration::from_secs(10);
/// How soon it is noticed that a pod starts, while something is being warmed.
const PAUSE_WITHIN: Duration = Duration::from_millis(50);
/// Longest time without a word from the snapshotter while it works; it speaks about twice a second.
const SILENCE: Duration = Duration::from_secs(60);

/// What a [`WarmAgent`] works with.
pub struct WarmOptions {
    /// The policy file; it may be absent.
    pub policy: PathBuf,
    /// Who warms.
    pub snapshotter: Snapshotter,
    /// Who knows which images there are.
    pub containerd: Containerd,
    /// Images that were pulled.
    pub images: SeenImages,
    /// When pods start.
    pub quiet: Arc<dyn Quiet>,
    /// Images warmed at once.
    pub max_parallel: usize,
    /// How often a tag is resolved again.
    pub resolve_every: Duration,
    /// Where events are counted.
    pub metrics: Metrics,
}

/// Keeps the images of a policy warm. Cheap to clone.
#[derive(Clone)]
pub struct WarmAgent {
    shared: Arc<Shared>,
}

struct Shared {
    options: WarmOptions,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    policy: Policy,
    policy_problem: Option<String>,
    /// What containerd listed last.
    listed: Vec<String>,
    schedule: Schedule,
}

/// A warm under way.
struct Running {
    target: Target,
    stop: CancellationToken,
}

/// What one run of the agent keeps between two looks.
struct Rounds {
    file: PolicyFile,
    looked: Option<Instant>,
    listed: Option<Instant>,
    running: Vec<Running>,
    tasks: JoinSet<(Target, Result<Outcome, Status>)>,
}

impl WarmAgent {
    /// An agent that does nothing yet.
    #[must_use]
    pub fn new(options: WarmOptions) -> Self {
        let state = Mutex::default();
        Self {
            shared: Arc::new(Shared { options, state }),
        }
    }

    /// How warming stands.
    #[must_use]
    pub fn status(&self) -> WarmStatus {
        let state = self.shared.state();
        WarmStatus {
            policy_problem: state.policy_problem.clone(),
            images: state.schedule.status(Instant::now()),
        }
    }

    /// Works until `stopping`.
    pub async fn run(&self, stopping: CancellationToken) {
        let shared = &self.shared;
        let mut rounds = Rounds {
            file: PolicyFile::at(&shared.options.policy),
            looked: None,
            listed: None,
            running: Vec::new(),
            tasks: JoinSet::new(),
        };
        loop {
            let look = async {
                shared.look(&mut rounds).await;
                shared.list(&mut rounds).await;
            };
            if stopping.run_until_cancelled(look).await.is_none() {
                break;
            }
            let pause = shared.turn(&mut rounds);
            shared.publish();
            tokio::select! {
                () = stopping.cancelled() => break,
                Some(ended) = rounds.tasks.join_next(), if !rounds.tasks.is_empty() => {
                    if let Ok((target, result)) = ended {
                        rounds.running.retain(|running| running.target != target);
                        shared.ended(&target, result);
                    }
                }
                () = tokio::time::sleep(pause) => {}
            }
        }
        // Dropped calls are cancelled at the snapshotter.
        rounds.tasks.shutdown().await;
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Fields are replaced whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads the policy if it has changed.
    async fn look(&self, rounds: &mut Rounds) {
        if rounds.looked.is_some_and(|looked| looked.elapsed() < LOOK_EVERY) {
            return;
        }
        rounds.looked = Some(Instant::now());
        let mut file = std::mem::replace(&mut rounds.file, PolicyFile::at(&self.options.policy));
        let looked = tokio::task::spawn_blocking(move || {
            let look = file.look();
            (file, look)
        });
        // After a panic the file is read again.
        let Ok((file, look)) = looked.await else { return };
        rounds.file = file;
        match look {
            Look::Same => {}
            Look::Policy(policy) => {
                tracing::info!(path = %self.options.policy.display(), entries = policy.entries.len(), "the warming policy was read");
                rounds.listed = None;
                let mut state = self.state();
                state.policy = policy;
                state.policy_problem = None;
            }
            Look::Broken(why) => {
                tracing::error!(why, "the warming policy cannot be used; the one before it goes on");
                self.options.metrics.warm_policy_errors.inc();
                self.state().policy_problem = Some(why);
            }
        }
    }

    /// Lists the images for the policy's patterns, and tells the schedule what is wanted.
    async fn list(&self, rounds: &mut Rounds) {
        if rounds.listed.is_some_and(|listed| listed.elapsed() < LIST_EVERY) {
            return;
        }
        rounds.listed = Some(Instant::now());
        if self.state().policy.has_patterns() {
            let mut images = self.options.containerd.images();
            let list = images.list_images(Request::new(ListImagesRequest::default()));
            match tokio::time::timeout(LIST_LIMIT, list).await {
                Ok(Ok(answer)) => {
                    let tags = answer.into_inner().images.into_iter().flat_map(|image| image.repo_tags);
                    self.state().listed = tags.collect();
                }
                Ok(Err(status)) => tracing::debug!(%status, "containerd does not list its images"),
                Err(_) => tracing::debug!("containerd does not list its images in time"),
            }
        }
        let mut state = self.state();
        let mut known = self.options.images.names();
        known.extend_from_slice(&state.listed);
        let wanted = targets(&state.policy, &known);
        state.schedule.want(wanted, Instant::now());
    }

    /// Starts what is due and stops what is not to go on; how long until there may be more to do.
    fn turn(self: &Arc<Self>, rounds: &mut Rounds) -> Duration {
        let quiet_in = self.options.quiet.quiet_in();
        let mut state = self.state();
        for running in &rounds.running {
            if !quiet_in.is_zero() || !state.schedule.wants(&running.target) {
                running.stop.cancel();
            }
        }
        while quiet_in.is_zero() && rounds.running.len() < self.options.max_parallel {
            let Some(target) = state.schedule.begin_next(Instant::now()) else {
                break;
            };
            let stop = CancellationToken::new();
            let (shared, wanted, stopped) = (self.clone(), target.clone(), stop.clone());
            rounds.tasks.spawn(async move {
                let warm = shared.warm(&wanted);
                let result = stopped.run_until_cancelled(warm).await.unwrap_or(Ok(Outcome::Paused));
                (wanted, result)
            });
            rounds.running.push(Running { target, stop });
        }
        if rounds.running.is_empty() {
            LOOK_EVERY
        } else {
            PAUSE_WITHIN
        }
    }

    async fn warm(&self, target: &Target) -> Result<Outcome, Status> {
        let mut control = self.options.snapshotter.control();
        let request = api::WarmRequest {
            image: target.key.image.clone(),
            manifest_digest: String::new(),
            share: api::Share::from(target.share).into(),
            platform: target.key.platform.clone(),
        };
        let mut reports = control.warm(request).await?.into_inner();
        let mut done = false;
        loop {
            let silent = |_| Status::deadline_exceeded(format!("no report within {SILENCE:?}"));
            match tokio::time::timeout(SILENCE, reports.message())
                .await
                .map_err(silent)??
            {
                Some(progress) => {
                    done = progress.done;
                    self.state().schedule.report(target, &progress);
                }
                None if done => return Ok(Outcome::Done),
                None => return Err(Status::aborted("the reports ended too early")),
            }
        }
    }

    fn ended(&self, target: &Target, result: Result<Outcome, Status>) {
        let failure = result.as_ref().err().map(|status| code_name(status.code()));
        let (outcome, why) = match result {
            Ok(outcome) => (outcome, None),
            Err(status) => {
                let why = format!("{}: {}", status.code(), status.message());
                (Outcome::Failed(why.clone()), Some(why))
            }
        };
        let ended = self
            .state()
            .schedule
            .end(target, outcome, Instant::now(), self.options.resolve_every);
        let Some(state) = ended else { return };
        let result = match state {
            ImageState::Resident => "ok",
            ImageState::Partial => "partial",
            ImageState::Waiting | ImageState::Warming | ImageState::Paused => "paused",
            ImageState::Failed => failure.unwrap_or("unknown"),
        };
        self.options
            .metrics
            .warm_runs
            .get_or_create(&ResultLabels { result })
            .inc();
        let (image, share) = (&target.key.image, target.share.name());
        match why {
            Some(why) => tracing::warn!(image, share, why, "the image could not be warmed; it is tried again"),
            None => tracing::debug!(image, share, result, "a warm ended"),
        }
    }

    fn publish(&self) {
        let status = self.state().schedule.status(Instant::now());
        let metrics = &self.options.metrics;
        for state in ImageState::ALL {
            let count = status.iter().filter(|image| image.state == state).count();
            let labels = StateLabels { state: state.name() };
            metrics
                .warm_images
                .get_or_create(&labels)
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let sum = |bytes: fn(&super::ImageStatus) -> u64| {
            let sum = status.iter().map(bytes).fold(0, u64::saturating_add);
            i64::try_from(sum).unwrap_or(i64::MAX)
        };
        metrics.warm_wanted.set(sum(|image| image.bytes_wanted));
        metrics.warm_resident.set(sum(|image| image.bytes_resident));
    }
}
