//! The intercepted methods, one by one; those about usage are in [`super::usage`].

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt as _;
use hullspeed_proto::cri::v1::PullImageRequest;
use prost::Message as _;

use super::identity::{Identities, Sight};
use super::listing::{Asked, List};
use super::lookup::{self, Meant};
use super::overlay::{self, Era};
use super::parts::{inner, map, text, with_inner};
use super::{CriRules, info, listing, malformed_answer, malformed_request, question, samples};
use crate::containerd::Containerd;
use crate::ledger::Adoption;
use crate::relay::{Answer, Call, Failure, Messages, Method};
use crate::wire::WireError;

/// Field of every request for one sandbox that holds its id.
const ID: u32 = 1;

/// Field of every request for a list that holds its filter.
const FILTER: u32 = 1;

/// `ContainerFilter.pod_sandbox_id` and `ContainerStatsFilter.pod_sandbox_id`.
const CONTAINER_FILTER_SANDBOX: u32 = 3;
const STATS_FILTER_SANDBOX: u32 = 2;

pub(super) type Answered = Result<Answer, Failure>;

impl CriRules {
    pub(super) fn identities(&self) -> &Arc<Identities> {
        self.options.events.identities()
    }

    async fn meant(&self, id: &str) -> Result<Meant, Failure> {
        lookup::meant(id, self.identities(), &self.options.containerd).await
    }

    /// A call that names a sandbox, and the id that it named.
    pub(super) async fn by_id(&self, call: &Call) -> Result<(String, Answer), Failure> {
        let id = text(&call.message, ID).map_err(|error| malformed_request(&error))?;
        let answer = match self.meant(&id).await? {
            Meant::AsAsked => call.upstream.unary(call.message.clone()).await?,
            Meant::Full(full) => send(call, &full).await?,
            Meant::Nobody => unknown(call, &id).await?,
        };
        Ok((id, answer))
    }

    pub(super) async fn sandbox_status(&self, call: &Call) -> Answered {
        let (asked, answer) = self.by_id(call).await?;
        let wrong = |error: WireError| malformed_answer("PodSandboxStatus", &error);
        let Some(status) = inner(&answer.message, 1).map_err(wrong)? else {
            return Ok(answer);
        };
        let id = text(&status, 1).map_err(wrong)?;
        let labels = map(&status, 7).map_err(wrong)?;
        match self.identities().sight(&id, &labels) {
            Sight::Native => Ok(answer),
            Sight::Hidden => unknown(call, &asked).await,
            Sight::Adopted(adoption) => {
                let era = self.era(&adoption).await?;
                let status = overlay::status(&status, &adoption, era).map_err(wrong)?;
                let message = with_inner(&answer.message, 1, &status).map_err(wrong)?;
                let facts = self.options.events.facts();
                let message = info::dressed(&message, &adoption, facts.as_deref()).map_err(wrong)?;
                Ok(answer.with(message))
            }
        }
    }

    async fn era(&self, adoption: &Adoption) -> Result<Era, Failure> {
        if overlay::era_matters(adoption) {
            Ok(self.options.events.era().await?)
        } else {
            Ok(Era::Since1_7)
        }
    }

    pub(super) async fn remove(&self, call: &Call) -> Answered {
        let id = text(&call.message, ID).map_err(|error| malformed_request(&error))?;
        let full = match self.meant(&id).await? {
            Meant::Nobody => return unknown(call, &id).await,
            Meant::Full(full) => full,
            Meant::AsAsked => lookup::full_id(&id, self.identities(), &self.options.containerd).await?,
        };
        let answer = send(call, &full).await?;
        if !full.is_empty() {
            // Who it was is remembered before the ledger forgets, for the events that are still to come.
            self.identities().depart(&full);
            self.rates.forget(&full);
            self.options.sandboxes.removed(&full);
        }
        Ok(answer)
    }

