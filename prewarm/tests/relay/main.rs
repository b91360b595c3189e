//! The relay between raw HTTP/2 peers that do anything, and between tonic's.
#![expect(clippy::unwrap_used, reason = "tests")]

mod gathered;
mod hostile;
mod lifetime;
mod passed;
mod stalled;
mod support;
mod typed;
