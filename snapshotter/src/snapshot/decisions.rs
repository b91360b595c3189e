//! What became of the layers that containerd offered for lazy use: counted since the start, and the last refusals kept with
//! their reasons. A refusal is also noted in the record of the snapshot that the layer is unpacked into, and outlives the daemon there.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use estargz::digest::Digest;
use hullspeed_daemon::error::chain;

use crate::layer::NotLazy;

/// Refusals kept.
pub const MAX_REFUSED: usize = 256;

/// Bytes kept of an error's text; causes may repeat what a registry sent.
const MAX_TEXT: usize = 1024;

/// Why a layer is unpacked and not lazy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    /// [`crate::layer::NotLazy::reason`] or [`super::labels::LabelError::reason`].
    pub reason: String,
    /// The error with its causes.
    pub error: String,
    /// The host that failed last, where a registry is the reason; otherwise empty.
    pub host: String,
    /// When that was decided.
    pub at: SystemTime,
}

impl Fallback {
    /// A decision of this moment.
    pub fn now(reason: &str, mut error: String) -> Self {
        error.truncate(error.floor_char_boundary(MAX_TEXT));
        Self {
            reason: reason.to_owned(),
            error,
            host: String::new(),
            at: SystemTime::now(),
        }
    }
}

impl From<&NotLazy> for Fallback {
    fn from(error: &NotLazy) -> Self {
        Self {
            host: error.host().to_owned(),
            ..Self::now(error.reason(), chain(error))
        }
    }
}

/// A layer that was left to containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// Name of the snapshot that it is for.
    pub snapshot: String,
    /// Reference of the image; empty where the labels do not tell.
    pub image: String,
    /// Digest of the image's manifest, where the labels tell.
    pub manifest: Option<Digest>,
    /// Digest of the blob, where the labels tell.
    pub layer: Option<Digest>,
    /// Why.
    pub fallback: Fallback,
}

/// The memory of decisions.
#[derive(Debug, Default)]
pub struct Decisions(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    lazy: u64,
    /// Reasons are few: all are names in this program.
    refused: BTreeMap<String, u64>,
    last: VecDeque<Refused>,
}

/// What was decided since the start.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counts {
    /// Layers mounted lazily.
    pub lazy: u64,
    /// Layers left to containerd, by reason.
    pub refused: Vec<(String, u64)>,
}

impl Decisions {
    /// A layer is lazy. What was said of it before does not count any more.
    pub fn lazy(&self, snapshot: &str) {
        let mut kept = self.kept();
        kept.lazy += 1;
        kept.last.retain(|refused| refused.snapshot != snapshot);
    }

    /// A layer is not lazy.
    pub fn refused(&self, refused: Refused) {
        let mut kept = self.kept();
        *kept.refused.entry(refused.fallback.reason.clone()).or_default() += 1;
        // A pull that is tried again and again must not drive out the others.
        let same = |other: &Refused| other.snapshot == refused.snapshot && other.image == refused.image;
        kept.last.retain(|other| !same(other));
        if kept.last.len() == MAX_REFUSED {
            kept.last.pop_front();
        }
        kept.last.push_back(refused);
    }

    /// What was decided since the start.
    pub fn counts(&self) -> Counts {
        let kept = self.kept();
        let refused = kept.refused.iter().map(|(reason, count)| (reason.clone(), *count));
        Counts {
            lazy: kept.lazy,
            refused: refused.collect(),
        }
    }

    /// The last refusals, the oldest first.
    pub fn last(&self) -> Vec<Refused> {
        self.kept().last.iter().cloned().collect()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Counts and entries are changed one by one; a torn change costs a line of a report.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(snapshot: &str, image: &str, reason: &str) -> Refused {
        Refused {
            snapshot: snapshot.to_owned(),
            image: image.to_owned(),
            manifest: None,
            layer: Some(Digest::of(snapshot)),
            fallback: Fallback::now(reason, "é".repeat(MAX_TEXT)),
        }
    }

    #[test]
    fn decisions_are_counted_and_the_last_refusals_kept() {
        let decisions = Decisions::default();
        for number in 0..MAX_REFUSED + 10 {
            decisions.refused(refused(&number.to_string(), "a", "registry"));
        }
        // The same layer again takes the place of its own.
        decisions.refused(refused("200", "a", "timeout"));
        decisions.lazy("201");
        let last = decisions.last();
        assert_eq!(last.len(), MAX_REFUSED - 1);
        assert_eq!(last[0].snapshot, "10");
        let newest = last.last().unwrap();
        assert_eq!(
            (newest.snapshot.as_str(), newest.fallback.reason.as_str()),
            ("200", "timeout")
        );
        assert!(newest.fallback.error.len() <= MAX_TEXT);
        assert!(last.iter().all(|refused| refused.snapshot != "201"));
        let total = u64::try_from(MAX_REFUSED).unwrap() + 10;
        let counts = Counts {
            lazy: 1,
            refused: vec![("registry".to_owned(), total), ("timeout".to_owned(), 1)],
        };
        assert_eq!(decisions.counts(), counts);
    }
}
