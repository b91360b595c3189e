//! What a fanotify group of pre-content class tells: one record per event, each with the range that somebody is about to read.

use zerocopy::native_endian::{I32, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

/// `FAN_PRE_ACCESS`: somebody is about to read.
pub const PRE_ACCESS: u64 = 0x0010_0000;
/// `FAN_Q_OVERFLOW`: events were lost. Never with an unlimited queue.
pub const OVERFLOW: u64 = 0x4000;
/// `FANOTIFY_METADATA_VERSION`.
const VERSION: u8 = 3;
/// `FAN_EVENT_INFO_TYPE_RANGE`.
const INFO_RANGE: u8 = 6;
/// Length of an event as the kernel writes it for this class: its metadata and one range.
pub const EVENT_BYTES: usize = size_of::<Metadata>() + size_of::<RangeInfo>();

/// `struct fanotify_event_metadata`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Metadata {
    event_len: U32,
    version: u8,
    reserved: u8,
    metadata_len: U16,
    mask: U64,
    fd: I32,
    pid: I32,
}

/// `struct fanotify_event_info_header`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct InfoHeader {
    kind: u8,
    padding: u8,
    length: U16,
}

/// `struct fanotify_event_info_range`.
#[derive(FromBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RangeInfo {
    header: InfoHeader,
    padding: U32,
    offset: U64,
    count: U64,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asked {
    /// The bytes from here, so many.
    Range {
        /// Where in the file they begin.
        offset: u64,
        /// How many.
        count: u64,
    },
    /// Something that this program does not know; it can only be denied.
    Unknown {
        /// The event's mask.
        mask: u64,
    },
}

/// One event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// The number that names the event in its answer, and a descriptor of the process that read it. Negative if there is none, and
    /// then there is nothing to answer.
    pub fd: i32,
    /// The process that waits, in our namespace of processes; 0 if it is not in it.
    pub pid: i32,
    /// What it asks for.
    pub asked: Asked,
}

/// The events in what one read brought: up to the first that is not whole, or of a version that is not known.
pub fn events(bytes: &[u8]) -> Events<'_> {
    Events { rest: bytes }
}

/// Iterator over events.
#[derive(Debug, Clone)]
pub struct Events<'a> {
    rest: &'a [u8],
}

impl Iterator for Events<'_> {
    type Item = Event;

    fn next(&mut self) -> Option<Event> {
        let (metadata, _) = Metadata::ref_from_prefix(self.rest).ok()?;
        let length = usize::try_from(metadata.event_len.get()).ok()?;
        let header = usize::from(metadata.metadata_len.get());
        let whole = (size_of::<Metadata>()..=length).contains(&header) && length <= self.rest.len();
        if metadata.version != VERSION || !whole {
            self.rest = &[];
            return None;
        }
        let (event, rest) = self.rest.split_at(length);
        self.rest = rest;
        let mask = metadata.mask.get();
        let asked = match range(event.get(header..).unwrap_or_default()) {
            Some((offset, count)) if mask & PRE_ACCESS != 0 => Asked::Range { offset, count },
            Some(_) | None => Asked::Unknown { mask },
        };
        Some(Event {
            fd: metadata.fd.get(),
            pid: metadata.pid.get(),
            asked,
        })
    }
}

/// The range among the records that follow an event's metadata.
fn range(mut records: &[u8]) -> Option<(u64, u64)> {
    loop {
        let (header, _) = InfoHeader::ref_from_prefix(records).ok()?;
        let length = usize::from(header.length.get());
        if length < size_of::<InfoHeader>() || length > records.len() {
            return None;
        }
        if header.kind == INFO_RANGE {
            let (info, _) = RangeInfo::ref_from_prefix(&records[..length]).ok()?;
            return Some((info.offset.get(), info.count.get()));
        }
        records = &records[length..];
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn encoded(fd: i32, mask: u64, offset: u64, count: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(u32::try_from(EVENT_BYTES).unwrap().to_ne_bytes());
        bytes.extend([VERSION, 0]);
        bytes.extend(24_u16.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend(fd.to_ne_bytes());
        bytes.extend(77_i32.to_ne_bytes());
        bytes.extend([INFO_RANGE, 0]);
        bytes.extend(24_u16.to_ne_bytes());
        bytes.extend(0_u32.to_ne_bytes());
        bytes.extend(offset.to_ne_bytes());
        bytes.extend(count.to_ne_bytes());
        bytes
    }

    #[test]
    fn events_come_out_as_the_kernel_wrote_them() {
        assert_eq!(EVENT_BYTES, 48);
        let mut bytes = encoded(9, PRE_ACCESS, 4096, 8192);
        bytes.extend(encoded(10, 1, 0, 1));
        // What follows is room in the buffer that the kernel has not used.
        bytes.extend([0; 100]);
        let found: Vec<_> = events(&bytes).collect();
        let asked = Asked::Range {
            offset: 4096,
            count: 8192,
        };
        assert_eq!(found[0], Event { fd: 9, pid: 77, asked });
        assert_eq!(found[1].asked, Asked::Unknown { mask: 1 });
        assert_eq!(found.len(), 2);
    }

    #[test]
    fn an_event_without_a_range_is_unknown_and_one_that_is_cut_off_is_none() {
        let whole = encoded(9, PRE_ACCESS, 0, 1);
        for cut in 0..whole.len() {
            assert_eq!(events(&whole[..cut]).count(), 0, "{cut} bytes");
        }
        let mut bare = whole[..24].to_vec();
        bare[..4].copy_from_slice(&24_u32.to_ne_bytes());
        let mask = PRE_ACCESS;
        assert_eq!(events(&bare).next().unwrap().asked, Asked::Unknown { mask });
    }

    proptest! {
        #[test]
        fn whatever_the_bytes_are_the_events_end(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            prop_assert!(events(&bytes).count() <= bytes.len() / size_of::<Metadata>());
        }

        #[test]
        fn a_changed_byte_is_no_other_events_fault(at in 0..48_usize, to: u8) {
            let mut bytes = encoded(9, PRE_ACCESS, 0, 1);
            bytes[at] = to;
            bytes.extend(encoded(10, PRE_ACCESS, 0, 1));
            prop_assert!(events(&bytes).count() <= 4);
        }
    }
}
