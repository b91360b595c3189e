//! Tokens of the filter language.
//!
//! What a character means depends on what came before: after an operator everything up to a comma or white space is
//! one value, dots and brackets included.

use super::FilterErrorKind;

/// A token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Token<'a> {
    End,
    Field(&'a str),
    Value(&'a str),
    /// A quoted text without its marks and escapes.
    Quoted {
        mark: char,
        text: Vec<u8>,
    },
    /// `,` or `.`.
    Separator,
    Operator(&'a str),
    /// A character that can start no token.
    Other,
    Illegal(FilterErrorKind),
}

/// Reads tokens off a filter.
pub(super) struct Scanner<'a> {
    input: &'a str,
    at: usize,
    /// An operator was read, and its value is due.
    value_due: bool,
}

impl<'a> Scanner<'a> {
    pub(super) fn new(input: &'a str) -> Self {
        Self {
            input,
            at: 0,
            value_due: false,
        }
    }

    /// Byte position of the next character.
    pub(super) fn position(&self) -> usize {
        self.at
    }

    /// The next character, even if it is white space.
    pub(super) fn peek(&self) -> Option<char> {
        self.input[self.at..].chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let c = self.peek()?;
        self.at += c.len_utf8();
        Some(c)
    }

    fn skip_while(&mut self, holds: impl Fn(char) -> bool) {
        while self.peek().is_some_and(&holds) {
            self.next();
        }
    }

    /// The next token and where it starts; white space before it is skipped.
    pub(super) fn scan(&mut self) -> (usize, Token<'a>) {
        self.skip_while(char::is_whitespace);
        let start = self.at;
        let input = self.input;
        let Some(c) = self.next() else {
            return (start, Token::End);
        };
        let token = match c {
            '\0' | char::REPLACEMENT_CHARACTER => Token::Illegal(FilterErrorKind::Character),
            '/' | '|' | '"' => match self.quoted(c) {
                Ok(text) => Token::Quoted { mark: c, text },
                Err(kind) => Token::Illegal(kind),
            },
            ',' | '.' => {
                self.value_due = false;
                Token::Separator
            }
            '=' | '!' | '~' => {
                self.skip_while(|c| matches!(c, '=' | '!' | '~'));
                self.value_due = true;
                Token::Operator(&input[start..self.at])
            }
            _ if self.value_due => {
                self.skip_while(is_value);
                self.value_due = false;
                Token::Value(&input[start..self.at])
            }
            c if is_field(c) => {
                self.skip_while(is_field);
                Token::Field(&input[start..self.at])
            }
            _ => Token::Other,
        };
        (start, token)
    }

    /// Reads up to the closing `mark`.
    fn quoted(&mut self, mark: char) -> Result<Vec<u8>, FilterErrorKind> {
        let mut text = Vec::new();
        loop {
            match self.next() {
                None | Some('\n' | '\0' | char::REPLACEMENT_CHARACTER) => return Err(FilterErrorKind::Unterminated),
                Some('\\') => self.escape(mark, &mut text)?,
                Some(c) if c == mark => return Ok(text),
                Some(c) => push(&mut text, c),
            }
        }
    }

    /// Reads what follows a backslash, in the syntax of Go's strings.
    fn escape(&mut self, mark: char, text: &mut Vec<u8>) -> Result<(), FilterErrorKind> {
        let c = self.next().ok_or(FilterErrorKind::Unterminated)?;
        let byte = match c {
            'a' => 0x07,
            'b' => 0x08,
            'f' => 0x0c,
            'n' => b'\n',
            'r' => b'\r',
            't' => b'\t',
            'v' => 0x0b,
            '\\' => b'\\',
            c if c == mark => {
                push(text, c);
                return Ok(());
            }
            'x' => self.byte(0, 16, 2)?,
            '0'..='7' => self.byte(c.to_digit(8).unwrap_or_default(), 8, 2)?,
            'u' | 'U' => {
                let code = self.digits(0, 16, if c == 'u' { 4 } else { 8 })?;
                if code > u32::from(char::MAX) {
                    return Err(FilterErrorKind::Escape);
                }
                // Go writes the replacement character for half of a surrogate pair.
                push(text, char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER));
                return Ok(());
            }
            _ => return Err(FilterErrorKind::Escape),
        };
        text.push(byte);
        Ok(())
    }

    fn byte(&mut self, first: u32, base: u32, count: usize) -> Result<u8, FilterErrorKind> {
        u8::try_from(self.digits(first, base, count)?).map_err(|_| FilterErrorKind::Escape)
    }

    fn digits(&mut self, first: u32, base: u32, count: usize) -> Result<u32, FilterErrorKind> {
        let mut value = first;
        for _ in 0..count {
            let digit = self
                .next()
                .and_then(|c| c.to_digit(base))
                .ok_or(FilterErrorKind::Escape)?;
            // Eight digits of base 16 fill a u32 exactly.
            value = value * base + digit;
        }
        Ok(value)
    }
}

fn push(text: &mut Vec<u8>, c: char) {
    text.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
}

fn is_field(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// What may be in a value without quotes: anything that leaves a mark on paper.
fn is_value(c: char) -> bool {
    c != ',' && !c.is_whitespace() && !c.is_control() && !is_invisible(c)
}

/// Formatting characters, private ones and the replacement character (which stands for broken input).
fn is_invisible(c: char) -> bool {
    matches!(c,
        '\u{ad}' | '\u{600}'..='\u{605}' | '\u{61c}' | '\u{6dd}' | '\u{70f}' | '\u{8e2}' | '\u{180e}'
        | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffd}' | '\u{e000}'..='\u{f8ff}' | '\u{e0000}'..='\u{10ffff}')
}
