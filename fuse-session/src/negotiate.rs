//! The INIT handshake: what the kernel offers, what we ask for, what both agreed on.
//!
//! Runs once per connection, before the workers start. The outcome, [`Negotiated`], is all a later process needs to
//! serve the same connection without a handshake (the kernel sends INIT only once).

use thiserror::Error;
use zerocopy::{FromBytes, IntoBytes};

use crate::abi::{self, InHeader, InitIn, InitInExt, InitOut, capability, opcode};
use crate::channel::{Channel, Received};
use crate::reply::Reply;
use crate::worker::READ_BUFFER_BYTES;
use crate::{MAX_REPLY_BYTES, PAGE_BYTES};

/// What a read-only, immutable file system wants from the kernel.
///
/// EXPLICIT_INVAL_DATA: contents never change, so a new mtime or size is no reason to drop cached pages. HAS_RESEND and
/// INIT_EXT only say that we understand them. KILLPRIV, locks and write-back caching concern writing only.
const WANTED: u64 = capability::ASYNC_READ
    | capability::ASYNC_DIO
    | capability::PARALLEL_DIROPS
    | capability::DO_READDIRPLUS
    | capability::READDIRPLUS_AUTO
    | capability::CACHE_SYMLINKS
    | capability::MAX_PAGES
    | capability::EXPLICIT_INVAL_DATA
    | capability::INIT_EXT
    | capability::HAS_RESEND;

/// Granularity of timestamps: one nanosecond.
const TIME_GRANULARITY: u32 = 1;
/// Nothing is ever written; this is the kernel's own minimum.
const MAX_WRITE_BYTES: u32 = 4096;

/// How deep we are stacked with passthrough: on file systems that are not stacked themselves, so that overlayfs, whose limit is two,
/// can stand on us.
const STACK_DEPTH: u32 = 1;

/// The handshake failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum HandshakeError {
    /// Reading INIT failed, or the mount vanished before it.
    #[error("no INIT request from the kernel ({0})")]
    NoInit(String),
    /// The first message is something else, or cut off.
    #[error("first message is not a whole INIT request")]
    NotInit,
    /// A kernel older than Linux 5.4, or a protocol of another major version.
    #[error("kernel speaks FUSE protocol {major}.{minor}, {wanted_major}.{wanted_minor} is the oldest supported", wanted_major = abi::MAJOR, wanted_minor = abi::MINOR_MIN)]
    Version {
        /// Major version offered.
        major: u32,
        /// Minor version offered.
        minor: u32,
    },
    /// The file system's `init` refused or panicked.
    #[error("file system refused to start (errno {0})")]
    Refused(i32),
}

/// What we ask of the kernel, from the configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wishes {
    pub(crate) max_background: u16,
    pub(crate) readahead_bytes: u32,
    pub(crate) passthrough: bool,
    pub(crate) posix_acl: bool,
}

impl Wishes {
    fn capabilities(self) -> u64 {
        let passthrough = if self.passthrough { capability::PASSTHROUGH } else { 0 };
        let posix_acl = if self.posix_acl { capability::POSIX_ACL } else { 0 };
        WANTED | passthrough | posix_acl
    }
}

/// The agreement between the kernel and this session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Negotiated {
    kernel_minor: u32,
    offered: u64,
    reply: InitOut,
}

/// Bytes of a stored [`Negotiated`]: format, kernel minor, offered capabilities, the reply.
const STORED_BYTES: usize = 4 + 4 + 8 + size_of::<InitOut>();
/// Format number of a stored [`Negotiated`].
const STORED_FORMAT: u32 = 1;

impl Negotiated {
    /// Minor version of the kernel's protocol.
    pub fn kernel_minor(&self) -> u32 {
        self.kernel_minor
    }

    /// Capability bits the kernel offers, `flags2` in the high word.
    pub fn offered(&self) -> u64 {
        self.offered
    }

    /// Capability bits in force.
    pub fn granted(&self) -> u64 {
        u64::from(self.reply.flags) | u64::from(self.reply.flags2) << 32
    }

