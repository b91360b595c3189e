//! The daemon that keeps a pool of ready pod sandboxes ("hulls") and hands one to the kubelet in about a millisecond, as
//! a library.
//!
//! - [`relay`] passes gRPC calls from the kubelet to containerd as raw bytes and hands a few methods to rules;
//! - [`wire`] edits protobuf messages without decoding them; [`ledger`] knows which sandboxes are hulls, which adopted;
//! - [`containerd`] is the daemon's own, typed connection; [`adopt`] turns a hull into a pod's sandbox, from a
//!   [`adopt::HullSource`];
//! - [`rules`] hides hulls and shows adopted sandboxes as what they are in every call;
//! - [`warm`] keeps images resident in the [`snapshotter`], and [`credentials`] hands it the logins of pulls.

pub mod adopt;
pub mod cli;
pub mod client;
pub mod config;
pub mod containerd;
pub mod control;
pub mod credentials;
pub mod doctor;
pub mod ledger;
pub mod mark;
pub mod metrics;
pub mod pool;
pub mod relay;
pub mod requests;
pub mod rules;
pub mod run;
pub mod snapshotter;
pub mod warm;
pub mod wire;
