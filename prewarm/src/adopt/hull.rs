//! A hull in hand: an ordinary sandbox that containerd made ahead, with everything open that its adoption needs.

/// A hull. Dropping it closes its files; the sandbox itself goes through [`super::HullSource::discard`].
#[derive(Debug)]
pub struct Hull {
    /// The sandbox's id.
    pub id: String,
    /// The runtime handler that it was made for, as pods name it.
    pub runtime_handler: String,
}

impl Hull {
    /// Whether its processes live.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        true
    }
}
