//! gRPC statuses in HTTP/2 headers.

use h2::Reason;
use http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};
use tonic::{Code, Status};

use super::Failure;

pub(super) const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
pub(super) const GRPC_ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
pub(super) const GRPC_ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");

const DETAILS: &str = "grpc-status-details-bin";
const GRPC: HeaderValue = HeaderValue::from_static("application/grpc");

/// Whether a request or an answer is gRPC's, as gRPC servers decide it.
pub(super) fn is_grpc(headers: &HeaderMap) -> bool {
    let Some(rest) = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok())
        .and_then(|kind| {
            let (head, rest) = kind.split_at_checked(GRPC.len())?;
            head.eq_ignore_ascii_case("application/grpc").then_some(rest)
        })
    else {
        return false;
    };
    rest.is_empty() || rest.starts_with(['+', ';'])
}

/// The status in trailers, or in the headers of an answer without any. Details stay where they are.
pub(super) fn read(headers: &HeaderMap) -> Option<Status> {
    headers.get(GRPC_STATUS)?;
    // What is not base64 would be a panic there.
    let mut headers = headers.clone();
    headers.remove(DETAILS);
    Status::from_header_map(&headers)
}

/// The code in trailers, or in the headers of an answer without any.
pub(super) fn code(headers: &HeaderMap) -> Option<Code> {
    headers.get(GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
}

/// What a reset means, as gRPC clients take it.
pub(super) fn code_of(reason: Reason) -> Code {
    match reason {
        Reason::REFUSED_STREAM => Code::Unavailable,
        Reason::CANCEL => Code::Cancelled,
        Reason::ENHANCE_YOUR_CALM => Code::ResourceExhausted,
        Reason::INADEQUATE_SECURITY => Code::PermissionDenied,
        _ => Code::Internal,
    }
}

/// What an answer without a gRPC status means, as gRPC clients take it.
pub(super) fn of_http(status: StatusCode) -> Status {
    let code = match status.as_u16() {
        400 => Code::Internal,
        401 => Code::Unauthenticated,
        403 => Code::PermissionDenied,
        404 => Code::Unimplemented,
        429 | 502 | 503 | 504 => Code::Unavailable,
        _ => Code::Unknown,
    };
    Status::new(
        code,
        format!("containerd answers with HTTP status {status} and without a gRPC status"),
    )
}

/// Trailers that say `status`.
pub(super) fn trailers(status: &Status) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_err() {
        trailers.insert(GRPC_STATUS, HeaderValue::from(status.code() as i32));
    }
    trailers
}

/// The trailers of a failed answer whose headers are sent.
pub(super) fn failed_trailers(failure: &Failure) -> HeaderMap {
    match failure {
        Failure::Ours(status) => trailers(status),
        Failure::Answered { status, metadata } => {
            let mut trailers = metadata.clone();
            for header in [CONTENT_TYPE, CONTENT_LENGTH, GRPC_ENCODING, GRPC_ACCEPT_ENCODING] {
                trailers.remove(header);
            }
            if !trailers.contains_key(GRPC_STATUS) {
                trailers.insert(GRPC_STATUS, HeaderValue::from(status.code() as i32));
            }
            trailers
        }
    }
}

/// An answer without a body: `headers`, which hold the status.
pub(super) fn bare(headers: HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.headers_mut() = headers;
    response.headers_mut().insert(CONTENT_TYPE, GRPC);
    response
}

/// The headers of an answer that has messages.
pub(super) fn head(mut metadata: HeaderMap) -> Response<()> {
    // Messages are sent as they are.
    metadata.remove(GRPC_ENCODING);
    metadata.remove(CONTENT_LENGTH);
    bare(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(kind: &str) -> HeaderMap {
        HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_str(kind).unwrap())])
    }

    #[test]
    fn grpc_is_told_from_http() {
        for kind in [
            "application/grpc",
            "application/grpc+proto",
            "application/grpc;x=y",
            "Application/GRPC",
        ] {
            assert!(is_grpc(&headers(kind)), "{kind}");
        }
        for kind in [
            "application/grpcx",
            "application/json",
            "application/grp",
            "",
            "applicätion/grpc",
        ] {
            assert!(!is_grpc(&headers(kind)), "{kind}");
        }
        assert!(!is_grpc(&HeaderMap::new()));
    }

    #[test]
    fn damaged_details_are_no_panic() {
        let mut trailers = trailers(&Status::not_found("a\nb ü"));
        trailers.insert(DETAILS, HeaderValue::from_static("%%%"));
        let status = read(&trailers).unwrap();
        assert_eq!((status.code(), status.message()), (Code::NotFound, "a\nb ü"));
        let failure = Failure::Answered {
            status,
            metadata: trailers,
        };
        assert_eq!(failed_trailers(&failure).get(DETAILS).unwrap(), "%%%");
    }
}
