//! Parts of blobs by HTTP range requests: the hot path of the fetch engine.

use std::fmt;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures_util::Stream;
use http::header::{CONTENT_ENCODING, CONTENT_RANGE, HeaderValue, RANGE};
use http::{HeaderMap, Method, StatusCode};
use url::Url;

use crate::auth::Scope;
use crate::body;
use crate::client::Client;
use crate::digest::Digest;
use crate::endpoint::Endpoint;
use crate::error::{Error, Fault};
use crate::exchange::{Answer, Ask};
use crate::reference::Reference;
use crate::turns::Need;

/// Which part of a blob.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RangeSpec {
    /// Bytes `start..end`; a blob that ends earlier gives less.
    From(Range<u64>),
    /// The last `n` bytes; a smaller blob gives all of itself.
    Suffix(u64),
}

impl fmt::Display for RangeSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::From(range) => write!(f, "bytes={}-{}", range.start, range.end.saturating_sub(1)),
            Self::Suffix(length) => write!(f, "bytes=-{length}"),
        }
    }
}

/// A part of a blob on its way: bytes `start..end` of it.
pub struct RangeResponse {
    /// Offset of the first byte.
    pub start: u64,
    /// Offset behind the last byte.
    pub end: u64,
    /// Size of the whole blob, if the server says it.
    pub total: Option<u64>,
    /// The server ignored the range and sends the blob from its start; what was not asked for is read and dropped.
    pub ranges_ignored: bool,
    response: reqwest::Response,
    /// Bytes before `start` that a server without ranges still has to send.
    skip: u64,
    got: u64,
    idle: Duration,
    host: String,
    asked: String,
    /// Where the bytes come from, if that is not the host itself.
    edge: Option<Box<Edge>>,
}

/// The kept address of a store, which is forgotten when its bytes are of no use.
struct Edge {
    client: Client,
    blob: String,
    url: Url,
}

impl fmt::Debug for RangeResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The address that answers may be signed.
        let mut shown = f.debug_struct("RangeResponse");
        let shown = shown.field("start", &self.start).field("end", &self.end);
        shown.field("asked", &self.asked).finish_non_exhaustive()
    }
}

/// What the address of a blob at a host is kept under.
fn kept_as(key: &str, image: &Reference, digest: &Digest) -> String {
    format!("{key} {}@{digest}", image.repository())
}

impl Client {
    /// Forgets to where a host sent for a blob, so that it is asked anew: what came from there was wrong.
    pub(crate) fn forget_address(&self, key: &str, image: &Reference, digest: &Digest) {
        let blob = kept_as(key, image, digest);
        if let Some(url) = self.urls().find(&blob) {
            self.urls().drop_stale(&blob, &url);
        }
    }

    /// Asks for a part of a blob, one host of the image after the other. The bytes are unverified: the caller checks them against the
    /// layer's TOC.
    ///
    /// Retries until the head of an answer is there; what the body then does is the caller's to handle, because only
    /// the caller knows which part is already good.
    pub async fn blob_range(
        &self,
        image: &Reference,
        digest: &Digest,
        range: RangeSpec,
    ) -> Result<RangeResponse, Error> {
        let asked = format!("read of {range} of blob {digest} of {}", image.repository());
        let mut turns = self.turns(image, Need::Pull, &asked)?;
        loop {
            let (endpoint, attempts) = (turns.host(), turns.attempts());
            match self.range_at(endpoint, image, digest, range.clone(), attempts).await {
                Ok(response) => {
                    turns.succeeded();
                    return Ok(response);
                }
                Err(error) => turns.failed(error)?,
            }
        }
    }

    /// Asks one host for a part of a blob.
    pub(crate) async fn range_at(
        &self,
        endpoint: &Endpoint,
        image: &Reference,
        digest: &Digest,
        range: RangeSpec,
        attempts: u32,
    ) -> Result<RangeResponse, Error> {
        let asked = format!("read of {range} of blob {digest} of {}", image.repository());
        if matches!(&range, RangeSpec::From(range) if range.is_empty()) || range == RangeSpec::Suffix(0) {
            return Err(bad_range(&range, "it is empty").at(&endpoint.name, asked));
        }
        let blob = kept_as(endpoint.key(), image, digest);
        let origin_ask = blob_ask(endpoint, image, digest, asked)?;
        let value = HeaderValue::from_str(&range.to_string());
        let value = value.map_err(|_| bad_range(&range, "not a header").at(&endpoint.name, &origin_ask.asked))?;
        let mut ask = origin_ask.header(RANGE, value);
        let origin_url = ask.url.clone();
        let mut attempt = 0;
        loop {
            let kept = self.urls().find(&blob);
            ask.url = kept.clone().unwrap_or_else(|| origin_url.clone());
            let fault = match self.send_once(endpoint, &ask).await {
                Ok(answer) => {
                    if !endpoint.is_own(&answer.url) && kept.as_ref() != Some(&answer.url) {
                        self.urls().keep(blob.clone(), answer.url.clone());
                    }
                    let edge = (!endpoint.is_own(&answer.url)).then(|| {
                        Box::new(Edge {
                            client: self.clone(),
                            blob: blob.clone(),
                            url: answer.url.clone(),
                        })
                    });
                    match self.fit(endpoint, &ask, &range, answer) {
                        Ok(response) => return Ok(RangeResponse { edge, ..response }),
                        Err(fault) => fault,
                    }
                }
                Err(fault) => fault,
            };
            if let Some(stale) = kept {
                // Signed addresses expire and stores die: once more through the registry. That attempt keeps a new
                // address only if it succeeds, so this cannot go round in circles.
                self.urls().drop_stale(&blob, &stale);
                if !fault.is_transient() && attempt == 0 {
                    attempt += 1;
                    continue;
                }
            }
            self.pause(&mut attempt, attempts, fault)
                .await
                .map_err(|fault| fault.at(&endpoint.name, &ask.asked))?;
        }
    }

