//! Parts of a blob from whichever of its sources delivers them, before there is a layer to fetch for.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use estargz::digest::Digest;
use futures_util::StreamExt;
use hullspeed_daemon::error::chain;

use crate::layer::NotLazy;
use crate::layer::fetch::Engine;
use crate::layer::fetch::health::Host;
use crate::layer::report::Failure;
use crate::layer::source::{BlobSource, ByteStream, Priority, SourceError};
use crate::metrics::defs::{FetchLabels, KindLabels};

/// Requests to each source for one part.
const MAX_ATTEMPTS: u32 = 5;
/// Bytes that count as progress.
const PROGRESS: usize = 16 << 10;
/// Longest pause at a time; who asked for the layer has its own limit on all of it.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A part of the blob, received.
pub(super) struct Received {
    pub(super) start: u64,
    /// Size of the whole blob.
    pub(super) blob_size: u64,
    pub(super) bytes: Bytes,
}

/// No source delivered.
pub(super) struct Undelivered {
    /// The host that failed last; empty where none could be asked.
    pub(super) host: String,
    pub(super) cause: SourceError,
}

struct Candidate {
    source: Arc<dyn BlobSource>,
    host: Arc<Host>,
    attempts: u32,
    /// It refused for good, or its bytes were wrong.
    is_out: bool,
    has_delivered: bool,
}

/// The sources of one blob.
pub(super) struct Sources<'a> {
    engine: &'a Engine,
    /// For log lines and reports: the image, and the layer that is to be opened.
    image: &'a str,
    layer: Digest,
    list: Vec<Candidate>,
    requests: u64,
    bytes: u64,
    /// The request that failed last.
    failure: Option<Failure>,
}

/// A part on its way: what came of it, and what is still to come.
struct Part {
    /// What is asked for; for the end of a blob whose size is not known, what was asked for.
    wanted: Range<u64>,
    /// The last so many bytes of a blob whose size is not known yet.
    tail: Option<u64>,
    got: BytesMut,
}

impl Part {
    fn left(&self) -> Range<u64> {
        self.wanted.start + self.got.len() as u64..self.wanted.end
    }
}

impl<'a> Sources<'a> {
    pub(super) fn new(engine: &'a Engine, sources: Vec<Arc<dyn BlobSource>>, image: &'a str, layer: Digest) -> Self {
        let candidate = |source: Arc<dyn BlobSource>| Candidate {
            host: engine.host(source.host()),
            source,
            attempts: 0,
            is_out: false,
            has_delivered: false,
        };
        Self {
            engine,
            image,
            layer,
            list: sources.into_iter().map(candidate).collect(),
            requests: 0,
            bytes: 0,
            failure: None,
        }
    }

