//! Wrong answers on demand: what goes wrong, and for which requests.

use std::io;
use std::ops::Range;
use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Method, StatusCode, header};

/// How long what was sent of a body has to get on its way before the connection is closed.
const FLUSH: Duration = Duration::from_millis(30);

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Answer with this status and a short text, without asking the registry. With 200 that is a page of somebody else's.
    Status(u16),
    /// Answer with this status, and ask to come again after so many seconds.
    Busy {
        /// 429 or 503.
        status: u16,
        /// `Retry-After`.
        retry_after: u32,
    },
    /// Never answer, with the connection left open.
    Silent,
    /// Reset the connection instead of an answer.
    Reset,
    /// Flip every bit of the bytes at these offsets of the blob, whichever range is asked for.
    Corrupt(Range<u64>),
    /// Close the connection after so many bytes of the body.
    Truncate(u64),
    /// Send so many bytes of the body, then nothing, with the connection left open.
    Stall(u64),
    /// Leave out so many bytes at the end of the body and end it in good order.
    Short(u64),
    /// Say in `Content-Range` that the bytes are from so many further on than they are.
    Misplaced(u64),
    /// Answer late.
    Slow(Duration),
    /// Answer a range request with the whole blob (200), as some registries do.
    IgnoreRange,
    /// Answer a request for several ranges with the whole blob, and one for a single range as asked.
    SingleRange,
}

/// Which requests a fault is for.
#[derive(Debug, Clone)]
pub struct FaultRule {
    /// The path has to contain this (a digest, a repository, `/manifests/`).
    pub path_contains: String,
    /// Only this method.
    pub method: Option<Method>,
    /// Only requests with a `Range` header.
    pub ranges_only: bool,
    /// Only requests for any of these bytes.
    pub overlapping: Option<Range<u64>>,
    /// So many matching requests pass unharmed first.
    pub skip: u32,
    /// How many requests it hits; `None` for all.
    pub times: Option<u32>,
    /// What happens to them.
    pub fault: Fault,
}

impl FaultRule {
    /// A rule for every GET whose path contains `path_contains`.
    pub fn get(path_contains: impl Into<String>, fault: Fault) -> Self {
        let path_contains = path_contains.into();
        Self {
            path_contains,
            method: Some(Method::GET),
            ranges_only: false,
            overlapping: None,
            skip: 0,
            times: None,
            fault,
        }
    }

    /// The same rule, for so many requests only.
    #[must_use]
    pub fn times(self, times: u32) -> Self {
        Self {
            times: Some(times),
            ..self
        }
    }

    /// The same rule, for requests for any of these bytes of a blob only.
    #[must_use]
    pub fn overlapping(self, bytes: Range<u64>) -> Self {
        Self {
            overlapping: Some(bytes),
            ..self
        }
    }

    fn matches(&self, method: &Method, path: &str, range: Option<&str>) -> bool {
        let method_fits = self.method.as_ref().is_none_or(|wanted| wanted == method);
        let range_fits = match &self.overlapping {
            None => range.is_some() || !self.ranges_only,
            Some(bytes) => range.and_then(asked).is_some_and(|asked| overlap(&asked, bytes)),
        };
        method_fits && range_fits && path.contains(&self.path_contains) && self.times != Some(0)
    }
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

/// The bytes that a `Range` header asks for, if it is one range from a first byte on.
fn asked(range: &str) -> Option<Range<u64>> {
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let last = if last.is_empty() {
        u64::MAX
    } else {
        last.parse::<u64>().ok()?.saturating_add(1)
    };
    Some(first.parse().ok()?..last)
}

/// The fault for a request, with the rules' counters moved on: of the first rule that matches and does not let it pass.
pub(super) fn pick(rules: &mut [FaultRule], method: &Method, path: &str, headers: &HeaderMap) -> Option<Fault> {
    let range = headers.get(header::RANGE).and_then(|value| value.to_str().ok());
    for rule in rules.iter_mut().filter(|rule| rule.matches(method, path, range)) {
        if rule.skip > 0 {
            rule.skip -= 1;
        } else {
            rule.times = rule.times.map(|left| left - 1);
            return Some(rule.fault.clone());
        }
    }
    None
}

impl Fault {
    /// The answer that this fault gives without asking the registry.
    pub(super) fn answer(&self) -> Option<Response> {
        match self {
            Self::Status(code) => Some(status_only(*code)),
            Self::Busy { status, retry_after } => {
                let mut response = status_only(*status);
                let value = HeaderValue::from(*retry_after);
                response.headers_mut().insert(header::RETRY_AFTER, value);
                Some(response)
            }
            _ => None,
        }
    }

    /// Whether the registry is not to see the request's range.
    pub(super) fn drops_range(&self, headers: &HeaderMap) -> bool {
        let several = || {
            headers
                .get(header::RANGE)
                .is_some_and(|value| value.as_bytes().contains(&b','))
        };
        match self {
            Self::IgnoreRange => true,
            Self::SingleRange => several(),
            _ => false,
        }
    }

