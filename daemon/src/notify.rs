//! systemd's notification protocol, as far as a start and a stop need it.

use hullspeed_keeper::notification::{Address, Sender};

/// Tells the service manager `state`; without one, nothing happens. A failure is no reason to stop.
pub fn send(state: &str) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|socket| !socket.is_empty()) else {
        return;
    };
    let sender = Address::parse(&socket).and_then(Sender::new);
    if let Err(error) = sender.and_then(|sender| sender.send(state.as_bytes(), None)) {
        tracing::warn!(%error, state, "the service manager is not notified");
    }
}
