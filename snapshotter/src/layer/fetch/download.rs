//! One range of the blob as a sequence of pieces, whatever happens to the connections that bring it.
//!
//! A broken or stalled body is asked for again from the byte where it stopped; what was received is never asked for twice. The
//! number of attempts is bounded, and so is the time without a byte. A source that is given up is followed by the layer's next one,
//! from the same byte: every blob of one TOC has its members at the same offsets, and what does not fit is found when it is verified.

use std::collections::VecDeque;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::StreamExt;

use super::error::FetchError;
use super::flight::Urgency;
use super::gate::Slot;
use super::layer::LayerFetch;
use super::remotes::Remote;
use crate::layer::source::{ByteStream, Priority, SourceError};
use crate::metrics::defs::{FetchLabels, KindLabels};

/// Requests without progress between them, after which a source is given up: about five seconds of a source that refuses at once.
pub(super) const MAX_FRUITLESS: u32 = 8;
/// Requests for one range to one source in all: a server that sends a little each time is given up too.
const MAX_ATTEMPTS: u32 = 20;
/// Bytes that count as progress.
const PROGRESS: u64 = 16 << 10;
/// Pause before the second request; it doubles from there.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// Longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What happens to a range.
#[derive(Debug)]
pub(super) enum Step {
    /// Its next bytes came.
    Piece(Bytes),
    /// The request broke. Its slot is given up; [`Download::resume`] comes next.
    Broken,
    /// All of it came.
    End,
}

pub(super) struct Download {
    fetch: Arc<LayerFetch>,
    remote: Arc<Remote>,
    /// Whom to ask if `remote` is given up.
    others: VecDeque<Arc<Remote>>,
    /// Whether a remote was given up and the present one has not delivered yet.
    on_trial: bool,
    position: u64,
    end: u64,
    priority: Priority,
    urgency: Urgency,
    /// The right to the request under way; given up between requests.
    slot: Option<Slot>,
    body: Option<ByteStream>,
    /// When the request under way was made.
    asked: Instant,
    attempts: u32,
    fruitless: u32,
    /// Bytes since the last request.
    received: u64,
}

impl Download {
    pub(super) fn new(
        fetch: Arc<LayerFetch>,
        remote: Arc<Remote>,
        others: VecDeque<Arc<Remote>>,
        range: Range<u64>,
        priority: Priority,
        urgency: Urgency,
        slot: Slot,
    ) -> Self {
        Self {
            fetch,
            remote,
            others,
            on_trial: false,
            position: range.start,
            end: range.end,
            priority,
            urgency,
            slot: Some(slot),
            body: None,
            asked: Instant::now(),
            attempts: 0,
            fruitless: 0,
            received: 0,
        }
    }

    /// The next that happens to the range.
    pub(super) async fn next(&mut self) -> Result<Step, FetchError> {
        while self.position < self.end {
            if self.priority > Priority::Demand && !self.urgency.is_raised() {
                self.fetch.engine().stand_aside(&self.urgency).await;
            }
            match self.receive().await {
                Ok(mut piece) => {
                    let wanted = self.end - self.position;
                    if piece.len() as u64 > wanted {
                        piece.truncate(usize::try_from(wanted).unwrap_or(usize::MAX));
                    }
                    self.position += piece.len() as u64;
                    self.received += piece.len() as u64;
                    if !piece.is_empty() && std::mem::take(&mut self.on_trial) {
                        self.fetch.remotes().promote(&self.remote);
                    }
                    if self.position == self.end {
                        self.close("ok");
                    }
                    self.fetch
                        .engine()
                        .metrics
                        .fetch_bytes
                        .get_or_create(&KindLabels { kind: self.kind() })
                        .inc_by(piece.len() as u64);
                    return Ok(Step::Piece(piece));
                }
                Err(error) => {
                    if self.recover(error)? {
                        return Ok(Step::Broken);
                    }
                }
            }
        }
        Ok(Step::End)
    }

