//! Tar headers of the layers we write: ustar where it suffices, with a pax extended header in front where it does not.
//!
//! Encoding the headers anew instead of copying the input's has three reasons: names are clean, a hard link can become a
//! regular file, and there is exactly one way to read them, so that the tar stream and the TOC cannot disagree.

use crate::input::pax;
use crate::input::tar::{BLOCK, TarEntry, TarKind, padding_of};

const NAME_BYTES: usize = 100;
const OWNER_BYTES: usize = 32;
/// Largest number in a field of 8 bytes: seven octal digits.
const MAX_SHORT: u64 = 0o7777777;
/// Largest number in a field of 12 bytes: eleven octal digits.
const MAX_LONG: u64 = 0o77777777777;
/// Name field of a pax header itself. Nobody reads it; a constant one costs nothing compressed.
const PAX_NAME: &[u8] = b"PaxHeaders/entry";

/// Appends the header blocks of `entry` to `out`. `name` and `link` are clean and as they stand in the TOC.
pub(super) fn encode(entry: &TarEntry, name: &[u8], kind: TarKind, link: &[u8], out: &mut Vec<u8>) {
    let mut records = Vec::new();
    let mut header = tar::Header::new_ustar();
    let mut need = |key: &str, value: &[u8]| records.push((key.as_bytes().to_vec(), value.to_vec()));
    let bytes = header.as_mut_bytes();
    let mut field = |range: std::ops::Range<usize>, value: &[u8], key: &str| {
        let room = range.len();
        if value.len() > room {
            need(key, value);
        }
        let kept = value.len().min(room);
        bytes[range.start..range.start + kept].copy_from_slice(&value[..kept]);
    };
    field(0..NAME_BYTES, name, "path");
    field(157..157 + NAME_BYTES, link, "linkpath");
    field(265..265 + OWNER_BYTES, &entry.user, "uname");
    field(297..297 + OWNER_BYTES, &entry.group, "gname");
    let size = if kind == TarKind::Regular { entry.size } else { 0 };
    let seconds = u64::try_from(entry.mtime.seconds).ok().filter(|&s| s <= MAX_LONG);
    if seconds.is_none() || entry.mtime.nanos != 0 {
        need("mtime", entry.mtime.to_pax().as_bytes());
    }
    for (key, value, most) in [
        ("uid", entry.uid, MAX_SHORT),
        ("gid", entry.gid, MAX_SHORT),
        ("size", size, MAX_LONG),
    ] {
        if value > most {
            need(key, value.to_string().as_bytes());
        }
    }
    // What does not fit is 0 here and right in the pax header, as Go's writer has it.
    let fitting = |value: u64, most| if value > most { 0 } else { value };
    octal(&mut bytes[100..108], entry.mode.into());
    octal(&mut bytes[108..116], fitting(entry.uid, MAX_SHORT));
    octal(&mut bytes[116..124], fitting(entry.gid, MAX_SHORT));
    octal(&mut bytes[124..136], fitting(size, MAX_LONG));
    octal(&mut bytes[136..148], seconds.unwrap_or(0));
    octal(&mut bytes[329..337], fitting(entry.device.0, MAX_SHORT));
    octal(&mut bytes[337..345], fitting(entry.device.1, MAX_SHORT));
    bytes[156] = match kind {
        TarKind::Regular => b'0',
        TarKind::Hardlink => b'1',
        TarKind::Symlink => b'2',
        TarKind::Char => b'3',
        TarKind::Block => b'4',
        TarKind::Directory => b'5',
        TarKind::Fifo => b'6',
    };
    for (name, value) in &entry.xattrs {
        records.push(([b"SCHILY.xattr.", name.as_slice()].concat(), value.clone()));
    }
    records.extend(entry.records.iter().cloned());
    if !records.is_empty() {
        encode_records(records, out);
    }
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
}

fn encode_records(mut records: Vec<pax::Record>, out: &mut Vec<u8>) {
    records.sort();
    let mut body = Vec::new();
    for (key, value) in &records {
        pax::push(&mut body, key, value);
    }
    let mut header = tar::Header::new_ustar();
    let bytes = header.as_mut_bytes();
    bytes[..PAX_NAME.len()].copy_from_slice(PAX_NAME);
    bytes[156] = b'x';
    octal(&mut bytes[100..108], 0);
    octal(&mut bytes[108..116], 0);
    octal(&mut bytes[116..124], 0);
    octal(&mut bytes[124..136], body.len() as u64);
    octal(&mut bytes[136..148], 0);
    header.set_cksum();
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&body);
    pad(body.len() as u64, out);
}

