//! Quantities as people write them: `512KiB`, `1.5s`.
//!
//! Pure; used by [`crate::config`] for values of configuration files.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A number of bytes, written with a unit (`4096B`, `512KiB`, `8MiB`, `2GiB`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(u64);

/// A text that is not a quantity with a unit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// No number at the start.
    #[error("has no number at its start")]
    Number,
    /// No unit, or an unknown one.
    #[error("needs one of the units {0}")]
    Unit(&'static str),
    /// Larger than can be represented.
    #[error("is too large")]
    TooLarge,
}

const SIZE_UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];
const TIME_UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

impl ByteSize {
    /// `n` KiB.
    pub const fn kib(n: u32) -> Self {
        Self((n as u64) << 10)
    }

    /// `n` MiB.
    pub const fn mib(n: u32) -> Self {
        Self((n as u64) << 20)
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, factor) = SIZE_UNITS
            .into_iter()
            .find(|(_, factor)| self.0 != 0 && self.0.is_multiple_of(*factor))
            .unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / factor)
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        quantity(text, &SIZE_UNITS, "B, KiB, MiB, GiB").map(Self)
    }
}

/// Reads a duration such as `500ms`, `10s`, `5m`, `2h`, `1d`.
pub fn duration(text: &str) -> Result<Duration, UnitError> {
    quantity(text, &TIME_UNITS, "ms, s, m, h, d").map(Duration::from_millis)
}

/// Writes a duration so that [`duration`] reads it; parts below a millisecond are lost.
pub fn display_duration(duration: Duration) -> String {
    let millis = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let (unit, factor) = TIME_UNITS
        .into_iter()
        .rev()
        .find(|(_, factor)| millis != 0 && millis.is_multiple_of(*factor))
        .unwrap_or(("s", 1000));
    format!("{}{unit}", millis / factor)
}

/// A whole number followed by one of `units`, without fractions: `1.5s` is written `1500ms`.
fn quantity(text: &str, units: &[(&str, u64)], names: &'static str) -> Result<u64, UnitError> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    if number.is_empty() {
        return Err(UnitError::Number);
    }
    let number: u64 = number.parse().map_err(|_| UnitError::TooLarge)?;
    let unit = unit.trim_start();
    let (_, factor) = units
        .iter()
        .find(|(name, _)| *name == unit)
        .ok_or(UnitError::Unit(names))?;
    number.checked_mul(*factor).ok_or(UnitError::TooLarge)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_round_trip() {
        for text in ["1B", "512KiB", "1023KiB", "8MiB", "2GiB", "0B"] {
            assert_eq!(text.parse::<ByteSize>().unwrap().to_string(), text);
        }
        for text in ["500ms", "10s", "90s", "5m", "2h", "1d", "0s"] {
            assert_eq!(display_duration(duration(text).unwrap()), text);
        }
        assert_eq!("8 MiB".parse(), Ok(ByteSize::mib(8)));
    }

    #[test]
    fn what_is_not_a_quantity_is_refused() {
        assert_eq!("".parse::<ByteSize>(), Err(UnitError::Number));
        assert_eq!("-1KiB".parse::<ByteSize>(), Err(UnitError::Number));
        assert_eq!("5".parse::<ByteSize>(), Err(UnitError::Unit("B, KiB, MiB, GiB")));
        assert_eq!("5kb".parse::<ByteSize>(), Err(UnitError::Unit("B, KiB, MiB, GiB")));
        assert_eq!("18446744073709551616B".parse::<ByteSize>(), Err(UnitError::TooLarge));
        assert_eq!("18446744073709551615GiB".parse::<ByteSize>(), Err(UnitError::TooLarge));
        assert_eq!(duration("1.5s"), Err(UnitError::Unit("ms, s, m, h, d")));
        assert_eq!(duration("s"), Err(UnitError::Number));
    }
}
