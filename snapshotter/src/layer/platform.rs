//! Which image of an index is for this machine.

use std::fmt;
use std::str::FromStr;

use serde::Deserialize;

/// Longest text taken for a platform.
const MAX_LENGTH: usize = 100;

/// An operating system and a processor, in the words of image indices.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Platform {
    os: String,
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

/// A text that is no platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no platform; one is os/architecture or os/architecture/variant")]
pub struct PlatformError(String);

impl Platform {
    /// That of this machine, any variant.
    pub fn own() -> Self {
        // The names that differ from those of indices.
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "x86" => "386",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: None,
        }
    }

    /// Whether an image for `other` is what is wanted.
    pub fn accepts(&self, other: &Self) -> bool {
        let same_variant = self.variant.is_none() || self.variant == other.variant;
        self.os == other.os && self.architecture == other.architecture && same_variant
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Self, PlatformError> {
        let error = || PlatformError(text.chars().take(MAX_LENGTH).collect());
        let word = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        let mut parts = text.split('/');
        let mut next = || parts.next().filter(|part| word(part)).map(str::to_owned);
        let (os, architecture) = (next(), next());
        let variant = parts.next();
        match (os, architecture, variant.is_none_or(word), parts.next()) {
            (Some(os), Some(architecture), true, None) if text.len() <= MAX_LENGTH => Ok(Self {
                os,
                architecture,
                variant: variant.map(str::to_owned),
            }),
            _ => Err(error()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.as_ref().map_or(Ok(()), |variant| write!(f, "/{variant}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_are_read_and_compared() {
        let platform = |text: &str| text.parse::<Platform>().unwrap();
        for text in ["linux/amd64", "linux/arm/v7"] {
            assert_eq!(platform(text).to_string(), text);
        }
        assert!(platform("linux/arm").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/arm/v6").accepts(&platform("linux/arm/v7")));
        assert!(!platform("linux/arm/v6").accepts(&platform("linux/arm")));
        assert!(!platform("linux/arm").accepts(&platform("linux/arm64")));
        assert_eq!(Platform::own().os, "linux");
        for bad in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "linux/arm/",
            "linux/arm/v7/x",
            "linux/a b",
            "linux /x",
        ] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
    }
}
