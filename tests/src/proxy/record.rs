//! What the proxy saw: one record per request, and totals.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, StatusCode, header};

/// Records kept; later requests are counted, not recorded.
pub const MAX_RECORDS: usize = 100_000;

/// Sums over all connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Requests received.
    pub requests: u64,
    /// Bytes sent to clients: status lines, headers and bodies, everything that TCP carried.
    pub bytes_down: u64,
    /// Bytes received from clients, likewise.
    pub bytes_up: u64,
}

impl Totals {
    /// Bytes on the wire in both directions.
    #[must_use]
    pub fn wire_bytes(&self) -> u64 {
        self.bytes_down + self.bytes_up
    }
}

/// One request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestRecord {
    /// When it arrived, since the log began.
    pub at: Duration,
    /// When the last byte of its answer was handed to the link, or the client went away; `None` while it is under way.
    pub ended: Option<Duration>,
    /// Its method.
    pub method: String,
    /// Its path with the query.
    pub path: String,
    /// Its `Range` header.
    pub range: Option<String>,
    /// Whether it came with an `Authorization`. What was in it is not kept.
    pub authorized: bool,
    /// Whether a rule was applied to it.
    pub faulted: bool,
    /// The answer's status; 0 while there is none.
    pub status: u16,
    /// Offset in the blob of the body's first byte.
    pub start: u64,
    /// Bytes of the answer's body that were sent.
    pub body_bytes: u64,
}

impl RequestRecord {
    /// Whether it is for bytes of a blob.
    #[must_use]
    pub fn is_blob(&self) -> bool {
        self.method == "GET" && self.path.contains("/blobs/")
    }

    /// Whether bytes of a blob came.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.is_blob() && matches!(self.status, 200 | 206)
    }

    /// The bytes of the blob that were sent.
    #[must_use]
    pub fn sent(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.body_bytes)
    }
}

/// Bytes of each blob that went out more than once, summed: 0 when every byte came once.
#[must_use]
pub fn sent_again(records: &[RequestRecord]) -> u64 {
    let mut blobs: BTreeMap<&str, Vec<Range<u64>>> = BTreeMap::new();
    for record in records.iter().filter(|record| record.is_served()) {
        let path = record.path.split('?').next().unwrap_or_default();
        blobs.entry(path).or_default().push(record.sent());
    }
    blobs.into_values().map(overlap).sum()
}

fn overlap(mut ranges: Vec<Range<u64>>) -> u64 {
    ranges.sort_by_key(|range| range.start);
    let mut end = 0;
    let mut twice = 0;
    for range in ranges {
        twice += range.end.min(end).saturating_sub(range.start);
        end = end.max(range.end);
    }
    twice
}

/// How many requests at least followed each other: each begun after the one before it had ended.
#[must_use]
pub fn round_trips(records: &[RequestRecord]) -> usize {
    let mut spans: Vec<(Duration, Duration)> = records
        .iter()
        .map(|record| (record.ended.unwrap_or(Duration::MAX), record.at))
        .collect();
    // The most intervals of which no two overlap: always the next that ends first.
    spans.sort();
    let (mut count, mut free) = (0, None);
    for (ended, at) in spans {
        if free.is_none_or(|free| at >= free) {
            (count, free) = (count + 1, Some(ended));
        }
    }
    count
}

#[derive(Default)]
struct Answer {
    status: AtomicU16,
    faulted: AtomicBool,
    start: AtomicU64,
    body_bytes: AtomicU64,
    /// Nanoseconds since the log began, one more than that; 0 while there is no end.
    ended: AtomicU64,
}

struct Row {
    record: RequestRecord,
    answer: Arc<Answer>,
}

struct State {
    began: Instant,
    count: u64,
    rows: Vec<Row>,
}

/// The request log.
pub(super) struct Log(Mutex<State>);

impl Default for Log {
    fn default() -> Self {
        Self(Mutex::new(State {
            began: Instant::now(),
            count: 0,
            rows: Vec::new(),
        }))
    }
}

