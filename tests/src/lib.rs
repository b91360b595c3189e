//! The harness: a real registry behind a proxy of our own, a real containerd with CRI and CNI, real images made from
//! Debian packages, and the comparison of whole file trees. The integration suite in `tests/tests` and the cold-start
//! demo in `benches` are built on it.
//!
//! Everything a run makes lives below one [`run::RunDir`]: files, sockets, mounts, cgroups, a bridge. Dropping it takes
//! all of that away again, and the next run in the same directory sweeps what a killed run left behind. All waits are
//! bounded. The harness needs root and touches nothing of the host's own containerd, registry or CNI configuration.

pub mod access;
pub mod census;
pub mod containerd;
pub mod content;
pub mod cri;
pub mod daemon;
pub mod demo_image;
pub mod fixture;
pub mod kept;
pub mod layer_tar;
pub mod layout;
pub mod lazy;
pub mod load;
pub mod login;
pub mod metrics;
pub mod network;
pub mod observation;
pub mod operator;
pub mod package_source;
pub mod pause;
pub mod plain;
pub mod pod_node;
pub mod pod_spec;
pub mod prewarm;
pub mod probe;
pub mod process;
pub mod programs;
pub mod proxy;
pub mod raw;
pub mod reader;
pub mod registry;
pub mod release;
pub mod requirements;
pub mod run;
pub mod scenario;
pub mod snapshots;
pub mod snapshotter;
pub mod sweep;
mod sys;
pub mod toolbox;
pub mod tree;
pub mod unasked;
pub mod way;
pub mod websocket;
