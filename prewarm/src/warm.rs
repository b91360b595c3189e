//! Keeps shares of images resident in the snapshotter, as a policy file says.
//!
//! - [`policy`] is the file, [`mod@file`] reads it again when it changes; [`glob`] are its patterns, matched against the images that
//!   containerd has and against [`seen`], those that were pulled through the relay;
//! - [`schedule`] is what is to be warmed and when: pure, with the time handed to it;
//! - [`agent`] does it: one `Warm` call per image, few at once, none while pods start.
//!
//! What the snapshotter has made resident stays so if a call is cancelled, so a warm that makes room for a pod's start loses nothing.

pub mod agent;
pub mod file;
pub mod glob;
pub mod policy;
pub mod schedule;
pub mod seen;
#[cfg(test)]
mod tests;

use std::time::Duration;

pub use agent::{WarmAgent, WarmOptions};
pub use schedule::{ImageState, ImageStatus};

/// Tells when pods start, which are not to be disturbed; implemented by the pool.
pub trait Quiet: Send + Sync + 'static {
    /// How long it is until no pod starts, as far as is known; zero if none does.
    fn quiet_in(&self) -> Duration;
}

/// How warming stands.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WarmStatus {
    /// Why the policy file as it is now is not used, if it is not.
    pub policy_problem: Option<String>,
    /// The images, in the order in which they are warmed.
    pub images: Vec<ImageStatus>,
}
