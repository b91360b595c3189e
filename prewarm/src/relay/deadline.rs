//! `grpc-timeout`: how long a client waits.

use std::time::Duration;

use http::{HeaderMap, HeaderValue};
use tokio::time::Instant;
use tonic::Status;

const HEADER: &str = "grpc-timeout";

/// Digits that the header may have.
const MOST_DIGITS: usize = 8;

/// Timeouts beyond this are none: the clock cannot count that far on every system.
const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// When a call ends, if its client says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Deadline(Option<Instant>);

impl Deadline {
    /// What the headers of a request say, counted from now. What gRPC servers refuse is refused as they do.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, Status> {
        let Some(value) = headers.get(HEADER) else {
            return Ok(Self(None));
        };
        let timeout = parse(value.as_bytes()).ok_or_else(|| {
            let value = String::from_utf8_lossy(value.as_bytes());
            Status::internal(format!("malformed grpc-timeout: {value:?}"))
        })?;
        Ok(Self((timeout < LONGEST).then(|| Instant::now() + timeout)))
    }

    /// Puts what remains into the headers of a request to containerd.
    pub(super) fn put(self, headers: &mut HeaderMap) {
        match self.0 {
            Some(at) => headers.insert(HEADER, format(at.saturating_duration_since(Instant::now()))),
            None => headers.remove(HEADER),
        };
    }

    /// Ends when the call does; never without a deadline.
    pub(super) async fn passed(self) {
        match self.0 {
            Some(at) => tokio::time::sleep_until(at).await,
            None => std::future::pending().await,
        }
    }
}

/// The status of a call whose deadline has passed.
pub(super) fn exceeded() -> Status {
    Status::deadline_exceeded("context deadline exceeded")
}

fn parse(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > MOST_DIGITS || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count = digits
        .iter()
        .fold(0_u64, |count, digit| count * 10 + u64::from(digit - b'0'));
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// The finest unit in which the timeout has few enough digits, rounded up as gRPC clients do.
fn format(timeout: Duration) -> HeaderValue {
    let nanos = timeout.as_nanos();
    let units: [(u128, char); 6] = [
        (1, 'n'),
        (1_000, 'u'),
        (1_000_000, 'm'),
        (1_000_000_000, 'S'),
        (60_000_000_000, 'M'),
        (3_600_000_000_000, 'H'),
    ];
    let most = 10_u128.pow(8) - 1;
    let text = units
        .iter()
        .map(|(unit, name)| (nanos.div_ceil(*unit), name))
        .find(|(count, _)| *count <= most)
        .map_or_else(|| format!("{most}H"), |(count, name)| format!("{count}{name}"));
    HeaderValue::from_str(&text).unwrap_or(HeaderValue::from_static("99999999H"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn malformed_timeouts_are_refused() {
        for bad in ["", "S", "1", "1s", "-1S", "123456789S", "1 S", "+1S", "１S"] {
            assert_eq!(parse(bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(parse(b"99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        assert_eq!(parse(b"0n"), Some(Duration::ZERO));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_and_never_shorter(nanos in any::<u64>()) {
            let timeout = Duration::from_nanos(nanos);
            let read = parse(format(timeout).as_bytes()).unwrap();
            prop_assert!(read >= timeout);
            prop_assert!(read - timeout <= timeout / 1_000_000 + Duration::from_nanos(1));
        }

        #[test]
        fn any_bytes_are_read_or_refused(value in proptest::collection::vec(any::<u8>(), 0..12)) {
            let _ = parse(&value);
        }
    }
}
