//! Answering a registry's `WWW-Authenticate`: basic authentication and the bearer token flow, with a token cache.

mod token;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use http::header::{HeaderMap, WWW_AUTHENTICATE};
use reqwest::RequestBuilder;
use url::Url;

use crate::client::Client;
use crate::credentials::{Found, Login};
use crate::endpoint::Endpoint;
use crate::error::{ErrorClass, Fault};
use crate::handed_over::Stamp;
use crate::limits::MAX_TOKENS;

/// Longest name of a repository that is taken from a challenge.
const MAX_SCOPE_NAME: usize = 1024;

/// What a request is allowed to do once authorised, in the token server's words.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Scope {
    /// The repository that is asked; a login may be for it alone.
    repository: String,
    actions: Vec<String>,
}

impl Scope {
    pub(crate) fn pull(repository: &str) -> Self {
        Self::of(repository, "pull")
    }

    pub(crate) fn push(repository: &str) -> Self {
        Self::of(repository, "pull,push")
    }

    fn of(repository: &str, actions: &str) -> Self {
        Self {
            repository: repository.to_owned(),
            actions: vec![format!("repository:{repository}:{actions}")],
        }
    }

    /// Adds reading of another repository, for mounting its blobs.
    pub(crate) fn and_pull(mut self, repository: &str) -> Self {
        self.actions.push(format!("repository:{repository}:pull"));
        self
    }

    /// What a token server is asked for. A host below whose root the repository has a longer name may give that name in its challenge;
    /// another repository than the one that is asked is not taken from there.
    fn wanted(&self, named: Option<&str>) -> Vec<String> {
        let mut actions = self.actions.clone();
        let own = format!("repository:{}:", self.repository);
        let longer = named.filter(|name| {
            name.strip_suffix(&self.repository)
                .is_some_and(|head| head.ends_with('/'))
        });
        if let (Some(name), Some(first)) = (longer, actions.first_mut())
            && let Some(rest) = first.strip_prefix(&own)
        {
            *first = format!("repository:{name}:{rest}");
        }
        actions
    }
}

/// A ready `Authorization`.
#[derive(Clone)]
pub(crate) enum Authorization {
    Basic { username: String, password: String },
    Bearer(String),
}

impl Authorization {
    pub(crate) fn apply(&self, request: RequestBuilder) -> RequestBuilder {
        // reqwest marks both headers as sensitive, which keeps them out of Debug output.
        match self {
            Self::Basic { username, password } => request.basic_auth(username, Some(password)),
            Self::Bearer(token) => request.bearer_auth(token),
        }
    }
}

impl fmt::Debug for Authorization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Authorization(redacted)")
    }
}

/// What a registry wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Challenge {
    Basic,
    Bearer {
        realm: Url,
        service: Option<String>,
        /// The repository, as the registry names it.
        repository: Option<String>,
    },
}

impl Challenge {
    /// The first challenge of an answer that this client can meet, bearer before basic.
    pub(crate) fn from_headers(headers: &HeaderMap) -> Result<Self, Fault> {
        let bad = |reason: String| Fault::Header {
            name: "www-authenticate",
            reason,
        };
        let mut basic = false;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let text = value.to_str().map_err(|_| bad("not text".to_owned()))?;
            let Ok(challenges) = http_auth::parse_challenges(text) else {
                continue;
            };
            for challenge in challenges {
                basic |= challenge.scheme.eq_ignore_ascii_case("basic");
                if !challenge.scheme.eq_ignore_ascii_case("bearer") {
                    continue;
                }
                let find = |name: &str| {
                    let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                    found.map(|(_, value)| value.to_unescaped())
                };
                let realm = find("realm").ok_or_else(|| bad("bearer challenge without a realm".to_owned()))?;
                let realm = Url::parse(&realm).map_err(|_| bad("realm is not a URL".to_owned()))?;
                return Ok(Self::Bearer {
                    realm,
                    service: find("service"),
                    repository: find("scope").as_deref().and_then(repository_of),
                });
            }
        }
        if basic {
            Ok(Self::Basic)
        } else {
            Err(bad("no scheme that this client knows (Bearer, Basic)".to_owned()))
        }
    }
}

/// The first repository of a scope.
fn repository_of(scope: &str) -> Option<String> {
    let mut resources = scope.split_ascii_whitespace();
    let (name, _) = resources.find_map(|resource| resource.strip_prefix("repository:")?.rsplit_once(':'))?;
    let usable = name.len() <= MAX_SCOPE_NAME && name.bytes().all(|byte| byte.is_ascii_graphic());
    usable.then(|| name.to_owned())
}

/// Authorisations by registry and scope, and the last challenge of each registry.
#[derive(Default)]
pub(crate) struct Tokens {
    slots: Mutex<HashMap<(String, Scope), Arc<Slot>>>,
    challenges: Mutex<HashMap<String, Challenge>>,
}

/// One registry and scope; its lock makes token requests single-flight.
pub(crate) type Slot = tokio::sync::Mutex<Option<Grant>>;

