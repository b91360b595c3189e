//! Records of the journal as bytes: the file's [`MAGIC`], then for each record its length (4 bytes, little endian), the
//! first 8 bytes of the SHA-256 of what follows, and a protobuf message. Pure functions; input may be damaged anywhere.

use prost::Message;
use sha2::{Digest as _, Sha256};

/// How a journal begins.
pub const MAGIC: &[u8; 8] = b"HSADOPT1";

/// The longest record: a pod's configuration is at most as long as the largest message that containerd takes.
pub const MAX_RECORD_BYTES: usize = (16 << 20) + 4096;

const LENGTH_BYTES: usize = 4;
const CHECKSUM_BYTES: usize = 8;

/// An adoption.
#[derive(Clone, PartialEq, Message)]
pub struct AdoptRecord {
    /// The sandbox.
    #[prost(string, tag = "1")]
    pub id: String,
    /// The handler that the pod names.
    #[prost(string, tag = "2")]
    pub runtime_handler: String,
    /// The pod's configuration, encoded.
    #[prost(bytes = "vec", tag = "3")]
    pub config: Vec<u8>,
    /// Nanoseconds since the epoch.
    #[prost(int64, tag = "4")]
    pub adopted_at: i64,
}

/// What happened to a sandbox.
#[derive(Debug, Clone, PartialEq)]
pub enum Record {
    /// It becomes a pod's.
    Adopt(AdoptRecord),
    /// It does not, after all, and is no hull any more.
    Aborted(String),
    /// containerd's record is the pod's, too.
    Branded(String),
    /// It does not exist any more.
    Forgotten(String),
    /// It looks as its pod's sandbox should; what comes next is that the pod is told.
    Whole(String),
}

#[derive(Clone, PartialEq, Message)]
struct Envelope {
    #[prost(oneof = "Body", tags = "1, 2, 3, 4, 5")]
    body: Option<Body>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum Body {
    #[prost(message, tag = "1")]
    Adopt(AdoptRecord),
    #[prost(string, tag = "2")]
    Aborted(String),
    #[prost(string, tag = "3")]
    Branded(String),
    #[prost(string, tag = "4")]
    Forgotten(String),
    #[prost(string, tag = "5")]
    Whole(String),
}

/// Where a journal stops making sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damage {
    /// Offset of the first byte that does not.
    pub at: usize,
    /// What is wrong there.
    pub reason: &'static str,
}

/// Appends a record; fails with its length if that is too long.
pub fn encode(record: &Record, out: &mut Vec<u8>) -> Result<(), usize> {
    let body = match record.clone() {
        Record::Adopt(adopt) => Body::Adopt(adopt),
        Record::Aborted(id) => Body::Aborted(id),
        Record::Branded(id) => Body::Branded(id),
        Record::Forgotten(id) => Body::Forgotten(id),
        Record::Whole(id) => Body::Whole(id),
    };
    let payload = Envelope { body: Some(body) }.encode_to_vec();
    let length = u32::try_from(payload.len()).map_err(|_| payload.len())?;
    if payload.len() > MAX_RECORD_BYTES {
        return Err(payload.len());
    }
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(&checksum(&payload));
    out.extend_from_slice(&payload);
    Ok(())
}

/// The records of a journal up to the first damage.
#[must_use]
pub fn decode(journal: &[u8]) -> (Vec<Record>, Option<Damage>) {
    let mut records = Vec::new();
    if journal.is_empty() {
        return (records, None);
    }
    let Some(mut rest) = journal.strip_prefix(MAGIC) else {
        let reason = "no journal of ours begins so";
        return (records, Some(Damage { at: 0, reason }));
    };
    while !rest.is_empty() {
        match decode_one(rest) {
            Ok((record, behind)) => {
                records.push(record);
                rest = behind;
            }
            Err(reason) => {
                let at = journal.len() - rest.len();
                return (records, Some(Damage { at, reason }));
            }
        }
    }
    (records, None)
}

fn decode_one(bytes: &[u8]) -> Result<(Record, &[u8]), &'static str> {
    const CUT: &str = "a record is cut off";
    let (length, rest) = bytes.split_first_chunk::<LENGTH_BYTES>().ok_or(CUT)?;
    let (expected, rest) = rest.split_first_chunk::<CHECKSUM_BYTES>().ok_or(CUT)?;
    let length = usize::try_from(u32::from_le_bytes(*length)).unwrap_or(usize::MAX);
    if length > MAX_RECORD_BYTES {
        return Err("a record is too long");
    }
    let (payload, rest) = rest.split_at_checked(length).ok_or(CUT)?;
    if checksum(payload) != *expected {
        return Err("a record's checksum is wrong");
    }
    let envelope = Envelope::decode(payload).map_err(|_| "a record is not one")?;
    let record = match envelope.body {
        Some(Body::Adopt(adopt)) => Record::Adopt(adopt),
        Some(Body::Aborted(id)) => Record::Aborted(id),
        Some(Body::Branded(id)) => Record::Branded(id),
        Some(Body::Forgotten(id)) => Record::Forgotten(id),
        Some(Body::Whole(id)) => Record::Whole(id),
        None => return Err("a record of an unknown kind"),
    };
    Ok((record, rest))
}

fn checksum(payload: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let digest = Sha256::digest(payload);
    let mut first = [0; CHECKSUM_BYTES];
    first.copy_from_slice(&digest[..CHECKSUM_BYTES]);
    first
}
