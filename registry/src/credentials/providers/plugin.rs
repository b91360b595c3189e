//! One run of a credential provider: a request on its standard input, an answer on its standard output.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::ProviderError;
use super::config::Provider;
use super::pattern;
use crate::credentials::program::{self, ProgramError};
use crate::credentials::{Login, is_hub};
use crate::duration;
use crate::limits::MAX_PROVIDER_ANSWER;

/// What an answer is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reach {
    /// The image that was asked for.
    Image,
    /// All images of its registry.
    Registry,
    /// All images.
    Global,
}

/// Logins by pattern, the closest first; overwritten at the end.
pub(super) struct Answer {
    pub(super) reach: Reach,
    /// How long it may be kept.
    pub(super) kept: Duration,
    auth: Vec<(String, Login)>,
}

impl Drop for Answer {
    fn drop(&mut self) {
        for (_, login) in &mut self.auth {
            login.wipe();
        }
    }
}

impl Answer {
    /// The login for an image.
    pub(super) fn login(&self, image: &str) -> Option<&Login> {
        let of = |pattern: &str| self.auth.iter().find(|(own, _)| own == pattern).map(|(_, login)| login);
        let matching = self.auth.iter().find(|(own, _)| pattern::matches(own, image));
        let hub = || {
            let host = image.split('/').next().unwrap_or_default();
            is_hub(host)
                .then(|| of("index.docker.io").or_else(|| of("docker.io")))
                .flatten()
        };
        matching.map(|(_, login)| login).or_else(hub)
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Request<'a> {
    api_version: &'a str,
    kind: &'static str,
    image: &'a str,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Response {
    #[serde(default)]
    api_version: String,
    #[serde(default)]
    kind: String,
    #[serde(default)]
    cache_key_type: String,
    #[serde(default)]
    cache_duration: Option<String>,
    #[serde(default)]
    auth: Option<BTreeMap<String, Auth>>,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
}

/// Asks a program in `directory` for the logins for an image, and waits no longer than `patience`.
pub(super) async fn ask(
    provider: &Provider,
    directory: &Path,
    image: &str,
    patience: Duration,
) -> Result<Answer, ProviderError> {
    let failed = |reason: String| ProviderError::Plugin {
        name: provider.name.clone(),
        reason,
    };
    let request = Request {
        api_version: &provider.api_version,
        kind: "CredentialProviderRequest",
        image,
    };
    let request = serde_json::to_vec(&request).map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(directory.join(&provider.name));
    command
        .args(&provider.args)
        .envs(provider.env.iter().map(|(name, value)| (name, value)));
    let said = program::ask(command, &request, MAX_PROVIDER_ANSWER, patience).await;
    let said = said.map_err(|error| {
        failed(match error {
            ProgramError::Start(cause) => format!("cannot be run: {cause}"),
            error => error.to_string(),
        })
    })?;
    answer(said.bytes(), provider)
}

/// What an answer says. No error quotes it.
fn answer(said: &[u8], provider: &Provider) -> Result<Answer, ProviderError> {
    let bad = |reason: &str| ProviderError::Plugin {
        name: provider.name.clone(),
        reason: format!("gave an answer that is none: {reason}"),
    };
    let response: Response = serde_json::from_slice(said).map_err(|_| bad("no CredentialProviderResponse"))?;
    if response.kind != "CredentialProviderResponse" {
        return Err(bad("its kind is not CredentialProviderResponse"));
    }
    if response.api_version != provider.api_version {
        return Err(bad("its apiVersion is not the request's"));
    }
    let reach = match response.cache_key_type.as_str() {
        "Image" => Reach::Image,
        "Registry" => Reach::Registry,
        "Global" => Reach::Global,
        _ => return Err(bad("its cacheKeyType is not Image, Registry or Global")),
    };
    let kept = match response.cache_duration.as_deref() {
        None => provider.default_cache,
        Some(text) => duration::parse(text).ok_or_else(|| bad("its cacheDuration is no time"))?,
    };
    let entries = response.auth.unwrap_or_default().into_iter();
    let mut auth: Vec<_> = entries.filter_map(|(pattern, entry)| usable(&pattern, entry)).collect();
    // As the kubelet sorts them: what says more of a path comes before what says less of it.
    auth.sort_by(|(one, _), (other, _)| other.cmp(one));
    Ok(Answer { reach, kept, auth })
}

/// A pattern without a scheme, and without the beginnings of paths of APIs that docker writes behind registries. As in the kubelet,
/// a slash at the end of a path is a part of it.
fn usable(pattern: &str, entry: Auth) -> Option<(String, Login)> {
    let bare = pattern
        .strip_prefix("https://")
        .or_else(|| pattern.strip_prefix("http://"))
        .unwrap_or(pattern);
    let (host, path) = bare.split_at(bare.find('/').unwrap_or(bare.len()));
    let api = path.starts_with("/v1/") || path.starts_with("/v2/");
    let path = if api { &path[3..] } else { path };
    let bare = if path == "/" {
        host.to_owned()
    } else {
        format!("{host}{path}")
    };
    let login = Login::Basic {
        username: entry.username,
        password: entry.password,
    };
    (login.problem().is_none() && pattern::is_usable(&bare)).then_some((bare, login))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn provider() -> Provider {
        Provider {
            name: "p".to_owned(),
            match_images: vec!["*".to_owned()],
            default_cache: Duration::from_secs(60),
            api_version: "credentialprovider.kubelet.k8s.io/v1".to_owned(),
            args: Vec::new(),
            env: Vec::new(),
            wants_service_account: false,
        }
    }

    const SAID: &str = r#"{"kind":"CredentialProviderResponse","apiVersion":"credentialprovider.kubelet.k8s.io/v1",
        "cacheKeyType":"Registry","cacheDuration":"6h0m0s","auth":{
            "r.io":{"username":"all","password":"secret"},
            "r.io/team":{"username":"team","password":"secret"},
            "*.r.io":{"username":"sub","password":"secret"},
            "https://index.docker.io/v1/":{"username":"hub","password":"secret"},
            "bad.io":{"username":"","password":"secret"}}}"#;

