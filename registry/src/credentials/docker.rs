//! Docker's and podman's configuration: logins by registry, in the file or kept by a helper.

use std::collections::HashMap;
use std::io::Read as _;
use std::path::PathBuf;
use std::sync::Arc;

use docker_credential::{CredentialRetrievalError, DockerCredential};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{CredentialError, Login, is_hub};
use crate::limits::MAX_CONFIG_BYTES;

/// The key under which docker files Docker Hub's login.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// A configuration of docker's.
#[derive(Clone)]
pub(super) enum DockerConfig {
    Text { name: &'static str, json: Arc<str> },
    File { path: PathBuf, required: bool },
}

/// What a configuration says about a registry: whose entry to read, and whether a program has to be asked for it.
pub(super) struct Choice {
    json: String,
    key: String,
    pub(super) helper: Option<String>,
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

    pub(super) fn choose(&self, host: &str) -> Result<Option<Choice>, CredentialError> {
        let Some(json) = self.read()? else { return Ok(None) };
        let parse_error = |source| CredentialError::Parse {
            path: self.name(),
            source,
        };
        let keys: Keys = serde_json::from_str(&json).map_err(parse_error)?;
        Ok(keys.choose(host).map(|(key, helper)| Choice { json, key, helper }))
    }

    pub(super) fn find(&self, Choice { json, key, helper }: Choice) -> Result<Option<Login>, CredentialError> {
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
