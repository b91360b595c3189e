//! Docker's and podman's configuration: logins by registry, in the file or kept by a helper.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::process::Command;

use super::program::{self, ProgramError};
use super::{CredentialError, Login, is_hub};
use crate::limits::{MAX_CONFIG_BYTES, MAX_HELPER_ANSWER};

/// The key under which docker files Docker Hub's login.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// A configuration of docker's.
#[derive(Clone)]
pub(super) enum DockerConfig {
    Text { name: &'static str, json: Arc<str> },
    File { path: PathBuf, required: bool },
}

/// What a configuration says about a registry.
pub(super) enum Known {
    /// The login itself, or that there is none.
    Login(Option<Login>),
    /// Which program has to be asked.
    Helper(Helper),
}

/// A credential helper and what it is asked for.
pub(super) struct Helper {
    config: String,
    name: String,
    key: String,
}

/// Which entry counts, and which helper.
struct Choice {
    key: String,
    helper: Option<String>,
    /// Whether the helper is for this registry alone, so that no entry counts beside it.
    own: bool,
}

/// What a helper says.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Said {
    username: String,
    secret: String,
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

impl DockerConfig {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Text { name, .. } => (*name).to_owned(),
            Self::File { path, .. } => path.display().to_string(),
        }
    }

    fn read(&self) -> Result<Option<String>, CredentialError> {
        let (path, required) = match self {
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

    /// What is known of a registry.
    pub(super) fn look_up(&self, host: &str) -> Result<Known, CredentialError> {
        let Some(json) = self.read()? else {
            return Ok(Known::Login(None));
        };
        let keys: Keys = serde_json::from_str(&json).map_err(|source| self.no_config(source))?;
        let Some(Choice { key, helper, own }) = keys.choose(host) else {
            return Ok(Known::Login(None));
        };
        let login = if own { None } else { self.entry(&json, &key)? };
        Ok(match (login, helper) {
            (None, Some(name)) => Known::Helper(Helper {
                config: self.name(),
                name,
                key,
            }),
            (login, _) => Known::Login(login),
        })
    }

    fn no_config(&self, source: serde_json::Error) -> CredentialError {
        CredentialError::Parse {
            path: self.name(),
            source,
        }
    }

    /// The login in the file itself.
    fn entry(&self, json: &str, key: &str) -> Result<Option<Login>, CredentialError> {
        let mut whole: Value = serde_json::from_str(json).map_err(|source| self.no_config(source))?;
        let Some(entry) = whole.get_mut("auths").and_then(|auths| auths.get_mut(key)) else {
            return Ok(None);
        };
        // Without the helpers, which are asked within limits of ours.
        let alone = json!({ "auths": { key: entry.take() } }).to_string();
        let found = docker_credential::get_credential_from_reader(alone.as_bytes(), key);
        let damaged = |reason| CredentialError::Entry {
            path: self.name(),
            key: key.to_owned(),
            reason,
        };
        match found {
            Ok(DockerCredential::UsernamePassword(username, password)) => Ok(basic(username, password)),
            Ok(DockerCredential::IdentityToken(token)) => Ok(Some(Login::IdentityToken(token))),
            Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(None),
            Err(CredentialRetrievalError::CredentialMismatchError) => {
                Err(damaged("auth disagrees with username and password"))
            }
            Err(_) => Err(damaged("auth is not base64 of user:password")),
        }
    }
}

fn basic(username: String, password: String) -> Option<Login> {
    let empty = username.is_empty() && password.is_empty();
    (!empty).then_some(Login::Basic { username, password })
}

impl Helper {
    /// Asks the program in `$PATH`.
    pub(super) async fn ask(self, patience: Duration) -> Result<Option<Login>, CredentialError> {
        let program = format!("docker-credential-{}", self.name);
        if program.contains('/') {
            return Err(self.failed("is no name of a program"));
        }
        self.ask_program(program.as_ref(), patience).await
    }

    async fn ask_program(&self, program: &OsStr, patience: Duration) -> Result<Option<Login>, CredentialError> {
        let mut command = Command::new(program);
        command.arg("get");
        let said = match program::ask(command, self.key.as_bytes(), MAX_HELPER_ANSWER, patience).await {
            Ok(said) => said,
            Err(ProgramError::Failed { said, complaint, .. }) => {
                // The helper protocol has no code for "nothing stored", only this text.
                let nothing = |said: &[u8]| {
                    let text = String::from_utf8_lossy(said).to_ascii_lowercase();
                    text.contains("credentials not found")
                };
                if nothing(said.bytes()) || nothing(&complaint) {
                    return Ok(None);
                }
                return Err(self.failed("failed; run it by hand to see why"));
            }
            Err(ProgramError::Silent(_)) => return Err(self.failed("gave no answer in time")),
            Err(ProgramError::TooMuch(_)) => return Err(self.failed("said more than a login")),
            Err(ProgramError::Start(_)) => return Err(self.failed("cannot be run; is it in $PATH?")),
            Err(ProgramError::Read(_)) => return Err(self.failed("cannot be read")),
        };
        let said: Said = serde_json::from_slice(said.bytes()).map_err(|_| self.failed("gave a malformed answer"))?;
        Ok(match said.username.as_str() {
            "<token>" => Some(Login::IdentityToken(said.secret)),
            _ => basic(said.username, said.secret),
        })
    }

    fn failed(&self, reason: &'static str) -> CredentialError {
        CredentialError::Helper {
            path: self.config.clone(),
            helper: format!("docker-credential-{}", self.name),
            reason,
        }
    }
}

impl Keys {
    /// The entry to ask for and the helper that would answer.
    fn choose(self, host: &str) -> Option<Choice> {
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
            return Some(Choice {
                key,
                helper: Some(helper),
                own: true,
            });
        }
        let store = self.creds_store.filter(|store| !store.is_empty());
        let mut keys: Vec<_> = self
            .auths
            .unwrap_or_default()
            .into_keys()
            .filter(|key| same(key))
            .collect();
        keys.sort_unstable_by_key(|key| (key != host, key.len()));
        let choice = |key: String, helper| Choice {
            key,
            helper,
            own: false,
        };
        if let Some(key) = keys.into_iter().next() {
            return Some(choice(key, store));
        }
        let key = if is_hub(host) { DOCKER_HUB_KEY } else { host };
        store.map(|store| choice(key.to_owned(), Some(store)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper(directory: &tempfile::TempDir, script: &str) -> (Helper, PathBuf) {
        let program = directory.path().join("docker-credential-test");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let helper = Helper {
            config: "config.json".to_owned(),
            name: "test".to_owned(),
            key: "r.io".to_owned(),
        };
        (helper, program)
    }

    #[tokio::test]
    async fn what_helpers_say_is_understood_within_limits() {
        let asked = async |script: &str| {
            let directory = tempfile::tempdir().unwrap();
            let (helper, program) = helper(&directory, script);
            helper.ask_program(program.as_os_str(), Duration::from_secs(60)).await
        };
        let echo = r#"KEY=$(cat); echo "{\"ServerURL\":\"$KEY\",\"Username\":\"NAME\",\"Secret\":\"$KEY $1\"}""#;
        let login = Login::Basic {
            username: "u".to_owned(),
            password: "r.io get".to_owned(),
        };
        assert_eq!(asked(&echo.replace("NAME", "u")).await.unwrap(), Some(login));
        let token = Login::IdentityToken("r.io get".to_owned());
        assert_eq!(asked(&echo.replace("NAME", "<token>")).await.unwrap(), Some(token));
        let nothing = "echo 'credentials not found in native keychain'; exit 1";
        assert_eq!(asked(nothing).await.unwrap(), None);
        for (script, word) in [
            ("echo secret; exit 1", "failed"),
            ("echo secret", "malformed"),
            ("head -c 3000000 /dev/zero", "said more"),
        ] {
            let error = asked(script).await.unwrap_err();
            let said = format!("{error} {error:?}");
            assert!(said.contains(word) && !said.contains("secret"), "{said}");
        }
    }

    #[tokio::test]
    async fn a_helper_that_hangs_is_ended() {
        let directory = tempfile::tempdir().unwrap();
        let (helper, program) = helper(&directory, "sleep 1000 & wait");
        let error = helper
            .ask_program(program.as_os_str(), Duration::from_millis(300))
            .await;
        assert!(error.unwrap_err().to_string().contains("gave no answer in time"));
    }
}
