//! What failed of late, so that the next pod does not fail on it, too.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use hullspeed_proto::cri::v1::PodSandboxConfig;

/// After a failure that is not the pod's doing hulls are left alone for so long, and twice as long after the next one in
/// a row.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// How long a sysctl that the kernel refused is not tried again: each attempt costs a hull.
const REFUSED: Duration = Duration::from_secs(300);

/// Sysctls that are remembered; of more, those whose time ends first are forgotten.
const MAX_REFUSED: usize = 256;

/// The setbacks.
#[derive(Debug, Default)]
pub(super) struct Setbacks {
    paused_until: Option<Instant>,
    last_pause: Option<Duration>,
    /// Names and values, with the time until which they stay here.
    refused: BTreeMap<(String, String), Instant>,
}

impl Setbacks {
    /// Adoption itself failed.
    pub(super) fn failed(&mut self, now: Instant) {
        let pause = self
            .last_pause
            .map_or(FIRST_PAUSE, |last| (last * 2).min(LONGEST_PAUSE));
        self.last_pause = Some(pause);
        self.paused_until = Some(now + pause);
    }

    /// Adoption works.
    pub(super) fn succeeded(&mut self) {
        (self.paused_until, self.last_pause) = (None, None);
    }

    /// Whether hulls are left alone.
    pub(super) fn is_paused(&self, now: Instant) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// The kernel does not take this value of this sysctl.
    pub(super) fn refused(&mut self, name: &str, value: &str, now: Instant) {
        self.refused.retain(|_, until| now < *until);
        if self.refused.len() >= MAX_REFUSED
            && let Some(first) = self.refused.iter().min_by_key(|(_, until)| **until)
        {
            let first = first.0.clone();
            self.refused.remove(&first);
        }
        self.refused.insert((name.to_owned(), value.to_owned()), now + REFUSED);
    }

    /// Whether a pod asks for what the kernel does not take.
    pub(super) fn refuses(&self, config: &PodSandboxConfig, now: Instant) -> bool {
        if self.refused.is_empty() {
            return false;
        }
        let sysctls = config.linux.iter().flat_map(|linux| &linux.sysctls);
        let mut refused = sysctls.filter_map(|(name, value)| self.refused.get(&(name.clone(), value.clone())));
        refused.any(|until| now < *until)
    }
}

#[cfg(test)]
mod tests {
    use hullspeed_proto::cri::v1::LinuxPodSandboxConfig;

    use super::*;

    #[test]
    fn pauses_double_until_an_adoption_works() {
        let (mut setbacks, now) = (Setbacks::default(), Instant::now());
        assert!(!setbacks.is_paused(now));
        let mut pause = FIRST_PAUSE;
        for _ in 0..10 {
            setbacks.failed(now);
            assert!(setbacks.is_paused(now + pause - Duration::from_millis(1)));
            assert!(!setbacks.is_paused(now + pause));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        setbacks.succeeded();
        assert!(!setbacks.is_paused(now));
        setbacks.failed(now);
        assert!(!setbacks.is_paused(now + FIRST_PAUSE));
    }

    #[test]
    fn a_refused_sysctl_is_remembered_for_a_while_and_within_a_bound() {
        let pod = |value: &str| PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig {
                sysctls: [("net.core.somaxconn".to_owned(), value.to_owned())].into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let (mut setbacks, now) = (Setbacks::default(), Instant::now());
        assert!(!setbacks.refuses(&pod("x"), now));
        setbacks.refused("net.core.somaxconn", "x", now);
        assert!(setbacks.refuses(&pod("x"), now));
        assert!(!setbacks.refuses(&pod("7"), now));
        assert!(!setbacks.refuses(&pod("x"), now + REFUSED));
        for n in 0..MAX_REFUSED {
            setbacks.refused("kernel.shmmax", &n.to_string(), now + Duration::from_secs(1));
        }
        assert_eq!(setbacks.refused.len(), MAX_REFUSED);
        assert!(!setbacks.refuses(&pod("x"), now));
    }
}