    /// Whether the kernel can send requests in flight again to a successor (Linux 6.9).
    pub fn can_resend(&self) -> bool {
        self.offered & capability::HAS_RESEND != 0
    }

    /// Whether the kernel can read files of another file system by itself (Linux 6.9).
    pub fn can_pass_through(&self) -> bool {
        self.offered & capability::PASSTHROUGH != 0
    }

    /// Whether it does so on this connection.
    pub fn passes_through(&self) -> bool {
        self.granted() & capability::PASSTHROUGH != 0 && self.reply.max_stack_depth > 0
    }

    /// How many background requests the kernel has in flight at most, as agreed.
    pub(crate) fn max_background(&self) -> u16 {
        self.reply.max_background
    }

    /// For storage beside a kept descriptor.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(STORED_BYTES);
        bytes.extend_from_slice(&STORED_FORMAT.to_le_bytes());
        bytes.extend_from_slice(&self.kernel_minor.to_le_bytes());
        bytes.extend_from_slice(&self.offered.to_le_bytes());
        bytes.extend_from_slice(self.reply.as_bytes());
        bytes
    }

    /// Back from [`Negotiated::to_bytes`]; `None` for anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (format, rest) = u32::read_from_prefix(bytes).ok()?;
        let (kernel_minor, rest) = u32::read_from_prefix(rest).ok()?;
        let (offered, rest) = u64::read_from_prefix(rest).ok()?;
        let reply = InitOut::read_from_bytes(rest).ok()?;
        let known = u32::from_le(format) == STORED_FORMAT && reply.major == abi::MAJOR;
        known.then_some(Self {
            kernel_minor: u32::from_le(kernel_minor),
            offered: u64::from_le(offered),
            reply,
        })
    }
}

/// From how many background requests on the kernel calls the device congested.
pub(crate) fn congestion_threshold(max_background: u16) -> u16 {
    (max_background / 4 * 3).max(1)
}

/// Reads INIT, lets `accept` decide (the file system's `init`), answers.
pub(crate) fn handshake(
    channel: &Channel,
    wishes: Wishes,
    accept: impl FnOnce(fuse3::raw::Request) -> Result<(), i32>,
) -> Result<Negotiated, HandshakeError> {
    let mut buffer = vec![0; READ_BUFFER_BYTES];
    let len = loop {
        match channel.receive(&mut buffer) {
            Received::Message(len) => break len,
            Received::Retry => {}
            Received::Ended => return Err(HandshakeError::NoInit("connection ended".to_owned())),
            Received::Failed(errno) => return Err(HandshakeError::NoInit(errno.to_string())),
        }
    };
    let (header, init, flags2) = parse(&buffer[..len]).ok_or(HandshakeError::NotInit)?;
    let agreed = agree(init, flags2, wishes).and_then(|negotiated| {
        let asker = fuse3::raw::Request {
            unique: header.unique,
            uid: header.uid,
            gid: header.gid,
            pid: header.pid,
        };
        accept(asker).map(|()| negotiated).map_err(HandshakeError::Refused)
    });
    let reply = match &agreed {
        Ok(negotiated) => Reply::record(&negotiated.reply),
        Err(HandshakeError::Refused(errno)) => Reply::Error(*errno),
        Err(_) => Reply::Error(libc::EPROTO),
    };
    channel.send(header.unique, &reply);
    agreed
}

fn parse(message: &[u8]) -> Option<(InHeader, InitIn, u32)> {
    let (header, rest) = InHeader::read_from_prefix(message).ok()?;
    let whole = usize::try_from(header.len) == Ok(message.len());
    let (init, rest) = InitIn::read_from_prefix(rest).ok()?;
    let extended = u64::from(init.flags) & capability::INIT_EXT != 0;
    let flags2 = match InitInExt::read_from_prefix(rest) {
        Ok((extension, _)) if extended => extension.flags2,
        _ => 0,
    };
    (whole && header.opcode == opcode::INIT).then_some((header, init, flags2))
}