/// An authorisation with its lifetime.
#[derive(Debug, Clone)]
pub(crate) struct Grant {
    pub(crate) authorization: Authorization,
    /// Tells renewals apart.
    pub(crate) issued: Instant,
    expires: Option<Instant>,
    /// Whether it is a login itself, which a renewal would give again.
    login: bool,
    pub(crate) giver: Giver,
}

/// Who gave the login of a [`Grant`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Giver {
    /// It was handed over.
    HandedOver(Stamp),
    /// A source of the configuration, by its place.
    Source(usize),
    /// There is none.
    Nobody,
}

impl Grant {
    /// Whether it is a login itself, which a renewal would give again.
    pub(crate) fn is_login(&self) -> bool {
        self.login
    }
}

impl Tokens {
    pub(crate) fn slot(&self, endpoint: &str, scope: &Scope) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if slots.len() >= MAX_TOKENS {
            slots.retain(|_, slot| Arc::strong_count(slot) > 1);
        }
        Arc::clone(slots.entry((endpoint.to_owned(), scope.clone())).or_default())
    }

    pub(crate) fn challenge(&self, endpoint: &str) -> Option<Challenge> {
        self.challenges
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(endpoint)
            .cloned()
    }

    pub(crate) fn note_challenge(&self, endpoint: &str, challenge: &Challenge) {
        let mut challenges = self.challenges.lock().unwrap_or_else(PoisonError::into_inner);
        if challenges.len() >= MAX_TOKENS {
            challenges.clear();
        }
        let mut challenge = challenge.clone();
        // The next one is for another repository.
        if let Challenge::Bearer { repository, .. } = &mut challenge {
            *repository = None;
        }
        challenges.insert(endpoint.to_owned(), challenge);
    }
}

impl Client {
    /// Meets `challenge` from scratch, with the first login that is not refused and is none of `refused`: those handed over in
    /// their order, then what each configured source says now, and where none knows any, without one. A login that was itself refused
    /// at `since` is asked for anew where that takes more than reading a file.
    pub(crate) async fn authenticate(
        &self,
        endpoint: &Endpoint,
        scope: &Scope,
        challenge: &Challenge,
        refused: &[Giver],
        since: Option<Instant>,
    ) -> Result<Grant, Fault> {
        let credentials = self.credentials();
        let mut first = None;
        for (stamp, login) in credentials.handed_over(&endpoint.name, &scope.repository) {
            let giver = Giver::HandedOver(stamp);
            if refused.contains(&giver) {
                continue;
            }
            match self.grant(endpoint, scope, challenge, Some(login.into()), giver).await {
                Err(fault) if fault.class() == ErrorClass::Auth => {
                    first.get_or_insert(fault);
                }
                made => return made,
            }
        }
        let mut known = refused.contains(&Giver::Nobody);
        for source in 0..credentials.sources() {
            let giver = Giver::Source(source);
            if refused.contains(&giver) {
                known = true;
                continue;
            }
            match self.grant_of(endpoint, scope, challenge, source, since).await {
                Ok(Some(grant)) => return Ok(grant),
                Ok(None) => {}
                Err(Fault::Credentials(error)) => {
                    // What the registry says in the end tells nothing of it. Only a login that was refused is known.
                    tracing::warn!(
                        host = endpoint.name,
                        error = &error as &dyn std::error::Error,
                        "a source of logins cannot be used"
                    );
                    first.get_or_insert(Fault::Credentials(error));
                }
                Err(fault) if fault.class() == ErrorClass::Auth => {
                    known = true;
                    first.get_or_insert(fault);
                }
                Err(fault) => return Err(fault),
            }
        }
        if known {
            return Err(first.unwrap_or_else(|| self.unauthorized(Some("all that are known were refused"))));
        }
        let anonymous = self.grant(endpoint, scope, challenge, None, Giver::Nobody).await;
        // What was wrong with the best login tells more than that there was no other.
        anonymous.map_err(|fault| match first {
            Some(first) if fault.class() == ErrorClass::Auth => first,
            _ => fault,
        })
    }

    /// Meets `challenge` with the login of one source, if it has one; with one that is asked for anew, if a kept one is refused.
    async fn grant_of(
        &self,
        endpoint: &Endpoint,
        scope: &Scope,
        challenge: &Challenge,
        source: usize,
        since: Option<Instant>,
    ) -> Result<Option<Grant>, Fault> {
        let find = async |since| {
            let found = self
                .credentials()
                .find(source, &endpoint.name, &scope.repository, since);
            found.await.map_err(Fault::Credentials)
        };
        let Some(found) = find(since).await? else {
            return Ok(None);
        };
        let giver = Giver::Source(source);
        match self.grant(endpoint, scope, challenge, Some(found.clone()), giver).await {
            Err(fault) if fault.class() == ErrorClass::Auth => {
                let anew = find(Some(Instant::now())).await;
                let Ok(Some(other)) = anew else { return Err(fault) };
                if other.login == found.login {
                    return Err(fault);
                }
                self.grant(endpoint, scope, challenge, Some(other), giver)
                    .await
                    .map(Some)
            }
            made => made.map(Some),
        }
    }

