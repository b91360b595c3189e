//! Turning a hull into a pod's sandbox.
//!
//! [`Adopter`] answers RunPodSandbox. A pod that [`schema`] and [`eligibility`] let through gets a hull from the
//! [`HullSource`]: the adoption is written to the [`journal`], the hull's hostname, files and sysctls become the pod's
//! ([`patch`]), the ledger says whose it is, and the kubelet has its answer. containerd's own record follows in the
//! background ([`rebrand`]), so that containerd alone knows the pod after its next restart. Every other pod goes to
//! containerd as it came.

mod adopter;
pub mod eligibility;
pub mod fault;
mod glob;
pub mod gojson;
pub mod hull;
pub mod journal;
mod observer;
pub mod patch;
pub mod rebrand;
mod recovery;
#[cfg(test)]
mod samples;
pub mod schema;
mod source;
#[cfg(test)]
mod testing;

pub use adopter::{Adopter, AdopterError, JOURNAL, Options};
pub use observer::{Observer, Outcome};
pub use rebrand::Unbranded;
pub use recovery::{IdleHull, Recovered, RecoveryError};
pub use source::{HullSource, Miss};
