//! What Hullspeed's daemons have in common: the frame around what each of them is for.
//!
//! - [`config`] reads a TOML file into a checked configuration, with [`units`]; [`cli`] is the flags that all take;
//! - [`telemetry`] writes log lines, [`http`] serves `/metrics` and `/healthz`;
//! - [`root`] keeps a directory for one daemon, [`socket`] makes Unix sockets, [`activation`] takes over those that the
//!   service manager made and what it kept, [`fdstore`] gives it descriptors to keep, [`notify`] and [`signal`] are the
//!   rest of the talk with it;
//! - [`error`] writes an error with its causes in one line; [`grpc`] reaches peers on Unix sockets and names codes;
//! - [`fault`] has test builds die where a test wants it;
//! - [`ask`] is how a command line reaches its daemon, [`answer`] how it shows what that says; [`doctor`] is what the commands of that
//!   name have in common, [`containerd`] what all know of it.

pub mod activation;
pub mod answer;
pub mod ask;
pub mod cli;
pub mod config;
pub mod containerd;
pub mod doctor;
pub mod error;
pub mod fault;
pub mod fdstore;
pub mod grpc;
pub mod http;
pub mod notify;
pub mod root;
pub mod signal;
pub mod socket;
pub mod telemetry;
pub mod units;
