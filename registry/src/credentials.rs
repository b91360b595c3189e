//! Logins from docker and podman configuration, credential helpers included.
//!
//! Secrets are held only as long as a request needs them, `Debug` never shows them, and no error quotes them.

use std::collections::HashMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::sync::Semaphore;

use crate::handed_over::{HandedOver, Stamp};
use crate::limits::{HELPER_TIMEOUT, MAX_CONFIG_BYTES, MAX_HELPERS};

/// The key under which docker files Docker Hub's login.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

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

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Basic { .. } => "Login::Basic(redacted)",
            Self::IdentityToken(_) => "Login::IdentityToken(redacted)",
            Self::RegistryToken(_) => "Login::RegistryToken(redacted)",
        })
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

    /// Runs `ask` on a thread of its own, once there is a place for it; `None` if it panicked.
    ///
    /// The place is held by the thread, not by the caller: nothing can stop a helper that hangs, so a caller that has lost
    /// patience must not make room for another one.
    async fn run<T: Send + 'static>(&self, ask: impl FnOnce() -> T + Send + 'static) -> Option<T> {
        let place = Arc::clone(&self.places).acquire_owned().await.ok()?;
        let running = tokio::task::spawn_blocking(move || {
            let answer = ask();
            drop(place);
            answer
        });
        running.await.ok()
    }
}

/// What a configuration says about a registry: whose entry to read, and whether a program has to be asked for it.
struct Choice {
    json: String,
    key: String,
    helper: Option<String>,
}

#[derive(Clone)]
enum Source {
    Fixed { host: String, login: Login },
    Text { name: &'static str, json: Arc<str> },
    File { path: PathBuf, required: bool },
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
        self.first(Source::File {
            path: path.into(),
            required: true,
        })
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
            sources.push(Source::File {
                path: path.into(),
                required: true,
            });
        }
        if let Some(json) = variable("DOCKER_AUTH_CONFIG").and_then(|text| text.into_string().ok()) {
            sources.push(Source::Text {
                name: "$DOCKER_AUTH_CONFIG",
                json: json.into(),
            });
        }
        let home = || variable("HOME").map(|home| Path::new(&home).join(".docker"));
        if let Some(directory) = variable("DOCKER_CONFIG").map(PathBuf::from).or_else(home) {
            sources.push(Source::File {
                path: directory.join("config.json"),
                required: false,
            });
        }
        if let Some(directory) = variable("XDG_RUNTIME_DIR") {
            let path = Path::new(&directory).join("containers/auth.json");
            sources.push(Source::File { path, required: false });
        }
        Self::of(sources)
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

    /// The login for `host` (as in a [`crate::Reference`]), if any source has one.
    pub async fn login(&self, host: &str) -> Result<Option<Login>, CredentialError> {
        for source in self.sources.iter().cloned() {
            if let Source::Fixed { host: fixed, login } = source {
                if fixed == host {
                    return Ok(Some(login));
                }
                continue;
            }
            let found = tokio::time::timeout(HELPER_TIMEOUT, self.look_up(source, host.to_owned()));
            match found.await {
                Ok(Some(found)) => match found? {
                    Some(login) => return Ok(Some(login)),
                    None => continue,
                },
                Ok(None) | Err(_) => {
                    return Err(helper_error("of the docker configuration", "gave no answer in time"));
                }
            }
        }
        Ok(None)
    }

