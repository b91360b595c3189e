//! Log lines, to the standard error, in the form of the daemons' JSON lines: time, level, message, fields, target.
//!
//! A line that nobody takes at once, from a pipe or on a terminal, is dropped and counted, since the keeper must not wait for it.

use std::fmt::Write as _;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::time::{Duration, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use rustix::io::{Errno, ReadWriteFlags, pwritev2};
use rustix::net::SendFlags;

/// Most bytes of one text; the rest is cut off. With it a line stays below what a pipe takes as a whole.
const TEXT_LIMIT: usize = 512;

/// The target of all lines.
const TARGET: &str = "hullspeed_keeper";

/// A field's value.
#[derive(Debug, Clone, Copy)]
pub enum Value<'a> {
    /// A text.
    Text(&'a str),
    /// A number.
    Number(u64),
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(text)
    }
}

impl From<usize> for Value<'_> {
    fn from(number: usize) -> Self {
        Self::Number(number as u64)
    }
}

/// How lines are written.
#[derive(Debug)]
enum Way {
    /// To an open file of the keeper's own, which does not block. What others share is left as it is.
    Own(OwnedFd),
    /// To a socket, which has a call for that.
    Socket,
    /// To what cannot be opened again: with a word for the call where it is known, and else if there is room for something.
    Shared,
    /// To a file on a disk, which knows no other way.
    File,
}

/// Writes lines.
#[derive(Debug)]
pub struct Log {
    way: Way,
    dropped: u64,
    /// The last line was written in part.
    torn: bool,
}

impl Log {
    /// A log to the standard error.
    #[must_use]
    pub fn to_standard_error() -> Self {
        let kind = fstat(io::stderr()).map(|status| FileType::from_raw_mode(status.st_mode));
        let way = match kind {
            Ok(FileType::RegularFile) => Way::File,
            Ok(FileType::Socket) => Way::Socket,
            _ => {
                let flags = OFlags::WRONLY | OFlags::APPEND | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                open("/proc/self/fd/2", flags, Mode::empty()).map_or(Way::Shared, Way::Own)
            }
        };
        Self::of(way)
    }

    fn of(way: Way) -> Self {
        Self {
            way,
            dropped: 0,
            torn: false,
        }
    }

    /// What is worth to be known.
    pub fn info(&mut self, message: &str, fields: &[(&str, Value<'_>)]) {
        self.line("INFO", message, fields);
    }

    /// What should not be.
    pub fn warn(&mut self, message: &str, fields: &[(&str, Value<'_>)]) {
        self.line("WARN", message, fields);
    }

    /// What somebody has to do something about.
    pub fn error(&mut self, message: &str, fields: &[(&str, Value<'_>)]) {
        self.line("ERROR", message, fields);
    }

    fn line(&mut self, level: &str, message: &str, fields: &[(&str, Value<'_>)]) {
        let mut line = line(SystemTime::now(), level, message, fields);
        if self.dropped > 0 {
            // Before the closing brace and the line's end.
            line.truncate(line.len() - 2);
            let _ = writeln!(line, ",\"lines_dropped\":{}}}", self.dropped);
        }
        if self.torn {
            line.insert(0, '\n');
        }
        match self.write(line.as_bytes()) {
            Ok(written) => {
                self.torn = written < line.len();
                self.dropped = u64::from(self.torn);
            }
            Err(_) => self.dropped = self.dropped.saturating_add(1),
        }
    }

    fn write(&self, line: &[u8]) -> Result<usize, Errno> {
        let shared = io::stderr();
        match &self.way {
            Way::Own(target) => rustix::io::write(target, line),
            Way::Socket => rustix::net::send(shared, line, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Way::Shared => write_at_once(shared.as_fd(), line),
            Way::File => rustix::io::write(shared, line),
        }
    }
}

/// Writes without waiting, as far as what is written to knows how.
fn write_at_once(target: BorrowedFd<'_>, line: &[u8]) -> Result<usize, Errno> {
    // No offset, which a pipe has not.
    match pwritev2(target, &[IoSlice::new(line)], u64::MAX, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::SPIPE) => {}
        written => return written,
    }
    let mut polled = [PollFd::from_borrowed_fd(target, PollFlags::OUT)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    match poll(&mut polled, Some(&now))? {
        0 => Err(Errno::AGAIN),
        _ if !polled[0].revents().contains(PollFlags::OUT) => Err(Errno::IO),
        _ => rustix::io::write(target, line),
    }
}

fn line(time: SystemTime, level: &str, message: &str, fields: &[(&str, Value<'_>)]) -> String {
    let mut line = String::from("{\"timestamp\":\"");
    timestamp(&mut line, time);
    line.push_str("\",\"level\":");
    quote(&mut line, level);
    line.push_str(",\"message\":");
    quote(&mut line, message);
    for (name, value) in fields {
        line.push(',');
        quote(&mut line, name);
        line.push(':');
        match value {
            Value::Text(text) => quote(&mut line, text),
            Value::Number(number) => line.push_str(&number.to_string()),
        }
    }
    line.push_str(",\"target\":");
    quote(&mut line, TARGET);
    line.push_str("}\n");
    line
}

fn quote(line: &mut String, text: &str) {
    line.push('"');
    for character in text
        .get(..text.floor_char_boundary(TEXT_LIMIT))
        .unwrap_or_default()
        .chars()
    {
        match character {
            '"' | '\\' => line.extend(['\\', character]),
            '\n' => line.push_str("\\n"),
            control if u32::from(control) < 0x20 => {
                let _ = write!(line, "\\u{:04x}", u32::from(control));
            }
            other => line.push(other),
        }
    }
    line.push('"');
}

/// RFC 3339 in UTC with microseconds. The calendar's years begin in March here, so that the leap day is their last.
fn timestamp(line: &mut String, time: SystemTime) {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since the first of March of the year 0.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 {
        march_month + 3
    } else {
        march_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let micros = since.subsec_micros();
    let _ = write!(
        line,
        "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000000Z"),
            (951_782_400, "2000-02-29T00:00:00.000000Z"),
            (951_868_799, "2000-02-29T23:59:59.000000Z"),
            (1_735_689_599, "2024-12-31T23:59:59.000000Z"),
            (1_740_787_200, "2025-03-01T00:00:00.000000Z"),
            (4_107_542_400, "2100-03-01T00:00:00.000000Z"),
        ] {
            let mut text = String::new();
            timestamp(&mut text, at(seconds));
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn a_line_is_one_object_whatever_is_in_it() {
        let hostile = "\"\\\n\t\u{1}ä\u{1F600}";
        let long = "ä".repeat(TEXT_LIMIT);
        let fields = [
            ("a", hostile.into()),
            ("n", Value::Number(3)),
            ("long", long.as_str().into()),
        ];
        let text = line(at(0), "INFO", "said", &fields);
        assert_eq!(text.matches('\n').count(), 1);
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&value["a"], &value["n"]), (&hostile.into(), &3.into()));
        assert_eq!(
            (&value["level"], &value["message"], &value["target"]),
            (&"INFO".into(), &"said".into(), &TARGET.into())
        );
        assert_eq!(value["long"].as_str().unwrap().len(), TEXT_LIMIT);
    }
}
