//! containerd's filter language, by which `List` is narrowed.
//!
//! ```text
//! filter    := selector ("," selector)*            all must match
//! selector  := fieldpath [operator value]          without an operator: the field is present
//! fieldpath := field ("." field)*                  kind, name, parent, labels.KEY
//! field     := quoted | [A-Za-z0-9_]+
//! operator  := "==" | "!=" | "~="                  ~= is a regular expression
//! value     := quoted | characters up to "," or white space
//! quoted    := "…" with Go's escapes; after ~= also /…/ and |…|
//! ```
//! Of several filters one must match. Parsing is pure and linear; [`scan`] makes tokens of the text. Values are bytes,
//! because an escape can make any byte.

use regex::{Regex, RegexBuilder};

use super::Info;
use scan::{Scanner, Token};

mod scan;
#[cfg(test)]
mod tests;

/// Limit on the memory that one regular expression takes when compiled.
const MAX_REGEX_BYTES: usize = 1 << 20;

/// Why a filter cannot be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("at byte {at}: {kind}")]
pub struct FilterError {
    /// Where in the filter.
    pub at: usize,
    /// What is wrong there.
    pub kind: FilterErrorKind,
}

/// What is wrong with a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FilterErrorKind {
    /// Neither a name nor a quoted text.
    #[error("expected a field")]
    Field,
    /// Not one of the operators.
    #[error("expected one of the operators == != ~=")]
    Operator,
    /// Neither a value nor a quoted text.
    #[error("expected a value")]
    Value,
    /// Something after a complete selector.
    #[error("expected a comma or the end")]
    End,
    /// A quotation mark that is not allowed here.
    #[error("only \" quotes are allowed here")]
    Quote,
    /// No closing quotation mark in the line.
    #[error("quoted text is not terminated")]
    Unterminated,
    /// An escape that Go does not know.
    #[error("illegal escape sequence")]
    Escape,
    /// A NUL or a replacement character.
    #[error("illegal character")]
    Character,
}

/// One or more filters, of which one must match.
#[derive(Debug, Clone)]
pub struct Filters(Vec<Vec<Selector>>);

#[derive(Debug, Clone)]
struct Selector {
    path: Vec<Vec<u8>>,
    test: Test,
}

#[derive(Debug, Clone)]
enum Test {
    Present,
    Equal(Vec<u8>),
    NotEqual(Vec<u8>),
    /// None is an expression that cannot be compiled: containerd lets it match nothing.
    Matches(Option<Regex>),
}

impl Filters {
    /// Parses `filters`; none at all match everything, and so does an empty one. An error comes with the filter.
    pub fn parse<'a>(filters: impl IntoIterator<Item = &'a str>) -> Result<Self, (&'a str, FilterError)> {
        let parsed = filters
            .into_iter()
            .map(|filter| parse(filter).map_err(|error| (filter, error)));
        parsed.collect::<Result<_, _>>().map(Self)
    }

    /// Whether `info` is to be listed.
    pub fn matches(&self, info: &Info) -> bool {
        self.0.is_empty()
            || self
                .0
                .iter()
                .any(|selectors| selectors.iter().all(|selector| selector.matches(info)))
    }
}

impl Selector {
    fn matches(&self, info: &Info) -> bool {
        let value = field(info, &self.path);
        // An absent field is compared as an empty one, except for equality.
        let text = value.unwrap_or_default();
        match &self.test {
            Test::Present => value.is_some(),
            Test::Equal(wanted) => value.is_some_and(|value| value.as_bytes() == wanted),
            Test::NotEqual(unwanted) => text.as_bytes() != unwanted,
            Test::Matches(regex) => regex.as_ref().is_some_and(|regex| regex.is_match(text)),
        }
    }
}

/// The field of a snapshot that a path names.
fn field<'a>(info: &'a Info, path: &[Vec<u8>]) -> Option<&'a str> {
    let (first, rest) = path.split_first()?;
    match first.as_slice() {
        b"kind" => Some(info.kind.name()),
        b"name" => Some(&info.name),
        b"parent" => Some(info.parent.as_deref().unwrap_or_default()),
        b"labels" => {
            let key = rest.join(&b'.');
            info.labels.get(std::str::from_utf8(&key).ok()?).map(String::as_str)
        }
        _ => None,
    }
}

fn parse(filter: &str) -> Result<Vec<Selector>, FilterError> {
    if filter.is_empty() {
        return Ok(Vec::new());
    }
    let mut scanner = Scanner::new(filter);
    let mut selectors = vec![selector(&mut scanner)?];
    loop {
        match scanner.peek() {
            None => return Ok(selectors),
            Some(',') => {
                scanner.scan();
                selectors.push(selector(&mut scanner)?);
            }
            Some(_) => {
                return Err(FilterError {
                    at: scanner.position(),
                    kind: FilterErrorKind::End,
                });
            }
        }
    }
}

fn selector(scanner: &mut Scanner<'_>) -> Result<Selector, FilterError> {
    let mut path = vec![name(scanner)?];
    while scanner.peek() == Some('.') {
        scanner.scan();
        path.push(name(scanner)?);
    }
    if matches!(scanner.peek(), None | Some(',')) {
        return Ok(Selector {
            path,
            test: Test::Present,
        });
    }
    let (at, token) = scanner.scan();
    let test = match token {
        Token::Operator("==") => Test::Equal(value(scanner, false)?),
        Token::Operator("!=") => Test::NotEqual(value(scanner, false)?),
        Token::Operator("~=") => Test::Matches(regex(&value(scanner, true)?)),
        Token::Illegal(kind) => return Err(FilterError { at, kind }),
        _ => {
            return Err(FilterError {
                at,
                kind: FilterErrorKind::Operator,
            });
        }
    };
    Ok(Selector { path, test })
}

fn name(scanner: &mut Scanner<'_>) -> Result<Vec<u8>, FilterError> {
    let (at, token) = scanner.scan();
    match token {
        Token::Field(text) => Ok(text.as_bytes().to_vec()),
        Token::Quoted { mark: '"', text } => Ok(text),
        Token::Quoted { .. } => Err(FilterError {
            at,
            kind: FilterErrorKind::Quote,
        }),
        Token::Illegal(kind) => Err(FilterError { at, kind }),
        _ => Err(FilterError {
            at,
            kind: FilterErrorKind::Field,
        }),
    }
}

fn value(scanner: &mut Scanner<'_>, any_mark: bool) -> Result<Vec<u8>, FilterError> {
    let (at, token) = scanner.scan();
    match token {
        Token::Value(text) => Ok(text.as_bytes().to_vec()),
        Token::Quoted { mark, text } if any_mark || mark == '"' => Ok(text),
        Token::Quoted { .. } => Err(FilterError {
            at,
            kind: FilterErrorKind::Quote,
        }),
        Token::Illegal(kind) => Err(FilterError { at, kind }),
        _ => Err(FilterError {
            at,
            kind: FilterErrorKind::Value,
        }),
    }
}

fn regex(pattern: &[u8]) -> Option<Regex> {
    let compiled = std::str::from_utf8(pattern)
        .ok()
        .and_then(|pattern| RegexBuilder::new(pattern).size_limit(MAX_REGEX_BYTES).build().ok());
    if compiled.is_none() {
        tracing::warn!(
            pattern = %String::from_utf8_lossy(pattern).chars().take(200).collect::<String>(),
            "filter has an invalid regular expression and matches nothing"
        );
    }
    compiled
}
