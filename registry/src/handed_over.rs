//! Logins handed over at run time: by repository, in memory only, bounded in number and time.
//!
//! The longest place that fits a request wins, and among those for one place the newest. A login that is replaced, forgotten or
//! past its time is overwritten in memory, and authorisations made with it are not used any more: see [`Stamp`].

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroize as _;

use crate::credentials::{Login, is_hub};
use crate::limits::{MAX_HANDED_OVER, MAX_HELD, MAX_SECRET_BYTES};
use crate::reference::Reference;

/// A registry, or repositories of it that begin alike.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Place {
    host: String,
    /// Whole components; empty for all repositories.
    prefix: String,
}

/// A text that is no place, or a login that is none. Quotes no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Neither a registry nor a repository.
    #[error("{0:?} is no registry, and no registry with a repository")]
    Place(String),
    /// A login for another registry.
    #[error("the login is for {registry:?} and not for {host}")]
    Registry {
        /// What the login is for.
        registry: String,
        /// The place's registry.
        host: String,
    },
    /// A login that cannot be used.
    #[error("the login cannot be used: {0}")]
    Login(&'static str),
}

impl Place {
    /// The repository of an image.
    pub fn of(image: &Reference) -> Self {
        Self {
            host: image.host().to_owned(),
            prefix: image.repository().to_owned(),
        }
    }

    /// `host[:port]`, or `host[:port]/component…`; nothing is completed.
    pub fn prefix(text: &str) -> Result<Self, PlaceError> {
        let bad = || PlaceError::Place(text.chars().take(300).collect());
        let (host, prefix) = match text.split_once('/') {
            Some((host, prefix)) => (host, prefix),
            None => (text, ""),
        };
        // As a reference it is checked as strictly as one; the dot and the colon of most hosts make them known as such.
        let path = if prefix.is_empty() { "x" } else { prefix };
        let whole = Reference::parse(&format!("{host}/{path}")).map_err(|_| bad())?;
        let same_host = whole.host() == host || is_hub(host);
        if !same_host || whole.tag().is_some() || whole.digest().is_some() {
            return Err(bad());
        }
        Ok(Self {
            host: whole.host().to_owned(),
            prefix: prefix.to_owned(),
        })
    }

    /// Fails if `registry` (a host or an address, as docker writes them) is not the place's; an empty one is anybody's.
    pub fn check_registry(&self, registry: &str) -> Result<(), PlaceError> {
        let address = registry
            .strip_prefix("https://")
            .or_else(|| registry.strip_prefix("http://"))
            .unwrap_or(registry);
        let host = address.split('/').next().unwrap_or(address);
        let same = host.eq_ignore_ascii_case(&self.host) || (is_hub(host) && is_hub(&self.host));
        if registry.is_empty() || same {
            Ok(())
        } else {
            Err(PlaceError::Registry {
                registry: registry.chars().take(300).collect(),
                host: self.host.clone(),
            })
        }
    }

    fn contains(&self, other: &Self) -> bool {
        let inside = other.prefix.strip_prefix(self.prefix.as_str());
        self.host == other.host
            && (self.prefix.is_empty() || inside.is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.host)?;
        if self.prefix.is_empty() {
            Ok(())
        } else {
            write!(f, "/{}", self.prefix)
        }
    }
}

impl Login {
    /// User name and password from the base64 of `name:password`, as docker files them.
    pub fn from_base64(text: &str) -> Result<Self, PlaceError> {
        let bad = PlaceError::Login("auth is not base64 of user:password");
        if text.len() > MAX_SECRET_BYTES {
            return Err(PlaceError::Login("it is too long"));
        }
        let mut bytes = STANDARD.decode(text).map_err(|_| bad.clone())?;
        let login = std::str::from_utf8(&bytes)
            .ok()
            .and_then(|text| text.split_once(':'))
            .map(|(username, password)| Self::Basic {
                username: username.to_owned(),
                // Old clients padded it.
                password: password.trim_matches('\0').to_owned(),
            });
        bytes.zeroize();
        login.ok_or(bad)
    }

    fn parts(&self) -> [&str; 2] {
        match self {
            Self::Basic { username, password } => [username, password],
            Self::IdentityToken(token) | Self::RegistryToken(token) => [token, ""],
        }
    }

    fn check(&self) -> Result<(), PlaceError> {
        let parts = self.parts();
        let problem = if parts.iter().any(|part| part.len() > MAX_SECRET_BYTES) {
            "it is too long"
        } else if parts[0].is_empty() {
            "it is empty"
        } else if matches!(self, Self::Basic { username, .. } if username.contains(':')) {
            "a user name has no colon"
        } else if matches!(self, Self::RegistryToken(token) if !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            "a token has printable characters only"
        } else {
            return Ok(());
        };
        Err(PlaceError::Login(problem))
    }
}

