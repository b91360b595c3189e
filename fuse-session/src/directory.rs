//! Directory answers: packing a stream of entries into one bounded buffer.
//!
//! The stream is read only until the first entry that does not fit; the kernel asks again from the offset of the last
//! one it got. Used by [`crate::dispatch`] for READDIR and READDIRPLUS.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::pin::pin;

use fuse3::raw::reply::{DirectoryEntry, DirectoryEntryPlus};
use fuse3::{FileType, Result};
use futures_util::{Stream, StreamExt};
use zerocopy::IntoBytes;

use crate::reply::{self, Reply};
use crate::{MAX_REPLY_BYTES, abi};

/// Longest name the kernel takes in a directory entry.
const NAME_MAX: usize = 1024;

/// An entry of either kind of stream.
pub(crate) trait Packable {
    /// The attributes that go before the entry, if any.
    fn head(&self) -> Option<abi::EntryOut>;
    /// Inode, offset of the next entry, kind, name.
    fn parts(&self) -> (u64, i64, FileType, &OsStr);
}

impl Packable for DirectoryEntry {
    fn head(&self) -> Option<abi::EntryOut> {
        None
    }

    fn parts(&self) -> (u64, i64, FileType, &OsStr) {
        (self.inode, self.offset, self.kind, &self.name)
    }
}

impl Packable for DirectoryEntryPlus {
    fn head(&self) -> Option<abi::EntryOut> {
        Some(reply::entry(&self.attr, self.generation, self.entry_ttl, self.attr_ttl))
    }

    fn parts(&self) -> (u64, i64, FileType, &OsStr) {
        (self.inode, self.offset, self.kind, &self.name)
    }
}

/// Answers with as many entries as `size` bytes hold.
///
/// An error in the stream ends the answer: it is reported if nothing came before it, else the next request meets it.
/// A name the kernel would refuse counts as such an error (EIO), since the kernel would fail the whole answer for it.
pub(crate) async fn pack<E: Packable>(entries: impl Stream<Item = Result<E>>, size: u32) -> Reply {
    let room = usize::try_from(size).unwrap_or(usize::MAX).min(MAX_REPLY_BYTES);
    let mut packed = Vec::with_capacity(room.min(64 * 1024));
    let mut entries = pin!(entries);
    while let Some(entry) = entries.next().await {
        let refused = match entry {
            Ok(entry) => match append(&mut packed, &entry, room) {
                Appended::Whole => continue,
                Appended::NoRoom if packed.is_empty() => Reply::Error(libc::EINVAL),
                Appended::NoRoom => break,
                Appended::BadName => {
                    tracing::warn!(name = ?entry.parts().1, "directory entry with an impossible name");
                    Reply::Error(libc::EIO)
                }
            },
            Err(errno) => errno.into(),
        };
        if packed.is_empty() {
            return refused;
        }
        break;
    }
    Reply::Data(packed.into())
}

enum Appended {
    Whole,
    NoRoom,
    BadName,
}

fn append<E: Packable>(packed: &mut Vec<u8>, entry: &E, room: usize) -> Appended {
    let head = entry.head();
    let (ino, offset, kind, name) = entry.parts();
    let name = name.as_bytes();
    let namelen = match u32::try_from(name.len()) {
        Ok(len) if !name.is_empty() && name.len() <= NAME_MAX && !name.iter().any(|b| matches!(b, 0 | b'/')) => len,
        _ => return Appended::BadName,
    };
    let fixed = size_of::<abi::Dirent>() + if head.is_some() { size_of::<abi::EntryOut>() } else { 0 };
    let end = packed.len() + (fixed + name.len()).next_multiple_of(8);
    if end > room {
        return Appended::NoRoom;
    }
    if let Some(head) = head {
        packed.extend_from_slice(head.as_bytes());
    }
    let dirent = abi::Dirent {
        ino,
        off: offset.cast_unsigned(),
        namelen,
        kind: kind.const_into_mode_t() >> 12,
    };
    packed.extend_from_slice(dirent.as_bytes());
    packed.extend_from_slice(name);
    packed.resize(end, 0);
    Appended::Whole
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use fuse3::Errno;
    use futures_util::FutureExt;
    use futures_util::stream;

    use super::*;

    fn named(name: &str, offset: i64) -> Result<DirectoryEntry> {
        Ok(DirectoryEntry {
            inode: 7,
            kind: FileType::RegularFile,
            name: name.into(),
            offset,
        })
    }

    #[test]
    fn the_stream_is_read_only_until_the_buffer_is_full() {
        let read = AtomicUsize::new(0);
        let entries = stream::iter((1..1000).map(|offset| {
            read.fetch_add(1, Ordering::Relaxed);
            named("abc", offset)
        }));
        // 24 bytes of record and a padded name make 32 bytes each.
        let reply = pack(entries, 100).now_or_never().unwrap();
        assert_eq!(reply.payload().len(), 96);
        assert_eq!(read.load(Ordering::Relaxed), 4);
    }

    #[test]
    fn errors_show_only_when_nothing_came_before() {
        let failing = || stream::iter([named("a", 1), Err(Errno::from(libc::EIO))]);
        assert_eq!(pack(failing(), 4096).now_or_never().unwrap().payload().len(), 32);
        assert_eq!(
            pack(failing().skip(1), 4096).now_or_never().unwrap().error_code(),
            -libc::EIO
        );
        assert_eq!(pack(failing(), 8).now_or_never().unwrap().error_code(), -libc::EINVAL);
    }

    #[test]
    fn impossible_names_never_reach_the_kernel() {
        for name in ["", "a/b", "a\0b", &"n".repeat(NAME_MAX + 1)] {
            let reply = pack(stream::iter([named(name, 1)]), 4096).now_or_never().unwrap();
            assert_eq!(reply.error_code(), -libc::EIO, "{name:?}");
        }
        let empty = pack(stream::iter(Vec::<Result<DirectoryEntry>>::new()), 4096)
            .now_or_never()
            .unwrap();
        assert_eq!((empty.error_code(), empty.payload().len()), (0, 0));
    }
}
