//! One range of the blob as a sequence of pieces, whatever happens to the connections that bring it.
//!
//! A request that fails, or a body that breaks or stalls, is followed at once by one to the layer's next source, from the byte where
//! it stopped; what was received is never asked for twice. Only when no source may be asked now ([`health`](super::health)) there
//! is a pause, without slot. It ends with an error when all sources have refused for good, or when nothing has come for the read's
//! deadline. Every blob of one TOC has its members at the same offsets, and what does not fit is found when it is verified.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;
use hullspeed_daemon::error::chain;

use super::error::FetchError;
use super::flight::Urgency;
use super::gate::{Lane, Slot};
use super::health::Permit;
use super::layer::LayerFetch;
use super::remotes::Remote;
use super::report::Asking;
use super::sequence::Expected;
use crate::layer::source::{ByteStream, SourceError};
use crate::metrics::defs::{FetchLabels, KindLabels};

/// Requests without progress between them, after which what no reader waits for is given up.
pub(super) const MAX_FRUITLESS: u32 = 8;
/// Requests without progress to one source that alone is asked.
pub(super) const MAX_ALONE: u32 = 4;
/// Bytes that count as progress.
const PROGRESS: u64 = 16 << 10;
/// Longest time without progress if another source can be asked.
const ALTERNATIVE_STALL: Duration = Duration::from_secs(2);
/// Time without a byte after which a request gives its slot to a reader who waits for one.
const GRACE: Duration = Duration::from_secs(1);
/// Longest pause before it is looked again whom to ask; sources may have been added.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// What happens to a range.
#[derive(Debug)]
pub(super) enum Step {
    /// Its next bytes came.
    Piece(Bytes),
    /// Nobody can be asked now. The slot is given up; [`Download::resume`] comes next.
    Broken,
    /// All of it came.
    End,
}

/// Who may be asked.
pub(super) enum Whom {
    /// Every source of the layer but these.
    AnyBut(Vec<Arc<Remote>>),
    /// One, and not for long.
    Only(Arc<Remote>),
}

/// Who is to be asked next.
enum Choice {
    Ask(Arc<Remote>),
    Wait(Duration),
    Nobody,
}

pub(super) struct Download {
    fetch: Arc<LayerFetch>,
    whom: Whom,
    /// Asked now, or last.
    remote: Option<Arc<Remote>>,
    /// Who broke the protocol once; a proxy in between may have.
    misfits: Vec<Arc<Remote>>,
    /// A source refused for good, and the present one has not delivered yet.
    on_trial: bool,
    last_error: Option<SourceError>,
    position: u64,
    end: u64,
    lane: Lane,
    /// Counts its bytes for the sequence that it is part of.
    pub(super) expected: Option<Expected>,
    urgency: Urgency,
    /// The right to the request under way; given up when nobody can be asked.
    slot: Option<Slot>,
    permit: Option<Permit>,
    /// Counts the request under way.
    asking: Option<Asking>,
    body: Option<ByteStream>,
    /// When the request under way was made.
    asked: Instant,
    attempts: u32,
    fruitless: u32,
    /// Bytes since the last request.
    received: u64,
    /// Time spent waiting, and bytes that came, since there was progress last.
    waited: Duration,
    trickle: u64,
    give_up_at: Instant,
}

impl Download {
    pub(super) fn new(
        fetch: Arc<LayerFetch>,
        whom: Whom,
        range: Range<u64>,
        lane: Lane,
        urgency: Urgency,
        slot: Slot,
    ) -> Self {
        let give_up_at = Instant::now() + fetch.engine().options.read_deadline;
        Self {
            fetch,
            whom,
            remote: None,
            misfits: Vec::new(),
            on_trial: false,
            last_error: None,
            position: range.start,
            end: range.end,
            lane,
            expected: None,
            urgency,
            slot: Some(slot),
            permit: None,
            asking: None,
            body: None,
            asked: Instant::now(),
            attempts: 0,
            fruitless: 0,
            received: 0,
            waited: Duration::ZERO,
            trickle: 0,
            give_up_at,
        }
    }

    /// The next that happens to the range.
    pub(super) async fn next(&mut self) -> Result<Step, FetchError> {
        while self.position < self.end {
            if !self.is_urgent() && !self.permit.as_ref().is_some_and(Permit::is_wanted) {
                self.fetch.engine().stand_aside(&self.lane, &self.urgency).await;
            }
            if self.body.is_none() && !self.is_ready()? {
                return Ok(Step::Broken);
            }
            match self.receive().await {
                Ok(piece) => return Ok(Step::Piece(self.take(piece))),
                Err(error) => self.failed(error)?,
            }
        }
        Ok(Step::End)
    }

    fn is_urgent(&self) -> bool {
        self.lane.is_demand() || self.urgency.is_raised()
    }

