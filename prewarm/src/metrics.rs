//! Prometheus metrics of the daemon.
//!
//! [`defs`] names every family; labels are closed enums, short fixed texts, or names of containerd's runtime handlers,
//! so the number of series is bounded. A [`Metrics`] is cheap to clone (its families share their state) and is handed to
//! every part that counts something.

pub mod defs;
#[cfg(test)]
mod tests;

pub use defs::Metrics;
