//! What the proxy saw: one record per request, and totals.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use axum::extract::Request;
use futures_util::StreamExt as _;
use http::{StatusCode, header};

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
    /// Its method.
    pub method: String,
    /// Its path with the query.
    pub path: String,
    /// Its `Range` header.
    pub range: Option<String>,
    /// The answer's status; 0 while there is none.
    pub status: u16,
    /// Bytes of the answer's body that were sent.
    pub body_bytes: u64,
}

#[derive(Default)]
struct Answer {
    status: AtomicU16,
    body_bytes: AtomicU64,
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
        if state.rows.len() < MAX_RECORDS {
            let (at, method) = (state.began.elapsed(), request.method().to_string());
            let record = RequestRecord {
                at,
                method,
                path,
                range,
                status: 0,
                body_bytes: 0,
            };
            state.rows.push(Row {
                record,
                answer: Arc::clone(&answer),
            });
        }
        Entry(answer)
    }

    pub(super) fn count(&self) -> u64 {
        self.state().count
    }

    pub(super) fn records(&self) -> Vec<RequestRecord> {
        let complete = |row: &Row| RequestRecord {
            status: row.answer.status.load(Ordering::Relaxed),
            body_bytes: row.answer.body_bytes.load(Ordering::Relaxed),
            ..row.record.clone()
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

/// A request under way.
pub(super) struct Entry(Arc<Answer>);

impl Entry {
    pub(super) fn answered(&self, status: StatusCode) {
        self.0.status.store(status.as_u16(), Ordering::Relaxed);
    }

    /// Counts the body as it passes.
    pub(super) fn count(self, body: Body) -> Body {
        let counted = body.into_data_stream().inspect(move |frame| {
            if let Ok(bytes) = frame {
                self.0.body_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
        });
        Body::from_stream(counted)
    }
}
