//! Stats of sandboxes asked for one by one, where containerd's list of them failed.
//!
//! One sandbox fails the whole list: one without a cgroup, and before containerd 1.7 one that is not ready. It may be a
//! hull, or one that the selector leaves out, which containerd would not have looked at.

use bytes::Bytes;
use tonic::{Code, Status};

use super::super::calls::sandbox_items;
use super::super::events::Events;
use super::super::listing::{self, Asked};
use super::super::overlay::Era;
use super::super::question::{self, Listed};
use super::super::{malformed_answer, malformed_request};
use crate::containerd::{Containerd, MAX_MESSAGE_BYTES};
use crate::relay::Failure;

/// Most text of failures that are told together.
const MAX_TEXT: usize = 4096;

/// Length of the ids that containerd makes.
const FULL: usize = 64;

/// What single questions are asked with.
#[derive(Clone)]
pub(super) struct Singles {
    pub(super) containerd: Containerd,
    pub(super) events: Events,
}

/// Whether a list that failed so may not fail so for the client.
pub(super) fn may_be_a_strangers(failure: &Failure, asked: &Asked) -> bool {
    let Failure::Answered { status, .. } = failure else {
        return false;
    };
    status.code() != Code::Unimplemented && (!asked.selector.is_empty() || names_a_sandbox(status.message()))
}

/// A failure, without the id of a sandbox that may be a hull.
pub(super) fn nameless(failure: Failure) -> Failure {
    let status = failure.status();
    if names_a_sandbox(status.message()) {
        let text = "hullspeed: containerd's stream of stats broke off";
        return Status::new(status.code(), text).into();
    }
    failure
}

/// Whether a text has a full id in it.
fn names_a_sandbox(text: &str) -> bool {
    let words = text.split(|c: char| !c.is_ascii_hexdigit());
    words.into_iter().any(|word| word.len() >= FULL)
}

impl Singles {
    /// The list that containerd would have answered with, or its failure, if there were no hulls.
    pub(super) async fn list(&self, asked: &Asked, request: &Bytes) -> Result<Listed, Failure> {
        let ids = self.ids(asked).await?;
        let turn = question::turn(self.containerd.lists()).await?;
        let mut message = Vec::new();
        let mut failed: Option<Status> = None;
        for id in ids {
            match self.one(asked, request, &id).await? {
                // Lists join by concatenation.
                Ok(one) => message.extend_from_slice(&one),
                Err(status) if self.events.era().await? == Era::Until1_6 => return Err(status.into()),
                Err(status) if is_transient(&status) => {}
                Err(status) => failed = Some(joined(failed, status)),
            }
            if message.len() > MAX_MESSAGE_BYTES {
                let text = format!(
                    "grpc: trying to send message larger than max ({} vs. {MAX_MESSAGE_BYTES})",
                    message.len()
                );
                return Err(Status::resource_exhausted(text).into());
            }
        }
        match failed {
            Some(status) => Err(status.into()),
            None => Ok(Listed::new(message.into(), turn)),
        }
    }

    /// Full ids of the sandboxes that the request is about and the client may see.
    async fn ids(&self, asked: &Asked) -> Result<Vec<String>, Failure> {
        let wrong = |error| malformed_answer("ListPodSandbox", &error);
        let identities = self.events.identities();
        let list = question::sandboxes(&self.containerd, "").await?;
        let found = sandbox_items(&list, identities, asked).map_err(wrong)?;
        let mut ids = listing::visible(&found, identities).map_err(wrong)?;
        if !asked.id.is_empty() {
            ids.retain(|id| id.starts_with(&asked.id));
            if ids.len() > 1 {
                // Ambiguous: containerd takes it for a full id, which nobody has.
                ids.clear();
            }
        }
        Ok(ids)
    }

    /// Stats of one sandbox as a list, which is empty if there is none of that id, or what containerd's list says.
    async fn one(&self, asked: &Asked, request: &Bytes, id: &str) -> Result<Result<Bytes, Status>, Failure> {
        if asked.has_filter {
            let single = asked.forwarded(request, Some(id));
            let single = single.map_err(|error| malformed_request(&error))?;
            return match question::listed_stats(&self.containerd, single.into()).await {
                // Not about the sandbox.
                Err(status) if !status.message().contains(id) => Err(status.into()),
                answered => Ok(answered),
            };
        }
        // With a filter, containerd would leave out those that are not ready; without one it does not.
        let status = match question::sandbox_stats(&self.containerd, id).await {
            Ok(one) => return Ok(Ok(one)),
            Err(status) => status,
        };
        if status
            .message()
            .starts_with("an error occurred when trying to find sandbox")
        {
            return Ok(Ok(Bytes::new()));
        }
        let Some(text) = text_of_list(status.message(), id) else {
            return Err(status.into());
        };
        Ok(Err(Status::new(status.code(), text)))
    }
}

/// Whether a list goes on without a sandbox of which this is said.
fn is_transient(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::NotFound) || status.message().ends_with("ttrpc: closed")
}

/// What containerd's list says where its `PodSandboxStats` says `text`; `None` if that is not about the sandbox.
fn text_of_list(text: &str, id: &str) -> Option<String> {
    let because = |what: &str| text.strip_prefix(what)?.strip_prefix(id)?.strip_prefix(": ");
    if let Some(why) = because("failed to decode pod sandbox metrics ") {
        return Some(format!(
            "failed to decode sandbox container metrics for sandbox {id:?}: {why}"
        ));
    }
    let why = because("failed getting metrics for sandbox ")?;
    Some(format!("failed to obtain metrics for sandbox {id:?}: {why}"))
}

/// Failures of several sandboxes, as containerd tells them.
fn joined(first: Option<Status>, next: Status) -> Status {
    match first {
        None => next,
        Some(first) if first.message().len() + next.message().len() > MAX_TEXT => first,
        Some(first) => Status::new(first.code(), format!("{}\n{}", first.message(), next.message())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_says_it_in_other_words() {
        let id = "ab".repeat(32);
        let of = |text: String| text_of_list(&text, &id);
        assert_eq!(
            of(format!("failed to decode pod sandbox metrics {id}: failed: why")),
            Some(format!(
                "failed to decode sandbox container metrics for sandbox \"{id}\": failed: why"
            ))
        );
        assert_eq!(
            of(format!("failed getting metrics for sandbox {id}: why")),
            Some(format!("failed to obtain metrics for sandbox \"{id}\": why"))
        );
        assert_eq!(of("transport error".into()), None);
        assert!(names_a_sandbox(&format!("of \"{id}\": why")));
        assert!(!names_a_sandbox(&format!("of \"{}\": why", &id[1..])));
    }

    #[test]
    fn failures_told_together_are_bounded() {
        let one = || Status::unknown("x".repeat(1500));
        let all = (0..9).fold(None, |all, _| Some(joined(all, one())));
        assert_eq!(all.unwrap().message().len(), 3001);
    }
}
