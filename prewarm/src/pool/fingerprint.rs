//! What hulls were made with.

use std::sync::Arc;

use crate::containerd::facts::Facts;

/// What a hull that is made now is made with.
#[derive(Debug)]
pub(super) struct Current {
    pub(super) facts: Arc<Facts>,
    pub(super) stamp: Stamp,
}

/// Marks of the files that a hull depends on.
#[derive(Debug)]
pub(super) struct Stamp {}

impl Stamp {
    pub(super) fn is_current(&self) -> bool {
        true
    }
}
