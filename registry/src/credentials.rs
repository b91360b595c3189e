//! Where logins come from: a file of logins, docker and podman configuration with its helpers, the kubelet's credential providers.
//!
//! Every source is read when it is asked, so that none needs a restart. Secrets are held only as long as a request needs them or the source
//! says, `Debug` never shows them, and no error quotes them.

mod docker;
mod logins;
mod program;
mod providers;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::Semaphore;
use zeroize::Zeroize as _;

use crate::handed_over::{HandedOver, InUse, Place, Stamp};
use crate::limits::{HELPER_TIMEOUT, MAX_HELPERS};
use docker::{DockerConfig, Known};

pub use logins::check_credentials_file;
pub use providers::{ProviderError, Providers};

/// What proves an identity to a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Login {
    /// User name and password (or an access token in its place).
    Basic {
        /// User name.
        username: String,
        /// Password.
        password: String,
    },
    /// OAuth2 refresh token.
    IdentityToken(String),
    /// Bearer token, for the registry itself.
    RegistryToken(String),
}

impl Login {
    /// Overwrites what is secret in it.
    pub(crate) fn wipe(&mut self) {
        match self {
            Self::Basic { username, password } => {
                username.zeroize();
                password.zeroize();
            }
            Self::IdentityToken(token) | Self::RegistryToken(token) => token.zeroize(),
        }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Login::Basic(redacted)",
            Self::IdentityToken(_) => "Login::IdentityToken(redacted)",
            Self::RegistryToken(_) => "Login::RegistryToken(redacted)",
        })
    }
}

/// A login and how long it is good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) login: Login,
    /// When it is to be asked for again, where the source says that.
    pub(crate) until: Option<Instant>,
}

impl From<Login> for Found {
    fn from(login: Login) -> Self {
        Self { login, until: None }
    }
}

/// Where logins come from, asked in order; the first that knows a registry wins. Cheap to clone.
#[derive(Clone)]
pub struct Credentials {
    /// Asked before the sources.
    handed_over: Option<HandedOver>,
    sources: Arc<[Source]>,
    helpers: Helpers,
}

impl Default for Credentials {
    fn default() -> Self {
        Self::of(Vec::new())
    }
}

/// The bound on credential helpers that run at once, shared by all clones of [`Credentials`].
#[derive(Clone)]
struct Helpers {
    places: Arc<Semaphore>,
}

impl Helpers {
    fn new() -> Self {
        Self {
            places: Arc::new(Semaphore::new(MAX_HELPERS)),
        }
    }

    /// Asks, once there is a place for it; `None` if that panicked. It goes on, and ends in its time, whoever waits for it.
    async fn run<T: Send + 'static>(&self, ask: impl Future<Output = T> + Send + 'static) -> Option<T> {
        let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
        let running = tokio::spawn(async move {
            let answer = ask.await;
            drop(place);
            answer
        });
        running.await.ok()
    }
}

#[derive(Clone)]
enum Source {
    Fixed { host: String, login: Login },
    Logins { path: PathBuf },
    Docker(DockerConfig),
    Providers(Providers),
}

impl Source {
    fn name(&self) -> String {
        match self {
            Self::Fixed { host, .. } => format!("given login for {host}"),
            Self::Logins { path } => path.display().to_string(),
            Self::Docker(config) => config.name(),
            Self::Providers(providers) => format!("the credential providers of {}", providers.config().display()),
        }
    }
}

