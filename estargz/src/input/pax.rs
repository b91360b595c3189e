//! Records of pax extended headers: `LENGTH KEY=VALUE\n`, LENGTH counting the whole record.

/// One record. Order and repetitions are kept: GNU's sparse format 0.0 repeats keys.
pub type Record = (Vec<u8>, Vec<u8>);

/// Longest decimal number in front of a record; 20 digits is `u64::MAX`.
const MAX_LENGTH_DIGITS: usize = 20;

/// The records of an extended header's body, or `None` where it does not follow the format.
pub fn parse(mut body: &[u8]) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    while !body.is_empty() {
        let space = body.iter().take(MAX_LENGTH_DIGITS + 1).position(|&b| b == b' ')?;
        let length = usize::try_from(decimal(&body[..space])?).ok()?;
        let record = body.get(space + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|&b| b == b'=')?;
        // Go refuses a NUL in a key too; no file system could hold such an attribute.
        if equals == 0 || record[..equals].contains(&0) {
            return None;
        }
        records.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        body = &body[length..];
    }
    Some(records)
}

/// Appends one record to the body of an extended header.
pub fn push(body: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = key.len() + value.len() + 3;
    // The length counts its own digits.
    let mut length = rest + 1;
    while length != rest + digits(length) {
        length = rest + digits(length);
    }
    body.extend_from_slice(length.to_string().as_bytes());
    body.push(b' ');
    body.extend_from_slice(key);
    body.push(b'=');
    body.extend_from_slice(value);
    body.push(b'\n');
}

fn digits(n: usize) -> usize {
    n.to_string().len()
}

/// An unsigned decimal number and nothing else: no sign, no space.
pub fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// A point in time as tar has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Timestamp {
    /// Seconds since the epoch, rounded down.
    pub seconds: i64,
    /// Nanoseconds after `seconds`.
    pub nanos: u32,
}

impl Timestamp {
    /// `[-]SECONDS[.FRACTION]`; digits below the nanosecond are dropped.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let (negative, text) = match text.strip_prefix(b"-") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        let mut parts = text.splitn(2, |&b| b == b'.');
        let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
        let nanos = match parts.next() {
            None | Some(b"") => 0,
            Some(fraction) => nanos(fraction)?,
        };
        Some(match (negative, nanos) {
            (false, _) => Self { seconds, nanos },
            (true, 0) => Self {
                seconds: -seconds,
                nanos,
            },
            (true, _) => Self {
                seconds: -seconds - 1,
                nanos: 1_000_000_000 - nanos,
            },
        })
    }

    /// The text that [`Timestamp::parse`] reads, without needless digits.
    pub fn to_pax(self) -> String {
        let (sign, seconds, nanos) = match (self.seconds < 0, self.nanos) {
            (true, 1..) => ("-", (self.seconds + 1).unsigned_abs(), 1_000_000_000 - self.nanos),
            (true, 0) => ("-", self.seconds.unsigned_abs(), 0),
            (false, nanos) => ("", self.seconds.unsigned_abs(), nanos),
        };
        if nanos == 0 {
            return format!("{sign}{seconds}");
        }
        format!("{sign}{seconds}.{nanos:09}").trim_end_matches('0').to_owned()
    }
}

fn nanos(fraction: &[u8]) -> Option<u32> {
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut value = 0;
    for place in 0..9 {
        value = value * 10 + fraction.get(place).map_or(0, |&b| u32::from(b - b'0'));
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_round_trip_around_every_length_boundary() {
        for size in (0..20).chain(85..105).chain(980..1010) {
            let value = vec![b'v'; size];
            let mut body = Vec::new();
            push(&mut body, b"key", &value);
            push(&mut body, b"SCHILY.xattr.user.a", b"\0=\n");
            let records = parse(&body).unwrap();
            assert_eq!(records[0], (b"key".to_vec(), value));
            assert_eq!(records[1], (b"SCHILY.xattr.user.a".to_vec(), b"\0=\n".to_vec()));
            assert_eq!(records.len(), 2);
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for bad in [
            &b"6 a=b"[..],
            b"6 a=b\n6",
            b"5 a=b\n",
            b"99 a=b\n",
            b"-6 a=b\n",
            b"6  a=b",
            b"5 =b\n",
            b"0 a=b\n",
            b"1 ",
            b"5 ab\n\n",
            b"99999999999999999999999999 a=b\n",
            b"18446744073709551615 a=b\n",
            b"\0\0\0\0",
            b"8 a\0b=c\n",
        ] {
            assert!(parse(bad).is_none(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn timestamps() {
        for (text, seconds, nanos, back) in [
            ("0", 0, 0, "0"),
            ("1700000000.5", 1_700_000_000, 500_000_000, "1700000000.5"),
            ("1.0000000019", 1, 1, "1.000000001"),
            ("12.", 12, 0, "12"),
            ("-1", -1, 0, "-1"),
            ("-1.25", -2, 750_000_000, "-1.25"),
            ("-0.5", -1, 500_000_000, "-0.5"),
        ] {
            let time = Timestamp::parse(text.as_bytes()).unwrap();
            assert_eq!(time, Timestamp { seconds, nanos }, "{text}");
            assert_eq!(time.to_pax(), back);
        }
        for bad in ["", "-", ".5", "1.x", "+1", "1e3", "99999999999999999999", "- 1"] {
            assert!(Timestamp::parse(bad.as_bytes()).is_none(), "{bad}");
        }
    }
}
