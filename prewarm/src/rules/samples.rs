//! Metrics of sandboxes and their containers: the first two label values are the pod's name and namespace.

use super::parts::text;
use crate::ledger::Adoption;
use crate::wire::{Edit, WireError, edit};

/// `PodSandboxMetrics.metrics` and `ContainerMetrics.metrics`.
const METRICS: u32 = 2;
const CONTAINERS: u32 = 3;
const LABEL_VALUES: u32 = 4;

/// Whose metrics these `PodSandboxMetrics` are.
pub(crate) fn sandbox_id(item: &[u8]) -> Result<String, WireError> {
    text(item, 1)
}

/// `PodSandboxMetrics` of an adopted sandbox.
pub(crate) fn dressed(item: &[u8], adoption: &Adoption) -> Result<Vec<u8>, WireError> {
    edit(item, |field| match (field.number, field.value.bytes()) {
        (METRICS, Some(one)) => Ok(Edit::Bytes(metric(one, adoption)?)),
        (CONTAINERS, Some(container)) => Ok(Edit::Bytes(edit::<WireError>(container, |field| {
            match (field.number, field.value.bytes()) {
                (METRICS, Some(one)) => Ok(Edit::Bytes(metric(one, adoption)?)),
                _ => Ok(Edit::Keep),
            }
        })?)),
        _ => Ok(Edit::Keep),
    })
}

fn metric(message: &[u8], adoption: &Adoption) -> Result<Vec<u8>, WireError> {
    let metadata = adoption.config.metadata.clone().unwrap_or_default();
    let mut pod = [metadata.name, metadata.namespace].into_iter();
    edit(message, |field| {
        if field.number != LABEL_VALUES {
            return Ok(Edit::Keep);
        }
        Ok(pod.next().map_or(Edit::Keep, |value| Edit::Bytes(value.into_bytes())))
    })
}