/// Tells one login handed over from the next, so that an authorisation is known to be made with the one that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp(u64);

/// A login as long as it is held; overwritten at its end.
struct Held {
    login: Login,
    stamp: Stamp,
    /// Renewed also by the same login; the order of `u64`s is that of time.
    set: u64,
    until: Instant,
}

impl Drop for Held {
    fn drop(&mut self) {
        match &mut self.login {
            Login::Basic { username, password } => {
                username.zeroize();
                password.zeroize();
            }
            Login::IdentityToken(token) | Login::RegistryToken(token) => token.zeroize(),
        }
    }
}

#[derive(Default)]
struct Table {
    held: HashMap<Place, Held>,
    /// Counts what was set.
    count: u64,
}

/// The logins that were handed over. Clones share them.
#[derive(Clone, Default)]
pub struct HandedOver {
    table: Arc<Mutex<Table>>,
}

impl fmt::Debug for HandedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandedOver").field("logins", &self.len()).finish()
    }
}

impl HandedOver {
    /// Uses `login` for `place` from now on, for `time` and at most [`MAX_HELD`].
    pub fn set(&self, place: Place, login: Login, time: Duration) -> Result<(), PlaceError> {
        login.check()?;
        let now = Instant::now();
        let mut table = self.table();
        table.count += 1;
        let (set, until) = (table.count, now + time.min(MAX_HELD));
        if let Some(held) = table
            .held
            .get_mut(&place)
            .filter(|held| held.login == login && held.until > now)
        {
            // The same again: what was made with it stays good.
            (held.set, held.until) = (set, until);
            return Ok(());
        }
        if table.held.len() >= MAX_HANDED_OVER && !table.held.contains_key(&place) {
            table.make_room(now);
        }
        let stamp = Stamp(set);
        table.held.insert(
            place,
            Held {
                login,
                stamp,
                set,
                until,
            },
        );
        Ok(())
    }

    /// Forgets the logins for `place` and everything below it; how many those were.
    pub fn forget(&self, place: &Place) -> usize {
        let mut table = self.table();
        let before = table.held.len();
        table.held.retain(|held, _| !place.contains(held));
        before - table.held.len()
    }

