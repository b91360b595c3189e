//! Bodies, from one HTTP/2 stream to another: what is read is acknowledged to its sender only when it could be sent on,
//! so the slowest reader sets the pace and nothing piles up here.

use std::future::poll_fn;
use std::task::Poll;

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use http::HeaderMap;

/// Why a body was not sent to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// Its sender's stream or connection broke.
    Source(h2::Error),
    /// Its reader does not want it any more, or is gone.
    Sink,
}

/// Sends on what comes until it ends, trailers included. Gives the trailers.
pub(super) async fn pump(from: &mut RecvStream, to: &mut SendStream<Bytes>) -> Result<Option<HeaderMap>, Broken> {
    while let Some(data) = next(from, to).await? {
        let end = from.is_end_stream();
        write(to, data, end, |sent| {
            // Fails only if the stream is gone, which the next read says.
            let _ = from.flow_control().release_capacity(sent);
        })
        .await?;
        if end {
            return Ok(None);
        }
    }
    let trailers = from.trailers().await.map_err(Broken::Source)?;
    let sent = match &trailers {
        Some(trailers) => to.send_trailers(trailers.clone()),
        None => to.send_data(Bytes::new(), true),
    };
    sent.map_err(|_| Broken::Sink)?;
    Ok(trailers)
}

/// The next piece of a body, unless its reader goes first.
async fn next(from: &mut RecvStream, to: &mut SendStream<Bytes>) -> Result<Option<Bytes>, Broken> {
    poll_fn(|cx| match from.poll_data(cx) {
        Poll::Ready(data) => Poll::Ready(data.transpose().map_err(Broken::Source)),
        Poll::Pending => to.poll_reset(cx).map(|_| Err(Broken::Sink)),
    })
    .await
}

/// Sends `data` as fast as its reader takes it, and tells how many bytes went.
pub(super) async fn write(
    to: &mut SendStream<Bytes>,
    mut data: Bytes,
    end: bool,
    mut sent: impl FnMut(usize),
) -> Result<(), Broken> {
    if data.is_empty() && end {
        return to.send_data(data, true).map_err(|_| Broken::Sink);
    }
    to.reserve_capacity(data.len());
    while !data.is_empty() {
        let capacity = to.capacity().min(data.len());
        if capacity == 0 {
            match poll_fn(|cx| to.poll_capacity(cx)).await {
                Some(Ok(_)) => continue,
                Some(Err(_)) | None => return Err(Broken::Sink),
            }
        }
        let part = data.split_to(capacity);
        to.send_data(part, end && data.is_empty()).map_err(|_| Broken::Sink)?;
        sent(capacity);
    }
    Ok(())
}

/// Why a stream was reset by its other end; `None` if something else broke it.
pub(super) fn reset_by_peer(error: &h2::Error) -> Option<Reason> {
    error.reason().filter(|_| error.is_reset() && error.is_remote())
}
