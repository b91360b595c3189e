//! The way back to the client of one call: an answer, a failure, a reset.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::StreamExt;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use http::header::CONTENT_TYPE;
use http::{HeaderMap, HeaderValue, Response, StatusCode};
use tonic::{Code, Status};

use super::pump::{Broken, write};
use super::{Answer, Failure, Limits, Messages, Reply, frames, status};

/// Requests up to this size are sent without waiting for containerd's window. Answers go in copies of at most this size,
/// so that what waits in a connection does not keep a whole large message in memory.
const PIECE: usize = 16 << 10;

/// The client's side of a call.
pub(super) struct Client {
    grpc: bool,
    stalled: Duration,
    reading: Duration,
    respond: SendResponse<Bytes>,
    /// Once headers are sent.
    stream: Option<SendStream<Bytes>>,
}

impl Client {
    pub(super) fn new(respond: SendResponse<Bytes>, grpc: bool, limits: &Limits) -> Self {
        Self {
            grpc,
            stalled: limits.stalled,
            reading: limits.reading,
            respond,
            stream: None,
        }
    }

    /// Ends when the client has given up, or is gone.
    pub(super) async fn gone(&mut self) {
        let _ = poll_fn(|cx| self.poll_gone(cx)).await;
    }

    pub(super) fn poll_gone(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Result<Reason, h2::Error>> {
        match &mut self.stream {
            Some(stream) => stream.poll_reset(cx),
            None => self.respond.poll_reset(cx),
        }
    }

    /// Sends headers; the body follows.
    pub(super) fn begin(&mut self, head: Response<()>) -> Result<&mut SendStream<Bytes>, Broken> {
        let stream = self.respond.send_response(head, false).map_err(|_| Broken::Sink)?;
        Ok(self.stream.insert(stream))
    }

    /// Sends headers without a body.
    pub(super) fn bare(&mut self, head: Response<()>) -> Result<(), Broken> {
        self.respond
            .send_response(head, true)
            .map(drop)
            .map_err(|_| Broken::Sink)
    }

    /// Resets the call.
    pub(super) fn reset(&mut self, reason: Reason) -> Code {
        match &mut self.stream {
            Some(stream) => stream.send_reset(reason),
            None => self.respond.send_reset(reason),
        }
        status::code_of(reason)
    }

    /// Ends the call with a failure, wherever it is.
    pub(super) fn fail(&mut self, failure: &Failure) -> Code {
        let trailers = status::failed_trailers(failure);
        let sent = match &mut self.stream {
            None if !self.grpc => return self.fail_plainly(failure.status()),
            None => self.bare(status::bare(trailers)),
            Some(stream) if self.grpc => stream.send_trailers(trailers).map_err(|_| Broken::Sink),
            Some(_) => return self.reset(Reason::INTERNAL_ERROR),
        };
        match sent {
            Ok(()) => failure.status().code(),
            Err(_) => self.reset(Reason::INTERNAL_ERROR),
        }
    }

    /// Who does not speak gRPC is told in HTTP.
    fn fail_plainly(&mut self, status: &Status) -> Code {
        let http = match status.code() {
            Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            _ => StatusCode::BAD_GATEWAY,
        };
        self.refuse(http, status.message().to_owned());
        status.code()
    }

    /// Refuses what is not gRPC.
    pub(super) fn refuse(&mut self, http: StatusCode, why: String) {
        let mut head = Response::new(());
        *head.status_mut() = http;
        head.headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        if let Ok(stream) = self.begin(head) {
            // Fails only if the client is gone.
            let _ = stream.send_data(Bytes::from(why), true);
        }
    }

    /// Sends a rule's answer.
    pub(super) async fn reply(&mut self, reply: Reply) -> Code {
        let done = match reply {
            Reply::One(answer) => self.answer(answer).await,
            Reply::Stream(messages) => self.messages(messages).await,
            Reply::Failed(failure) => Ok(self.fail(&failure)),
        };
        done.unwrap_or_else(|_| {
            // The client is gone or reads nothing; if it is there, it hears of it.
            self.reset(Reason::CANCEL)
        })
    }

    async fn answer(&mut self, answer: Answer) -> Result<Code, Broken> {
        let Answer {
            metadata,
            message,
            mut trailers,
        } = answer;
        let code = *status::code(&trailers).get_or_insert(Code::Ok);
        trailers
            .entry(status::GRPC_STATUS)
            .or_insert(HeaderValue::from_static("0"));
        self.begin(status::head(metadata))?;
        if !self.message(message).await? {
            return Err(Broken::Sink);
        }
        let stream = self.stream.as_mut().ok_or(Broken::Sink)?;
        stream.send_trailers(trailers).map_err(|_| Broken::Sink)?;
        Ok(code)
    }

    /// Sends one message. Whether it was read in time.
    async fn message(&mut self, message: Bytes) -> Result<bool, Broken> {
        let Self { stalled, reading, .. } = *self;
        let Some(stream) = &mut self.stream else {
            return Err(Broken::Sink);
        };
        let sent = tokio::time::timeout(reading, send_slowly(stream, message, stalled)).await;
        sent.unwrap_or(Ok(false))
    }

    async fn messages(&mut self, mut messages: Messages) -> Result<Code, Broken> {
        loop {
            let next = poll_fn(|cx| match messages.poll_next_unpin(cx) {
                Poll::Ready(next) => Poll::Ready(Ok(next)),
                Poll::Pending => self.poll_gone(cx).map(|_| Err(Broken::Sink)),
            });
            match next.await? {
                Some(Ok(message)) => {
                    if self.stream.is_none() {
                        self.begin(status::head(HeaderMap::new()))?;
                    }
                    if !self.message(message).await? {
                        // Headers need no window, so this arrives whatever the client has not read.
                        return Ok(self.fail(&unread_stream()));
                    }
                }
                Some(Err(failure)) => return Ok(self.fail(&failure)),
                None => return Ok(self.fail(&Failure::Ours(Status::ok("")))),
            }
        }
    }
}

/// Sends a small message without waiting; gives a larger one back.
pub(super) fn send_at_once(stream: &mut SendStream<Bytes>, message: Bytes, end: bool) -> Result<Option<Bytes>, Broken> {
    if message.len() > PIECE {
        return Ok(Some(message));
    }
    let mut framed = BytesMut::with_capacity(frames::PREFIX + message.len());
    framed.put_slice(&frames::prefix(&message));
    framed.put(message);
    stream.send_data(framed.freeze(), end).map_err(|_| Broken::Sink)?;
    Ok(None)
}

/// What a subscriber is told that leaves messages unread.
fn unread_stream() -> Failure {
    Failure::Ours(Status::resource_exhausted(
        "hullspeed: this subscriber does not read, its stream is ended; subscribe again",
    ))
}

/// Sends a message as its receiver reads it. Whether it was not `stalled` in a large one.
async fn send_slowly(stream: &mut SendStream<Bytes>, message: Bytes, stalled: Duration) -> Result<bool, Broken> {
    let stalled = if message.len() <= PIECE { Duration::MAX } else { stalled };
    let mut framed = BytesMut::with_capacity(PIECE.min(frames::PREFIX + message.len()));
    framed.put_slice(&frames::prefix(&message));
    let mut rest = &message[..];
    loop {
        let part = rest.len().min(PIECE - framed.len());
        framed.put_slice(&rest[..part]);
        rest = &rest[part..];
        let piece = write(stream, framed.split().freeze(), false, |_| {});
        match tokio::time::timeout(stalled, piece).await {
            Ok(written) => written?,
            Err(_) => return Ok(false),
        }
        if rest.is_empty() {
            return Ok(true);
        }
        framed.reserve(PIECE.min(rest.len()));
    }
}
