//! One group of claimed members: one request, its body cut into members as it arrives.
//!
//! Each run of whole members goes to the decompression threads at once, and their waiters are woken from there, so a reader
//! waits for its own chunk and not for the end of the body. The memory for a member is reserved before its bytes are taken.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::decode;
use super::download::{Download, Step, Whom};
use super::engine::Engine;
use super::error::FetchError;
use super::flight::{Claim, Urgency};
use super::gate::{Lane, Slot};
use super::layer::LayerFetch;
use super::plan;
use super::remotes::Remote;
use super::sequence::Expected;

/// Members to fetch together; in blob order.
pub(super) struct Group {
    pub(super) claims: VecDeque<Claim>,
    lane: Lane,
    urgency: Urgency,
    /// Counts its bytes for the sequence that it is part of; from the beginning, and not only once it has a slot.
    expected: Option<Expected>,
}

impl Group {
    /// Members of a layer that have been claimed.
    pub(super) fn new(fetch: &LayerFetch, claims: VecDeque<Claim>, lane: Lane, urgency: Urgency) -> Self {
        let length = range_of(fetch, &claims).map_or(0, |range| range.end - range.start);
        let expected = lane.sequence().map(|sequence| sequence.expect(length));
        Self {
            claims,
            lane,
            urgency,
            expected,
        }
    }

    /// Waits for its turn and fetches it.
    pub(super) async fn fetch(self, fetch: Arc<LayerFetch>) {
        let slot = fetch.enter(&self.lane, &self.urgency).await;
        run(fetch, self, slot).await;
    }
}

/// A whole member and the memory reserved for it.
struct Received {
    claim: Claim,
    bytes: Bytes,
    from: Option<Arc<Remote>>,
    _memory: Option<OwnedSemaphorePermit>,
}

/// The state of a body being cut.
struct Cutter {
    fetch: Arc<LayerFetch>,
    claims: VecDeque<Claim>,
    buffer: BytesMut,
    /// Blob offset of the buffer's first byte.
    start: u64,
    /// Reserved for the member at the front.
    memory: Option<OwnedSemaphorePermit>,
    jobs: JoinSet<()>,
    /// For what has to be asked for once more.
    lane: Lane,
    urgency: Urgency,
}

/// Fetches a group and settles every claim of it.
pub(super) async fn run(fetch: Arc<LayerFetch>, group: Group, slot: Slot) {
    let Some(range) = range_of(&fetch, &group.claims) else {
        return;
    };
    let whom = Whom::AnyBut(Vec::new());
    let mut download = Download::new(fetch.clone(), whom, range.clone(), group.lane, group.urgency, slot);
    download.expected = group.expected;
    let mut cutter = Cutter {
        fetch,
        claims: group.claims,
        buffer: BytesMut::new(),
        start: range.start,
        memory: None,
        jobs: JoinSet::new(),
        lane: download.lane().clone(),
        urgency: download.urgency().clone(),
    };
    let result = loop {
        cutter.cut(download.remote()).await;
        match download.next().await {
            Ok(Step::Piece(piece)) => cutter.buffer.extend_from_slice(&piece),
            Ok(Step::Broken) => cutter.pause(&mut download).await,
            Ok(Step::End) => break Ok(()),
            Err(error) => break Err(error),
        }
    };
    cutter.memory = None;
    cutter.buffer = BytesMut::new();
    // What the jobs still do is local, or asks for a slot of its own.
    let remote = download.remote().cloned();
    drop(download);
    if let Err(error) = result {
        cutter.give_up(error, remote.as_deref());
    }
    while cutter.jobs.join_next().await.is_some() {}
    cutter.fetch.group_done();
}

fn range_of(fetch: &LayerFetch, claims: &VecDeque<Claim>) -> Option<std::ops::Range<u64>> {
    let members = claims.front()?.member()..claims.back()?.member() + 1;
    Some(plan::blob_range(fetch.layer().index(), &members))
}

