//! Logins handed over at run time: by repository, in memory only, bounded in number and time.
//!
//! A login is confirmed, or tentative while the pull that brought it is under way. Several may be known for one request: the confirmed
//! come first, then the tentative, each from the longest place that fits to the shortest and from the newest to the oldest. A registry that
//! refuses one is shown the next, so a wrong login takes a right one from nobody. A login that is dropped, forgotten or past its time is
//! overwritten in memory, and authorisations made with it are not used any more: see [`Stamp`].

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroize as _;

use crate::credentials::{Login, is_hub};
use crate::limits::{
    MAX_CONFIRMED_OF_PLACE, MAX_HANDED_OVER, MAX_HELD, MAX_LOGINS_TRIED, MAX_SECRET_BYTES, MAX_TENTATIVE_OF_PLACE,
    TENTATIVE_HELD,
};
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
    /// A login for another registry, which is not quoted: secrets have been written into addresses.
    #[error("the login is for another registry and not for {host}")]
    Registry {
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

    /// A repository by its registry's name and its own.
    pub(crate) fn new(host: &str, repository: &str) -> Self {
        Self {
            host: host.to_owned(),
            prefix: repository.to_owned(),
        }
    }

    /// How closely it is told: the length of what repositories begin with.
    pub(crate) fn depth(&self) -> usize {
        self.prefix.len()
    }

    /// `host[:port]`, or `host[:port]/component…`; nothing is completed.
    pub fn prefix(text: &str) -> Result<Self, PlaceError> {
        // A name and a password before the host are no part of the error.
        let shown = text.rsplit_once('@').map_or(text, |(_, rest)| rest);
        let bad = || PlaceError::Place(shown.chars().take(300).collect());
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
        let authority = address.split('/').next().unwrap_or(address);
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        let same = host.eq_ignore_ascii_case(&self.host) || (is_hub(host) && is_hub(&self.host));
        if registry.is_empty() || same {
            Ok(())
        } else {
            Err(PlaceError::Registry {
                host: self.host.clone(),
            })
        }
    }

    /// Whether it has all that `other` has.
    pub(crate) fn contains(&self, other: &Self) -> bool {
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
        self.problem().map_or(Ok(()), |problem| Err(PlaceError::Login(problem)))
    }

    /// Why it cannot be used, if so.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        let parts = self.parts();
        if parts.iter().any(|part| part.len() > MAX_SECRET_BYTES) {
            Some("it is too long")
        } else if parts[0].is_empty() {
            Some("it is empty")
        } else if matches!(self, Self::Basic { username, .. } if username.contains(':')) {
            Some("a user name has no colon")
        } else if matches!(self, Self::RegistryToken(token) if !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            Some("a token has printable characters only")
        } else {
            None
        }
    }
}

/// Tells one login handed over from the next, so that an authorisation is known to be made with the one that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp(u64);

/// How long a login is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// So long, whoever uses it.
    For(Duration),
    /// As long as its place is in use ([`HandedOver::in_use`]), and so long after it was set or used last.
    WhileUsed(Duration),
}

impl From<Duration> for Keeping {
    fn from(time: Duration) -> Self {
        Self::For(time)
    }
}

impl Keeping {
    fn time(self) -> Duration {
        let (Self::For(time) | Self::WhileUsed(time)) = self;
        time.min(MAX_HELD)
    }
}

/// A login as long as it is held; overwritten at its end.
struct Held {
    login: Login,
    stamp: Stamp,
    /// Renewed also by the same login; the order of `u64`s is that of time.
    set: u64,
    keeping: Keeping,
    until: Instant,
    confirmed: bool,
    /// Pulls under way that brought it.
    pulls: u32,
}

impl Held {
    fn keep(&mut self, keeping: Keeping, now: Instant) {
        self.keeping = keeping;
        self.until = now + keeping.time();
    }

    /// The less, the sooner it is asked.
    fn rank(&self) -> (bool, std::cmp::Reverse<u64>) {
        (!self.confirmed, std::cmp::Reverse(self.set))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.login.wipe();
    }
}

