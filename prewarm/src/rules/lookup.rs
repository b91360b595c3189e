//! Sandboxes by id, where containerd takes any unambiguous beginning of one: a hull is neither found nor in the way.

use super::identity::Identities;
use super::{listing, question};
use crate::containerd::Containerd;
use crate::relay::Failure;

/// Length of the ids that containerd makes.
const FULL: usize = 64;

/// Put before an id, it makes one that no sandbox has or begins with: ids are hexadecimal.
const NOBODY: char = '~';

/// What an id in a request stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Meant {
    /// What containerd takes it for.
    AsAsked,
    /// The sandbox with this full id.
    Full(String),
    /// No sandbox that may be seen.
    Nobody,
}

/// Finds out what `id` stands for. Asks containerd only when a hull's id begins with it.
pub(crate) async fn meant(id: &str, identities: &Identities, containerd: &Containerd) -> Result<Meant, Failure> {
    let ledger = identities.ledger();
    if id.is_empty() || ledger.adoption(id).is_some() {
        return Ok(Meant::AsAsked);
    }
    if ledger.is_hull(id) {
        return Ok(Meant::Nobody);
    }
    if id.len() >= FULL || !ledger.any_hull_begins_with(id) {
        return Ok(Meant::AsAsked);
    }
    let mut seen = beginning_with(id, identities, containerd).await?;
    Ok(match (seen.pop(), seen.is_empty()) {
        (None, _) => Meant::Nobody,
        (Some(only), true) => Meant::Full(only),
        // Ambiguous without the hulls, too: containerd says so.
        (Some(_), false) => Meant::AsAsked,
    })
}

/// The full id of the sandbox that `id` stands for, if there is exactly one.
pub(crate) async fn full_id(id: &str, identities: &Identities, containerd: &Containerd) -> Result<String, Failure> {
    if id.len() >= FULL || id.is_empty() || identities.ledger().adoption(id).is_some() {
        return Ok(id.to_owned());
    }
    let mut seen = beginning_with(id, identities, containerd).await?;
    match (seen.pop(), seen.is_empty()) {
        (Some(only), true) => Ok(only),
        _ => Ok(id.to_owned()),
    }
}

async fn beginning_with(id: &str, identities: &Identities, containerd: &Containerd) -> Result<Vec<String>, Failure> {
    let list = question::sandboxes(containerd, "").await?;
    let mut seen =
        listing::visible(&list, identities).map_err(|error| super::malformed_answer("ListPodSandbox", &error))?;
    seen.retain(|full| full.starts_with(id));
    Ok(seen)
}

/// An id that stands for nobody, to have containerd itself say what it says of an unknown one.
pub(crate) fn nobody(id: &str) -> String {
    format!("{NOBODY}{id}")
}

/// A failure that names [`nobody`], as it would have named `id`.
pub(crate) fn named(failure: Failure, id: &str) -> Failure {
    let stand_in = nobody(id);
    let status = failure.status();
    if !status.message().contains(&stand_in) {
        return failure;
    }
    let message = status.message().replace(&stand_in, id);
    Failure::Ours(tonic::Status::new(status.code(), message))
}