    /// Logins held.
    pub fn len(&self) -> usize {
        let mut table = self.table();
        table.drop_expired(Instant::now());
        table.held.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The login for a repository.
    pub(crate) fn find(&self, host: &str, repository: &str) -> Option<(Stamp, Login)> {
        let table = self.table();
        table
            .find(host, repository)
            .map(|held| (held.stamp, held.login.clone()))
    }

    /// Which login is for a repository now.
    pub(crate) fn stamp(&self, host: &str, repository: &str) -> Option<Stamp> {
        self.table().find(host, repository).map(|held| held.stamp)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Every change is one insert or remove.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn find(&self, host: &str, repository: &str) -> Option<&Held> {
        if self.held.is_empty() {
            return None;
        }
        let now = Instant::now();
        let mut place = Place {
            host: host.to_owned(),
            prefix: repository.to_owned(),
        };
        loop {
            if let Some(held) = self.held.get(&place).filter(|held| held.until > now) {
                return Some(held);
            }
            if place.prefix.is_empty() {
                return None;
            }
            place.prefix.truncate(place.prefix.rfind('/').unwrap_or(0));
        }
    }

    fn drop_expired(&mut self, now: Instant) {
        self.held.retain(|_, held| held.until > now);
    }

    fn make_room(&mut self, now: Instant) {
        self.drop_expired(now);
        while self.held.len() >= MAX_HANDED_OVER {
            let oldest = self.held.iter().min_by_key(|(_, held)| held.set);
            let Some(place) = oldest.map(|(place, _)| place.clone()) else {
                return;
            };
            self.held.remove(&place);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn basic(password: &str) -> Login {
        Login::Basic {
            username: "u".to_owned(),
            password: password.to_owned(),
        }
    }

    fn place(text: &str) -> Place {
        Place::prefix(text).unwrap()
    }

    fn password(held: &HandedOver, host: &str, repository: &str) -> Option<String> {
        match held.find(host, repository)?.1 {
            Login::Basic { password, .. } => Some(password),
            _ => None,
        }
    }

    #[test]
    fn the_longest_place_wins_and_components_are_whole() {
        let held = HandedOver::default();
        for prefix in [
            "r.io",
            "r.io/team",
            "r.io/team/app",
            "localhost:5000",
            "docker.io/library/x",
        ] {
            held.set(place(prefix), basic(prefix), HOUR).unwrap();
        }
        for (host, repository, expected) in [
            ("r.io", "team/app", Some("r.io/team/app")),
            ("r.io", "team/app/deep", Some("r.io/team/app")),
            ("r.io", "team/application", Some("r.io/team")),
            ("r.io", "teams/app", Some("r.io")),
            ("r.io:443", "team/app", None),
            ("x.io", "team/app", None),
            ("localhost:5000", "a", Some("localhost:5000")),
            ("docker.io", "library/x", Some("docker.io/library/x")),
            ("docker.io", "library/y", None),
        ] {
            assert_eq!(
                password(&held, host, repository).as_deref(),
                expected,
                "{host}/{repository}"
            );
        }
        assert_eq!(held.forget(&place("r.io/team")), 2);
        assert_eq!(password(&held, "r.io", "team/app").as_deref(), Some("r.io"));
        let image = Reference::parse("index.docker.io/x:1").unwrap();
        assert_eq!(held.forget(&Place::of(&image)), 1);
    }

    #[test]
    fn the_newest_wins_the_same_keeps_its_stamp_and_time_ends_it() {
        let held = HandedOver::default();
        let stamp = || held.stamp("r.io", "a");
        held.set(place("r.io"), basic("1"), HOUR).unwrap();
        let first = stamp();
        held.set(place("r.io"), basic("1"), HOUR).unwrap();
        assert!(first.is_some() && stamp() == first);
        held.set(place("r.io"), basic("2"), HOUR).unwrap();
        assert!(stamp().is_some() && stamp() != first);
        held.set(place("r.io/a"), basic("3"), Duration::ZERO).unwrap();
        assert_eq!(password(&held, "r.io", "a").as_deref(), Some("2"));
        assert_eq!(held.len(), 1);
    }

    #[test]
    fn there_is_a_bound_and_the_oldest_goes_first() {
        let held = HandedOver::default();
        for number in 0..MAX_HANDED_OVER {
            held.set(place(&format!("r.io/{number}")), basic("x"), HOUR).unwrap();
        }
        held.set(place("r.io/0"), basic("x"), HOUR).unwrap();
        held.set(place("r.io/new"), basic("x"), HOUR).unwrap();
        assert_eq!(held.len(), MAX_HANDED_OVER);
        assert!(held.stamp("r.io", "0").is_some() && held.stamp("r.io", "new").is_some());
        assert!(held.stamp("r.io", "1").is_none());
    }

    #[test]
    fn nonsense_is_refused_and_nothing_secret_is_shown() {
        for bad in [
            "",
            "r",
            "r.io/",
            "r.io//x",
            "r.io/A",
            "r.io/a:tag",
            "https://r.io",
            "u:p@r.io",
            "r.io/../x",
            "/x",
        ] {
            let found = Place::prefix(bad);
            assert!(found.is_err() || bad == "r.io/", "{bad:?}: {found:?}");
        }
        let hub = place("index.docker.io/library");
        assert_eq!(hub.to_string(), "docker.io/library");
        assert!(hub.check_registry("https://index.docker.io/v1/").is_ok() && hub.check_registry("").is_ok());
        assert!(place("r.io").check_registry("https://R.io/v2/").is_ok());
        assert!(place("r.io").check_registry("x.io").is_err());
        for bad in ["", "!", "c2VjcmV0", "/////w==", "OnNlY3JldA=="] {
            let login = Login::from_base64(bad).and_then(|login| login.check());
            assert!(matches!(login, Err(PlaceError::Login(_))), "{bad}");
        }
        // echo -n "u:p:w" | base64
        assert_eq!(Login::from_base64("dTpwOnc=").unwrap(), basic("p:w"));
        let held = HandedOver::default();
        for bad in [
            basic(&"s".repeat(MAX_SECRET_BYTES + 1)),
            Login::RegistryToken("a\nb".to_owned()),
            Login::IdentityToken(String::new()),
            Login::Basic {
                username: "a:b".to_owned(),
                password: "secret".to_owned(),
            },
        ] {
            let error = held.set(place("r.io"), bad, HOUR).unwrap_err();
            assert!(!format!("{error:?} {error}").contains("secret"));
        }
        held.set(place("r.io"), Login::RegistryToken("secret".to_owned()), HOUR)
            .unwrap();
        assert!(!format!("{held:?} {:?}", held.find("r.io", "a")).contains("secret"));
    }
}
