//! The gzip member that carries the TOC: a tar stream with one entry, which also ends the layer's tar stream.

use std::io::{self, Read};

use flate2::bufread::GzDecoder;

use super::{MAX_TOC_BYTES, MAX_TOC_MEMBER_BYTES, TOC_TAR_NAME, TocError};
use crate::digest::Digest;

/// What the tar framing may add to the TOC itself: headers, an extended header, padding, the end of the archive.
const TAR_OVERHEAD: u64 = 64 << 10;

/// The TOC as it stands in a layer, not yet read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocDocument {
    /// The JSON bytes.
    pub json: Vec<u8>,
    /// Their digest, which identifies the layer. Compare it before reading the document.
    pub digest: Digest,
}

/// Unfolds the TOC member, the bytes at [`crate::footer::Footer::toc`], or a layer of a TOC image.
///
/// Memory is bounded by [`MAX_TOC_BYTES`] whatever the member holds.
pub fn parse_member(member: &[u8]) -> Result<TocDocument, TocError> {
    if member.len() as u64 > MAX_TOC_MEMBER_BYTES {
        return Err(TocError::TooLarge {
            limit: MAX_TOC_MEMBER_BYTES,
            form: "compressed",
        });
    }
    let broken = |source| TocError::Member {
        compressed: member.len(),
        source,
    };
    let limit = MAX_TOC_BYTES as u64;
    let mut tar = tar::Archive::new(GzDecoder::new(member).take(limit + TAR_OVERHEAD));
    let mut entries = tar.entries().map_err(broken)?;
    let mut entry = match entries.next() {
        Some(entry) => entry.map_err(broken)?,
        None => return Err(TocError::WrongEntry { found: String::new() }),
    };
    let name = entry.path_bytes();
    if *name != *TOC_TAR_NAME.as_bytes() {
        return Err(TocError::WrongEntry {
            found: name
                .iter()
                .take(100)
                .copied()
                .collect::<Vec<_>>()
                .escape_ascii()
                .to_string(),
        });
    }
    let size = entry.size();
    if size > limit {
        return Err(TocError::TooLarge {
            limit,
            form: "uncompressed",
        });
    }
    let mut json = Vec::new();
    let read = entry.read_to_end(&mut json).map_err(broken)?;
    if read as u64 != size {
        return Err(broken(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            format!("{read} of {size} bytes are there"),
        )));
    }
    drop(entry);
    // The member's checksum stands behind what ends the archive.
    io::copy(&mut tar.into_inner().take(TAR_OVERHEAD), &mut io::sink()).map_err(broken)?;
    Ok(TocDocument {
        digest: Digest::of(&json),
        json,
    })
}

/// The uncompressed TOC member: header, `json`, padding, and the end of the layer's tar stream.
///
/// The header says nothing of owner, mode or time; byte for byte what the reference writer emits.
pub fn encode_member(json: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.set_path(TOC_TAR_NAME).expect("a short plain name fits a header");
    header.set_size(json.len() as u64);
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
        .set_device_major(0)
        .expect("the header is of the form that has device numbers");
    header
        .set_device_minor(0)
        .expect("the header is of the form that has device numbers");
    header.set_cksum();
    // Go ends the checksum with NUL and space, the tar crate spends both on another digit.
    let sum = header.cksum().expect("the checksum was just set");
    header
        .as_old_mut()
        .cksum
        .copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    let mut tar = Vec::with_capacity(json.len() + 4 * 512);
    tar.extend_from_slice(header.as_bytes());
    tar.extend_from_slice(json);
    tar.resize(tar.len().next_multiple_of(512) + 1024, 0);
    tar
}