    async fn receive(&mut self) -> Result<Bytes, SourceError> {
        let stall = self.fetch.engine().options.stall_timeout;
        let stalled = |_| SourceError::transient(format!("no byte arrived within {stall:?}"));
        if self.body.is_none() {
            self.attempts += 1;
            self.received = 0;
            self.asked = Instant::now();
            let request = self.remote.source.read(self.position..self.end, self.priority);
            self.body = Some(tokio::time::timeout(stall, request).await.map_err(stalled)??);
        }
        let Some(body) = &mut self.body else {
            return Err(SourceError::transient("no body"));
        };
        match tokio::time::timeout(stall, body.next()).await.map_err(stalled)? {
            Some(piece) => piece,
            None => Err(SourceError::transient(format!(
                "the body ended at {} instead of {}",
                self.position, self.end
            ))),
        }
    }

    /// Ends the request under way; whether a pause is due before the next.
    fn recover(&mut self, error: SourceError) -> Result<bool, FetchError> {
        self.close(error.class());
        self.fruitless = if self.received >= PROGRESS {
            1
        } else {
            self.fruitless + 1
        };
        if !error.is_transient() || self.fruitless >= MAX_FRUITLESS || self.attempts >= MAX_ATTEMPTS {
            self.give_up(error)?;
            return Ok(false);
        }
        tracing::debug!(error = %error, attempt = self.attempts, at = self.position, "asking for the rest again");
        // A source in trouble must not keep others from theirs.
        self.slot = None;
        Ok(true)
    }

    /// Pauses after a broken request and waits for the right to make the next.
    pub(super) async fn resume(&mut self) {
        tokio::time::sleep(pause(self.fruitless)).await;
        self.slot = Some(self.fetch.enter(self.priority, &self.urgency).await);
    }

    /// Goes back to `position`, between requests: what came from there on was not kept.
    pub(super) fn rewind(&mut self, position: u64) {
        debug_assert!(self.body.is_none(), "a body cannot go back");
        self.position = self.position.min(position);
    }

    /// Goes on at the next remote, if there is one.
    fn give_up(&mut self, error: SourceError) -> Result<(), FetchError> {
        let Some(next) = self.others.pop_front() else {
            return Err(FetchError::Source {
                attempts: self.attempts,
                source: error,
            });
        };
        let (failed, layer) = (&self.remote.names.image, self.remote.names.layer_digest);
        tracing::warn!(image = %failed, %layer, next = %next.names.image, error = &error as &dyn std::error::Error, "a source of the layer does not deliver; asking the next");
        self.remote = next;
        self.on_trial = true;
        self.attempts = 0;
        self.fruitless = 0;
        Ok(())
    }

    /// Where the bytes given last came from.
    pub(super) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    fn close(&mut self, result: &'static str) {
        self.body = None;
        let metrics = &self.fetch.engine().metrics;
        metrics
            .fetch_requests
            .get_or_create(&FetchLabels {
                kind: self.kind(),
                result,
            })
            .inc();
        metrics.fetch_request.observe(self.asked.elapsed().as_secs_f64());
    }

    fn kind(&self) -> &'static str {
        self.priority.kind()
    }
}

/// Half of the doubled pause, plus up to as much again by chance, so that clients of a failing server drift apart.
fn pause(fruitless: u32) -> Duration {
    let doubled = FIRST_PAUSE
        .saturating_mul(1 << fruitless.saturating_sub(1).min(10))
        .min(LONGEST_PAUSE);
    // A fresh `RandomState` is keyed by the process's random source; no more is asked of it here.
    let chance = RandomState::new().build_hasher().finish() % 1024;
    doubled / 2 + doubled.mul_f64(f64::from(u32::try_from(chance).unwrap_or(0)) / 2048.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_their_limit_and_vary() {
        for (fruitless, most) in [(0, 50), (1, 50), (2, 100), (5, 800), (7, 2000), (u32::MAX, 2000)] {
            let most = Duration::from_millis(most);
            let pauses: Vec<Duration> = (0..32).map(|_| pause(fruitless)).collect();
            assert!(
                pauses.iter().all(|pause| (most / 2..=most).contains(pause)),
                "{fruitless}: {pauses:?}"
            );
            assert!(pauses.iter().any(|pause| pause != &pauses[0]));
        }
    }
}