    /// Checks an answer against what was asked.
    fn fit(&self, endpoint: &Endpoint, ask: &Ask, range: &RangeSpec, answer: Answer) -> Result<RangeResponse, Fault> {
        let headers = answer.response.headers();
        check_coding(headers)?;
        let length = answer.response.content_length();
        let ranges_ignored = answer.response.status() != StatusCode::PARTIAL_CONTENT;
        let extent = if ranges_ignored {
            whole(range, length)?
        } else {
            partial(range, headers, length)?
        };
        Ok(RangeResponse {
            start: extent.start,
            end: extent.end,
            total: extent.total,
            ranges_ignored,
            response: answer.response,
            skip: if ranges_ignored { extent.start } else { 0 },
            got: 0,
            idle: self.idle(),
            host: endpoint.name.clone(),
            asked: ask.asked.clone(),
            edge: None,
        })
    }
}

pub(crate) fn blob_ask(endpoint: &Endpoint, image: &Reference, digest: &Digest, asked: String) -> Result<Ask, Error> {
    match endpoint.url(image, &format!("blobs/{digest}")) {
        Ok(url) => Ok(Ask::new(
            Method::GET,
            url,
            Scope::pull(&endpoint.repository(image)),
            asked,
        )),
        Err(fault) => Err(fault.at(&endpoint.name, asked)),
    }
}

impl RangeResponse {
    /// Bytes that the body holds.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether the body holds nothing; it never does.
    pub fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// The next piece; `None` exactly when all of `start..end` has been given.
    ///
    /// A piece may be empty: a server that ignores ranges sends much that is dropped, and a caller that bounds the time
    /// without progress has to see that there is some.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, Error> {
        self.piece().await.map_err(|fault| {
            // The next request may be sent elsewhere, and need not fail in the same way.
            if let Some(edge) = self.edge.take() {
                edge.client.urls().drop_stale(&edge.blob, &edge.url);
            }
            fault.at(&self.host, &self.asked)
        })
    }

    /// The whole part. Its size is what was asked for at most.
    pub async fn bytes(mut self) -> Result<Bytes, Error> {
        let mut all = Vec::new();
        while let Some(piece) = self.chunk().await? {
            if all.is_empty() && piece.len() as u64 == self.len() {
                return Ok(piece);
            }
            all.extend_from_slice(&piece);
        }
        Ok(all.into())
    }

    /// The pieces as a stream that ends after the first error; like those of [`Self::chunk`], they may be empty.
    pub fn into_stream(self) -> impl Stream<Item = Result<Bytes, Error>> + Send {
        futures_util::stream::try_unfold(self, |mut this| async move {
            Ok(this.chunk().await?.map(|piece| (piece, this)))
        })
    }

    async fn piece(&mut self) -> Result<Option<Bytes>, Fault> {
        let left = self.len() - self.got;
        if left == 0 && self.ranges_ignored {
            return Ok(None);
        }
        let Some(mut piece) = body::next(&mut self.response, self.idle).await? else {
            return match left {
                0 => Ok(None),
                _ => Err(Fault::Truncated {
                    got: self.got,
                    expected: self.len(),
                }),
            };
        };
        let skipped = self.skip.min(piece.len() as u64);
        self.skip -= skipped;
        piece = piece.slice(usize::try_from(skipped).expect("not more than the piece's length")..);
        if piece.len() as u64 > left {
            if !self.ranges_ignored {
                return Err(Fault::TooLarge { limit: self.len() });
            }
            piece.truncate(usize::try_from(left).expect("less than the piece's length"));
        }
        self.got += piece.len() as u64;
        Ok(Some(piece))
    }
}

struct Extent {
    start: u64,
    end: u64,
    total: Option<u64>,
}