    /// Meets `challenge` with one login.
    async fn grant(
        &self,
        endpoint: &Endpoint,
        scope: &Scope,
        challenge: &Challenge,
        found: Option<Found>,
        giver: Giver,
    ) -> Result<Grant, Fault> {
        let until = found.as_ref().and_then(|found| found.until);
        let grant = |authorization| Grant {
            authorization,
            issued: Instant::now(),
            expires: until,
            login: true,
            giver,
        };
        match (challenge, found.map(|found| found.login)) {
            // Made for the registry by somebody else, so there is nothing to ask a token server for.
            (_, Some(Login::RegistryToken(token))) => Ok(grant(Authorization::Bearer(token))),
            (Challenge::Basic, Some(Login::Basic { username, password })) => {
                Ok(grant(Authorization::Basic { username, password }))
            }
            (Challenge::Basic, Some(Login::IdentityToken(_))) => {
                Err(self.unauthorized(Some("an identity token is of no use here")))
            }
            (Challenge::Basic, None) => Err(self.unauthorized(None)),
            (Challenge::Bearer { .. }, login) => {
                let (token, expires, issued) = self.token(endpoint, scope, challenge, login).await?;
                Ok(Grant {
                    issued,
                    expires: Some(expires),
                    login: false,
                    ..grant(Authorization::Bearer(token))
                })
            }
        }
    }

    /// Whether a grant for `scope` can still be used: it has not run out, and the login that it was made with was not forgotten.
    pub(crate) fn is_fresh(&self, endpoint: &Endpoint, scope: &Scope, grant: &Grant) -> bool {
        let held = match grant.giver {
            Giver::HandedOver(stamp) => self.credentials().holds(stamp, &endpoint.name, &scope.repository),
            Giver::Source(_) | Giver::Nobody => true,
        };
        held && grant.expires.is_none_or(|expires| expires > Instant::now())
    }

    pub(crate) fn unauthorized(&self, problem: Option<&str>) -> Fault {
        let places = self.credentials().places();
        let hint = problem.map_or_else(
            || format!("none is known; looked at: {places}; log in or name an auth file"),
            |problem| format!("{problem}; login from: {places}"),
        );
        Fault::Unauthorized { hint }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn challenge(values: &[&'static str]) -> Result<Challenge, Fault> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_static(value));
        }
        Challenge::from_headers(&headers)
    }

    #[test]
    fn bearer_is_preferred_and_nonsense_is_refused() {
        let bearer = challenge(&[
            r#"Basic realm="x""#,
            r#"BEARER realm="https://a.io/token?x=1",service="a, \"b\"",scope="s""#,
        ]);
        let realm = Url::parse("https://a.io/token?x=1").unwrap();
        assert_eq!(
            bearer.unwrap(),
            Challenge::Bearer {
                realm,
                service: Some("a, \"b\"".to_owned()),
                repository: None
            }
        );
        assert_eq!(challenge(&[r#"Basic realm="x""#]).unwrap(), Challenge::Basic);
        for bad in [
            &[][..],
            &["Negotiate"],
            &[r#"Bearer service="x""#],
            &[r#"Bearer realm="not a url""#],
            &["=,=,,\""],
        ] {
            assert!(challenge(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_longer_name_of_the_repository_is_taken_from_the_challenge_and_no_other() {
        let named = |scope: &str| {
            let header = format!(r#"Bearer realm="https://a.io/token",scope="{scope}""#);
            let headers = HeaderMap::from_iter([(WWW_AUTHENTICATE, HeaderValue::from_str(&header).unwrap())]);
            let Ok(Challenge::Bearer { repository, .. }) = Challenge::from_headers(&headers) else {
                panic!("{header}")
            };
            Scope::pull("a/b").wanted(repository.as_deref()).remove(0)
        };
        assert_eq!(named("repository:proxy/a/b:pull"), "repository:proxy/a/b:pull");
        assert_eq!(
            named("registry:catalog:* repository:x/a/b:push"),
            "repository:x/a/b:pull"
        );
        for other in [
            "repository:secret:pull,push",
            "repository:xa/b:pull",
            "registry:catalog:*",
            "",
            "repository:",
        ] {
            assert_eq!(named(other), "repository:a/b:pull", "{other}");
        }
    }

    #[test]
    fn idle_slots_are_dropped_when_there_are_too_many() {
        let tokens = Tokens::default();
        let held = tokens.slot("held", &Scope::pull("r"));
        for n in 0..MAX_TOKENS * 3 {
            tokens.slot("h", &Scope::pull(&n.to_string()));
        }
        assert!(tokens.slots.lock().unwrap().len() <= MAX_TOKENS);
        assert!(Arc::ptr_eq(&held, &tokens.slot("held", &Scope::pull("r"))));
    }
}
