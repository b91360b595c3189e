//! containerd's version as numbers.

/// A release of containerd, by the first three numbers of its version.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// 1 or 2, so far.
    pub major: u32,
    /// Of a line that is maintained, such as 6 or 7 of 1.
    pub minor: u32,
    /// None if the version does not tell.
    pub patch: Option<u32>,
}

impl Release {
    /// The release of a version such as `1.6.20~ds1` or `v2.1.9`; none if it does not begin with two numbers.
    #[must_use]
    pub fn of(version: &str) -> Option<Self> {
        let mut numbers = version.trim_start_matches('v').split('.').map(|part| {
            let digits = part.find(|c: char| !c.is_ascii_digit()).unwrap_or(part.len());
            part[..digits].parse().ok()
        });
        Some(Self {
            major: numbers.next()??,
            minor: numbers.next()??,
            patch: numbers.next().flatten(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn versions_are_read() {
        let release = |major, minor, patch| Some(Release { major, minor, patch });
        for (version, expected) in [
            ("1.6.20~ds1", release(1, 6, Some(20))),
            ("v1.7.34", release(1, 7, Some(34))),
            ("2.1.0-rc.1", release(2, 1, Some(0))),
            ("2.1", release(2, 1, None)),
            ("2.1.x", release(2, 1, None)),
            ("1", None),
            ("", None),
            ("main", None),
            ("1.99999999999.1", None),
        ] {
            assert_eq!(Release::of(version), expected, "{version}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_borne(version in "\\PC{0,20}") {
            let _ = Release::of(&version);
        }
    }
}