/// The part of a whole body (status 200) that was asked for.
fn whole(range: &RangeSpec, length: Option<u64>) -> Result<Extent, Fault> {
    let total = length.ok_or_else(|| bad_range(range, "the server ignores ranges and does not say the blob's size"))?;
    let (start, end) = match range {
        RangeSpec::From(range) => (range.start, range.end.min(total)),
        RangeSpec::Suffix(n) => (total.saturating_sub(*n), total),
    };
    if start >= end {
        return Err(bad_range(range, &format!("the blob has {total} bytes")));
    }
    Ok(Extent {
        start,
        end,
        total: Some(total),
    })
}

/// The part that a 206 announces, if it is the one asked for.
fn partial(range: &RangeSpec, headers: &HeaderMap, length: Option<u64>) -> Result<Extent, Fault> {
    let bad = |reason: &str| bad_range(range, reason);
    let value = headers
        .get(CONTENT_RANGE)
        .ok_or_else(|| bad("206 without a content-range"))?;
    let text = value.to_str().unwrap_or_default();
    let extent = content_range(text).ok_or_else(|| bad(&format!("content-range {text:?} is nonsense")))?;
    let fits = match range {
        // Less than asked for is right only at the end of the blob.
        RangeSpec::From(range) => {
            extent.start == range.start
                && (extent.end == range.end || (extent.end < range.end && extent.total == Some(extent.end)))
        }
        RangeSpec::Suffix(n) => extent
            .total
            .is_some_and(|total| extent.end == total && extent.start == total.saturating_sub(*n)),
    };
    if !fits {
        return Err(bad(&format!("the server sends content-range {text:?}")));
    }
    if length.is_some_and(|length| length != extent.end - extent.start) {
        return Err(bad(&format!("content-length does not fit content-range {text:?}")));
    }
    Ok(extent)
}

/// `bytes a-b/total` with `*` for an unknown total.
fn content_range(text: &str) -> Option<Extent> {
    let (range, total) = text.trim().strip_prefix("bytes ")?.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let number = |text: &str| {
        text.bytes()
            .all(|b| b.is_ascii_digit())
            .then(|| text.parse::<u64>().ok())
            .flatten()
    };
    let (start, end) = (number(first)?, number(last)?.checked_add(1)?);
    let total = if total == "*" { None } else { Some(number(total)?) };
    (start < end && total.is_none_or(|total| end <= total)).then_some(Extent { start, end, total })
}

/// Refuses content codings, which were not asked for and would change every offset.
pub(crate) fn check_coding(headers: &HeaderMap) -> Result<(), Fault> {
    match headers.get(CONTENT_ENCODING).map(HeaderValue::as_bytes) {
        None | Some(b"" | b"identity") => Ok(()),
        Some(coding) => {
            let reason = format!("{:?} was not asked for", String::from_utf8_lossy(coding));
            Err(Fault::Header {
                name: "content-encoding",
                reason,
            })
        }
    }
}

fn bad_range(range: &RangeSpec, reason: &str) -> Fault {
    Fault::Range {
        asked: range.to_string(),
        reason: reason.chars().take(300).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_parse_strictly() {
        let parse = |text: &str| content_range(text).map(|extent| (extent.start, extent.end, extent.total));
        assert_eq!(parse("bytes 0-0/1"), Some((0, 1, Some(1))));
        assert_eq!(parse("bytes 5-9/*"), Some((5, 10, None)));
        for bad in [
            "",
            "bytes",
            "bytes 0-0",
            "bytes 1-0/9",
            "bytes 0-9/9",
            "bytes -1-3/9",
            "bytes +1-3/9",
            "bytes */9",
            "bytes 0-18446744073709551615/*",
            "bits 0-0/1",
            "bytes 0-0/x",
        ] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn answers_must_be_what_was_asked_for() {
        let headers = |text: &str| HeaderMap::from_iter([(CONTENT_RANGE, HeaderValue::from_str(text).unwrap())]);
        let fits = |range: &RangeSpec, text: &str| partial(range, &headers(text), None).is_ok();
        let range = RangeSpec::From(10..20);
        assert!(fits(&range, "bytes 10-19/100") && fits(&range, "bytes 10-14/15") && fits(&range, "bytes 10-19/*"));
        assert!(!fits(&range, "bytes 0-9/100") && !fits(&range, "bytes 10-14/100") && !fits(&range, "bytes 10-29/100"));
        assert!(!fits(&range, "bytes 10-14/*"));
        let suffix = RangeSpec::Suffix(10);
        assert!(fits(&suffix, "bytes 90-99/100") && fits(&suffix, "bytes 0-4/5"));
        assert!(
            !fits(&suffix, "bytes 0-9/100") && !fits(&suffix, "bytes 90-99/*") && !fits(&suffix, "bytes 89-98/100")
        );
        assert!(partial(&range, &headers("bytes 10-19/100"), Some(11)).is_err());
        assert!(whole(&range, None).is_err() && whole(&range, Some(10)).is_err());
        assert_eq!(whole(&suffix, Some(3)).unwrap().start, 0);
    }
}