    pub(super) fn requests(&self) -> u64 {
        self.requests
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The request that failed last, whatever came after it.
    pub(super) fn take_failure(&mut self) -> Option<Failure> {
        self.failure.take()
    }

    /// Size of the blob, where a source knows it.
    pub(super) fn size(&self) -> Option<u64> {
        self.list.iter().find_map(|candidate| candidate.source.size())
    }

    /// Counts what was asked of others for the same layer.
    pub(super) fn charge(&mut self, others: &mut Sources<'_>) {
        self.requests += others.requests;
        self.bytes += others.bytes;
        self.failure = others.failure.take().or(self.failure.take());
    }

    /// Asks those no more whose bytes came, which were wrong in the way of `error`; whether others are left.
    pub(super) fn rule_out_deliverers(&mut self, error: &NotLazy) -> bool {
        let mut hosts = Vec::new();
        for candidate in &mut self.list {
            if std::mem::take(&mut candidate.has_delivered) {
                candidate.is_out = true;
                hosts.push(candidate.host.name().to_owned());
            }
            candidate.attempts = 0;
        }
        if self.list.iter().all(|candidate| candidate.is_out) {
            return false;
        }
        let (image, layer, host) = (self.image, self.layer, hosts.join(", "));
        tracing::warn!(image, %layer, host, error = error as &dyn std::error::Error,
            "a source of the TOC has wrong bytes; asking another");
        self.failure = Some(self.failure_at(host, error.reason(), chain(error)));
        true
    }

    fn failure_at(&self, host: String, reason: &'static str, what: String) -> Failure {
        Failure {
            at: SystemTime::now(),
            reason: reason.to_owned(),
            what,
            host,
            image: self.image.to_owned(),
            layer: Some(self.layer),
        }
    }

    /// The end of the blob, as long as `length` says for its size.
    pub(super) async fn tail(&mut self, length: impl Fn(Option<u64>) -> u64) -> Result<Received, Undelivered> {
        let size = self.size();
        let length = length(size);
        match size {
            Some(0) => Ok(Received {
                start: 0,
                blob_size: 0,
                bytes: Bytes::new(),
            }),
            Some(size) => self.receive(size - length..size, None).await,
            None => self.receive(0..0, Some(length)).await,
        }
    }

    /// All of `wanted`, which `tail` has from `start` on, and what `tail` holds before it.
    pub(super) async fn rest(
        &mut self,
        wanted: Range<u64>,
        start: u64,
        mut tail: Bytes,
    ) -> Result<(Bytes, (u64, Bytes)), Undelivered> {
        let to_len = |bytes: u64| usize::try_from(bytes).unwrap_or(usize::MAX);
        if wanted.start >= start {
            let before = tail.split_to(to_len(wanted.start - start).min(tail.len()));
            tail.truncate(to_len(wanted.end - wanted.start));
            return Ok((tail, (start, before)));
        }
        let missing = self.receive(wanted.start..start.min(wanted.end), None).await?;
        let mut all = BytesMut::from(&missing.bytes[..]);
        all.extend_from_slice(&tail[..to_len(wanted.end.saturating_sub(start)).min(tail.len())]);
        Ok((all.freeze(), (wanted.start, Bytes::new())))
    }

    /// A range of the blob, from whoever delivers.
    pub(super) async fn receive(&mut self, wanted: Range<u64>, tail: Option<u64>) -> Result<Received, Undelivered> {
        for candidate in &mut self.list {
            candidate.attempts = 0;
        }
        let got = BytesMut::new();
        let mut part = Part { wanted, tail, got };
        let mut last = None;
        loop {
            let Some(number) = self.choose().await else {
                return Err(last.unwrap_or_else(|| Undelivered {
                    host: String::new(),
                    cause: SourceError::transient("the layer has no source"),
                }));
            };
            let result = self.ask(number, &mut part).await;
            let label = result.as_ref().map_or_else(SourceError::class, |()| "ok");
            let metrics = self.engine.metrics();
            let labels = FetchLabels {
                kind: "toc",
                result: label,
            };
            metrics.fetch_requests.get_or_create(&labels).inc();
            match result {
                Ok(()) => {
                    if let Some(candidate) = self.list.get(number) {
                        candidate.host.delivered();
                    }
                    return Ok(Received {
                        start: part.wanted.start,
                        blob_size: part.wanted.end,
                        bytes: part.got.freeze(),
                    });
                }
                Err(cause) => {
                    let host = self.failed(number, &cause);
                    last = Some(Undelivered { host, cause });
                }
            }
        }
    }

    /// Notes that a source failed, and tells so; who it was.
    fn failed(&mut self, number: usize, error: &SourceError) -> String {
        let Some(candidate) = self.list.get_mut(number) else {
            return String::new();
        };
        let (image, layer) = (self.image, self.layer);
        let (host, cause) = (candidate.host.clone(), error as &dyn std::error::Error);
        // Who breaks the protocol is asked once more: a proxy in between may have.
        if error.is_transient() || (error.class() == "protocol" && candidate.attempts == 0) {
            candidate.host.failed(error);
            candidate.attempts += 1;
            tracing::info!(image, %layer, host = host.name(), error = cause, "a source of the TOC fails");
        } else {
            candidate.is_out = true;
            tracing::warn!(image, %layer, host = host.name(), error = cause, "a source of the TOC refuses");
        }
        let host = host.name().to_owned();
        self.failure = Some(self.failure_at(host.clone(), error.class(), chain(error)));
        host
    }

    /// Whom to ask next: the first that may be asked now, if need be after a pause.
    async fn choose(&self) -> Option<usize> {
        let usable = |candidate: &&Candidate| !candidate.is_out && candidate.attempts < MAX_ATTEMPTS;
        let began = Instant::now();
        loop {
            let mut soonest: Option<Duration> = None;
            for (number, candidate) in self.list.iter().enumerate() {
                match candidate.host.pause() {
                    _ if !usable(&candidate) => {}
                    None => return Some(number),
                    Some(pause) => soonest = Some(soonest.map_or(pause, |least| least.min(pause))),
                }
            }
            let pause = soonest?;
            if began.elapsed() >= self.engine.read_deadline() {
                return None;
            }
            tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
        }
    }

    async fn ask(&mut self, number: usize, part: &mut Part) -> Result<(), SourceError> {
        let Some(candidate) = self.list.get(number) else {
            return Err(SourceError::transient("no such source"));
        };
        let (source, host) = (candidate.source.clone(), candidate.host.clone());
        self.requests += 1;
        let asked = Instant::now();
        let until = asked + self.engine.stall_timeout();
        let body = match part.tail {
            Some(length) => {
                let tail = self.in_time(until, source.read_tail(length)).await?;
                // A source that gives more than was asked for would be read without a bound.
                part.wanted = tail.start..tail.blob_size.min(tail.start.saturating_add(length));
                if part.wanted.end != tail.blob_size {
                    return Err(SourceError::transient("more than the end of the blob came"));
                }
                part.tail = None;
                tail.body
            }
            None => self.in_time(until, source.read(part.left(), Priority::Demand)).await?,
        };
        host.answered(asked.elapsed());
        self.collect(number, body, part).await
    }

    async fn collect(&mut self, number: usize, mut body: ByteStream, part: &mut Part) -> Result<(), SourceError> {
        let stall = self.engine.stall_timeout();
        let (mut until, mut trickle) = (Instant::now() + stall, 0);
        loop {
            let left = part.left();
            if left.is_empty() {
                return Ok(());
            }
            let next = async {
                body.next()
                    .await
                    .unwrap_or_else(|| Err(SourceError::transient("the body ended early")))
            };
            let mut piece = self.in_time(until, next).await?;
            trickle += piece.len();
            // A few bytes now and then are none; an empty piece is a server on its way to the range.
            if piece.is_empty() || trickle >= PROGRESS {
                (until, trickle) = (Instant::now() + stall, 0);
            }
            self.bytes += piece.len() as u64;
            let metrics = self.engine.metrics();
            metrics
                .fetch_bytes
                .get_or_create(&KindLabels { kind: "toc" })
                .inc_by(piece.len() as u64);
            piece.truncate(usize::try_from(left.end - left.start).unwrap_or(usize::MAX));
            if let Some(candidate) = self.list.get_mut(number).filter(|_| !piece.is_empty()) {
                candidate.has_delivered = true;
            }
            part.got.extend_from_slice(&piece);
        }
    }

    /// Waits for what is to come by `until`.
    async fn in_time<T>(
        &self,
        until: Instant,
        ask: impl Future<Output = Result<T, SourceError>>,
    ) -> Result<T, SourceError> {
        match tokio::time::timeout_at(until.into(), ask).await {
            Ok(result) => result,
            Err(_) => {
                let stall = self.engine.stall_timeout();
                Err(SourceError::transient(format!("no progress within {stall:?}")))
            }
        }
    }
}