/// Why a login could not be read.
#[derive(Debug, thiserror::Error)]
pub enum CredentialError {
    /// The file cannot be read.
    #[error("{path} cannot be read")]
    Read {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not docker configuration.
    #[error("{path} is not a docker configuration file")]
    Parse {
        /// The file.
        path: String,
        /// Where it stops making sense.
        #[source]
        source: serde_json::Error,
    },
    /// The entry of a registry is damaged.
    #[error("entry {key} of {path} is damaged: {reason}")]
    Entry {
        /// The file.
        path: String,
        /// The registry's key.
        key: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The file of logins is none.
    #[error("{path} is not a file of logins: line {line}")]
    Logins {
        /// The file.
        path: String,
        /// Where it stops making sense.
        line: usize,
    },
    /// The credential helper failed.
    #[error("credential helper {helper} (named in {path}) {reason}")]
    Helper {
        /// The file.
        path: String,
        /// The helper's program.
        helper: String,
        /// What it did.
        reason: &'static str,
    },
    /// The kubelet's credential providers failed.
    #[error("the credential providers failed")]
    Providers(#[source] Arc<ProviderError>),
}

impl Credentials {
    /// No login for any registry.
    pub fn anonymous() -> Self {
        Self::default()
    }

    /// One login for one registry, before everything else.
    pub fn with_login(self, host: impl Into<String>, login: Login) -> Self {
        self.first(Source::Fixed {
            host: host.into(),
            login,
        })
    }

    /// A docker configuration file that must exist, before everything else.
    pub fn with_file(self, path: impl Into<PathBuf>) -> Self {
        self.first(Source::Docker(DockerConfig::File {
            path: path.into(),
            required: true,
        }))
    }

    /// A file of logins, see [`check_credentials_file`], before everything else.
    pub fn with_logins(self, path: impl Into<PathBuf>) -> Self {
        self.first(Source::Logins { path: path.into() })
    }

    /// The kubelet's credential providers, after everything else.
    pub fn with_providers(self, providers: Providers) -> Self {
        let sources = self.sources.iter().cloned();
        Self {
            sources: sources.chain([Source::Providers(providers)]).collect(),
            ..self
        }
    }

    /// Logins that come and go while the process runs, before everything else.
    pub fn with_handed_over(self, handed_over: HandedOver) -> Self {
        Self {
            handed_over: Some(handed_over),
            ..self
        }
    }

    /// The places of this process's environment: `$REGISTRY_AUTH_FILE`, `$DOCKER_AUTH_CONFIG` (JSON text), `config.json`
    /// in `$DOCKER_CONFIG` or `~/.docker`, and `$XDG_RUNTIME_DIR/containers/auth.json`.
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<std::ffi::OsString>) -> Self {
        let mut sources = Vec::new();
        if let Some(path) = variable("REGISTRY_AUTH_FILE") {
            sources.push(DockerConfig::File {
                path: path.into(),
                required: true,
            });
        }
        if let Some(json) = variable("DOCKER_AUTH_CONFIG").and_then(|text| text.into_string().ok()) {
            sources.push(DockerConfig::Text {
                name: "$DOCKER_AUTH_CONFIG",
                json: json.into(),
            });
        }
        let home = || variable("HOME").map(|home| Path::new(&home).join(".docker"));
        if let Some(directory) = variable("DOCKER_CONFIG").map(PathBuf::from).or_else(home) {
            sources.push(DockerConfig::File {
                path: directory.join("config.json"),
                required: false,
            });
        }
        if let Some(directory) = variable("XDG_RUNTIME_DIR") {
            let path = Path::new(&directory).join("containers/auth.json");
            sources.push(DockerConfig::File { path, required: false });
        }
        Self::of(sources.into_iter().map(Source::Docker).collect())
    }

    /// Keeps what was handed over for a repository, until what is returned is dropped.
    pub fn in_use(&self, repository: Place) -> Option<InUse> {
        let held = self.handed_over.as_ref()?;
        Some(held.in_use(repository))
    }

    /// The logins for requests to a repository that were handed over, in the order in which they are to be tried.
    pub(crate) fn handed_over(&self, host: &str, repository: &str) -> Vec<(Stamp, Login)> {
        let held = self.handed_over.as_ref();
        held.map(|held| held.find(host, repository)).unwrap_or_default()
    }

    /// Whether a login that was handed over is still one for a repository.
    pub(crate) fn holds(&self, stamp: Stamp, host: &str, repository: &str) -> bool {
        let held = self.handed_over.as_ref();
        held.is_some_and(|held| held.holds(stamp, host, repository))
    }

    /// How many sources there are besides what was handed over.
    pub(crate) fn sources(&self) -> usize {
        self.sources.len()
    }

    /// The login that one source has for a repository. What a provider gave before `refused` was found out to be of no use is asked
    /// for again.
    pub(crate) async fn find(
        &self,
        source: usize,
        host: &str,
        repository: &str,
        refused: Option<Instant>,
    ) -> Result<Option<Found>, CredentialError> {
        let Some(source) = self.sources.get(source) else {
            return Ok(None);
        };
        match source {
            Source::Fixed { host: fixed, login } => Ok((fixed == host).then(|| login.clone().into())),
            Source::Logins { path } => {
                let (path, host, repository) = (path.clone(), host.to_owned(), repository.to_owned());
                let read = tokio::task::spawn_blocking(move || logins::find(&path, &host, &repository));
                read.await.unwrap_or(Ok(None)).map(|login| login.map(Found::from))
            }
            Source::Docker(config) => {
                let found = tokio::time::timeout(HELPER_TIMEOUT, self.look_up(config.clone(), host.to_owned()));
                match found.await {
                    Ok(Some(found)) => found.map(|login| login.map(Found::from)),
                    Ok(None) | Err(_) => Err(helper_error("of the docker configuration", "gave no answer in time")),
                }
            }
            Source::Providers(providers) => {
                let found = providers.find(host, repository, refused).await;
                found.map_err(CredentialError::Providers)
            }
        }
    }

    /// What one docker configuration says; `None` if the look-up broke down.
    async fn look_up(&self, source: DockerConfig, host: String) -> Option<Result<Option<Login>, CredentialError>> {
        let known = tokio::task::spawn_blocking(move || source.look_up(&host));
        match known.await.ok()? {
            Ok(Known::Login(login)) => Some(Ok(login)),
            // Helpers are programs that may ask a keychain or a cloud. Only what needs one waits for a place among them.
            Ok(Known::Helper(helper)) => self.helpers.run(helper.ask(HELPER_TIMEOUT)).await,
            Err(error) => Some(Err(error)),
        }
    }

    /// Where logins are looked for, for error messages.
    pub(crate) fn places(&self) -> String {
        let handed_over = self.handed_over.iter().map(|_| "what was handed over".to_owned());
        let places: Vec<_> = handed_over.chain(self.sources.iter().map(Source::name)).collect();
        if places.is_empty() {
            "no credentials configured".to_owned()
        } else {
            places.join(", ")
        }
    }

    fn first(self, source: Source) -> Self {
        Self {
            sources: std::iter::once(source).chain(self.sources.iter().cloned()).collect(),
            ..self
        }
    }

    fn of(sources: Vec<Source>) -> Self {
        Self {
            handed_over: None,
            sources: sources.into(),
            helpers: Helpers::new(),
        }
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.sources.iter().map(Source::name)).finish()
    }
}

/// Whether a host is one of Docker Hub's names.
pub(crate) fn is_hub(name: &str) -> bool {
    matches!(name, "docker.io" | "index.docker.io" | "registry-1.docker.io")
}

fn helper_error(helper: &str, reason: &'static str) -> CredentialError {
    CredentialError::Helper {
        path: "docker configuration".to_owned(),
        helper: helper.to_owned(),
        reason,
    }
}

#[cfg(test)]
mod tests;
