//! The kubelet's credential providers: programs that know logins of a cloud's registries.
//!
//! An answer is kept as long as it says and for what it says, and is asked for again, at a random time before its end, as long as it is
//! used. However many requests want the same login, one program runs. The configuration is read again when it has changed.

mod config;
mod pattern;
mod plugin;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use super::Found;
use crate::files::Stamp;
use crate::limits::{MAX_HELPERS, MAX_PROVIDER_ANSWERS, PROVIDER_ASKED_AGAIN, PROVIDER_TIMEOUT};
use crate::retry::jittered;
use config::Provider;
use plugin::{Answer, Reach};

/// Answers that last less are not renewed ahead of their end.
const LEAST_RENEWED: Duration = Duration::from_secs(1);

/// Why the credential providers are of no use. No text of theirs that may hold a secret is in it.
#[derive(Debug, thiserror::Error)]
pub enum ProviderError {
    /// The configuration cannot be read.
    #[error("{} cannot be read", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The configuration is neither YAML nor JSON.
    #[error("{} is no CredentialProviderConfig: line {line}", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where it stops making sense.
        line: u64,
    },
    /// A value of the configuration makes no sense.
    #[error("{}: {key} {reason}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A program is missing or failed.
    #[error("credential provider {name} {reason}")]
    Plugin {
        /// The program.
        name: String,
        /// What it did.
        reason: String,
    },
    /// A program that only the kubelet can ask.
    #[error(
        "credential provider {name} requires a token of the pod's service account (tokenAttributes), which only the kubelet has"
    )]
    ServiceAccount {
        /// The program.
        name: String,
    },
}

/// The programs of one configuration. Clones share what they know.
#[derive(Clone)]
pub struct Providers {
    shared: Arc<Shared>,
}

struct Shared {
    config: PathBuf,
    programs: PathBuf,
    table: Mutex<Table>,
    running: Semaphore,
}

#[derive(Default)]
struct Table {
    providers: Option<Loaded>,
    /// By program and by what they are good for: an image, a registry, or the empty text for all.
    answers: HashMap<(String, String), Kept>,
    /// How far each program's last answer reached.
    reaches: HashMap<String, Reach>,
    flights: HashMap<(String, String), Flight>,
    /// Counts the configurations that were read.
    generation: u64,
}

type List = Arc<[Arc<Provider>]>;

struct Loaded {
    seen: Vec<(PathBuf, Stamp)>,
    providers: List,
}

struct Kept {
    answer: Arc<Answer>,
    obtained: Instant,
    until: Instant,
    /// Whether anybody wanted it since.
    used: bool,
}

/// What a program said, when, and what it was asked for.
#[derive(Clone)]
struct Said {
    answer: Arc<Answer>,
    image: Arc<str>,
    until: Option<Instant>,
}

type Flight = futures_util::future::Shared<BoxFuture<'static, Result<Said, Arc<ProviderError>>>>;

impl fmt::Debug for Providers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Providers({})", self.shared.config.display())
    }
}

