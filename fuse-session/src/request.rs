//! Decoding of what the kernel sends: bytes in, an owned [`Request`] out.
//!
//! Bounds-checked throughout: any byte string gives a request or a [`DecodeError`], never a panic. Everything is copied
//! out of the worker's buffer, so that a handler may outlive it. Called by [`crate::worker`] for every message.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use thiserror::Error;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use crate::abi::{self, InHeader, opcode};

/// A message that does not follow the protocol.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum DecodeError {
    /// Not even a header.
    #[error("message of {0} bytes is shorter than a request header")]
    NoHeader(usize),
    /// The header's length and the message's differ.
    #[error("header of request {unique} says {claimed} bytes, the message has {actual}")]
    Length { unique: u64, claimed: u32, actual: usize },
    /// The arguments are cut off.
    #[error("arguments of opcode {opcode} in request {unique} are truncated at {actual} bytes")]
    Truncated { unique: u64, opcode: u32, actual: usize },
    /// A name without its terminator, or an empty one.
    #[error("name in opcode {opcode} of request {unique} is not a terminated string")]
    Name { unique: u64, opcode: u32 },
}

impl DecodeError {
    /// The request to answer with EIO, if the message names one.
    pub(crate) fn unique(&self) -> Option<u64> {
        match *self {
            Self::NoHeader(_) => None,
            Self::Length { unique, .. } | Self::Truncated { unique, .. } | Self::Name { unique, .. } => Some(unique),
        }
    }
}

/// Who asks, and about which inode.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller {
    /// Identifies the request in the reply.
    pub(crate) unique: u64,
    /// The inode asked about.
    pub(crate) node: u64,
    /// Effective user.
    pub(crate) uid: u32,
    /// Effective group.
    pub(crate) gid: u32,
    /// Thread id in the mounter's pid namespace; zero when not visible there.
    pub(crate) pid: u32,
}

/// One decoded request.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) caller: Caller,
    pub(crate) operation: Operation,
}

/// Where and how much to read, for files and directories.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReadRange {
    pub(crate) fh: u64,
    pub(crate) offset: u64,
    pub(crate) size: u32,
    pub(crate) lock_owner: u64,
}

/// What is asked.
#[derive(Debug)]
pub(crate) enum Operation {
    Lookup {
        name: OsString,
    },
    Forget {
        nodes: Vec<(u64, u64)>,
    },
    Getattr {
        fh: Option<u64>,
        flags: u32,
    },
    Readlink,
    Open {
        flags: u32,
    },
    Read(ReadRange),
    Release {
        fh: u64,
        flags: u32,
        lock_owner: u64,
        flush: bool,
    },
    Statfs,
    Getxattr {
        name: OsString,
        size: u32,
    },
    Listxattr {
        size: u32,
    },
    Flush {
        fh: u64,
        lock_owner: u64,
    },
    Opendir {
        flags: u32,
    },
    Readdir(ReadRange),
    Readdirplus(ReadRange),
    Releasedir {
        fh: u64,
        flags: u32,
    },
    Access {
        mask: u32,
    },
    Lseek {
        fh: u64,
        offset: u64,
        whence: u32,
    },
    Interrupt {
        unique: u64,
    },
    Destroy,
    /// A message the kernel expects no answer to and that means nothing here.
    Ignored,
    /// An operation outside the read-only set, with the errno that answers it.
    Refused {
        opcode: u32,
        errno: i32,
    },
}

/// Reads the arguments of one request front to back.
struct Arguments<'a> {
    header: InHeader,
    rest: &'a [u8],
}

impl<'a> Arguments<'a> {
    fn take<T: FromBytes + KnownLayout + Immutable>(&mut self) -> Result<T, DecodeError> {
        match T::read_from_prefix(self.rest) {
            Ok((value, rest)) => {
                self.rest = rest;
                Ok(value)
            }
            Err(_) => Err(DecodeError::Truncated {
                unique: self.header.unique,
                opcode: self.header.opcode,
                actual: self.rest.len(),
            }),
        }
    }

    fn name(&mut self) -> Result<OsString, DecodeError> {
        let error = DecodeError::Name {
            unique: self.header.unique,
            opcode: self.header.opcode,
        };
        match self.rest.iter().position(|byte| *byte == 0) {
            None | Some(0) => Err(error),
            Some(end) => {
                let (name, rest): (&'a [u8], &'a [u8]) = self.rest.split_at(end);
                self.rest = rest;
                Ok(OsString::from_vec(name.to_vec()))
            }
        }
    }

    fn range(&mut self) -> Result<ReadRange, DecodeError> {
        let read: abi::ReadIn = self.take()?;
        Ok(ReadRange {
            fh: read.fh,
            offset: read.offset,
            size: read.size,
            lock_owner: read.lock_owner,
        })
    }

