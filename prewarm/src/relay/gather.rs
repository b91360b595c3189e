//! Calls that are handed to rules.

use std::sync::{Arc, Mutex};

use h2::RecvStream;
use http::{Method as Verb, Request, StatusCode};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};

use super::client::Client;
use super::deadline::{Deadline, exceeded};
use super::frames::{Bounds, Encoding, Frame, Frames, Unread};
use super::server::Own;
use super::upstream::Bound;
use super::{Api, Call, Failure, Method, Reply, Shared, status, stopped};

/// Gathers a call, lets the rules answer it, sends their answer. What is under way is dropped when the client gives up,
/// the deadline passes or the relay ends.
pub(super) async fn gathered(
    shared: &Shared,
    own: &Own,
    (method, api): (Method, Api),
    request: Request<RecvStream>,
    client: &mut Client,
    ended: &CancellationToken,
) -> Code {
    if let Err(code) = refuse_http(&request, client) {
        return code;
    }
    let deadline = match Deadline::of(request.headers()) {
        Ok(deadline) => deadline,
        Err(status) => return client.fail(&status.into()),
    };
    // Until the call has ended, its messages count.
    let held = Arc::new(Mutex::new(None));
    let mut bite = None;
    let asked = async {
        let (parts, body) = request.into_parts();
        let encoding = Encoding::of(&parts.headers)?;
        let limits = &shared.options.limits;
        let bounds = Bounds {
            most: limits.message,
            quiet: limits.quiet,
            whole: limits.gather,
        };
        let mut frames = Frames::new(body, encoding, own.requests.clone(), bounds);
        let only = tokio::time::timeout(limits.gather, frames.only()).await;
        let frame = only.map_err(|_| {
            let text = format!(
                "the request did not come within {:?}, or there is no memory for it",
                limits.gather
            );
            Status::resource_exhausted(text)
        })?;
        let Frame { message, bite: taken } = frame.map_err(|unread| match unread {
            Unread::Bad(status) => status,
            Unread::Stalled(time) => {
                Status::resource_exhausted(format!("the request has begun and did not go on within {time:?}"))
            }
            Unread::Broken(error) => Status::cancelled(format!("the request broke: {error}")),
        })?;
        bite = Some(taken);
        let upstream = Box::new(Bound {
            link: Arc::clone(&own.link),
            parts,
            deadline,
            answers: own.answers.clone(),
            bounds: Bounds {
                // containerd is given the time that it needs.
                quiet: limits.gather,
                ..bounds
            },
            held: Arc::clone(&held),
        });
        Ok::<_, Failure>(
            shared
                .options
                .rules
                .call(Call {
                    method,
                    api,
                    message,
                    upstream,
                })
                .await,
        )
    };
    let reply = tokio::select! {
        biased;
        () = client.gone() => return Code::Cancelled,
        reply = asked => reply.unwrap_or_else(Reply::Failed),
        () = deadline.passed() => Reply::Failed(exceeded().into()),
        () = ended.cancelled() => Reply::Failed(stopped()),
    };
    let cut = tokio::select! {
        biased;
        code = client.reply(reply) => return code,
        () = deadline.passed() => exceeded().into(),
        () = ended.cancelled() => stopped(),
    };
    client.fail(&cut)
}

/// Refuses what no gRPC server takes for a call, as containerd does.
fn refuse_http(request: &Request<RecvStream>, client: &mut Client) -> Result<(), Code> {
    let verb = request.method();
    let (http, why) = if verb != Verb::POST {
        (
            StatusCode::METHOD_NOT_ALLOWED,
            format!("received a HEADERS frame with :method {verb} which should be POST"),
        )
    } else if !status::is_grpc(request.headers()) {
        let kind = request.headers().get(http::header::CONTENT_TYPE);
        (
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            format!("invalid gRPC request content-type {kind:?}"),
        )
    } else {
        return Ok(());
    };
    client.refuse(http, why);
    Err(Code::Internal)
}