    /// Whether the next request can be made right now; the slot is given up if not.
    fn is_ready(&mut self) -> Result<bool, FetchError> {
        let choice = self.choose();
        if matches!(choice, Choice::Nobody) || Instant::now() >= self.give_up_at {
            return Err(self.error());
        }
        let has_slot = self.slot.as_ref().is_some_and(|slot| !slot.is_lent());
        if let (Choice::Ask(remote), true) = (choice, has_slot) {
            let kept = self.permit.take().filter(|permit| permit.is_for(&remote.host));
            self.permit = kept.or_else(|| remote.host.try_enter(self.is_urgent()));
            if self.permit.is_some() {
                let in_flight = &self.fetch.engine().in_flight;
                self.asking = Some(in_flight.enter(self.lane.priority()));
                self.turn_to(remote);
                return Ok(true);
            }
        }
        // A source in trouble must not keep others from theirs.
        self.slot = None;
        self.permit = None;
        self.asking = None;
        Ok(false)
    }

    fn choose(&self) -> Choice {
        let remotes = match &self.whom {
            Whom::Only(remote) => vec![remote.clone()],
            Whom::AnyBut(without) => {
                let mut all = self.fetch.remotes().all();
                all.retain(|remote| !without.iter().any(|other| Arc::ptr_eq(other, remote)));
                all
            }
        };
        let mut shortest = None;
        for remote in remotes {
            match remote.host.pause() {
                None => return Choice::Ask(remote),
                Some(pause) => shortest = Some(shortest.map_or(pause, |least: Duration| least.min(pause))),
            }
        }
        shortest.map_or(Choice::Nobody, Choice::Wait)
    }

    fn turn_to(&mut self, remote: Arc<Remote>) {
        if let Some(before) = &self.remote
            && !Arc::ptr_eq(before, &remote)
        {
            self.fetch.engine().metrics.fetch_failovers.inc();
            tracing::info!(
                image = %remote.names.image, layer = %remote.names.layer_digest,
                from = before.host.name(), to = remote.host.name(), at = self.position,
                "the fetch goes on at another source"
            );
        }
        self.remote = Some(remote);
    }

    async fn receive(&mut self) -> Result<Bytes, SourceError> {
        let Some(remote) = self.remote.clone() else {
            return Err(SourceError::transient("nobody was asked"));
        };
        let mut body = match self.body.take() {
            Some(body) => body,
            None => {
                self.attempts += 1;
                self.received = 0;
                self.waited = Duration::ZERO;
                self.trickle = 0;
                self.asked = Instant::now();
                self.fetch.counts().request(self.lane.priority());
                let request = remote.source.read(self.position..self.end, self.lane.priority());
                let body = self.in_time(request).await??;
                remote.host.answered(self.asked.elapsed());
                body
            }
        };
        let piece = self.in_time(body.next()).await?;
        self.body = Some(body);
        piece.unwrap_or_else(|| {
            Err(SourceError::transient(format!(
                "the body ended at {} instead of {}",
                self.position, self.end
            )))
        })
    }

    /// Waits for the request under way as long as there is progress often enough. One that stands still lends its slot.
    async fn in_time<T>(&mut self, work: impl Future<Output = T>) -> Result<T, SourceError> {
        let mut work = std::pin::pin!(work);
        let patience = self.patience();
        loop {
            let left = patience.saturating_sub(self.waited);
            let began = Instant::now();
            let result = tokio::time::timeout(left.min(GRACE), &mut work).await;
            self.waited += began.elapsed();
            match result {
                Ok(done) => return Ok(done),
                Err(_) if self.waited >= patience => {
                    if let Some(remote) = &self.remote {
                        remote.source.distrust();
                    }
                    return Err(SourceError::transient(format!("no progress within {patience:?}")));
                }
                Err(_) => {
                    if let Some(slot) = &mut self.slot
                        && self.fetch.engine().gate.is_starved()
                    {
                        slot.lend();
                    }
                }
            }
        }
    }

    /// Longest time without progress: short if there is somebody else to ask.
    fn patience(&self) -> Duration {
        let stall = self.fetch.engine().options.stall_timeout;
        let (Whom::AnyBut(without), Some(now)) = (&self.whom, &self.remote) else {
            return stall;
        };
        let is_other = |remote: &Arc<Remote>| {
            let differs = remote.host.name() != now.host.name() && remote.host.pause().is_none();
            differs && !without.iter().any(|other| Arc::ptr_eq(other, remote))
        };
        if self.fetch.remotes().all().iter().any(is_other) {
            stall.min(ALTERNATIVE_STALL)
        } else {
            stall
        }
    }

    /// Notes what came.
    fn take(&mut self, mut piece: Bytes) -> Bytes {
        let wanted = self.end - self.position;
        if piece.len() as u64 > wanted {
            piece.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
        }
        let length = piece.len() as u64;
        self.position += length;
        self.received += length;
        self.trickle += length;
        if let Some(expected) = &mut self.expected {
            expected.came(length);
        }
        // An empty piece: a server that ignores ranges is on its way to this one.
        if length == 0 || self.trickle >= PROGRESS || self.position == self.end {
            self.trickle = 0;
            self.waited = Duration::ZERO;
            self.give_up_at = Instant::now() + self.fetch.engine().options.read_deadline;
        }
        if length > 0
            && std::mem::take(&mut self.on_trial)
            && let Some(remote) = &self.remote
        {
            self.fetch.remotes().promote(remote);
        }
        let kind = self.lane.priority().kind();
        let metrics = &self.fetch.engine().metrics;
        metrics.fetch_bytes.get_or_create(&KindLabels { kind }).inc_by(length);
        self.fetch.counts().received(self.lane.priority(), length);
        if self.position == self.end {
            if let Some(remote) = &self.remote {
                remote.host.delivered();
            }
            self.close("ok");
        }
        piece
    }

