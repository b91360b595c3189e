//! How much of a disk the cache may take, as it is configured.

use std::fmt;
use std::str::FromStr;

use hullspeed_daemon::units::{ByteSize, UnitError};

/// A part of a filesystem: bytes, or percent of its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// So many bytes.
    Bytes(ByteSize),
    /// So many hundredths of the filesystem, at most 100.
    Percent(u8),
}

impl Amount {
    /// Nothing.
    pub const NONE: Self = Self::Bytes(ByteSize::kib(0));

    /// Bytes of a filesystem of this size.
    pub fn of(self, size: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.bytes(),
            Self::Percent(percent) => size / 100 * u64::from(percent.min(100)),
        }
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

/// A text that is no amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AmountError {
    /// Not a percentage from 0 to 100.
    #[error("is no whole number of percent from 0 to 100")]
    Percent,
    /// Not a size.
    #[error(transparent)]
    Size(#[from] UnitError),
}

impl FromStr for Amount {
    type Err = AmountError;

    fn from_str(text: &str) -> Result<Self, AmountError> {
        match text.strip_suffix('%') {
            Some(number) => number
                .trim_end()
                .parse()
                .ok()
                .filter(|percent| *percent <= 100)
                .map(Self::Percent)
                .ok_or(AmountError::Percent),
            None => Ok(Self::Bytes(text.parse()?)),
        }
    }
}

/// The limits of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// What all layers together may take; nothing for no limit.
    pub quota: Amount,
    /// What is left free on the filesystem for the sake of others, as long as there are layers that nobody uses.
    pub min_free: Amount,
}

impl Limits {
    /// No limits.
    pub const NONE: Self = Self {
        quota: Amount::NONE,
        min_free: Amount::NONE,
    };

    /// The limits on a filesystem of `size` bytes.
    pub(super) fn on(&self, size: u64) -> Bounds {
        let quota = match self.quota {
            Amount::NONE | Amount::Percent(0) => u64::MAX,
            quota => quota.of(size),
        };
        Bounds {
            quota,
            min_free: self.min_free.of(size),
        }
    }
}

/// Limits in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) quota: u64,
    pub(super) min_free: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_read_and_written() {
        for text in ["0B", "512MiB", "20GiB", "0%", "15%", "100%"] {
            assert_eq!(text.parse::<Amount>().unwrap().to_string(), text);
        }
        for bad in ["", "%", "101%", "-1%", "1.5%", "300", "lots", "20 GB"] {
            assert!(bad.parse::<Amount>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_quota_of_nothing_is_no_quota() {
        let limits = |quota: &str| Limits {
            quota: quota.parse().unwrap(),
            min_free: Amount::Percent(5),
        };
        for none in ["0B", "0%"] {
            assert_eq!(limits(none).on(1000).quota, u64::MAX);
        }
        assert_eq!(
            limits("40%").on(1000),
            Bounds {
                quota: 400,
                min_free: 50
            }
        );
        assert_eq!(limits("1KiB").on(10).quota, 1024);
    }
}
