//! Calls that are passed on as they come.

use std::future::{pending, poll_fn};
use std::pin::pin;
use std::task::Poll;

use h2::client::ResponseFuture;
use h2::{Reason, RecvStream};
use http::{Request, Response};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::client::Client;
use super::link::Link;
use super::pump::{Broken, pump, reset_by_peer};
use super::{status, stopped};

/// Passes a call on to containerd and its answer back. Ends with the call, and then whatever is still open is reset.
pub(super) async fn pass(
    link: &Link,
    request: Request<RecvStream>,
    client: &mut Client,
    ended: &CancellationToken,
) -> Code {
    let (parts, mut body) = request.into_parts();
    let no_body = body.is_end_stream();
    let sent = tokio::select! {
        biased;
        () = client.gone() => return Code::Cancelled,
        sent = link.send(Request::from_parts(parts, ()), no_body) => sent,
        () = ended.cancelled() => return client.fail(&stopped()),
    };
    let (response, mut upload) = match sent {
        Ok(sent) => sent,
        Err(error) => return client.fail(&error.status().into()),
    };
    let forth = async {
        if !no_body && let Err(Broken::Source(error)) = pump(&mut body, &mut upload).await {
            upload.send_reset(error.reason().unwrap_or(Reason::CANCEL));
        }
        // An answer may come long after its request, or before its end: it alone ends the call.
        pending::<()>().await;
    };
    let code = tokio::select! {
        biased;
        code = back(link, response, client) => Some(code),
        () = forth => None,
        () = ended.cancelled() => None,
    };
    code.unwrap_or_else(|| client.fail(&stopped()))
}

async fn back(link: &Link, response: ResponseFuture, client: &mut Client) -> Code {
    match relay(response, client).await {
        Ok(code) => code.unwrap_or(Code::Unknown),
        Err(Broken::Sink) => Code::Cancelled,
        Err(Broken::Source(error)) => broken(link, &error, client),
    }
}

/// Sends the answer back. Gives the code it ended with.
async fn relay(response: ResponseFuture, client: &mut Client) -> Result<Option<Code>, Broken> {
    let mut response = pin!(response);
    let response = poll_fn(|cx| match response.as_mut().poll(cx) {
        Poll::Ready(response) => Poll::Ready(response.map_err(Broken::Source)),
        Poll::Pending => client.poll_gone(cx).map(|_| Err(Broken::Sink)),
    });
    let (head, mut body) = response.await?.into_parts();
    let code = status::code(&head.headers);
    let head = Response::from_parts(head, ());
    if body.is_end_stream() {
        client.bare(head)?;
        return Ok(code);
    }
    let trailers = pump(&mut body, client.begin(head)?).await?;
    Ok(trailers.as_ref().and_then(status::code).or(code))
}

/// containerd's side broke. What containerd itself reset is reset with the same reason, as without a relay.
fn broken(link: &Link, error: &h2::Error, client: &mut Client) -> Code {
    if let Some(reason) = reset_by_peer(error) {
        return client.reset(reason);
    }
    let status = if error.is_reset() {
        Status::internal(format!("containerd's answer breaks HTTP/2: {error}"))
    } else {
        link.broken(error)
    };
    client.fail(&status.into())
}
