//! The daemon that gives containerd lazily mounted snapshots, as a library.
//!
//! `main.rs` parses the command line and calls [`run`]; everything else is here so that tests drive the same code:
//!
//! - [`snapshot`] is the snapshots service as an ordinary library, [`grpc`] its translation to containerd's API;
//! - [`layer`] mounts and warms eStargz layers; `snapshot` sees it only through [`layer::LayerMounts`];
//! - [`explain`] tells operators why both do what they do; [`control`] is the translation of that and of warming to our own API, and
//!   [`client`] the command line's end of it; [`doctor`] looks at the node, with or without a running daemon;
//! - [`config`], [`cli`], [`metrics`] and [`heap`] are the daemon's frame, on top of `hullspeed_daemon`.
//!
//! No module keeps state in a global: what a part needs is handed to it by [`run`].

pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod doctor;
pub mod explain;
pub mod grpc;
pub mod heap;
pub mod layer;
pub mod metrics;
pub mod run;
pub mod snapshot;