    fn forgets(&mut self) -> Result<Vec<(u64, u64)>, DecodeError> {
        let head: abi::BatchForgetIn = self.take()?;
        let held = self.rest.len() / size_of::<abi::ForgetOne>();
        let count = usize::try_from(head.count).unwrap_or(usize::MAX);
        if count > held {
            return Err(DecodeError::Truncated {
                unique: self.header.unique,
                opcode: self.header.opcode,
                actual: self.rest.len(),
            });
        }
        (0..count)
            .map(|_| self.take::<abi::ForgetOne>().map(|one| (one.nodeid, one.nlookup)))
            .collect()
    }
}

impl Request {
    /// Decodes one message as read from the device.
    pub(crate) fn decode(message: &[u8]) -> Result<Self, DecodeError> {
        let Ok((header, rest)) = InHeader::read_from_prefix(message) else {
            return Err(DecodeError::NoHeader(message.len()));
        };
        if usize::try_from(header.len) != Ok(message.len()) {
            return Err(DecodeError::Length {
                unique: header.unique,
                claimed: header.len,
                actual: message.len(),
            });
        }
        let caller = Caller {
            unique: header.unique,
            node: header.nodeid,
            uid: header.uid,
            gid: header.gid,
            pid: header.pid,
        };
        let operation = operation(Arguments { header, rest })?;
        Ok(Self { caller, operation })
    }
}

fn operation(mut arguments: Arguments<'_>) -> Result<Operation, DecodeError> {
    let header = arguments.header;
    Ok(match header.opcode {
        opcode::LOOKUP => Operation::Lookup {
            name: arguments.name()?,
        },
        opcode::FORGET => {
            let forget: abi::ForgetIn = arguments.take()?;
            Operation::Forget {
                nodes: vec![(header.nodeid, forget.nlookup)],
            }
        }
        opcode::BATCH_FORGET => Operation::Forget {
            nodes: arguments.forgets()?,
        },
        opcode::GETATTR => {
            let getattr: abi::GetattrIn = arguments.take()?;
            let fh = (getattr.flags & abi::GETATTR_FH != 0).then_some(getattr.fh);
            Operation::Getattr {
                fh,
                flags: getattr.flags,
            }
        }
        opcode::READLINK => Operation::Readlink,
        opcode::OPEN => Operation::Open {
            flags: arguments.take::<abi::OpenIn>()?.flags,
        },
        opcode::READ => Operation::Read(arguments.range()?),
        opcode::RELEASE => {
            let release: abi::ReleaseIn = arguments.take()?;
            Operation::Release {
                fh: release.fh,
                flags: release.flags,
                lock_owner: release.lock_owner,
                flush: release.release_flags & abi::RELEASE_FLUSH != 0,
            }
        }
        opcode::STATFS => Operation::Statfs,
        opcode::GETXATTR => {
            let size = arguments.take::<abi::GetxattrIn>()?.size;
            Operation::Getxattr {
                name: arguments.name()?,
                size,
            }
        }
        opcode::LISTXATTR => Operation::Listxattr {
            size: arguments.take::<abi::GetxattrIn>()?.size,
        },
        opcode::FLUSH => {
            let flush: abi::FlushIn = arguments.take()?;
            Operation::Flush {
                fh: flush.fh,
                lock_owner: flush.lock_owner,
            }
        }
        opcode::OPENDIR => Operation::Opendir {
            flags: arguments.take::<abi::OpenIn>()?.flags,
        },
        opcode::READDIR => Operation::Readdir(arguments.range()?),
        opcode::READDIRPLUS => Operation::Readdirplus(arguments.range()?),
        opcode::RELEASEDIR => {
            let release: abi::ReleaseIn = arguments.take()?;
            Operation::Releasedir {
                fh: release.fh,
                flags: release.flags,
            }
        }
        opcode::ACCESS => Operation::Access {
            mask: arguments.take::<abi::AccessIn>()?.mask,
        },
        opcode::LSEEK => {
            let seek: abi::LseekIn = arguments.take()?;
            Operation::Lseek {
                fh: seek.fh,
                offset: seek.offset,
                whence: seek.whence,
            }
        }
        opcode::INTERRUPT => Operation::Interrupt {
            unique: arguments.take::<abi::InterruptIn>()?.unique,
        },
        opcode::DESTROY => Operation::Destroy,
        opcode::NOTIFY_REPLY => Operation::Ignored,
        other => Operation::Refused {
            opcode: other,
            errno: refusal(other),
        },
    })
}

/// The errno of an operation that is not served: EROFS where it would write, ENOSYS (which the kernel remembers and
/// stops asking) elsewhere. STATX is among the latter: the kernel falls back to GETATTR.
fn refusal(operation: u32) -> i32 {
    match operation {
        opcode::SETATTR
        | opcode::SYMLINK
        | opcode::MKNOD
        | opcode::MKDIR
        | opcode::UNLINK
        | opcode::RMDIR
        | opcode::RENAME
        | opcode::RENAME2
        | opcode::LINK
        | opcode::WRITE
        | opcode::SETXATTR
        | opcode::REMOVEXATTR
        | opcode::CREATE
        | opcode::FALLOCATE
        | opcode::COPY_FILE_RANGE
        | opcode::TMPFILE => libc::EROFS,
        _ => libc::ENOSYS,
    }
}

#[cfg(test)]
pub(crate) mod tests;
