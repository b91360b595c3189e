//! Streams what the image's maker put first, behind the readers' backs.

use std::ops::Range;
use std::sync::Arc;

use tokio::task::JoinSet;

use super::flight::Urgency;
use super::group::{self, Group};
use super::layer::LayerFetch;
use super::plan;
use crate::layer::source::Priority;

/// Requests under way at once: the second is asked for while the first arrives, so no round trip is waited for.
const PIPELINE: usize = 2;

impl LayerFetch {
    /// Starts to fetch the layer's prioritized files, if it has any and they are not resident; in order, in the background.
    pub fn start_prefetch(self: &Arc<Self>) {
        if let Some(until) = self.layer().index().prefetch_end() {
            let fetch = self.clone();
            self.spawn(async move { fetch.prefetch(until).await });
        }
    }

    async fn prefetch(self: Arc<Self>, until: u64) {
        let mut requests = JoinSet::new();
        let mut next = 0;
        loop {
            if requests.len() >= PIPELINE {
                requests.join_next().await;
            }
            // The slot comes first: claims that wait for one would keep readers waiting.
            let fetch = self.clone();
            let (send, started) = tokio::sync::oneshot::channel();
            requests.spawn(async move {
                let slot = fetch.enter(Priority::Prefetch, &Urgency::default()).await;
                let claimed = fetch.claim_run(next, until);
                // The receiver is gone only when the whole prefetch is.
                let _ = send.send(claimed.as_ref().map(|(_, members)| members.end));
                if let Some((group, _)) = claimed {
                    group::run(fetch, group, slot).await;
                }
            });
            match started.await {
                Ok(Some(end)) => next = end,
                Ok(None) | Err(_) => break,
            }
        }
        while requests.join_next().await.is_some() {}
    }

    /// Claims the next stretch of members before `until`.
    fn claim_run(&self, from: u32, until: u64) -> Option<(Group, Range<u32>)> {
        let mut flights = self.flights().hold();
        let free = |member: u32| !flights.contains(member) && self.is_missing(member);
        let members = plan::run(
            self.layer().index(),
            from,
            until,
            free,
            self.engine().options.prefetch_range,
        )?;
        let urgency = Urgency::default();
        let claims = members
            .clone()
            .filter_map(|member| flights.claim(member, &urgency))
            .collect();
        Some((
            Group {
                claims,
                priority: Priority::Prefetch,
                urgency,
            },
            members,
        ))
    }
}