impl Cutter {
    /// Hands all whole members at the buffer's start to the decompression threads, and makes room for the next.
    async fn cut(&mut self, remote: Option<&Arc<Remote>>) {
        let mut ready = Vec::new();
        while let Some(claim) = self.claims.front() {
            let member = plan::member_range(self.fetch.layer().index(), claim.member());
            if self.memory.is_none() {
                let bytes =
                    (member.end - member.start) + plan::unfolded_size(self.fetch.layer().index(), claim.member());
                let engine = self.fetch.engine().clone();
                self.memory = engine.try_reserve(bytes);
                if self.memory.is_none() {
                    // Nothing may be held back here while waiting for memory that others give back.
                    self.start_job(std::mem::take(&mut ready));
                    self.memory = engine.reserve(bytes).await;
                }
            }
            let have = self.start + self.buffer.len() as u64;
            if have < member.end {
                // Tar headers between members are not needed.
                self.skip_to(member.start.min(have));
                break;
            }
            self.skip_to(member.start);
            let length = usize::try_from(member.end - member.start)
                .unwrap_or(usize::MAX)
                .min(self.buffer.len());
            let bytes = self.buffer.split_to(length).freeze();
            self.start = member.end;
            if let Some(claim) = self.claims.pop_front() {
                ready.push(Received {
                    claim,
                    bytes,
                    from: remote.cloned(),
                    _memory: self.memory.take(),
                });
            }
        }
        self.start_job(ready);
    }

    async fn pause(&mut self, download: &mut Download) {
        let engine = self.fetch.engine().clone();
        pause(&engine, download, &mut self.memory, &mut self.buffer, self.start).await;
    }

    fn skip_to(&mut self, offset: u64) {
        let skip = usize::try_from(offset.saturating_sub(self.start))
            .unwrap_or(usize::MAX)
            .min(self.buffer.len());
        if skip > 0 {
            bytes::Buf::advance(&mut self.buffer, skip);
            self.start += skip as u64;
        }
    }

    fn start_job(&mut self, ready: Vec<Received>) {
        if !ready.is_empty() {
            let (lane, urgency) = (self.lane.clone(), self.urgency.clone());
            self.jobs.spawn(settle(self.fetch.clone(), ready, lane, urgency));
        }
        // Forgets the jobs that are over.
        while self.jobs.try_join_next().is_some() {}
    }

    fn give_up(&mut self, error: FetchError, remote: Option<&Remote>) {
        let names = remote.map(|remote| &remote.names);
        tracing::error!(
            image = names.map(|names| &*names.image),
            layer = names.map(|names| names.layer_digest.to_string()),
            host = remote.map(|remote| remote.host.name()),
            members = self.claims.len(),
            error = &error as &dyn std::error::Error,
            "a range of the layer cannot be fetched"
        );
        let failure = Arc::new(error);
        for claim in self.claims.drain(..) {
            claim.settle(Err(failure.clone()));
        }
    }
}

/// Waits for the next request after one that broke, without keeping others from their memory.
///
/// Memory is kept only for bytes that came already, and only until somebody waits for memory. Otherwise those who have a slot and
/// wait for memory, and those who have memory and wait for a slot, could wait for each other. Bytes that lose their memory
/// are forgotten; `buffer` holds those from `start` on.
pub(super) async fn pause(
    engine: &Engine,
    download: &mut Download,
    memory: &mut Option<OwnedSemaphorePermit>,
    buffer: &mut BytesMut,
    start: u64,
) {
    if buffer.is_empty() {
        *memory = None;
        return download.resume().await;
    }
    {
        let mut resumed = std::pin::pin!(download.resume());
        tokio::select! {
            biased;
            () = engine.memory_wanted() => {}
            () = &mut resumed => return,
        }
        *memory = None;
        *buffer = BytesMut::new();
        resumed.await;
    }
    download.rewind(start);
}