impl Log {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self, request: &Request) -> Entry {
        let answer = Arc::new(Answer::default());
        let range = request
            .headers()
            .get(header::RANGE)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
        let path = request
            .uri()
            .path_and_query()
            .map_or_else(String::new, ToString::to_string);
        let mut state = self.state();
        state.count += 1;
        let began = state.began;
        if state.rows.len() < MAX_RECORDS {
            let record = RequestRecord {
                at: began.elapsed(),
                ended: None,
                method: request.method().to_string(),
                path,
                range,
                authorized: request.headers().contains_key(header::AUTHORIZATION),
                faulted: false,
                status: 0,
                start: 0,
                body_bytes: 0,
            };
            state.rows.push(Row {
                record,
                answer: Arc::clone(&answer),
            });
        }
        Entry { answer, began }
    }

    pub(super) fn count(&self) -> u64 {
        self.state().count
    }

    pub(super) fn records(&self) -> Vec<RequestRecord> {
        let complete = |row: &Row| {
            let ended = row.answer.ended.load(Ordering::Relaxed).checked_sub(1);
            RequestRecord {
                ended: ended.map(Duration::from_nanos),
                faulted: row.answer.faulted.load(Ordering::Relaxed),
                status: row.answer.status.load(Ordering::Relaxed),
                start: row.answer.start.load(Ordering::Relaxed),
                body_bytes: row.answer.body_bytes.load(Ordering::Relaxed),
                ..row.record.clone()
            }
        };
        self.state().rows.iter().map(complete).collect()
    }

    pub(super) fn reset(&self) {
        *self.state() = State {
            began: Instant::now(),
            count: 0,
            rows: Vec::new(),
        };
    }
}

/// A request under way; its record ends when this is dropped.
pub(super) struct Entry {
    answer: Arc<Answer>,
    began: Instant,
}

impl Entry {
    pub(super) fn faulted(&self) {
        self.answer.faulted.store(true, Ordering::Relaxed);
    }

    pub(super) fn answered(&self, status: StatusCode, start: u64) {
        self.answer.status.store(status.as_u16(), Ordering::Relaxed);
        self.answer.start.store(start, Ordering::Relaxed);
    }

    /// Counts the body as it passes.
    pub(super) fn count(self, body: Body) -> Body {
        let frames = body.into_data_stream();
        let counted = stream::unfold((frames, self), |(mut frames, entry)| async move {
            let frame = frames.next().await?;
            if let Ok(bytes) = &frame {
                entry.answer.body_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            Some((frame, (frames, entry)))
        });
        Body::from_stream(counted)
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let nanos = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX - 1);
        self.answer.ended.store(nanos + 1, Ordering::Relaxed);
    }
}

/// Offset in the blob of the body's first byte, from `Content-Range`.
pub(super) fn range_start(headers: &HeaderMap) -> u64 {
    let value = headers.get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = value
        .and_then(|text| text.strip_prefix("bytes "))
        .and_then(|text| text.split('-').next());
    start.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(path: &str, at: u64, ended: u64, sent: Range<u64>) -> RequestRecord {
        RequestRecord {
            at: Duration::from_millis(at),
            ended: Some(Duration::from_millis(ended)),
            method: "GET".into(),
            path: format!("/v2/a/blobs/{path}"),
            range: None,
            authorized: false,
            faulted: false,
            status: 206,
            start: sent.start,
            body_bytes: sent.end - sent.start,
        }
    }

    #[test]
    fn bytes_sent_again_are_summed_per_blob() {
        let rows = [
            record("x", 0, 1, 10..20),
            record("y", 0, 1, 10..20),
            record("x", 0, 1, 0..12),
            record("x", 0, 1, 19..30),
            record("x?signed", 0, 1, 5..6),
        ];
        assert_eq!(sent_again(&rows), 2 + 1 + 1);
        assert_eq!(sent_again(&rows[..2]), 0);
    }

    #[test]
    fn requests_at_once_are_one_round_trip() {
        let row = |at, ended| record("x", at, ended, 0..1);
        assert_eq!(round_trips(&[]), 0);
        assert_eq!(round_trips(&[row(0, 20), row(1, 25), row(2, 19)]), 1);
        assert_eq!(round_trips(&[row(0, 20), row(5, 30), row(21, 40), row(45, 60)]), 3);
    }
}
