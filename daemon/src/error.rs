//! Errors as lines for people.

use std::error::Error;

/// An error's message with those of its sources, in one line. A cause that the line ends with already is not said again:
/// errors of libraries often repeat their sources.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let said = cause.to_string();
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] std::io::Error);

    /// As libraries have it: what it says is what its source says.
    #[derive(Debug, thiserror::Error)]
    #[error("middle: {0}")]
    struct Repeating(#[source] Outer);

    #[test]
    fn causes_follow_their_effects() {
        assert_eq!(chain(&Outer(std::io::Error::other("inner"))), "outer: inner");
    }

    #[test]
    fn a_cause_is_said_once() {
        let error = Repeating(Outer(std::io::Error::other("inner")));
        assert_eq!(chain(&error), "middle: outer: inner");
        // The same word again, elsewhere, is another matter.
        let error = Outer(std::io::Error::other("outer but inner"));
        assert_eq!(chain(&error), "outer: outer but inner");
    }
}