fn agree(init: InitIn, flags2: u32, wishes: Wishes) -> Result<Negotiated, HandshakeError> {
    if init.major != abi::MAJOR || init.minor < abi::MINOR_MIN {
        return Err(HandshakeError::Version {
            major: init.major,
            minor: init.minor,
        });
    }
    let offered = u64::from(init.flags) | u64::from(flags2) << 32;
    let granted = offered & wishes.capabilities();
    let low = u32::try_from(granted & u64::from(u32::MAX)).expect("masked to 32 bits");
    let high = u32::try_from(granted >> 32).expect("shifted to 32 bits");
    let reply = InitOut {
        major: abi::MAJOR,
        minor: init.minor.min(abi::MINOR),
        // The kernel takes the smaller of this and its own bdi value, which is raised after the handshake.
        max_readahead: wishes.readahead_bytes.max(init.max_readahead),
        flags: low,
        max_background: wishes.max_background,
        congestion_threshold: congestion_threshold(wishes.max_background),
        max_write: MAX_WRITE_BYTES,
        time_gran: TIME_GRANULARITY,
        max_pages: u16::try_from(MAX_REPLY_BYTES / PAGE_BYTES).expect("256 pages fit"),
        map_alignment: 0,
        flags2: high,
        max_stack_depth: if granted & capability::PASSTHROUGH == 0 {
            0
        } else {
            STACK_DEPTH
        },
        unused: [0; 6],
    };
    Ok(Negotiated {
        kernel_minor: init.minor,
        offered,
        reply,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WISHES: Wishes = Wishes {
        max_background: 64,
        readahead_bytes: 1 << 20,
        passthrough: false,
        posix_acl: false,
    };

    fn offer(minor: u32, flags: u64) -> Result<Negotiated, HandshakeError> {
        offer_to(WISHES, minor, flags)
    }

    fn offer_to(wishes: Wishes, minor: u32, flags: u64) -> Result<Negotiated, HandshakeError> {
        let low = u32::try_from(flags & 0xffff_ffff).unwrap();
        let init = InitIn {
            major: 7,
            minor,
            max_readahead: 131_072,
            flags: low,
        };
        agree(init, u32::try_from(flags >> 32).unwrap(), wishes)
    }

    #[test]
    fn only_what_is_offered_and_wanted_is_granted() {
        let all = offer(45, u64::MAX).unwrap();
        assert_eq!(all.granted(), WANTED);
        assert_eq!((all.reply.minor, all.reply.max_pages), (abi::MINOR, 256));
        let none = offer(31, 0).unwrap();
        assert_eq!((none.granted(), none.reply.minor), (0, 31));
    }

    #[test]
    fn passthrough_and_acls_are_asked_for_only_when_wished() {
        let wishes = Wishes {
            passthrough: true,
            posix_acl: true,
            ..WISHES
        };
        let more = capability::PASSTHROUGH | capability::POSIX_ACL;
        let all = offer_to(wishes, 45, u64::MAX).unwrap();
        assert_eq!((all.granted(), all.reply.max_stack_depth), (WANTED | more, 1));
        assert!(all.passes_through());
        let old = offer_to(wishes, 39, !more).unwrap();
        assert_eq!((old.granted(), old.reply.max_stack_depth), (WANTED, 0));
        assert!(!old.passes_through() && !offer(45, u64::MAX).unwrap().passes_through());
    }

    #[test]
    fn old_kernels_are_refused() {
        assert!(matches!(
            offer(30, u64::MAX),
            Err(HandshakeError::Version { major: 7, minor: 30 })
        ));
    }

    #[test]
    fn the_agreement_survives_storage() {
        let negotiated = offer(41, u64::MAX).unwrap();
        let bytes = negotiated.to_bytes();
        assert_eq!(Negotiated::from_bytes(&bytes), Some(negotiated));
        for len in 0..bytes.len() {
            assert_eq!(Negotiated::from_bytes(&bytes[..len]), None);
        }
        assert_eq!(Negotiated::from_bytes(&[0xff; STORED_BYTES]), None);
    }
}