#[derive(Default)]
struct Table {
    /// Those of one place by rank; no place has none.
    held: HashMap<Place, Vec<Held>>,
    /// Repositories in use, and how often.
    uses: HashMap<Place, usize>,
    /// Counts what was set.
    count: u64,
}

/// The logins that were handed over. Clones share them.
#[derive(Clone, Default)]
pub struct HandedOver {
    table: Arc<Mutex<Table>>,
}

/// A repository is in use until this is dropped.
pub struct InUse {
    handed_over: HandedOver,
    place: Place,
}

impl fmt::Debug for InUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "InUse({})", self.place)
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.handed_over.table().release(&self.place);
    }
}

impl fmt::Debug for HandedOver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandedOver").field("logins", &self.len()).finish()
    }
}

impl HandedOver {
    /// Uses `login` for `place` from now on, at most [`MAX_HELD`] without any use. The one before it is kept for when it is refused.
    pub fn set(&self, place: Place, login: Login, keeping: impl Into<Keeping>) -> Result<(), PlaceError> {
        login.check()?;
        self.table().set(place, login, keeping.into(), true);
        Ok(())
    }

    /// Tries `login` for `place` too, after those that are confirmed: a pull has begun with it.
    pub fn try_out(&self, place: Place, login: Login) -> Result<(), PlaceError> {
        login.check()?;
        self.table().set(place, login, Keeping::For(TENTATIVE_HELD), false);
        Ok(())
    }

    /// The pull that brought `login` has failed. It is forgotten, unless it is confirmed or another pull goes on with it.
    pub fn withdraw(&self, place: &Place, login: &Login) {
        let mut table = self.table();
        let Some(logins) = table.held.get_mut(place) else {
            return;
        };
        if let Some(held) = logins.iter_mut().find(|held| held.login == *login) {
            held.pulls = held.pulls.saturating_sub(1);
        }
        logins.retain(|held| held.login != *login || held.confirmed || held.pulls > 0);
        if logins.is_empty() {
            table.held.remove(place);
        }
    }

    /// Keeps the logins for a repository, see [`Keeping::WhileUsed`].
    #[must_use]
    pub fn in_use(&self, repository: Place) -> InUse {
        let mut table = self.table();
        // What has run out is not to come back.
        table.drop_expired(Instant::now());
        *table.uses.entry(repository.clone()).or_default() += 1;
        drop(table);
        InUse {
            handed_over: self.clone(),
            place: repository,
        }
    }

    /// Forgets the logins for `place` and everything below it; how many those were.
    pub fn forget(&self, place: &Place) -> usize {
        let mut table = self.table();
        let before = table.len();
        table.held.retain(|held, _| !place.contains(held));
        before - table.len()
    }

