//! Who counts adoptions, and what there is to count.

use std::time::Duration;

/// How a RunPodSandbox was answered. Labels of a metric: [`Outcome::result`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// By an adoption.
    Hit,
    /// By containerd, for want of a hull.
    Miss,
    /// By containerd, because the pod needs something that a hull is not.
    Ineligible,
    /// By containerd, after an adoption that failed.
    Failed,
    /// By containerd or by a refusal, because only that is right.
    NativeOnly,
}

impl Outcome {
    /// A short, stable name.
    #[must_use]
    pub fn result(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Ineligible => "ineligible",
            Self::Failed => "failed",
            Self::NativeOnly => "native_only",
        }
    }
}

/// Counts what happens; implemented by the metrics. Called on the critical path: it must not block.
pub trait Observer: Send + Sync + 'static {
    /// A RunPodSandbox was decided on; `reason` is a short, stable name from a small set, empty for a hit.
    fn request(&self, outcome: Outcome, reason: &'static str) {
        let _ = (outcome, reason);
    }

    /// A hull became a pod's: what that took from request to answer, and how long the hull had waited.
    fn adopted(&self, took: Duration, hull_age: Duration) {
        let _ = (took, hull_age);
    }

    /// containerd's record of an adopted sandbox was rewritten ("ok"), is gone ("gone"), or could not be ("failed").
    fn rebranded(&self, result: &'static str) {
        let _ = result;
    }
}

/// Counts nothing.
impl Observer for () {}
