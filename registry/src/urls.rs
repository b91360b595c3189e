//! Final addresses of blobs whose registry redirects to a store, kept until they stop working.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use url::Url;

use crate::limits::MAX_URLS;

/// Bounded map from blob (`host/repository@digest`) to its final address; the oldest entries go first.
///
/// The addresses are signed, hence secrets for as long as they live: they are never logged.
#[derive(Default)]
pub(crate) struct Urls(Mutex<State>);

#[derive(Default)]
struct State {
    known: HashMap<String, Url>,
    order: VecDeque<String>,
}

impl Urls {
    pub(crate) fn find(&self, blob: &str) -> Option<Url> {
        self.lock().known.get(blob).cloned()
    }

    pub(crate) fn keep(&self, blob: String, url: Url) {
        let mut state = self.lock();
        if state.known.insert(blob.clone(), url).is_none() {
            state.order.push_back(blob);
        }
        while state.order.len() > MAX_URLS {
            if let Some(oldest) = state.order.pop_front() {
                state.known.remove(&oldest);
            }
        }
    }

    /// Forgets `url`, unless somebody has found a newer one since.
    pub(crate) fn drop_stale(&self, blob: &str, url: &Url) {
        let mut state = self.lock();
        if state.known.get(blob) == Some(url) {
            state.known.remove(blob);
            state.order.retain(|kept| kept != blob);
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_go_first_and_newer_addresses_survive() {
        let urls = Urls::default();
        let url = |n: usize| Url::parse(&format!("http://store/{n}")).unwrap();
        for n in 0..=MAX_URLS {
            urls.keep(n.to_string(), url(n));
        }
        assert_eq!(urls.find("0"), None);
        assert_eq!(urls.find("1"), Some(url(1)));
        urls.keep("1".to_owned(), url(77));
        urls.drop_stale("1", &url(1));
        assert_eq!(urls.find("1"), Some(url(77)));
        urls.drop_stale("1", &url(77));
        assert_eq!(urls.find("1"), None);
    }
}
