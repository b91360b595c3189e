//! Encoding of answers: fuse3's reply types in, the kernel's records out.
//!
//! A [`Reply`] is what a handler came to; [`crate::channel`] writes it after the header. Answers are cut or refused here
//! so that the kernel never sees one it would reject (a rejected answer leaves its caller waiting).

use std::time::Duration;

use bytes::Bytes;
use fuse3::raw::reply::{FileAttr, ReplyAttr, ReplyEntry, ReplyOpen, ReplyStatFs, ReplyXAttr};
use fuse3::{Errno, mode_from_kind_and_perm};
use zerocopy::{Immutable, IntoBytes};

use crate::abi;

/// Size of the largest fixed record, `EntryOut`.
const FIXED_MAX: usize = 128;
/// Longest symlink target the kernel takes: one page less the terminator.
pub(crate) const SYMLINK_MAX: usize = 4095;
/// The kernel refuses replies whose errno is not below this.
const ERRNO_LIMIT: i32 = 512;

/// A handler's answer, without the header.
#[derive(Debug)]
pub(crate) enum Reply {
    /// An errno, positive and below [`ERRNO_LIMIT`] after [`Reply::error_code`].
    Error(i32),
    /// Success without a payload.
    Empty,
    /// A fixed record.
    Fixed { bytes: [u8; FIXED_MAX], len: usize },
    /// Bytes of a file, a link, an attribute or a directory; written without a copy.
    Data(Bytes),
}

impl Reply {
    /// A fixed record. Records larger than [`FIXED_MAX`] do not exist; should one be added, this answers EIO.
    pub(crate) fn record<T: IntoBytes + Immutable>(record: &T) -> Self {
        let source = record.as_bytes();
        let mut bytes = [0; FIXED_MAX];
        match bytes.get_mut(..source.len()) {
            Some(target) => target.copy_from_slice(source),
            None => return Self::Error(libc::EIO),
        }
        Self::Fixed {
            bytes,
            len: source.len(),
        }
    }

    /// The payload to write after the header.
    pub(crate) fn payload(&self) -> &[u8] {
        match self {
            Self::Error(_) | Self::Empty => &[],
            Self::Fixed { bytes, len } => &bytes[..*len],
            Self::Data(data) => data,
        }
    }

    /// The header's error field: zero, or a negated errno the kernel accepts.
    pub(crate) fn error_code(&self) -> i32 {
        match *self {
            Self::Error(errno) if (1..ERRNO_LIMIT).contains(&errno) => -errno,
            Self::Error(_) => -libc::EIO,
            _ => 0,
        }
    }

    /// Bytes of a file or directory, cut to what the kernel has room for.
    pub(crate) fn data(mut data: Bytes, size: u32) -> Self {
        data.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Self::Data(data)
    }

    /// A symlink target; one the kernel cannot hold is an error instead of a truncated path.
    pub(crate) fn link(target: Bytes) -> Self {
        if target.len() > SYMLINK_MAX {
            Self::Error(libc::ENAMETOOLONG)
        } else {
            Self::Data(target)
        }
    }

    /// An extended attribute or the list of them, for a caller with room for `size` bytes; zero asks for the length.
    pub(crate) fn xattr(reply: ReplyXAttr, size: u32) -> Self {
        let length = match &reply {
            ReplyXAttr::Size(length) => *length,
            ReplyXAttr::Data(data) => match u32::try_from(data.len()) {
                Ok(length) => length,
                Err(_) => return Self::Error(libc::E2BIG),
            },
        };
        if size == 0 {
            return Self::record(&abi::GetxattrOut {
                size: length,
                padding: 0,
            });
        }
        if length > size {
            return Self::Error(libc::ERANGE);
        }
        match reply {
            ReplyXAttr::Data(data) => Self::Data(data),
            // The caller wanted the value and the file system knows only its length: a fault of the file system.
            ReplyXAttr::Size(_) => Self::Error(libc::EIO),
        }
    }
}

impl From<Errno> for Reply {
    fn from(errno: Errno) -> Self {
        // fuse3 converts to the negated form.
        Self::Error(i32::from(errno).checked_neg().unwrap_or(libc::EIO))
    }
}