    pub(super) async fn create(&self, call: &Call) -> Answered {
        let (id, answer) = self.by_id(call).await?;
        let ledger = self.identities().ledger();
        let sandbox = match ledger.adoption(&id) {
            Some(adoption) => Some(adoption.sandbox_id.clone()),
            None if id.is_empty() => None,
            None => ledger.adopted_with_prefix(&id).pop(),
        };
        if let (Some(sandbox), Ok(container)) = (sandbox, text(&answer.message, 1)) {
            self.starts.made(container, sandbox);
        }
        Ok(answer)
    }

    pub(super) async fn start(&self, call: &Call) -> Answered {
        let id = text(&call.message, ID).map_err(|error| malformed_request(&error))?;
        let answered = call.upstream.unary(call.message.clone()).await;
        if let Some(sandbox) = self.starts.ended(&id) {
            self.options.hulls.start_ended(&sandbox);
        }
        answered
    }

    pub(super) async fn configure(&self, call: &Call) -> Answered {
        let answer = call.upstream.unary(call.message.clone()).await?;
        self.options.hooks.flush("runtime_config");
        Ok(answer)
    }

    pub(super) async fn pull(&self, call: &Call) -> Answered {
        // A copy, only looked at. What cannot be decoded has no credentials for us, and containerd says what is wrong.
        if let Ok(request) = PullImageRequest::decode(call.message.clone())
            && let Some(image) = request.image
        {
            let auth = request.auth.unwrap_or_default();
            self.options.credentials.seen(&image.image, &auth);
        }
        call.upstream.unary(call.message.clone()).await
    }

    /// The request for a list of containers, which may be about those of one sandbox. containerd takes the beginning of
    /// a sandbox's id there, too; the list itself never shows a hull, which has no containers.
    async fn containers_request(&self, call: &Call) -> Result<Bytes, Failure> {
        let wrong = |error: WireError| malformed_request(&error);
        let Some(filter) = inner(&call.message, FILTER).map_err(wrong)? else {
            return Ok(call.message.clone());
        };
        let number = match call.method {
            Method::ListContainerStats | Method::StreamContainerStats => STATS_FILTER_SANDBOX,
            _ => CONTAINER_FILTER_SANDBOX,
        };
        let id = text(&filter, number).map_err(wrong)?;
        let id = match self.meant(&id).await? {
            Meant::AsAsked => return Ok(call.message.clone()),
            Meant::Full(full) => full,
            Meant::Nobody => lookup::nobody(&id),
        };
        let filter = with_inner(&filter, number, id.as_bytes()).map_err(wrong)?;
        let request = with_inner(&call.message, FILTER, &filter).map_err(wrong)?;
        Ok(request.into())
    }

    pub(super) async fn list_containers(&self, call: &Call) -> Answered {
        call.upstream.unary(self.containers_request(call).await?).await
    }

    /// The list request as containerd is to get it, and what to select by afterwards.
    pub(super) async fn list_request(&self, list: List, request: &Bytes) -> Result<(Asked, Bytes), Failure> {
        let asked = Asked::of(list, request).map_err(|error| malformed_request(&error))?;
        let id = match self.meant(&asked.id).await? {
            Meant::AsAsked => None,
            Meant::Full(full) => Some(full),
            Meant::Nobody => Some(lookup::nobody(&asked.id)),
        };
        let forwarded = asked.forwarded(request, id.as_deref());
        let forwarded = forwarded.map_err(|error| malformed_request(&error))?;
        Ok((asked, forwarded.into()))
    }

    pub(super) async fn list_sandboxes(&self, call: &Call) -> Answered {
        let (asked, request) = self.list_request(List::Sandboxes, &call.message).await?;
        let answer = call.upstream.unary(request).await?;
        let message = sandbox_items(&answer.message, self.identities(), &asked)
            .map_err(|error| malformed_answer("ListPodSandbox", &error))?;
        Ok(answer.with(message))
    }

    pub(super) async fn list_metrics(&self, call: &Call) -> Answered {
        let answer = call.upstream.unary(call.message.clone()).await?;
        let hulls = hull_ids(self.identities(), &self.options.containerd).await?;
        let message = metrics_items(&answer.message, self.identities(), &hulls)
            .map_err(|error| malformed_answer("ListPodSandboxMetrics", &error))?;
        Ok(answer.with(message))
    }