/// Stores what was received; what is wrong is asked for once more.
async fn settle(fetch: Arc<LayerFetch>, ready: Vec<Received>, lane: Lane, urgency: Urgency) {
    let layer = fetch.layer().clone();
    let metrics = fetch.engine().metrics.clone();
    let store = move || {
        let mut wrong = Vec::new();
        for received in ready {
            let Received { claim, bytes, from, .. } = received;
            match decode::store_member(&layer, &metrics, claim.member(), &bytes) {
                Ok(()) => {
                    if let Some(from) = from {
                        from.has_delivered();
                    }
                    claim.settle(Ok(()));
                }
                Err(error @ FetchError::Corrupt { .. }) => {
                    claim.announce_partial();
                    wrong.push((claim, from, error));
                }
                Err(error) => claim.settle(Err(Arc::new(error))),
            }
        }
        wrong
    };
    // If decoding panicked, the claims are dropped and their waiters look again.
    let wrong = fetch.engine().decode(store).await.unwrap_or_default();
    for (claim, from, error) in wrong {
        let Some(from) = from else { continue };
        fetch.note_corruption(&from, &error, "wrong bytes from the registry; asking once more");
        let result = refetch(&fetch, claim.member(), &from, (&lane, &urgency)).await;
        if let Err(error) = &result {
            fetch.note_corruption(
                &from,
                error,
                "wrong bytes from the registry, again; the reader gets an error",
            );
        }
        claim.settle(result.map_err(Arc::new));
    }
}

/// Asks for one member alone, from scratch: the other sources, and last the one whose bytes were wrong.
async fn refetch(
    fetch: &Arc<LayerFetch>,
    member: u32,
    culprit: &Arc<Remote>,
    turn: (&Lane, &Urgency),
) -> Result<(), FetchError> {
    let mut wrong = vec![culprit.clone()];
    while fetch.remotes().all().iter().any(|remote| !is_among(&wrong, remote)) {
        let (from, result) = refetch_from(fetch, member, Whom::AnyBut(wrong.clone()), turn).await;
        match (from, result) {
            (Some(from), Ok(())) => {
                fetch.remotes().promote(&from);
                return Ok(());
            }
            (Some(from), Err(error @ FetchError::Corrupt { .. })) => {
                fetch.note_corruption(&from, &error, "another source of the layer has no better bytes");
                wrong.push(from);
            }
            (_, Err(FetchError::Source { .. })) | (None, _) => break,
            (Some(_), Err(local)) => return Err(local),
        }
    }
    let (_, result) = refetch_from(fetch, member, Whom::Only(culprit.clone()), turn).await;
    result
}

fn is_among(remotes: &[Arc<Remote>], remote: &Arc<Remote>) -> bool {
    remotes.iter().any(|other| Arc::ptr_eq(other, remote))
}

/// One member, and who delivered it.
async fn refetch_from(
    fetch: &Arc<LayerFetch>,
    member: u32,
    whom: Whom,
    (lane, urgency): (&Lane, &Urgency),
) -> (Option<Arc<Remote>>, Result<(), FetchError>) {
    let engine = fetch.engine();
    let range = plan::member_range(fetch.layer().index(), member);
    let size = (range.end - range.start) + plan::unfolded_size(fetch.layer().index(), member);
    let start = range.start;
    let slot = fetch.enter(lane, urgency).await;
    let mut download = Download::new(fetch.clone(), whom, range, lane.clone(), urgency.clone(), slot);
    let mut memory = None;
    let mut bytes = BytesMut::new();
    loop {
        if memory.is_none() {
            memory = engine.reserve(size).await;
        }
        match download.next().await {
            Ok(Step::Piece(piece)) => bytes.extend_from_slice(&piece),
            Ok(Step::Broken) => pause(engine, &mut download, &mut memory, &mut bytes, start).await,
            Ok(Step::End) => break,
            Err(error) => return (download.remote().cloned(), Err(error)),
        }
    }
    // What is left is local.
    let from = download.remote().cloned();
    drop(download);
    let (layer, metrics) = (fetch.layer().clone(), engine.metrics.clone());
    let store = move || decode::store_member(&layer, &metrics, member, &bytes);
    let stored = engine.decode(store).await.unwrap_or(Err(FetchError::Abandoned));
    if let (Some(from), Ok(())) = (&from, &stored) {
        from.has_delivered();
    }
    (from, stored)
}
