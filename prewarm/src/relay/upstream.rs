//! containerd, as a gathered call reaches it.

use std::future::pending;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use h2::SendStream;
use h2::client::ResponseFuture;
use http::header::CONTENT_LENGTH;
use http::request::Parts;
use http::{HeaderMap, Request, StatusCode};
use tonic::{Code, Status};

use super::budget::{Allowance, Bite};
use super::client::send_at_once;
use super::deadline::Deadline;
use super::frames::{self, Bounds, Encoding, Frame, Frames, Unread};
use super::link::Link;
use super::pump::{reset_by_peer, write};
use super::status::{GRPC_ACCEPT_ENCODING, GRPC_ENCODING};
use super::{Answer, Failure, Messages, Upstream, status};

/// containerd behind one call.
pub(super) struct Bound {
    pub(super) link: Arc<Link>,
    /// The request's head as it came.
    pub(super) parts: Parts,
    pub(super) deadline: Deadline,
    /// Memory for answers.
    pub(super) answers: Allowance,
    /// What its messages must keep to.
    pub(super) bounds: Bounds,
    /// The share of the last unary answer, kept until the call has ended.
    pub(super) held: Arc<Mutex<Option<Bite>>>,
}

impl Bound {
    /// Sends `message` or begins to.
    async fn ask(&self, message: Bytes) -> Result<Asked, Failure> {
        let mut request = Request::from_parts(self.parts.clone(), ());
        let headers = request.headers_mut();
        // What is gathered is sent as it is, and the answer is wanted so.
        for header in [GRPC_ENCODING, GRPC_ACCEPT_ENCODING, CONTENT_LENGTH] {
            headers.remove(header);
        }
        self.deadline.put(headers);
        let (response, mut upload) = self.link.send(request, false).await.map_err(|error| error.status())?;
        let rest = send_at_once(&mut upload, message, true).unwrap_or(None);
        Ok(Asked {
            link: Arc::clone(&self.link),
            answers: self.answers.clone(),
            bounds: self.bounds,
            response,
            upload,
            rest,
        })
    }

    fn hold(&self, bite: Option<Bite>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = bite;
    }
}

#[async_trait]
impl Upstream for Bound {
    async fn unary(&self, message: Bytes) -> Result<Answer, Failure> {
        // Who holds a bite does not wait for another.
        self.hold(None);
        let mut answering = self.ask(message).await?.answering().await?;
        let Some(Frame { message, bite }) = answering.frame().await? else {
            answering.end().await?;
            let text = "cardinality violation: containerd sent no message where one is expected";
            return Err(Status::internal(text).into());
        };
        let ended = answering.frames.end().await;
        ended.map_err(|unread| answering.unread(unread))?;
        let trailers = answering.end().await?;
        self.hold(Some(bite));
        Ok(Answer {
            metadata: answering.head,
            message,
            trailers,
        })
    }

    async fn stream(&self, message: Bytes) -> Result<Messages, Failure> {
        let asked = State::Asked(self.ask(message).await?);
        let messages = stream::try_unfold(asked, |state| async {
            let mut answering = match state {
                State::Asked(asked) => asked.answering().await?,
                State::Answering(answering, bite) => {
                    // The message before this one is with the client, or on its way.
                    drop(bite);
                    answering
                }
            };
            if let Some(Frame { message, bite }) = answering.frame().await? {
                return Ok(Some((message, State::Answering(answering, bite))));
            }
            answering.end().await?;
            Ok(None)
        });
        Ok(messages.boxed())
    }
}

enum State {
    Asked(Asked),
    Answering(Answering, Bite),
}

/// A call whose answer has not begun.
struct Asked {
    link: Arc<Link>,
    answers: Allowance,
    bounds: Bounds,
    response: ResponseFuture,
    upload: SendStream<Bytes>,
    /// What is not sent yet.
    rest: Option<Bytes>,
}

impl Asked {
    /// Sends the rest, waits for headers.
    async fn answering(self) -> Result<Answering, Failure> {
        let Self {
            link,
            answers,
            bounds,
            response,
            mut upload,
            rest,
        } = self;
        let forth = async {
            if let Some(message) = rest {
                let prefix = Bytes::copy_from_slice(&frames::prefix(&message));
                // If containerd does not want it, the answer says why.
                if write(&mut upload, prefix, false, |_| {}).await.is_ok() {
                    let _ = write(&mut upload, message, true, |_| {}).await;
                }
            }
            pending::<()>().await;
        };
        let response = tokio::select! {
            biased;
            response = response => response.map_err(|error| failed(&link, &error))?,
            () = forth => return Err(Status::internal("the request has no end").into()),
        };
        let (head, body) = response.into_parts();
        if head.status != StatusCode::OK && status::code(&head.headers).is_none() {
            return Err(status::of_http(head.status).into());
        }
        let encoding = Encoding::of(&head.headers)?;
        let frames = Frames::new(body, encoding, answers, bounds);
        Ok(Answering {
            link,
            head: head.headers,
            frames,
        })
    }
}

/// A call whose answer has begun.
struct Answering {
    link: Arc<Link>,
    head: HeaderMap,
    frames: Frames,
}

impl Answering {
    async fn frame(&mut self) -> Result<Option<Frame>, Failure> {
        let frame = self.frames.next().await;
        frame.map_err(|unread| self.unread(unread))
    }

    /// Reads the status, which stands behind the last message or in the headers of an answer without any. Gives the
    /// trailers of a good one.
    async fn end(&mut self) -> Result<HeaderMap, Failure> {
        let trailers = self.frames.trailers().await;
        let trailers = trailers.map_err(|unread| self.unread(unread))?.unwrap_or_default();
        let status = status::read(&trailers).or_else(|| status::read(&self.head));
        let Some(status) = status else {
            return Err(Status::internal("server closed the stream without sending trailers").into());
        };
        if status.code() == Code::Ok {
            return Ok(trailers);
        }
        let mut metadata = self.head.clone();
        for name in trailers.keys() {
            metadata.remove(name);
        }
        metadata.extend(trailers);
        Err(Failure::Answered { status, metadata })
    }

    fn unread(&self, unread: Unread) -> Failure {
        match unread {
            Unread::Broken(error) => failed(&self.link, &error),
            Unread::Bad(status) => status.into(),
            Unread::Stalled(time) => {
                let text = format!("containerd began a message and did not go on within {time:?}");
                Status::unavailable(text).into()
            }
        }
    }
}

/// What a broken stream means, as gRPC clients say it.
fn failed(link: &Link, error: &h2::Error) -> Failure {
    let status = match reset_by_peer(error) {
        Some(reason) => {
            let text = format!("stream terminated by RST_STREAM with error code: {reason:?}");
            Status::new(status::code_of(reason), text)
        }
        None => link.broken(error),
    };
    status.into()
}