impl From<ReplyEntry> for Reply {
    fn from(reply: ReplyEntry) -> Self {
        Self::record(&entry(&reply.attr, reply.generation, reply.ttl, reply.ttl))
    }
}

impl From<ReplyAttr> for Reply {
    fn from(reply: ReplyAttr) -> Self {
        Self::record(&abi::AttrOut {
            attr_valid: reply.ttl.as_secs(),
            attr_valid_nsec: reply.ttl.subsec_nanos(),
            dummy: 0,
            attr: attr(&reply.attr),
        })
    }
}

impl From<ReplyOpen> for Reply {
    fn from(reply: ReplyOpen) -> Self {
        Self::record(&abi::OpenOut::cached(&reply))
    }
}

impl From<ReplyStatFs> for Reply {
    fn from(reply: ReplyStatFs) -> Self {
        Self::record(&abi::StatfsOut {
            blocks: reply.blocks,
            bfree: reply.bfree,
            bavail: reply.bavail,
            files: reply.files,
            ffree: reply.ffree,
            bsize: reply.bsize,
            namelen: reply.namelen,
            frsize: reply.frsize,
            padding: 0,
            spare: [0; 6],
        })
    }
}

/// An entry record; inode zero makes it a negative entry, cached for `entry_ttl`.
pub(crate) fn entry(attributes: &FileAttr, generation: u64, entry_ttl: Duration, attr_ttl: Duration) -> abi::EntryOut {
    abi::EntryOut {
        nodeid: attributes.ino,
        generation,
        entry_valid: entry_ttl.as_secs(),
        attr_valid: attr_ttl.as_secs(),
        entry_valid_nsec: entry_ttl.subsec_nanos(),
        attr_valid_nsec: attr_ttl.subsec_nanos(),
        attr: attr(attributes),
    }
}

fn attr(attributes: &FileAttr) -> abi::Attr {
    abi::Attr {
        ino: attributes.ino,
        size: attributes.size,
        blocks: attributes.blocks,
        atime: attributes.atime.sec,
        mtime: attributes.mtime.sec,
        ctime: attributes.ctime.sec,
        atimensec: attributes.atime.nsec,
        mtimensec: attributes.mtime.nsec,
        ctimensec: attributes.ctime.nsec,
        mode: mode_from_kind_and_perm(attributes.kind, attributes.perm & 0o7777),
        nlink: attributes.nlink,
        uid: attributes.uid,
        gid: attributes.gid,
        rdev: attributes.rdev,
        blksize: attributes.blksize,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errnos_the_kernel_would_reject_become_eio() {
        for (errno, code) in [(2, -2), (0, -5), (-2, -5), (512, -5), (511, -511), (i32::MAX, -5)] {
            assert_eq!(Reply::from(Errno::from(errno)).error_code(), code, "errno {errno}");
        }
    }

    #[test]
    fn xattr_answers_follow_the_room_the_caller_has() {
        let value = || ReplyXAttr::Data(Bytes::from_static(b"value"));
        assert_eq!(Reply::xattr(value(), 0).payload(), [5, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Reply::xattr(value(), 5).payload(), b"value");
        assert_eq!(Reply::xattr(value(), 4).error_code(), -libc::ERANGE);
        assert_eq!(Reply::xattr(ReplyXAttr::Size(7), 0).payload()[0], 7);
        assert_eq!(Reply::xattr(ReplyXAttr::Size(7), 6).error_code(), -libc::ERANGE);
        assert_eq!(Reply::xattr(ReplyXAttr::Size(7), 7).error_code(), -libc::EIO);
    }

    #[test]
    fn data_is_cut_and_long_links_refused() {
        assert_eq!(Reply::data(Bytes::from_static(b"abcdef"), 4).payload(), b"abcd");
        assert_eq!(Reply::link(Bytes::from(vec![b'a'; SYMLINK_MAX])).error_code(), 0);
        assert_eq!(
            Reply::link(Bytes::from(vec![b'a'; SYMLINK_MAX + 1])).error_code(),
            -libc::ENAMETOOLONG
        );
    }
}
