//! The policy file: which images are to be warm, and how much of them.
//!
//! ```toml
//! [[image]]
//! name = "registry.example.com/team/app:stable"   # or a pattern
//! share = "hot"                                    # toc | hot | all
//! priority = 10                                    # higher first; 0 if absent
//! platform = "linux/arm64"                         # this machine's if absent
//! ```
//!
//! A file is taken whole or not at all: a key that is misspelt must not quietly cost what it was meant for.

use hullspeed_proto::hullspeed::control::v1 as api;
use serde::Deserialize;
use toml::Spanned;

use super::glob;

/// Longest policy file.
pub const MAX_POLICY_BYTES: usize = 1 << 20;
/// Most entries of a policy.
pub const MAX_ENTRIES: usize = 1000;
/// Longest name of an image, or pattern.
pub const MAX_NAME: usize = 512;

/// How much of an image is to be resident. Each includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Share {
    /// The tables of contents.
    Toc,
    /// Also what is read first.
    Hot,
    /// Everything.
    All,
}

impl Share {
    /// As it is written.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Toc => "toc",
            Self::Hot => "hot",
            Self::All => "all",
        }
    }
}

impl From<Share> for api::Share {
    fn from(share: Share) -> Self {
        match share {
            Share::Toc => Self::Toc,
            Share::Hot => Self::Hot,
            Share::All => Self::All,
        }
    }
}

/// One entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// An image, or a pattern of images.
    pub name: String,
    /// How much of it.
    pub share: Share,
    /// What is warmed first: the higher.
    pub priority: i32,
    /// Which image of an index; empty for this machine's.
    pub platform: String,
}

/// A policy: its entries in the order of the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    /// The entries.
    pub entries: Vec<Entry>,
}

/// What is wrong with a policy file, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {what}")]
pub struct PolicyError {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// What is wrong.
    pub what: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    image: Vec<Spanned<Written>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    name: Spanned<String>,
    share: Share,
    #[serde(default)]
    priority: i32,
    #[serde(default)]
    platform: Option<Spanned<String>>,
}

impl Policy {
    /// Reads the text of a policy file.
    pub fn parse(text: &str) -> Result<Self, PolicyError> {
        let fault = |at: usize, what: String| place(text, at, what);
        if text.len() > MAX_POLICY_BYTES {
            return Err(fault(0, format!("the file is longer than {MAX_POLICY_BYTES} bytes")));
        }
        let document: Document = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            fault(at, error.message().to_owned())
        })?;
        if let Some(beyond) = document.image.get(MAX_ENTRIES) {
            return Err(fault(
                beyond.span().start,
                format!("there are more than {MAX_ENTRIES} images"),
            ));
        }
        let entry = |written: Spanned<Written>| {
            let Written {
                name,
                share,
                priority,
                platform,
            } = written.into_inner();
            check(name.as_ref(), "name").map_err(|what| fault(name.span().start, what))?;
            if let Some(platform) = &platform {
                check(platform.as_ref(), "platform").map_err(|what| fault(platform.span().start, what))?;
                if !(1..=2).contains(&platform.as_ref().matches('/').count()) {
                    let what = "platform must be os/architecture or os/architecture/variant".to_owned();
                    return Err(fault(platform.span().start, what));
                }
            }
            Ok(Entry {
                name: name.into_inner(),
                share,
                priority,
                platform: platform.map(Spanned::into_inner).unwrap_or_default(),
            })
        };
        let entries = document.image.into_iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Self { entries })
    }

    /// Whether any entry has to be matched against images that are known.
    #[must_use]
    pub fn has_patterns(&self) -> bool {
        self.entries.iter().any(|entry| glob::is_pattern(&entry.name))
    }
}

fn check(text: &str, key: &str) -> Result<(), String> {
    if text.is_empty() || text.len() > MAX_NAME {
        return Err(format!("{key} must have 1 to {MAX_NAME} characters"));
    }
    if text.bytes().all(|byte| byte.is_ascii_graphic()) {
        Ok(())
    } else {
        Err(format!("{key} must be printable ASCII without spaces"))
    }
}

