//! The forms of the format: where a blob's TOC is, and whether what was found there is what the manifest promises.
//!
//! Nothing here asks a registry. What identifies a layer is the digest in its manifest. It is of the TOC document, or, in
//! zstd:chunked layers of containers/storage, of the compressed TOC: then the compressed TOC is what is kept, so that what is kept
//! can always be compared with the name under which it is kept.

use std::ops::Range;

use bytes::Bytes;
use estargz::digest::Digest;
use estargz::footer::{Footer, FooterError};
use estargz::member::Compression;
use estargz::toc::{MAX_TOC_MEMBER_BYTES, TocError, parse_frame, parse_member};

use super::Expected;
use crate::layer::{Cause, NotLazy};

/// Reads the footer at the end of a blob.
pub(super) fn footer(tail: &[u8], blob_size: u64, layer: Digest) -> Result<Footer, NotLazy> {
    let footer = Footer::parse(tail, blob_size).map_err(|error| match error {
        FooterError::Unsupported { variant } => NotLazy::Unsupported { layer, what: variant },
        error => not_estargz(layer, Box::new(error)),
    })?;
    match &footer.toc {
        Some(toc) => bounded(toc, layer).map(|()| footer),
        None => Ok(footer),
    }
}

/// The footer of a blob whose manifest tells where the TOC is, and the size of the blob; `None` where the footer has to be read.
pub(super) fn told(expected: Expected, blob_size: Option<u64>) -> Option<(Footer, Range<u64>, u64)> {
    let blob_size = blob_size?;
    let footer = expected.position?.footer(blob_size).ok()?;
    let toc = footer.toc.clone()?;
    bounded(&toc, expected.layer).ok()?;
    Some((footer, toc, blob_size))
}

/// Refuses a TOC that is too large.
pub(super) fn bounded(toc: &Range<u64>, layer: Digest) -> Result<(), NotLazy> {
    let length = toc.end.saturating_sub(toc.start);
    if length > MAX_TOC_MEMBER_BYTES {
        let cause = format!("its TOC is said to have {length} bytes, more than {MAX_TOC_MEMBER_BYTES}");
        return Err(not_estargz(layer, cause.into()));
    }
    Ok(())
}

fn not_estargz(layer: Digest, cause: Cause) -> NotLazy {
    NotLazy::NotEstargz { layer, cause }
}

/// The TOC in the form whose digest is the expected one, before anything looks into it.
pub(super) async fn verified(
    compression: Compression,
    compressed: Bytes,
    expected: Expected,
) -> Result<Vec<u8>, NotLazy> {
    let layer = expected.layer;
    let invalid = |cause: Cause| NotLazy::TocInvalid { layer, cause };
    let identify = move || identify(compression, &compressed, &expected.toc);
    let identified = tokio::task::spawn_blocking(identify).await;
    identified
        .map_err(|error| invalid(Box::new(error)))?
        .map_err(|error| invalid(Box::new(error)))?
        .map_err(|found| NotLazy::TocMismatch {
            layer,
            expected: expected.toc,
            found,
        })
}

/// The document that `expected` names, or the digest of what is there instead.
fn identify(
    compression: Compression,
    compressed: &[u8],
    expected: &Digest,
) -> Result<Result<Vec<u8>, Digest>, TocError> {
    let document = match compression {
        Compression::Gzip => parse_member(compressed)?,
        // What the frame holds is looked at when the TOC is parsed.
        Compression::Zstd if Digest::of(compressed) == *expected => return Ok(Ok(compressed.to_vec())),
        Compression::Zstd => parse_frame(compressed)?,
    };
    if document.digest == *expected {
        Ok(Ok(document.json))
    } else {
        Ok(Err(document.digest))
    }
}
