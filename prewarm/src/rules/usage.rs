//! The methods about what sandboxes use.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use tonic::Status;

use super::calls::{Answered, has_items, unknown};
use super::events::Events;
use super::identity::Sight;
use super::listing::{Asked, List};
use super::overlay::Era;
use super::parts::{inner, matches, with_inner};
use super::stats::cgroup::{self, CgroupError, Reading};
use super::stats::{self, Rates};
use super::{CriRules, listing, malformed_answer};
use crate::ledger::Adoption;
use crate::relay::{Answer, Call, Failure, Messages};
use crate::wire::WireError;

mod single;

use single::Singles;

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
                let reading = match read(&adoption).await? {
                    Ok(reading) => reading,
                    Err(error) => return Err(unread(&asked, &id, &error, self.options.events.era().await?)),
                };
                let item = stats::dressed(&item, &adoption, &reading, &self.rates).map_err(wrong)?;
                let message = with_inner(&answer.message, 1, &item).map_err(wrong)?;
                Ok(answer.with(message))
            }
        }
    }

    pub(super) async fn list_stats(&self, call: &Call) -> Answered {
        let (asked, request) = self.list_request(List::Stats, &call.message).await?;
        match call.upstream.unary(request).await {
            Err(failure) if single::may_be_a_strangers(&failure, &asked) => {
                let list = self.singles().list(&asked, &call.message).await?;
                self.shown().items(&list, &asked).await.map(Answer::ours)
            }
            answered => {
                let answer = answered?;
                let message = self.shown().items(&answer.message, &asked).await?;
                Ok(answer.with(message))
            }
        }
    }

    fn shown(&self) -> Shown {
        Shown {
            events: self.options.events.clone(),
            rates: Arc::clone(&self.rates),
        }
    }

    fn singles(&self) -> Singles {
        Singles {
            containerd: self.options.containerd.clone(),
            events: self.options.events.clone(),
        }
    }

    pub(super) async fn stream_stats(&self, call: &Call) -> Result<Messages, Failure> {
        let (asked, request) = self.list_request(List::Stats, &call.message).await?;
        let pieces = call.upstream.stream(request).await?;
        let shared = Arc::new((asked, call.message.clone(), self.shown(), self.singles()));
        let mut first = true;
        let seen = pieces.then(move |piece| {
            let shared = Arc::clone(&shared);
            let first = std::mem::replace(&mut first, false);
            async move {
                let (asked, request, shown, singles) = &*shared;
                let message = match piece {
                    Err(failure) if first && single::may_be_a_strangers(&failure, asked) => {
                        let list = singles.list(asked, request).await?;
                        shown.items(&list, asked).await?
                    }
                    Err(failure) => return Err(single::nameless(failure)),
                    Ok(piece) => shown.items(&piece, asked).await?,
                };
                Ok(Bytes::from(message))
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

/// What stats are shown with.
#[derive(Clone)]
struct Shown {
    events: Events,
    rates: Arc<Rates>,
}

impl Shown {
    /// A list of stats, as it may be seen.
    async fn items(&self, message: &[u8], asked: &Asked) -> Result<Vec<u8>, Failure> {
        let wrong = |error: WireError| malformed_answer(LIST_STATS, &error);
        let identities = self.events.identities();
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
            let reading = match read(&adoption).await? {
                Ok(reading) => reading,
                Err(error) => return Err(unread_in_list(&id, &error, self.events.era().await?)),
            };
            readings.insert(id, (adoption, reading));
        }
        listing::items(message, |item| {
            let (id, labels) = stats::whose(item)?;
            if let Some((adoption, reading)) = readings.get(&id) {
                return stats::dressed(item, adoption, reading, &self.rates).map(Some);
            }
            let native = matches!(identities.sight(&id, &labels), Sight::Native);
            Ok((native && matches(&asked.selector, &labels)).then(|| item.to_vec()))
        })
        .map_err(wrong)
    }
}

/// A pod's cgroup cannot be read: what containerd says to `PodSandboxStats` of `asked`.
fn unread(asked: &str, id: &str, error: &CgroupError, era: Era) -> Failure {
    let text = match era {
        Era::Until1_6 => format!("failed getting metrics for sandbox {asked}: {error}"),
        Era::Since1_7 => {
            format!("failed to decode pod sandbox metrics {asked}: failed getting metrics for sandbox {id}: {error}")
        }
    };
    Status::unknown(text).into()
}

/// The same, in a list.
fn unread_in_list(id: &str, error: &CgroupError, era: Era) -> Failure {
    let text = match era {
        Era::Until1_6 => format!("failed to obtain metrics for sandbox {id:?}: {error}"),
        Era::Since1_7 => format!(
            "failed to decode sandbox container metrics for sandbox {id:?}: failed getting metrics for sandbox {id}: {error}"
        ),
    };
    Status::unknown(text).into()
}