fn place(text: &str, at: usize, what: String) -> PolicyError {
    let before = text.get(..at).unwrap_or_default();
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    PolicyError {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        what,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_policy_is_read_with_its_defaults() {
        let text = r#"
            [[image]]
            name = "r.io/a:1"
            share = "all"
            priority = -3
            platform = "linux/arm/v7"
            [[image]]
            name = "r.io/**"
            share = "toc"
        "#;
        let policy = Policy::parse(text).unwrap();
        let entry = |name: &str, share, priority, platform: &str| Entry {
            name: name.to_owned(),
            share,
            priority,
            platform: platform.to_owned(),
        };
        let expected = [
            entry("r.io/a:1", Share::All, -3, "linux/arm/v7"),
            entry("r.io/**", Share::Toc, 0, ""),
        ];
        assert_eq!(policy.entries, expected);
        assert!(policy.has_patterns());
        assert!(Policy::parse("").unwrap().entries.is_empty());
    }

    #[test]
    fn the_sample_is_a_policy_with_its_examples_and_without() {
        let sample = include_str!("../../../deploy/hullspeed/warm.toml");
        assert!(Policy::parse(sample).unwrap().entries.is_empty());
        let examples: Vec<&str> = sample.lines().filter_map(|line| line.strip_prefix("#: ")).collect();
        assert_eq!(Policy::parse(&examples.join("\n")).unwrap().entries.len(), 3);
    }

    #[test]
    fn a_fault_is_named_with_its_place() {
        let many = "[[image]]\nname = \"a\"\nshare = \"toc\"\n".repeat(MAX_ENTRIES + 1);
        let long = format!("[[image]]\nshare = \"toc\"\nname = \"{}\"", "a".repeat(MAX_NAME + 1));
        for (text, line, column, word) in [
            ("[[image]]\nname = \"a\"\nshare = \"hott\"\n", 3, 9, "hott"),
            ("[[image]]\nshare = \"toc\"\n", 1, 1, "name"),
            ("[[image]]\nname = \"a b\"\nshare = \"toc\"\n", 2, 8, "spaces"),
            ("[[image]]\nname = \"\"\nshare = \"toc\"\n", 2, 8, "characters"),
            ("[[image]]\nname = 7\nshare = \"toc\"\n", 2, 8, "string"),
            ("[[image]]\nname = \"a\"\nshare = \"toc\"\nprio = 1\n", 4, 1, "prio"),
            ("[[images]]\n", 1, 3, "images"),
            ("[[image]\n", 1, 9, ""),
            (
                "[[image]]\nname = \"a\"\nshare = \"toc\"\nplatform = \"linux\"\n",
                4,
                12,
                "architecture",
            ),
            (
                "[[image]]\nname = \"a\"\nshare = \"toc\"\npriority = 99999999999\n",
                4,
                12,
                "",
            ),
            (&many, 3 * MAX_ENTRIES + 1, 1, "more than"),
            (&long, 3, 8, "characters"),
        ] {
            let error = Policy::parse(text).unwrap_err();
            assert_eq!((error.line, error.column), (line, column), "{error} in {:.80}", text);
            assert!(error.what.contains(word), "{error}");
        }
        assert!(Policy::parse(&"#".repeat(MAX_POLICY_BYTES + 1)).is_err());
    }

    proptest! {
        /// No text makes it panic, and what it takes is within the limits.
        #[test]
        fn any_text_is_a_policy_or_has_a_fault_in_it(text in "(\\[\\[image\\]\\]\n|name = |share = |\"hot\"\n|\"é\\*x\"|\\PC|\n){0,12}") {
            match Policy::parse(&text) {
                Ok(policy) => prop_assert!(policy.entries.iter().all(|entry| !entry.name.is_empty())),
                Err(error) => prop_assert!(error.line <= text.matches('\n').count() + 1, "{error}"),
            }
        }
    }
}