    #[test]
    fn the_closest_login_counts() {
        let answer = answer(SAID.as_bytes(), &provider()).unwrap();
        assert_eq!(
            (answer.reach, answer.kept),
            (Reach::Registry, Duration::from_secs(6 * 3600))
        );
        let user = |image: &str| match answer.login(image) {
            Some(Login::Basic { username, .. }) => username.clone(),
            _ => "none".to_owned(),
        };
        assert_eq!(
            [
                "r.io/x",
                "r.io/team/x",
                "a.r.io/x",
                "docker.io/library/x",
                "bad.io/x",
                "r.io:5000/x"
            ]
            .map(user),
            ["all", "team", "sub", "hub", "none", "none"]
        );
    }

    #[test]
    fn only_the_beginning_of_a_path_is_an_apis() {
        for (pattern, bare) in [
            ("https://r.io/v2/", "r.io"),
            ("r.io/", "r.io"),
            ("r.io/v1/team", "r.io/team"),
            ("r.io/team/v2", "r.io/team/v2"),
            ("r.io/v2", "r.io/v2"),
            ("r.io/team/", "r.io/team/"),
        ] {
            let entry = Auth {
                username: "u".to_owned(),
                password: "p".to_owned(),
            };
            assert_eq!(usable(pattern, entry).unwrap().0, bare, "{pattern}");
        }
    }

    #[test]
    fn an_answer_that_is_none_is_told_of_and_not_quoted() {
        for (from, to, word) in [
            ("CredentialProviderResponse", "Other", "kind"),
            ("k8s.io/v1\"", "k8s.io/v1beta1\"", "apiVersion"),
            ("\"Registry\"", "\"Pod\"", "cacheKeyType"),
            ("6h0m0s", "soon", "cacheDuration"),
            ("\"auth\":{", "\"auth\":{{", "no CredentialProviderResponse"),
        ] {
            let text = SAID.replace(from, to);
            assert_ne!(text, SAID);
            let Err(error) = answer(text.as_bytes(), &provider()) else {
                panic!("{to} was accepted")
            };
            let said = format!("{error} {error:?}");
            assert!(said.contains(word) && !said.contains("secret"), "{said}");
        }
        let none = answer(SAID.replace("\"6h0m0s\"", "null").as_bytes(), &provider()).unwrap();
        assert_eq!(none.kept, Duration::from_secs(60));
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_ended_with_all_that_it_started() {
        let directory = tempfile::tempdir().unwrap();
        let (program, pid) = (directory.path().join("p"), directory.path().join("pid"));
        // It says whom it has started, and then says nothing that would be an answer.
        let script = format!(
            "#!/bin/sh\nsleep 1000 &\necho $! > {0}.new; mv {0}.new {0}\nwait\n",
            pid.display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
        let asked = ask(&provider(), directory.path(), "r.io/x", Duration::from_secs(2)).await;
        let Err(error) = asked else { panic!("it answered") };
        assert!(error.to_string().contains("gave no answer in 2 s"), "{error}");
        let pid = std::fs::read_to_string(pid).unwrap();
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
        for _ in 0..500 {
            // One that is dead and that nobody has waited for is ended, too.
            if state().is_empty() || state().contains(") Z") {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{pid} still runs");
    }

    proptest! {
        #[test]
        fn no_answer_makes_it_panic(said in prop::collection::vec(any::<u8>(), 0..100), at in 0..SAID.len(), byte in any::<u8>()) {
            let _ = answer(&said, &provider());
            let mut changed = SAID.as_bytes().to_vec();
            changed[at] = byte;
            if let Ok(answer) = answer(&changed, &provider()) {
                let _ = answer.login("r.io/team/x");
            }
        }
    }
}