    /// What one source says; `None` if the look-up broke down.
    async fn look_up(&self, source: Source, host: String) -> Option<Result<Option<Login>, CredentialError>> {
        let reader = source.clone();
        // Only what needs a helper waits for a place among them: one that hangs is no obstacle to any other login.
        let chosen = tokio::task::spawn_blocking(move || match reader.choose(&host) {
            Ok(Some(choice)) if choice.helper.is_some() => Err(choice),
            Ok(Some(choice)) => Ok(reader.find(choice)),
            Ok(None) => Ok(Ok(None)),
            Err(error) => Ok(Err(error)),
        });
        match chosen.await.ok()? {
            Ok(found) => Some(found),
            // Helpers are programs that may ask a keychain or a cloud.
            Err(choice) => self.helpers.run(move || source.find(choice)).await,
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

/// The part of a configuration file that decides which entry is asked for.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Keys {
    #[serde(default)]
    auths: Option<HashMap<String, IgnoredAny>>,
    #[serde(default)]
    cred_helpers: Option<HashMap<String, String>>,
    #[serde(default)]
    creds_store: Option<String>,
}

impl Source {
    fn name(&self) -> String {
        match self {
            Self::Fixed { host, .. } => format!("given login for {host}"),
            Self::Text { name, .. } => (*name).to_owned(),
            Self::File { path, .. } => path.display().to_string(),
        }
    }

    fn read(&self) -> Result<Option<String>, CredentialError> {
        let (path, required) = match self {
            Self::Fixed { .. } => return Ok(None),
            Self::Text { json, .. } => return Ok(Some(json.to_string())),
            Self::File { path, required } => (path, *required),
        };
        let file = match std::fs::File::open(path) {
            Ok(file) => file,
            // Somebody else's home, or none: as good as no configuration.
            Err(error) if !required && error.kind() != std::io::ErrorKind::PermissionDenied => return Ok(None),
            Err(source) => {
                return Err(CredentialError::Read {
                    path: self.name(),
                    source,
                });
            }
        };
        let mut json = String::new();
        let read = file.take(MAX_CONFIG_BYTES).read_to_string(&mut json);
        read.map_err(|source| CredentialError::Read {
            path: self.name(),
            source,
        })?;
        Ok(Some(json))
    }

    fn choose(&self, host: &str) -> Result<Option<Choice>, CredentialError> {
        let Some(json) = self.read()? else { return Ok(None) };
        let parse_error = |source| CredentialError::Parse {
            path: self.name(),
            source,
        };
        let keys: Keys = serde_json::from_str(&json).map_err(parse_error)?;
        Ok(keys.choose(host).map(|(key, helper)| Choice { json, key, helper }))
    }

    fn find(&self, Choice { json, key, helper }: Choice) -> Result<Option<Login>, CredentialError> {
        let found = docker_credential::get_credential_from_reader(json.as_bytes(), &key);
        let entry_error = |reason| CredentialError::Entry {
            path: self.name(),
            key: key.clone(),
            reason,
        };
        let helper = helper.map_or_else(
            || "of the docker configuration".into(),
            |name| format!("docker-credential-{name}"),
        );
        let helper_failed = |reason| CredentialError::Helper {
            path: self.name(),
            helper,
            reason,
        };
        match found {
            Ok(DockerCredential::UsernamePassword(username, password))
                if username.is_empty() && password.is_empty() =>
            {
                Ok(None)
            }
            Ok(DockerCredential::UsernamePassword(username, password)) => Ok(Some(Login::Basic { username, password })),
            Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Login::IdentityToken(token))),
            Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
            Err(CredentialRetrievalError::HelperFailure { stdout, stderr, .. }) => {
                // The helper protocol has no code for "nothing stored", only this text.
                if format!("{stdout}{stderr}")
                    .to_ascii_lowercase()
                    .contains("credentials not found")
                {
                    return Ok(None);
                }
                Err(helper_failed("failed; run it by hand to see why"))
            }
            Err(CredentialRetrievalError::HelperCommunicationError) => {
                Err(helper_failed("cannot be run; is it in $PATH?"))
            }
            Err(CredentialRetrievalError::MalformedHelperResponse) => Err(helper_failed("gave a malformed answer")),
            Err(CredentialRetrievalError::CredentialMismatchError) => {
                Err(entry_error("auth disagrees with username and password"))
            }
            Err(_) => Err(entry_error("auth is not base64 of user:password")),
        }
    }
}

