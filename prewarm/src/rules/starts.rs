//! Which container belongs to which sandbox, until it starts: the pool rests while a pod starts.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

/// Most containers that are waited for; the oldest are forgotten.
const MAX_WAITING: usize = 4096;

#[derive(Debug, Default)]
struct Waiting {
    sandboxes: HashMap<String, String>,
    order: VecDeque<String>,
}

/// Containers that were made and have not been started.
#[derive(Debug, Default)]
pub(crate) struct Starts {
    waiting: Mutex<Waiting>,
}

impl Starts {
    /// A container was made in a sandbox.
    pub(crate) fn made(&self, container_id: String, sandbox_id: String) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.order.push_back(container_id.clone());
        waiting.sandboxes.insert(container_id, sandbox_id);
        while waiting.order.len() > MAX_WAITING {
            if let Some(oldest) = waiting.order.pop_front() {
                waiting.sandboxes.remove(&oldest);
            }
        }
    }

    /// The container's start ended: the sandbox that it is in, if it was made through us.
    pub(crate) fn ended(&self, container_id: &str) -> Option<String> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.order.retain(|id| id != container_id);
        waiting.sandboxes.remove(container_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_ends_once_and_the_oldest_are_forgotten() {
        let starts = Starts::default();
        starts.made("first".into(), "pod".into());
        assert_eq!(starts.ended("first"), Some("pod".into()));
        assert_eq!(starts.ended("first"), None);
        for n in 0..=MAX_WAITING {
            starts.made(n.to_string(), "pod".into());
        }
        assert_eq!(starts.ended("0"), None);
        assert_eq!(starts.ended("1"), Some("pod".into()));
    }
}