    /// Makes the registry's answer, whose first byte is at `start` of the blob, a wrong one.
    pub(super) fn apply(self, mut response: Response, start: u64) -> Response {
        match self {
            Self::Short(bytes) => {
                let length = length(response.headers()).saturating_sub(bytes);
                response
                    .headers_mut()
                    .insert(header::CONTENT_LENGTH, HeaderValue::from(length));
                response.map(|body| Body::from_stream(head(body, length)))
            }
            Self::Misplaced(by) => {
                if let Some(value) = misplaced(response.headers(), by) {
                    response.headers_mut().insert(header::CONTENT_RANGE, value);
                }
                response
            }
            Self::Corrupt(range) => response.map(|body| corrupt(body, start, range)),
            Self::Truncate(after) => {
                let end = stream::once(async {
                    tokio::time::sleep(FLUSH).await;
                    Err(io::ErrorKind::ConnectionReset.into())
                });
                response.map(|body| Body::from_stream(head(body, after).chain(end)))
            }
            Self::Stall(after) => response.map(|body| Body::from_stream(head(body, after).chain(stream::pending()))),
            _ => response,
        }
    }
}

fn status_only(code: u16) -> Response {
    let status = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let mut response = (status, format!("injected fault: {status}\n")).into_response();
    if status == StatusCode::UNAUTHORIZED {
        // A 401 without a challenge is no HTTP.
        response.headers_mut().insert(
            header::WWW_AUTHENTICATE,
            HeaderValue::from_static("Basic realm=\"injected\""),
        );
    }
    response
}

fn length(headers: &HeaderMap) -> u64 {
    let value = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok());
    value.and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn misplaced(headers: &HeaderMap, by: u64) -> Option<HeaderValue> {
    let text = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let moved = |text: &str| Some(text.parse::<u64>().ok()?.saturating_add(by));
    HeaderValue::from_str(&format!("bytes {}-{}/{size}", moved(first)?, moved(last)?)).ok()
}

fn corrupt(body: Body, start: u64, range: Range<u64>) -> Body {
    let mut position = start;
    let frames = body.into_data_stream().map(move |frame| {
        let bytes = flip(frame?, position, &range);
        position += bytes.len() as u64;
        Ok::<_, axum::Error>(bytes)
    });
    Body::from_stream(frames)
}

/// The first `limit` bytes of a body.
fn head(body: Body, limit: u64) -> impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static {
    body.into_data_stream().scan(limit, |left, frame| {
        let next = frame.map_err(io::Error::other).map(|mut bytes| {
            bytes.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= bytes.len() as u64;
            bytes
        });
        let ended = matches!(&next, Ok(bytes) if bytes.is_empty());
        std::future::ready((!ended).then_some(next))
    })
}

fn flip(bytes: Bytes, position: u64, range: &Range<u64>) -> Bytes {
    let end = position + bytes.len() as u64;
    if range.end <= position || range.start >= end {
        return bytes;
    }
    let mut copy = bytes.to_vec();
    for (index, byte) in copy.iter_mut().enumerate() {
        if range.contains(&(position + index as u64)) {
            *byte = !*byte;
        }
    }
    copy.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(range: Option<&str>) -> HeaderMap {
        let range = range.map(|range| (header::RANGE, range.parse().unwrap()));
        range.into_iter().collect()
    }

    fn status(code: u16) -> Option<Fault> {
        Some(Fault::Status(code))
    }

    #[test]
    fn a_rule_skips_then_hits_so_many_times() {
        let mut rules = vec![FaultRule {
            skip: 1,
            ..FaultRule::get("/blobs/", Fault::Status(500)).times(2)
        }];
        let mut ask = || pick(&mut rules, &Method::GET, "/v2/a/blobs/sha256:00", &headers(None));
        let answers: Vec<_> = (0..5).map(|_| ask().is_some()).collect();
        assert_eq!(answers, [false, true, true, false, false]);
    }

    #[test]
    fn rules_for_the_same_requests_take_their_turns() {
        let first = FaultRule::get("/blobs/", Fault::Status(500)).times(1);
        let third = FaultRule {
            skip: 1,
            ..FaultRule::get("/blobs/", Fault::Status(429)).times(1)
        };
        let mut rules = vec![first, third];
        let mut ask = || pick(&mut rules, &Method::GET, "/v2/a/blobs/x", &headers(None));
        assert_eq!([ask(), ask(), ask(), ask()], [status(500), None, status(429), None]);
    }

    #[test]
    fn a_rule_leaves_other_requests_alone() {
        let mut rules = vec![FaultRule {
            ranges_only: true,
            ..FaultRule::get("/blobs/", Fault::Status(500))
        }];
        let mut ask = |method: &Method, path: &str, range| pick(&mut rules, method, path, &headers(range));
        let range = Some("bytes=0-9");
        assert_eq!(ask(&Method::GET, "/v2/a/manifests/x", range), None);
        assert_eq!(ask(&Method::HEAD, "/v2/a/blobs/x", range), None);
        assert_eq!(ask(&Method::GET, "/v2/a/blobs/x", None), None);
        assert_eq!(ask(&Method::GET, "/v2/a/blobs/x", range), status(500));
    }

    #[test]
    fn a_rule_can_be_for_some_bytes() {
        let mut rules = vec![FaultRule::get("/blobs/", Fault::Status(500)).overlapping(10..20)];
        let mut ask = |range| pick(&mut rules, &Method::GET, "/blobs/x", &headers(Some(range))).is_some();
        let answers = [
            "bytes=0-9",
            "bytes=0-10",
            "bytes=19-",
            "bytes=20-30",
            "bytes=-5",
            "lines=10-11",
        ]
        .map(&mut ask);
        assert_eq!(answers, [false, true, true, false, false, false]);
    }

    #[test]
    fn only_the_named_bytes_are_flipped() {
        let flipped = flip(Bytes::from_static(&[0, 1, 2, 3]), 10, &(11..13));
        assert_eq!(&flipped[..], [0, !1, !2, 3]);
        assert_eq!(&flip(Bytes::from_static(&[7]), 5, &(6..9))[..], [7]);
    }

    #[test]
    fn a_range_is_said_to_be_elsewhere() {
        let headers = HeaderMap::from_iter([(header::CONTENT_RANGE, HeaderValue::from_static("bytes 5-9/100"))]);
        assert_eq!(misplaced(&headers, 7).unwrap(), "bytes 12-16/100");
    }
}