impl Keys {
    /// The entry to ask for and the helper that would answer.
    fn choose(self, host: &str) -> Option<(String, Option<String>)> {
        let same = |key: &str| {
            let name = key
                .strip_prefix("https://")
                .or_else(|| key.strip_prefix("http://"))
                .unwrap_or(key);
            let name = name.split_once('/').map_or(name, |(name, path)| {
                // Old docker wrote API paths into its keys; podman's are repositories, which are not this registry.
                if matches!(path, "" | "v1/" | "v2/" | "v1" | "v2") {
                    name
                } else {
                    ""
                }
            });
            name.eq_ignore_ascii_case(host) || (is_hub(name) && is_hub(host))
        };
        let helpers = self.cred_helpers.unwrap_or_default();
        if let Some((key, helper)) = helpers
            .into_iter()
            .find(|(key, helper)| !helper.is_empty() && same(key))
        {
            return Some((key, Some(helper)));
        }
        let store = self.creds_store.filter(|store| !store.is_empty());
        let mut keys: Vec<_> = self
            .auths
            .unwrap_or_default()
            .into_keys()
            .filter(|key| same(key))
            .collect();
        keys.sort_unstable_by_key(|key| (key != host, key.len()));
        if let Some(key) = keys.into_iter().next() {
            return Some((key, store));
        }
        let key = if is_hub(host) { DOCKER_HUB_KEY } else { host };
        store.map(|store| (key.to_owned(), Some(store)))
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
mod tests {
    use super::*;

    // echo -n "u:p:w" | base64
    const ENTRY: &str = r#"{"auth":"dTpwOnc="}"#;

    fn basic(username: &str, password: &str) -> Option<Login> {
        Some(Login::Basic {
            username: username.to_owned(),
            password: password.to_owned(),
        })
    }

    async fn look(json: &str, host: &str) -> Result<Option<Login>, CredentialError> {
        let source = Source::Text {
            name: "test",
            json: json.into(),
        };
        Credentials::anonymous().first(source).login(host).await
    }

    #[tokio::test]
    async fn every_spelling_of_a_registry_is_found() {
        for (key, host) in [
            ("r.io", "r.io"),
            ("https://r.io", "r.io"),
            ("https://r.io/v2/", "r.io"),
            ("http://r.io:5000/v1/", "r.io:5000"),
            ("https://index.docker.io/v1/", "docker.io"),
            ("docker.io", "docker.io"),
        ] {
            let json = format!(r#"{{"auths":{{"{key}":{ENTRY}}}}}"#);
            assert_eq!(look(&json, host).await.unwrap(), basic("u", "p:w"), "{key}");
            assert_eq!(look(&json, "other.io").await.unwrap(), None);
        }
        // A login for one repository is none for the registry.
        let json = format!(r#"{{"auths":{{"r.io/team":{ENTRY}}}}}"#);
        assert_eq!(look(&json, "r.io").await.unwrap(), None);
        let token = look(r#"{"auths":{"r.io":{"identitytoken":"secret"}}}"#, "r.io")
            .await
            .unwrap();
        assert_eq!(token, Some(Login::IdentityToken("secret".to_owned())));
    }

    #[tokio::test]
    async fn damage_is_named_and_secrets_are_not() {
        let error = look(r#"{"auths":{"r.io":{"auth":"c2VjcmV0"}}}"#, "r.io")
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("r.io") && !format!("{error:?}").contains("secret"),
            "{error}"
        );
        assert!(matches!(look("{", "r.io").await, Err(CredentialError::Parse { .. })));
        let missing = Credentials::anonymous()
            .with_file("/nonexistent/auth.json")
            .login("r.io")
            .await
            .unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/auth.json"));
        let login = basic("user", "secret").unwrap();
        let credentials = Credentials::anonymous().with_login("r.io", login.clone());
        assert!(!format!("{login:?} {credentials:?}").contains("secret"));
    }

    #[tokio::test]
    async fn helpers_are_asked_and_their_absence_is_reported() {
        let error = look(r#"{"credHelpers":{"r.io":"hullspeed-absent"}}"#, "r.io")
            .await
            .unwrap_err();
        assert!(
            error.to_string().contains("docker-credential-hullspeed-absent"),
            "{error}"
        );
        let error = look(r#"{"credsStore":"hullspeed-absent"}"#, "r.io").await.unwrap_err();
        assert!(error.to_string().contains("$PATH"), "{error}");
        // Only the registry that the helper is for asks it.
        assert_eq!(
            look(r#"{"credHelpers":{"r.io":"hullspeed-absent"}}"#, "x.io")
                .await
                .unwrap(),
            None
        );
    }

    #[tokio::test]
    async fn helpers_that_hang_keep_their_places_and_bother_nobody_else() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        use std::time::Duration;

        let json = format!(r#"{{"auths":{{"r.io":{ENTRY}}},"credHelpers":{{"x.io":"hullspeed-absent"}}}}"#);
        let source = Source::Text {
            name: "test",
            json: json.into(),
        };
        let credentials = Credentials::anonymous().first(source);
        let begun = Arc::new(AtomicUsize::new(0));
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let hang = Arc::new(std::sync::Mutex::new(hang));
        let patience = Duration::from_millis(50);
        for _ in 0..MAX_HELPERS + 2 {
            let (begun, hang) = (Arc::clone(&begun), Arc::clone(&hang));
            let helper = credentials.helpers.run(move || {
                begun.fetch_add(1, Ordering::SeqCst);
                let _ended = hang.lock().map(|hang| hang.recv());
            });
            assert!(tokio::time::timeout(patience, helper).await.is_err());
        }
        assert_eq!(
            begun.load(Ordering::SeqCst),
            MAX_HELPERS,
            "those behind them were not even begun"
        );
        // A clone shares the places. Logins that need no helper need none of them.
        let clone = credentials.clone().with_login("y.io", basic("y", "p").unwrap());
        assert!(tokio::time::timeout(patience, clone.login("x.io")).await.is_err());
        let found = tokio::time::timeout(Duration::from_secs(10), clone.login("r.io")).await;
        assert_eq!(found.unwrap().unwrap(), basic("u", "p:w"));
        drop(release);
        let error = clone.login("x.io").await.unwrap_err();
        assert!(error.to_string().contains("$PATH"), "{error}");
    }

    #[tokio::test]
    async fn sources_are_asked_in_the_documented_order() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, user: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            let json = format!(r#"{{"auths":{{"r.io":{{"username":"{user}","password":"x"}}}}}}"#);
            std::fs::write(&path, &json).unwrap();
            (path, json)
        };
        let (auth_file, _) = write("auth.json", "file");
        let (_, json) = write("unused", "text");
        write("docker/config.json", "docker");
        write("home/.docker/config.json", "home");
        write("run/containers/auth.json", "run");
        let mut variables = vec![
            ("REGISTRY_AUTH_FILE", auth_file.into_os_string(), "file"),
            ("DOCKER_AUTH_CONFIG", json.into(), "text"),
            ("DOCKER_CONFIG", dir.path().join("docker").into_os_string(), "docker"),
            ("HOME", dir.path().join("home").into_os_string(), "home"),
            ("XDG_RUNTIME_DIR", dir.path().join("run").into_os_string(), "run"),
        ];
        while !variables.is_empty() {
            let find = |name: &str| {
                variables
                    .iter()
                    .find(|(n, ..)| *n == name)
                    .map(|(_, value, _)| value.clone())
            };
            let login = Credentials::from_variables(find).login("r.io").await.unwrap();
            assert_eq!(login, basic(variables[0].2, "x"));
            variables.remove(0);
        }
    }
}