    /// Ends the request under way; an error if there is to be no other.
    fn failed(&mut self, error: SourceError) -> Result<(), FetchError> {
        self.close(error.class());
        let Some(remote) = self.remote.clone() else {
            self.last_error = Some(error);
            return Err(self.error());
        };
        let progressed = self.received >= PROGRESS;
        self.fruitless = if progressed { 0 } else { self.fruitless + 1 };
        self.fetch
            .counts()
            .failed(remote.host.name(), chain(&error), error.class());
        let (image, layer) = (&remote.names.image, remote.names.layer_digest);
        let cause = &error as &dyn std::error::Error;
        if !error.is_transient() && !self.is_first_misfit(&error, &remote) {
            tracing::warn!(image, %layer, host = remote.host.name(), error = cause, "a source of the layer refuses");
            self.on_trial = true;
            match &mut self.whom {
                Whom::AnyBut(without) => without.push(remote),
                Whom::Only(_) => {
                    self.last_error = Some(error);
                    return Err(self.error());
                }
            }
        } else if progressed {
            remote.host.broke_off();
            tracing::debug!(image, %layer, host = remote.host.name(), error = cause, at = self.position, "asking for the rest again");
        } else if remote.host.failed(&error) {
            tracing::warn!(image, %layer, host = remote.host.name(), error = cause, "a host fails and is put back for a while");
        }
        self.last_error = Some(error);
        let most = match self.whom {
            Whom::Only(_) => MAX_ALONE,
            Whom::AnyBut(_) if self.is_urgent() => u32::MAX,
            Whom::AnyBut(_) => MAX_FRUITLESS,
        };
        if self.fruitless >= most {
            Err(self.error())
        } else {
            Ok(())
        }
    }

    /// Whether a source broke the protocol for the first time: asked once more, as after a failure that may pass.
    fn is_first_misfit(&mut self, error: &SourceError, remote: &Arc<Remote>) -> bool {
        let is_first = error.class() == "protocol" && !self.misfits.iter().any(|other| Arc::ptr_eq(other, remote));
        if is_first {
            self.misfits.push(remote.clone());
        }
        is_first
    }

    fn error(&mut self) -> FetchError {
        let nobody = || SourceError::transient("no source of the layer can be asked");
        FetchError::Source {
            attempts: self.attempts,
            source: self.last_error.take().unwrap_or_else(nobody),
        }
    }

    /// Waits for somebody who may be asked and for the right to do so; ends without if there is nobody in time.
    pub(super) async fn resume(&mut self) {
        self.slot = None;
        self.permit = None;
        self.asking = None;
        loop {
            let left = self.give_up_at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            match self.choose() {
                Choice::Nobody => return,
                Choice::Wait(pause) => tokio::time::sleep(pause.min(LOOK_AGAIN).min(left)).await,
                Choice::Ask(remote) => {
                    // Neither a slot nor a permit is held while the other is waited for.
                    let is_urgent = self.is_urgent();
                    tokio::select! {
                        () = remote.host.room(is_urgent) => {}
                        () = self.urgency.raised(), if !is_urgent => {}
                        () = tokio::time::sleep(left.min(LOOK_AGAIN)) => continue,
                    }
                    let slot = self.fetch.enter(&self.lane, &self.urgency).await;
                    if !is_urgent {
                        // It waited for others and not for a source.
                        self.give_up_at = Instant::now() + self.fetch.engine().options.read_deadline;
                    }
                    if remote.host.pause().is_some() {
                        continue;
                    }
                    if let Some(permit) = remote.host.try_enter(self.is_urgent()) {
                        self.permit = Some(permit);
                        self.slot = Some(slot);
                        return;
                    }
                }
            }
        }
    }

    /// Goes back to `position`, between requests: what came from there on was not kept.
    pub(super) fn rewind(&mut self, position: u64) {
        debug_assert!(self.body.is_none(), "a body cannot go back");
        self.position = self.position.min(position);
    }

    pub(super) fn lane(&self) -> &Lane {
        &self.lane
    }

    pub(super) fn urgency(&self) -> &Urgency {
        &self.urgency
    }

    /// Where the bytes given last came from.
    pub(super) fn remote(&self) -> Option<&Arc<Remote>> {
        self.remote.as_ref()
    }

    fn close(&mut self, result: &'static str) {
        self.body = None;
        self.permit = None;
        self.asking = None;
        let metrics = &self.fetch.engine().metrics;
        let kind = self.lane.priority().kind();
        metrics
            .fetch_requests
            .get_or_create(&FetchLabels { kind, result })
            .inc();
        metrics.fetch_request.observe(self.asked.elapsed().as_secs_f64());
    }
}