impl Providers {
    /// The programs in the directory `programs` that the `CredentialProviderConfig` at `config` (a file, or a directory of files) names.
    pub fn new(config: impl Into<PathBuf>, programs: impl Into<PathBuf>) -> Self {
        let shared = Shared {
            config: config.into(),
            programs: programs.into(),
            table: Mutex::default(),
            running: Semaphore::new(MAX_HELPERS),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Reads the configuration and looks for its programs, so that a wrong one is found before a login is needed.
    pub fn check(&self) -> Result<(), ProviderError> {
        for provider in config::read(&self.shared.config)? {
            let program = self.shared.programs.join(&provider.name);
            if !program.is_file() {
                return Err(ProviderError::Plugin {
                    name: provider.name,
                    reason: format!("is not in {}", self.shared.programs.display()),
                });
            }
        }
        Ok(())
    }

    pub(super) fn config(&self) -> &Path {
        &self.shared.config
    }

    /// The login for a repository that the first program has which has one. What was obtained before `refused` is obtained again, unless
    /// it is very new.
    pub(super) async fn find(
        &self,
        host: &str,
        repository: &str,
        refused: Option<Instant>,
    ) -> Result<Option<Found>, Arc<ProviderError>> {
        let image: Arc<str> = format!("{host}/{repository}").trim_end_matches('/').into();
        let shared = Arc::clone(&self.shared);
        let loaded = tokio::task::spawn_blocking(move || shared.load()).await;
        let (providers, generation) = loaded.unwrap_or_else(|_| Ok((Arc::default(), 0))).map_err(Arc::new)?;
        let mut failed = None;
        for provider in providers.iter().filter(|provider| provider.matches(&image)) {
            let name = || provider.name.clone();
            if provider.wants_service_account {
                failed.get_or_insert_with(|| Arc::new(ProviderError::ServiceAccount { name: name() }));
                continue;
            }
            match self.shared.said(provider, &image, refused, generation).await {
                Ok(said) => {
                    if let Some(login) = said.answer.login(&image) {
                        return Ok(Some(Found {
                            login: login.clone(),
                            until: said.until,
                        }));
                    }
                }
                Err(error) => {
                    tracing::warn!(%image, error = &*error as &dyn std::error::Error, "a credential provider failed");
                    failed.get_or_insert(error);
                }
            }
        }
        failed.map_or(Ok(None), Err)
    }
}

/// The registry of an image.
fn registry(image: &str) -> &str {
    image.split('/').next().unwrap_or(image)
}

/// What an answer, or a question, is filed under.
fn place(provider: &Provider, reach: Reach, image: &str) -> (String, String) {
    let good_for = match reach {
        Reach::Image => image,
        Reach::Registry => registry(image),
        Reach::Global => "",
    };
    (provider.name.clone(), good_for.to_owned())
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that changes it can panic halfway.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The programs of the configuration as it is now. What programs of another one said is forgotten.
    fn load(&self) -> Result<(List, u64), ProviderError> {
        let seen = config::stamps(&self.config);
        if let Some(known) = self.table().loaded(&seen) {
            return Ok(known);
        }
        let providers: List = config::read(&self.config)?.into_iter().map(Arc::new).collect();
        let mut table = self.table();
        // Somebody else may have read it meanwhile.
        if let Some(known) = table.loaded(&seen) {
            return Ok(known);
        }
        table.providers = Some(Loaded {
            seen,
            providers: Arc::clone(&providers),
        });
        table.answers.clear();
        table.reaches.clear();
        table.flights.clear();
        table.generation += 1;
        Ok((providers, table.generation))
    }

    /// What a program says about an image: what it said before, or what it says now.
    async fn said(
        self: &Arc<Self>,
        provider: &Arc<Provider>,
        image: &Arc<str>,
        refused: Option<Instant>,
        generation: u64,
    ) -> Result<Said, Arc<ProviderError>> {
        let asked = |alone: bool| {
            let mut table = self.table();
            if let Some(said) = table.kept(provider, image, refused) {
                return Ok(said);
            }
            let reach = if alone { Reach::Image } else { table.reach(provider) };
            Err(self.flight(&mut table, provider, image, reach, true, generation))
        };
        let said = match asked(false) {
            Ok(said) => return Ok(said),
            Err(flight) => flight.await?,
        };
        if said.answer.reach != Reach::Image || said.image == *image {
            return Ok(said);
        }
        // Somebody else's question has taught how far answers reach; this one is asked for this image alone.
        match asked(true) {
            Ok(said) => Ok(said),
            Err(flight) => flight.await,
        }
    }

    /// A run of a program: the one that is under way, or a new one, which goes on whoever waits for it. What is asked with another
    /// configuration than the one that counts is shared with nobody.
    fn flight(
        self: &Arc<Self>,
        table: &mut Table,
        provider: &Arc<Provider>,
        image: &Arc<str>,
        reach: Reach,
        wanted: bool,
        generation: u64,
    ) -> Flight {
        let key = place(provider, reach, image);
        let shares = table.generation == generation;
        if let Some(flight) = table.flights.get(&key).filter(|_| shares) {
            return flight.clone();
        }
        let (shared, provider, image) = (Arc::clone(self), Arc::clone(provider), Arc::clone(image));
        let filed = Filed {
            shared: Arc::clone(self),
            key: key.clone(),
            generation,
        };
        let run = async move {
            // Taken out however the run ends, and after what it said is kept.
            let _filed = filed;
            let asked = match shared.running.acquire().await {
                Ok(_place) => plugin::ask(&provider, &shared.programs, &image, PROVIDER_TIMEOUT)
                    .await
                    .map_err(Arc::new),
                Err(_) => Err(Arc::new(ProviderError::Plugin {
                    name: provider.name.clone(),
                    reason: "was not asked".to_owned(),
                })),
            };
            let answer = Arc::new(asked?);
            let until = shared.keep(&mut shared.table(), &provider, &image, &answer, wanted, generation);
            Ok(Said { answer, image, until })
        };
        let flight = run.boxed().shared();
        if shares {
            table.flights.insert(key, flight.clone());
        }
        tokio::spawn(flight.clone());
        flight
    }

    /// Keeps an answer as long as it is good; until when that is.
    fn keep(
        self: &Arc<Self>,
        table: &mut Table,
        provider: &Arc<Provider>,
        image: &Arc<str>,
        answer: &Arc<Answer>,
        used: bool,
        generation: u64,
    ) -> Option<Instant> {
        if table.generation != generation {
            return None;
        }
        table.reaches.insert(provider.name.clone(), answer.reach);
        let obtained = Instant::now();
        let until = obtained + answer.kept.mul_f64(0.95);
        if answer.kept.is_zero() {
            // Good for the request that it was asked for, and asked for again when that login is refused.
            return None;
        }
        table.make_room(obtained);
        let key = place(provider, answer.reach, image);
        let kept = Kept {
            answer: Arc::clone(answer),
            obtained,
            until,
            used,
        };
        table.answers.insert(key.clone(), kept);
        if answer.kept >= LEAST_RENEWED {
            // Between seven and nine tenths of its time.
            let wait = answer.kept / 2 + jittered(answer.kept.mul_f64(0.4));
            let renewal = Renewal {
                shared: Arc::downgrade(self),
                provider: Arc::clone(provider),
                image: Arc::clone(image),
                key,
                obtained,
                generation,
            };
            tokio::spawn(renewal.run(wait));
        }
        Some(until)
    }
}

/// The entry of a run among those that are under way; gone when the run is.
struct Filed {
    shared: Arc<Shared>,
    key: (String, String),
    generation: u64,
}

impl Drop for Filed {
    fn drop(&mut self) {
        let flight = {
            let mut table = self.shared.table();
            // Those of another configuration are gone already, and one that is there by now is somebody else's.
            let own = table.generation == self.generation;
            own.then(|| table.flights.remove(&self.key)).flatten()
        };
        drop(flight);
    }
}

/// An answer that is to be asked for again.
struct Renewal {
    shared: Weak<Shared>,
    provider: Arc<Provider>,
    image: Arc<str>,
    key: (String, String),
    obtained: Instant,
    generation: u64,
}

impl Renewal {
    /// Asks again after `wait`, if the answer is still the same and was used.
    async fn run(self, wait: Duration) {
        tokio::time::sleep(wait).await;
        let Some(shared) = self.shared.upgrade() else { return };
        let mut table = shared.table();
        let kept = table.answers.get(&self.key);
        let wanted = kept.is_some_and(|kept| kept.obtained == self.obtained && kept.used);
        if wanted && table.generation == self.generation {
            let reach = table.reach(&self.provider);
            // It runs by itself.
            drop(shared.flight(&mut table, &self.provider, &self.image, reach, false, self.generation));
        }
    }
}

impl Table {
    /// The programs of the files as they were `seen`.
    fn loaded(&self, seen: &[(PathBuf, Stamp)]) -> Option<(List, u64)> {
        let loaded = self.providers.as_ref().filter(|loaded| loaded.seen == seen)?;
        Some((Arc::clone(&loaded.providers), self.generation))
    }

    /// How far a program's answers reach, as far as it is known.
    fn reach(&self, provider: &Provider) -> Reach {
        self.reaches.get(&provider.name).copied().unwrap_or(Reach::Registry)
    }

    /// What a program said that is still good.
    fn kept(&mut self, provider: &Provider, image: &Arc<str>, refused: Option<Instant>) -> Option<Said> {
        let now = Instant::now();
        for reach in [Reach::Image, Reach::Registry, Reach::Global] {
            let Some(kept) = self.answers.get_mut(&place(provider, reach, image)) else {
                continue;
            };
            let old = now.duration_since(kept.obtained) >= PROVIDER_ASKED_AGAIN;
            let useless = refused.is_some_and(|refused| kept.obtained <= refused) && old;
            if kept.until > now && !useless {
                kept.used = true;
                return Some(Said {
                    answer: Arc::clone(&kept.answer),
                    image: Arc::clone(image),
                    until: Some(kept.until),
                });
            }
        }
        None
    }

    fn make_room(&mut self, now: Instant) {
        self.answers.retain(|_, kept| kept.until > now);
        while self.answers.len() >= MAX_PROVIDER_ANSWERS {
            let oldest = self.answers.iter().min_by_key(|(_, kept)| kept.obtained);
            let Some(oldest) = oldest.map(|(key, _)| key.clone()) else {
                return;
            };
            self.answers.remove(&oldest);
        }
    }
}

#[cfg(test)]
mod tests;
