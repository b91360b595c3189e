//! What the pool is for the adopter.

use super::hull::Hull;

/// Where hulls come from; implemented by the pool.
pub trait HullSource: Send + Sync + 'static {
    /// A live hull for pods of this handler, at once or not at all. It is the caller's alone from now on, and its pod's
    /// start has begun.
    fn take(&self, runtime_handler: &str) -> Result<Hull, Miss>;

    /// A hull that was taken and cannot be used: it is destroyed in the background.
    fn discard(&self, hull: Hull, why: &'static str);

    /// A hull that was taken and not touched: it can be handed out again, unless what it was made with has changed since.
    fn give_back(&self, hull: Hull);

    /// A pod of this sandbox begins its start, whoever makes the sandbox; refill waits until it has ended or some seconds
    /// have passed. While containerd makes a sandbox, its name stands for its id.
    fn start_begins(&self, sandbox_id: &str);

    /// The pod's container runs (or will not).
    fn start_ended(&self, sandbox_id: &str);

    /// containerd has no address left for a pod: every idle hull is to give its own back, in the background.
    fn release_all(&self, why: &'static str) {
        let _ = why;
    }
}

/// Why there is no hull. Labels of a metric: [`Miss::reason`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Miss {
    /// The pool is empty.
    Empty,
    /// The pool is off: configuration, CNI, drained.
    Off,
    /// There is no pool for this handler.
    Handler,
    /// What hulls were made with has changed; they are being flushed.
    Stale,
}

impl Miss {
    /// A short, stable name.
    #[must_use]
    pub fn reason(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Off => "pool_off",
            Self::Handler => "no_pool_for_handler",
            Self::Stale => "stale",
        }
    }
}
