//! A file of logins by registry or repository, for machines without docker: TOML that only its owner may read.
//!
//! ```toml
//! [login."registry.example.com"]
//! username = "node"
//! password = "…"
//! [login."registry.example.com/team"]
//! identity_token = "…"
//! ```

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use serde::Deserialize;
use zeroize::Zeroize as _;

use super::{CredentialError, Login};
use crate::files;
use crate::handed_over::Place;
use crate::hosts::line_of;
use crate::limits::MAX_LOGINS_BYTES;

/// The whole file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    login: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    username: Option<String>,
    password: Option<String>,
    identity_token: Option<String>,
    registry_token: Option<String>,
}

impl Drop for Entry {
    fn drop(&mut self) {
        for secret in [&mut self.password, &mut self.identity_token, &mut self.registry_token] {
            secret.zeroize();
        }
    }
}

impl Entry {
    fn login(&mut self) -> Result<Login, &'static str> {
        let parts = (
            self.username.take(),
            self.password.take(),
            self.identity_token.take(),
            self.registry_token.take(),
        );
        let login = match parts {
            (Some(username), Some(password), None, None) => Login::Basic { username, password },
            (None, None, Some(token), None) => Login::IdentityToken(token),
            (None, None, None, Some(token)) => Login::RegistryToken(token),
            _ => return Err("it must have username and password, or identity_token, or registry_token"),
        };
        login.problem().map_or(Ok(login), Err)
    }
}

/// The login of a file for a repository: that of the longest place that fits.
pub(super) fn find(path: &Path, host: &str, repository: &str) -> Result<Option<Login>, CredentialError> {
    let wanted = Place::new(host, repository);
    let mut places = read(path)?;
    places.retain(|(place, _)| place.contains(&wanted));
    let best = places.into_iter().max_by_key(|(place, _)| place.depth());
    Ok(best.map(|(_, login)| login))
}

/// Checks a file for [`super::Credentials::with_logins`], so that a wrong one is found before a login is needed.
pub fn check_credentials_file(path: &Path) -> Result<(), CredentialError> {
    read(path).map(drop)
}

fn read(path: &Path) -> Result<Vec<(Place, Login)>, CredentialError> {
    let shown = path.display().to_string();
    let private = |found: &std::fs::Metadata| match found.permissions().mode() & 0o077 {
        0 => Ok(()),
        _ => {
            let why = "others than its owner may use it; it must have mode 0600 or less";
            Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
        }
    };
    let text = files::read_if(path, MAX_LOGINS_BYTES, private).and_then(files::text);
    let mut text = text.map_err(|source| CredentialError::Read {
        path: shown.clone(),
        source,
    })?;
    let parsed = parse(&text, &shown);
    text.zeroize();
    parsed
}

/// The logins of a file's text. No error quotes the text: the parser's own words would.
fn parse(text: &str, path: &str) -> Result<Vec<(Place, Login)>, CredentialError> {
    let file: File = toml::from_str(text).map_err(|error| CredentialError::Logins {
        path: path.to_owned(),
        line: line_of(text, error.span().map_or(0, |span| span.start)),
    })?;
    let login = |(key, mut entry): (String, Entry)| {
        let bad = |reason| CredentialError::Entry {
            path: path.to_owned(),
            key: key.chars().take(300).collect(),
            reason,
        };
        let place = Place::prefix(&key).map_err(|_| bad("it is no registry, and no registry with a repository"))?;
        Ok((place, entry.login().map_err(bad)?))
    };
    file.login.into_iter().map(login).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};

    use proptest::prelude::*;

    use super::*;

    const FILE: &str = r#"
[login."r.io"]
username = "all"
password = "secret"
[login."r.io/team/app"]
identity_token = "app"
[login."r.io/team"]
registry_token = "team"
[login."index.docker.io"]
username = "hub"
password = ""
"#;

    fn shown(login: Option<Login>) -> String {
        match login {
            None => "none".to_owned(),
            Some(Login::Basic { username, .. }) => username,
            Some(Login::IdentityToken(token) | Login::RegistryToken(token)) => token,
        }
    }

    #[test]
    fn the_longest_place_counts_and_only_the_owner_may_read() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("logins.toml");
        fs::write(&path, FILE).unwrap();
        for mode in [0o644, 0o640, 0o604, 0o620] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let error = check_credentials_file(&path).unwrap_err();
            let why = std::error::Error::source(&error).unwrap().to_string();
            assert!(
                error.to_string().contains("logins.toml") && why.contains("0600"),
                "{error}: {why}"
            );
        }
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        for (host, repository, wanted) in [
            ("r.io", "x", "all"),
            ("r.io", "team/app", "app"),
            ("r.io", "team/app/sub", "app"),
            ("r.io", "team/application", "team"),
            ("r.io", "teams", "all"),
            ("docker.io", "library/x", "hub"),
            ("r.io:5000", "x", "none"),
            ("sub.r.io", "x", "none"),
        ] {
            assert_eq!(
                shown(find(&path, host, repository).unwrap()),
                wanted,
                "{host}/{repository}"
            );
        }
    }

    #[test]
    fn what_is_wrong_is_named_and_no_secret_is_quoted() {
        for (text, word) in [
            ("login = 'secret'", "line 1"),
            ("[login.'r.io']\nusername = 'u'\npassword = secret", "line 3"),
            ("[login.'r.io']\npasword = 'secret'", "line"),
            ("[login.'r.io']\npassword = 'secret'", "r.io"),
            ("[login.'r.io']\nusername = 'a:b'\npassword = 'secret'", "colon"),
            ("[login.'r.io']\nregistry_token = \"secret\\u0000\"", "r.io"),
            ("[login.'https://r.io']\nregistry_token = 'secret'", "https://r.io"),
            ("[login.'r.io']\nregistry_token = 'secret'\nusername = 'x'", "must have"),
        ] {
            let Err(error) = parse(text, "/logins.toml") else {
                panic!("{text} was accepted")
            };
            let said = format!("{error} {error:?}");
            assert!(said.contains(word) && said.contains("/logins.toml"), "{text}: {said}");
            assert!(!said.contains("secret"), "{said}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "\\PC{0,200}|(\\[login\\.'r\\.io'\\]\n)?(username|password) = '\\PC{0,20}'\n") {
            let _ = parse(&text, "x");
        }
    }
}