/// Appends zeros after content of `size` bytes up to the next block.
pub(super) fn pad(size: u64, out: &mut Vec<u8>) {
    let padding = usize::try_from(padding_of(size)).unwrap_or(BLOCK);
    out.resize(out.len() + padding, 0);
}

/// Octal digits filling a field up to its closing NUL.
fn octal(field: &mut [u8], mut value: u64) {
    let (last, digits) = field.split_last_mut().expect("header fields are not empty");
    *last = 0;
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(value & 7).unwrap_or(0);
        value >>= 3;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::input::pax::Timestamp;
    use crate::input::tar::TarReader;

    fn entry(kind: TarKind) -> TarEntry {
        TarEntry {
            name: b"usr/bin/tool".to_vec(),
            kind,
            link: Vec::new(),
            size: 0,
            mode: 0o4755,
            uid: 1000,
            gid: 2000,
            user: b"user".to_vec(),
            group: b"group".to_vec(),
            mtime: Timestamp {
                seconds: 1_700_000_000,
                nanos: 0,
            },
            device: (0, 0),
            xattrs: Vec::new(),
            records: Vec::new(),
            offset: 0,
        }
    }

    #[track_caller]
    fn round_trip(entry: &TarEntry, blocks: usize) {
        let mut out = Vec::new();
        encode(entry, &entry.name, entry.kind, &entry.link, &mut out);
        assert_eq!(out.len(), blocks * BLOCK, "{entry:?}");
        assert_eq!(
            TarReader::new(out.as_slice()).next_entry().unwrap().as_ref(),
            Some(entry)
        );
    }

    #[test]
    fn ordinary_entries_take_one_block() {
        for kind in [TarKind::Regular, TarKind::Directory, TarKind::Fifo] {
            round_trip(&entry(kind), 1);
        }
        round_trip(
            &TarEntry {
                device: (259, 1_048_575),
                ..entry(TarKind::Block)
            },
            1,
        );
        round_trip(
            &TarEntry {
                link: vec![b'l'; 100],
                name: vec![b'n'; 100],
                ..entry(TarKind::Symlink)
            },
            1,
        );
        round_trip(
            &TarEntry {
                uid: MAX_SHORT,
                gid: MAX_SHORT,
                size: MAX_LONG,
                ..entry(TarKind::Regular)
            },
            1,
        );
    }

    #[test]
    fn everything_else_survives_in_a_pax_header() {
        let xattrs = vec![
            (b"security.capability".to_vec(), b"\0\x01\n=".to_vec()),
            (b"user.e".to_vec(), Vec::new()),
        ];
        round_trip(
            &TarEntry {
                xattrs,
                ..entry(TarKind::Regular)
            },
            3,
        );
        round_trip(
            &TarEntry {
                records: vec![(b"atime".to_vec(), b"1.5".to_vec())],
                ..entry(TarKind::Regular)
            },
            3,
        );
        round_trip(
            &TarEntry {
                name: vec![b'n'; 101],
                ..entry(TarKind::Directory)
            },
            3,
        );
        round_trip(
            &TarEntry {
                link: "ö".repeat(300).into_bytes(),
                ..entry(TarKind::Hardlink)
            },
            4,
        );
        round_trip(
            &TarEntry {
                user: vec![b'u'; 33],
                group: vec![b'g'; 40],
                ..entry(TarKind::Fifo)
            },
            3,
        );
        round_trip(
            &TarEntry {
                uid: MAX_SHORT + 1,
                gid: u32::MAX.into(),
                ..entry(TarKind::Regular)
            },
            3,
        );
        round_trip(
            &TarEntry {
                size: MAX_LONG + 1,
                ..entry(TarKind::Regular)
            },
            3,
        );
        for (seconds, nanos) in [(-1, 0), (-2, 1), (5, 999_999_999), (1 << 34, 0)] {
            round_trip(
                &TarEntry {
                    mtime: Timestamp { seconds, nanos },
                    ..entry(TarKind::Directory)
                },
                3,
            );
        }
    }
}
