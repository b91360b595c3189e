//! The names of images that were pulled lately.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::policy::MAX_NAME;

/// Names kept; the one not pulled for longest goes first.
pub const MAX_SEEN: usize = 1024;

/// Images that were pulled through the relay, the last one first. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct SeenImages(Arc<Mutex<VecDeque<String>>>);

impl SeenImages {
    /// Notes a pull.
    pub fn add(&self, image: &str) {
        if image.is_empty() || image.len() > MAX_NAME {
            return;
        }
        let mut names = self.lock();
        if names.front().is_some_and(|first| first == image) {
            return;
        }
        names.retain(|name| name != image);
        names.truncate(MAX_SEEN - 1);
        names.push_front(image.to_owned());
    }

    /// The names.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.lock().iter().cloned().collect()
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<String>> {
        // Between two of its changes it is a shorter list, no worse.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept_once_each() {
        let seen = SeenImages::default();
        for number in 0..MAX_SEEN + 10 {
            seen.add(&number.to_string());
        }
        seen.add("20");
        seen.add(&"x".repeat(MAX_NAME + 1));
        let names = seen.names();
        assert_eq!(names.len(), MAX_SEEN);
        assert_eq!((names[0].as_str(), names[1].as_str()), ("20", "1033"));
        assert!(!names.contains(&"9".to_owned()));
    }
}