    /// The lists that come in pieces. A piece of which nothing is left is not sent: pieces have at least one item.
    pub(super) async fn streamed(&self, call: Call) -> Result<Messages, Failure> {
        let identities = Arc::clone(self.identities());
        match call.method {
            Method::StreamPodSandboxMetrics => {
                let pieces = call.upstream.stream(call.message.clone()).await?;
                let containerd = self.options.containerd.clone();
                let seen = pieces.then(move |piece| {
                    let (identities, containerd) = (Arc::clone(&identities), containerd.clone());
                    async move {
                        let piece = piece?;
                        // Asked after each piece, so that no hull in it is younger than the answer.
                        let hulls = hull_ids(&identities, &containerd).await?;
                        let seen = metrics_items(&piece, &identities, &hulls);
                        let seen = seen.map_err(|error| malformed_answer("StreamPodSandboxMetrics", &error))?;
                        Ok(Bytes::from(seen))
                    }
                });
                Ok(seen.filter(has_items).boxed())
            }
            Method::StreamPodSandboxStats => self.stream_stats(&call).await,
            Method::StreamContainers | Method::StreamContainerStats => {
                call.upstream.stream(self.containers_request(&call).await?).await
            }
            _ => {
                let (asked, request) = self.list_request(List::Sandboxes, &call.message).await?;
                let pieces = call.upstream.stream(request).await?;
                Ok(pieces_of(pieces, move |piece| {
                    sandbox_items(piece, &identities, &asked)
                        .map_err(|error| malformed_answer("StreamPodSandboxes", &error))
                }))
            }
        }
    }
}

/// Sends a call under another id.
async fn send(call: &Call, id: &str) -> Answered {
    let message = with_inner(&call.message, ID, id.as_bytes()).map_err(|error| malformed_request(&error))?;
    call.upstream.unary(message.into()).await
}

/// Has containerd say what it says when nobody has this id.
pub(super) async fn unknown(call: &Call, id: &str) -> Answered {
    send(call, &lookup::nobody(id))
        .await
        .map_err(|failure| lookup::named(failure, id))
}

/// A list of sandboxes, as it may be seen.
pub(super) fn sandbox_items(answer: &[u8], identities: &Identities, asked: &Asked) -> Result<Vec<u8>, WireError> {
    listing::items(answer, |item| listing::sandbox(item, identities, &asked.selector))
}

/// Ids of the hulls that containerd has now: metrics come without labels by which to know one.
async fn hull_ids(identities: &Identities, containerd: &Containerd) -> Result<HashSet<String>, Failure> {
    let list = question::sandboxes(containerd, "").await?;
    let mut hulls = HashSet::new();
    listing::items::<WireError>(&list, |item| {
        let id = text(item, 1)?;
        if matches!(identities.sight(&id, &map(item, 5)?), Sight::Hidden) {
            hulls.insert(id);
        }
        Ok(None)
    })
    .map_err(|error| malformed_answer("ListPodSandbox", &error))?;
    Ok(hulls)
}

fn metrics_items(answer: &[u8], identities: &Identities, hulls: &HashSet<String>) -> Result<Vec<u8>, WireError> {
    listing::items(answer, |item| {
        let id = samples::sandbox_id(item)?;
        if let Some(adoption) = identities.adoption(&id) {
            return samples::dressed(item, &adoption).map(Some);
        }
        let hidden = hulls.contains(&id) || identities.ledger().is_hull(&id);
        Ok((!hidden).then(|| item.to_vec()))
    })
}

/// Pieces of a list, each as `see` makes it.
fn pieces_of(pieces: Messages, mut see: impl FnMut(&[u8]) -> Result<Vec<u8>, Failure> + Send + 'static) -> Messages {
    pieces
        .map(move |piece| see(&piece?).map(Bytes::from))
        .filter(has_items)
        .boxed()
}

/// Whether a piece is to be sent.
pub(super) fn has_items(piece: &Result<Bytes, Failure>) -> std::future::Ready<bool> {
    std::future::ready(piece.as_ref().map_or(true, |piece| !listing::is_empty(piece)))
}
