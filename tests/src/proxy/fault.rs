//! Wrong answers on demand.

use std::io;
use std::ops::Range;
use std::time::Duration;

use axum::body::Body;
use bytes::Bytes;
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, Method, header};

/// What goes wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// Answer with this status and a short text, without asking the registry.
    Status(u16),
    /// Flip every bit of the bytes at these offsets of the blob, whichever range is asked for.
    Corrupt(Range<u64>),
    /// Close the connection after so many bytes of the body.
    Truncate(u64),
    /// Send so many bytes of the body, then nothing, with the connection left open.
    Stall(u64),
    /// Answer late.
    Slow(Duration),
    /// Answer a range request with the whole blob (200), as some registries do.
    IgnoreRange,
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

    fn matches(&self, method: &Method, path: &str, ranged: bool) -> bool {
        let method_fits = self.method.as_ref().is_none_or(|wanted| wanted == method);
        method_fits && path.contains(&self.path_contains) && (ranged || !self.ranges_only) && self.times != Some(0)
    }
}

/// The fault for a request, with the rule's counters moved on.
pub(super) fn pick(rules: &mut [FaultRule], method: &Method, path: &str, ranged: bool) -> Option<Fault> {
    let rule = rules.iter_mut().find(|rule| rule.matches(method, path, ranged))?;
    if rule.skip > 0 {
        rule.skip -= 1;
        return None;
    }
    rule.times = rule.times.map(|left| left - 1);
    Some(rule.fault.clone())
}

/// Offset in the blob of the body's first byte, from `Content-Range`.
pub(super) fn range_start(headers: &HeaderMap) -> u64 {
    let value = headers.get(header::CONTENT_RANGE).and_then(|value| value.to_str().ok());
    let start = value
        .and_then(|text| text.strip_prefix("bytes "))
        .and_then(|text| text.split('-').next());
    start.and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}

/// Wraps a body whose first byte is at `start` of the blob.
pub(super) fn apply(body: Body, fault: Option<Fault>, start: u64) -> Body {
    match fault {
        Some(Fault::Corrupt(range)) => {
            let mut position = start;
            let frames = body.into_data_stream().map(move |frame| {
                let bytes = flip(frame?, position, &range);
                position += bytes.len() as u64;
                Ok::<_, axum::Error>(bytes)
            });
            Body::from_stream(frames)
        }
        Some(Fault::Truncate(after)) => {
            Body::from_stream(head(body, after).chain(stream::once(async { Err(broken()) })))
        }
        Some(Fault::Stall(after)) => Body::from_stream(head(body, after).chain(stream::pending())),
        _ => body,
    }
}

fn broken() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
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

    #[test]
    fn a_rule_skips_then_hits_so_many_times() {
        let mut rules = vec![FaultRule {
            skip: 1,
            ..FaultRule::get("/blobs/", Fault::Status(500)).times(2)
        }];
        let mut ask = || pick(&mut rules, &Method::GET, "/v2/a/blobs/sha256:00", false);
        let answers: Vec<_> = (0..5).map(|_| ask().is_some()).collect();
        assert_eq!(answers, [false, true, true, false, false]);
    }

    #[test]
    fn a_rule_leaves_other_requests_alone() {
        let mut rules = vec![FaultRule {
            ranges_only: true,
            ..FaultRule::get("/blobs/", Fault::Status(500))
        }];
        assert_eq!(pick(&mut rules, &Method::GET, "/v2/a/manifests/x", true), None);
        assert_eq!(pick(&mut rules, &Method::HEAD, "/v2/a/blobs/x", true), None);
        assert_eq!(pick(&mut rules, &Method::GET, "/v2/a/blobs/x", false), None);
        assert_eq!(
            pick(&mut rules, &Method::GET, "/v2/a/blobs/x", true),
            Some(Fault::Status(500))
        );
    }

    #[test]
    fn only_the_named_bytes_are_flipped() {
        let flipped = flip(Bytes::from_static(&[0, 1, 2, 3]), 10, &(11..13));
        assert_eq!(&flipped[..], [0, !1, !2, 3]);
        assert_eq!(&flip(Bytes::from_static(&[7]), 5, &(6..9))[..], [7]);
    }
}
