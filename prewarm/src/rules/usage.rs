//! The methods about what sandboxes use.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tonic::Status;

use super::calls::{Answered, has_items, sandbox_items, unknown};
use super::identity::{Identities, Sight};
use super::listing::{Asked, List};
use super::parts::{inner, matches, with_inner};
use super::stats::cgroup::{self, CgroupError, Reading};
use super::stats::{self, Rates};
use super::{CriRules, listing, malformed_answer, malformed_request, question};
use crate::ledger::Adoption;
use crate::relay::{Answer, Call, Failure, Messages};
use crate::wire::WireError;

const SANDBOX_STATS: &str = "PodSandboxStats";
const LIST_STATS: &str = "ListPodSandboxStats";

impl CriRules {
    pub(super) async fn sandbox_stats(&self, call: &Call) -> Answered {
        let (asked, answer) = self.by_id(call).await?;
        let wrong = |error: WireError| malformed_answer(SANDBOX_STATS, &error);
        let Some(item) = inner(&answer.message, 1).map_err(wrong)? else {
            return Ok(answer);
        };
        let (id, labels) = stats::whose(&item).map_err(wrong)?;
        match self.identities().sight(&id, &labels) {
            Sight::Native => Ok(answer),
            Sight::Hidden => unknown(call, &asked).await,
            Sight::Adopted(adoption) => {
                let reading = read(&adoption).await?.map_err(|error| {
                    let what = format!(
                        "failed to decode pod sandbox metrics {asked}: failed getting metrics for sandbox {id}: {error}"
                    );
                    Failure::Ours(Status::unknown(what))
                })?;
                let item = stats::dressed(&item, &adoption, &reading, &self.rates).map_err(wrong)?;
                let message = with_inner(&answer.message, 1, &item).map_err(wrong)?;
                Ok(answer.with(message))
            }
        }
    }

    pub(super) async fn list_stats(&self, call: &Call) -> Answered {
        let (asked, request) = self.list_request(List::Stats, &call.message).await?;
        let answer = match call.upstream.unary(request).await {
            // One sandbox without a cgroup fails the whole list. containerd would not have looked at those that the
            // selector leaves out, so they may not fail it here either.
            Err(_) if !asked.selector.is_empty() => self.selected_stats(call, &asked).await?,
            answered => answered?,
        };
        let message = items(&answer.message, &asked, self.identities(), &self.rates).await?;
        Ok(answer.with(message))
    }

    /// Stats of the sandboxes that a selector finds, asked for one by one.
    async fn selected_stats(&self, call: &Call, asked: &Asked) -> Answered {
        let wrong = |error: WireError| malformed_answer("ListPodSandbox", &error);
        let list = question::sandboxes(&self.options.containerd, "").await?;
        let found = sandbox_items(&list, self.identities(), asked).map_err(wrong)?;
        let mut last = Answer::default();
        let mut message = Vec::new();
        for id in listing::visible(&found, self.identities()).map_err(wrong)? {
            if !id.starts_with(&asked.id) {
                continue;
            }
            let request = asked.forwarded(&call.message, Some(&id));
            let request = request.map_err(|error| malformed_request(&error))?;
            last = call.upstream.unary(request.into()).await?;
            // Lists join by concatenation.
            message.extend_from_slice(&last.message);
        }
        Ok(last.with(message))
    }

    pub(super) async fn stream_stats(&self, call: &Call) -> Result<Messages, Failure> {
        let (asked, request) = self.list_request(List::Stats, &call.message).await?;
        let pieces = call.upstream.stream(request).await?;
        let shared = Arc::new((asked, Arc::clone(self.identities()), Arc::clone(&self.rates)));
        let seen = pieces.then(move |piece| {
            let shared = Arc::clone(&shared);
            async move {
                let (asked, identities, rates) = &*shared;
                items(&piece?, asked, identities, rates).await.map(Bytes::from)
            }
        });
        Ok(seen.filter(has_items).boxed())
    }
}

/// Reads an adopted sandbox's cgroup, where that may wait.
async fn read(adoption: &Adoption) -> Result<Result<Reading, CgroupError>, Failure> {
    let id = adoption.sandbox_id.clone();
    let linux = adoption.config.linux.as_ref();
    let parent = linux.map(|linux| linux.cgroup_parent.clone()).unwrap_or_default();
    tokio::task::spawn_blocking(move || cgroup::read(&id, &parent))
        .await
        .map_err(|error| Failure::Ours(Status::internal(format!("hullspeed: reading a cgroup: {error}"))))
}

/// A list of stats, as it may be seen.
async fn items(message: &[u8], asked: &Asked, identities: &Identities, rates: &Rates) -> Result<Vec<u8>, Failure> {
    let wrong = |error: WireError| malformed_answer(LIST_STATS, &error);
    let mut adopted = Vec::new();
    listing::items::<WireError>(message, |item| {
        let (id, labels) = stats::whose(item)?;
        if let Sight::Adopted(adoption) = identities.sight(&id, &labels)
            && matches(&asked.selector, &adoption.config.labels)
        {
            adopted.push(adoption);
        }
        Ok(None)
    })
    .map_err(wrong)?;
    let mut readings = HashMap::new();
    for adoption in adopted {
        let id = adoption.sandbox_id.clone();
        let reading = read(&adoption).await?.map_err(|error| {
            let what = format!(
                "failed to decode sandbox container metrics for sandbox {id:?}: failed getting metrics for sandbox {id}: {error}"
            );
            Failure::Ours(Status::unknown(what))
        })?;
        readings.insert(id, (adoption, reading));
    }
    listing::items(message, |item| {
        let (id, labels) = stats::whose(item)?;
        if let Some((adoption, reading)) = readings.get(&id) {
            return stats::dressed(item, adoption, reading, rates).map(Some);
        }
        let native = matches!(identities.sight(&id, &labels), Sight::Native);
        Ok((native && matches(&asked.selector, &labels)).then(|| item.to_vec()))
    })
    .map_err(wrong)
}