    /// Logins held.
    pub fn len(&self) -> usize {
        let mut table = self.table();
        table.drop_expired(Instant::now());
        table.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The logins for a repository, in the order in which they are to be tried; at most [`MAX_LOGINS_TRIED`].
    pub(crate) fn find(&self, host: &str, repository: &str) -> Vec<(Stamp, Login)> {
        let table = self.table();
        let mut found = table.find(host, repository);
        // Stable: what comes from a longer place stays first.
        found.sort_by_key(|held| !held.confirmed);
        found.truncate(MAX_LOGINS_TRIED);
        found.iter().map(|held| (held.stamp, held.login.clone())).collect()
    }

    /// Whether a login is still one for a repository.
    pub(crate) fn holds(&self, stamp: Stamp, host: &str, repository: &str) -> bool {
        let table = self.table();
        table.find(host, repository).iter().any(|held| held.stamp == stamp)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Nothing that changes it can panic halfway.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn len(&self) -> usize {
        self.held.values().map(Vec::len).sum()
    }

    fn set(&mut self, place: Place, login: Login, keeping: Keeping, confirmed: bool) {
        let now = Instant::now();
        self.drop_expired(now);
        self.count += 1;
        let set = self.count;
        let known = self.held.get_mut(&place);
        let same = known.and_then(|logins| logins.iter_mut().find(|held| held.login == login));
        if let Some(held) = same {
            // The same again: what was made with it stays good.
            held.set = set;
            if confirmed {
                held.pulls = held.pulls.saturating_sub(1);
                held.confirmed = true;
                held.keep(keeping, now);
            } else {
                held.pulls = held.pulls.saturating_add(1);
                // One that is confirmed keeps its time, as long as the pull has not shown that it still works.
                if !held.confirmed {
                    held.keep(keeping, now);
                }
            }
        } else {
            self.make_room();
            self.held.entry(place.clone()).or_default().push(Held {
                login,
                stamp: Stamp(set),
                set,
                keeping,
                until: now + keeping.time(),
                confirmed,
                pulls: u32::from(!confirmed),
            });
        }
        if let Some(logins) = self.held.get_mut(&place) {
            logins.sort_by_key(Held::rank);
            let (mut kept, mut tentative) = (0, 0);
            logins.retain(|held| {
                let (count, most) = if held.confirmed {
                    (&mut kept, MAX_CONFIRMED_OF_PLACE)
                } else {
                    (&mut tentative, MAX_TENTATIVE_OF_PLACE)
                };
                *count += 1;
                *count <= most
            });
        }
    }

    /// What is held for a repository, from the longest place to the shortest.
    fn find(&self, host: &str, repository: &str) -> Vec<&Held> {
        let mut found = Vec::new();
        if self.held.is_empty() {
            return found;
        }
        let now = Instant::now();
        let mut place = Place {
            host: host.to_owned(),
            prefix: repository.to_owned(),
        };
        loop {
            let logins = self.held.get(&place).into_iter().flatten();
            found.extend(logins.filter(|held| is_live(held, &place, &self.uses, now)));
            if place.prefix.is_empty() {
                return found;
            }
            place.prefix.truncate(place.prefix.rfind('/').unwrap_or(0));
        }
    }

    fn drop_expired(&mut self, now: Instant) {
        let uses = &self.uses;
        self.held.retain(|place, logins| {
            logins.retain(|held| is_live(held, place, uses, now));
            !logins.is_empty()
        });
    }

    /// Room for one more: what is neither in use nor confirmed goes first, then the oldest.
    fn make_room(&mut self) {
        while self.len() >= MAX_HANDED_OVER {
            let all = self
                .held
                .iter()
                .flat_map(|(place, logins)| logins.iter().map(move |held| (place, held)));
            let least = all.min_by_key(|(place, held)| {
                let used = matches!(held.keeping, Keeping::WhileUsed(_)) && is_used(place, &self.uses);
                (used, held.confirmed, held.set)
            });
            let Some((place, set)) = least.map(|(place, held)| (place.clone(), held.set)) else {
                return;
            };
            if let Some(logins) = self.held.get_mut(&place) {
                logins.retain(|held| held.set != set);
                if logins.is_empty() {
                    self.held.remove(&place);
                }
            }
        }
    }

    /// One use of a repository has ended; with the last, the logins' time begins.
    fn release(&mut self, repository: &Place) {
        let now = Instant::now();
        if let Some(uses) = self.uses.get_mut(repository)
            && *uses > 1
        {
            *uses -= 1;
            return;
        }
        for (place, logins) in &mut self.held {
            if place.contains(repository) {
                for held in logins {
                    if let Keeping::WhileUsed(_) = held.keeping {
                        held.until = held.until.max(now + held.keeping.time());
                    }
                }
            }
        }
        self.uses.remove(repository);
    }
}

fn is_live(held: &Held, place: &Place, uses: &HashMap<Place, usize>, now: Instant) -> bool {
    held.until > now || (matches!(held.keeping, Keeping::WhileUsed(_)) && is_used(place, uses))
}

fn is_used(place: &Place, uses: &HashMap<Place, usize>) -> bool {
    uses.keys().any(|repository| place.contains(repository))
}

#[cfg(test)]
mod tests;
